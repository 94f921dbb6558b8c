"""Web servers on the loopback interface for tests, with a record of what was asked of them."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Site:
    """A folder served at `url`, and how the server behaves; change it at any time.

    fail: so many coming requests are answered 503; cut: so many coming answers break off in the middle; status: every
    request is answered so. asked: (method, file name, bytes sent) of each request that was answered rightly.
    """

    root: Path
    url: str = ""
    ranges: bool = True
    fail: int = 0
    cut: int = 0
    status: int | None = None
    delay_s: float = 0.0
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def gets(self, ending: str) -> int:
        """How many GET requests of files with this ending were answered."""
        return sum(method == "GET" and name.endswith(ending) for method, name, _ in self.asked)


@contextmanager
def serve(root: Path, **behaviour: Any) -> Iterator[Site]:
    """A server of the files of a folder, on a port of its own."""
    site = Site(root, **behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = site.root / self.path.lstrip("/")
            with site.lock:
                failing, cutting = site.fail > 0, body and not site.fail and site.cut > 0
                site.fail, site.cut = site.fail - failing, site.cut - cutting
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if site.ranges else None
            size = path.stat().st_size if path.is_file() else 0
            found = 404 if not path.is_file() else 416 if asked and int(asked[1]) >= size else 200
            status = 503 if failing else site.status or found
            if status != 200:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first, last = (int(asked[1]), min(int(asked[2]), size - 1)) if asked else (0, size - 1)
            time.sleep(site.delay_s)
            with site.lock:
                site.asked.append((self.command, path.name, last + 1 - first if body else 0))
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            if body:
                with path.open("rb") as file:
                    data = os.pread(file.fileno(), last + 1 - first, first)
                self.wfile.write(data[: len(data) // 2] if cutting else data)
                self.close_connection = cutting

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that went away is none of our business."""

    server = Server(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
