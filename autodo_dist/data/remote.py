"""A packed data set on s3:// or http(s)://: its files whole, in byte ranges, and their sizes, through fsspec.

Credentials and addresses come from the environment, as s3fs and aiohttp read them: AWS_PROFILE or AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, FSSPEC_S3_ANON=true for a public bucket; ~/.netrc and HTTPS_PROXY. Further
options of the two are FSSPEC_S3='{...}' and FSSPEC_HTTP='{...}' (fsspec's configuration).

fsspec runs all requests in one event loop on a thread of its own, so any number of threads may call a `Remote`. A
process that was forked after its first request may not (fsspec refuses); ranks here are started, never forked.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any
from urllib.request import getproxies

from autodo_dist.errors import AutodoError
from autodo_dist.urls import PACKAGES

log = logging.getLogger(__name__)

WAITS_S = (1.0, 3.0, 10.0, 30.0)  # before the second to the fifth try
CONNECTIONS = 64  # at once and per rank; botocore's own 10 would hold up a batch of ranges
STALL_S = 60  # without a byte, then the try has failed
_CREDENTIALS = "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
# errno of what s3fs makes of S3's refusals that another try does not change: bad request, another region, ...
_FINAL = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EREMCHG, errno.EMSGSIZE, errno.ENAMETOOLONG}
# asyncio's, botocore's and aiohttp's words for a line that was down, slow or cut.
_PASSING = {"TimeoutError", "ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError"}

Place = tuple[str, int, int]  # file, first byte, number of bytes


class Remote:
    """The files below one URL. Network trouble is tried again, with a warning, up to 5 times within a minute or so.

    AutodoError, in one line, for whatever is left then, and at once for what no further try would change.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files = _file_system(self.url)

    def __str__(self) -> str:
        return self.url

    def whole(self, name: str) -> bytes:
        """All bytes of a file that fits in memory."""
        return bytes(self._attempt([name], lambda _: self._files._cat_file(self._path(name)))[0])

    def ranges(self, places: Sequence[Place]) -> list[bytes]:
        """The bytes at each of these places, asked for all at once."""

        def ask(index: int) -> Coroutine[Any, Any, bytes]:
            name, start, size = places[index]
            answer: Coroutine[Any, Any, bytes] = self._files._cat_file(self._path(name), start=start, end=start + size)
            return answer

        found: list[bytes] = self._attempt([name for name, _, _ in places], ask)
        for (name, _, size), data in zip(places, found, strict=True):
            if len(data) > size:
                raise AutodoError(
                    f"data {self.url}: the server does not answer Range requests (it sent {len(data)} bytes of {name} "
                    f"for {size}); serve the folder with one that does, such as nginx or Apache, or copy it"
                )
            if len(data) < size:
                raise AutodoError(f"data {self._path(name)}: ends too early; copy it there again")
        return found

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of each file, asked for all at once; None where the server does not say. A missing one is an error."""
        return [
            info["size"] for info in self._attempt(names, lambda index: self._files._info(self._path(names[index])))
        ]

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _attempt(self, names: Sequence[str], ask: Callable[[int], Coroutine[Any, Any, Any]]) -> list[Any]:
        """The answers to `ask(index)` for the file of each name, where need be from a further try."""
        from fsspec.asyn import sync

        async def answers(indices: Sequence[int]) -> list[Any]:
            return await asyncio.gather(*map(ask, indices), return_exceptions=True)

        results: list[Any] = [None] * len(names)
        open_: Sequence[int] = range(len(names))
        for tries, wait in enumerate((*WAITS_S, None), start=1):
            for index, result in zip(open_, sync(self._files.loop, answers, open_), strict=True):
                results[index] = _unwrapped(result)
            open_ = [index for index in open_ if isinstance(results[index], BaseException)]
            for index in open_:
                if why := refusal(results[index], self.url):
                    raise AutodoError(f"data {self._path(names[index])}: {why}") from results[index]
            if not open_:
                break
            where, why = f"data {self._path(names[open_[0]])}", _text(results[open_[0]])
            if wait is None:
                raise AutodoError(f"{where}: {why}, {tries} times; check the network and the server, then start again")
            more = f" and {len(open_) - 1} more" if len(open_) > 1 else ""
            log.warning("%s%s: %s; try %d of %d in %g s", where, more, why, tries + 1, len(WAITS_S) + 1, wait)
            time.sleep(wait)
        return results


def _unwrapped(result: Any) -> Any:
    """An answer as it is; of an exception the cause, where fsspec says "not found" of whatever a web server refused."""
    cause = result.__cause__ if isinstance(result, FileNotFoundError) else None
    return cause if isinstance(cause, Exception) and not hasattr(cause, "response") else result  # S3's have a response


def refusal(error: BaseException, url: str) -> str | None:
    """Why no further try would help, and how to mend it; None where one may. An error that is a bug of ours is raised.

    aiohttp's and botocore's exceptions are known by their names, as only one of the two packages may be there.
    """
    s3 = url.startswith("s3:")
    status, kinds = getattr(error, "status", None), {kind.__name__ for kind in type(error).__mro__}
    if status == 404 or isinstance(error, FileNotFoundError):
        what = "no such bucket" if "specified bucket" in str(error) else "no such file"
        return f"{what}; check data.root, or copy the whole packed folder there"
    if status in (401, 403, 407) or isinstance(error, PermissionError):
        how = _CREDENTIALS if s3 else "~/.netrc"
        return f"access denied ({_text(error)}); check {how}, and the right to read there"
    if status == 416 or "range is not satisfiable" in str(error):
        return "ends too early; copy it there again"
    if "NoCredentialsError" in kinds:
        return f"no credentials; set {_CREDENTIALS}; for a public bucket FSSPEC_S3_ANON=true"
    if isinstance(error, OSError) and error.errno not in _FINAL:
        return None
    if kinds & _PASSING or (status is not None and (status in (408, 429) or status >= 500)):
        return None
    if isinstance(error, OSError) or kinds & {"BotoCoreError", "ClientError"}:
        return f"{_text(error)}; check data.root{', the AWS settings' if s3 else ''} and the server"
    raise error


def _file_system(url: str) -> Any:
    """The fsspec file system of a URL, without retries of its own. AutodoError names a missing package."""
    scheme = url.partition("://")[0]
    package = PACKAGES[scheme]
    try:
        importlib.import_module(package)
        import fsspec
    except ImportError as error:
        raise AutodoError(f"data {url}: {scheme}:// needs {package} ({error}); pip install {package}") from error

    def option(name: str, **defaults: Any) -> dict[str, Any]:
        """What the user's configuration of fsspec says of an option comes before our defaults."""
        return {name: defaults | fsspec.config.conf.get(scheme, {}).get(name, {})}

    if scheme == "s3":
        once = {"total_max_attempts": 1}
        files = fsspec.filesystem("s3", **option("config_kwargs", max_pool_connections=CONNECTIONS, retries=once))
        files.retries = 1
        return files
    from aiohttp import ClientTimeout

    # aiohttp looks proxies and ~/.netrc up for every request, at a third to a half of its time: only where one is.
    trust = bool(getproxies()) or os.path.isfile(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc"))
    # No limit on the whole: a large block over a slow line is no failure.
    timeout = ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
    # A byte range of a compressed answer would be another range.
    plain = option("headers", **{"Accept-Encoding": "identity"})
    return fsspec.filesystem(scheme, **option("client_kwargs", timeout=timeout, trust_env=trust), **plain)


def _text(error: BaseException) -> str:
    """An exception in one line; some have no text but a kind."""
    words = getattr(error, "strerror", None) or str(error)
    if (status := getattr(error, "status", None)) is not None:
        words = f"HTTP {status} {getattr(error, 'message', '')}"
    return " ".join((words or type(error).__name__).split())
