"""metrics.jsonl and logs on a disk that is full for a while: no line is lost. What a rank shows of its phase."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

import pytest

from autodo_dist.metrics import Clock, LineFile, console


def test_lines_that_a_full_disk_does_not_take_come_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = LineFile(path, 0)
    metrics.write({"step": 1})
    disk = metrics._file
    with open("/dev/full", "ab", buffering=0) as metrics._file:
        metrics.write({"step": 2})
        metrics.write({"step": 3})
    assert caplog.text.count("/dev/full: No space left on device; the next line tries again") == 2
    metrics._file = disk
    metrics.write({"step": 4})
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert metrics.lines == 4


def test_a_line_that_was_half_taken_is_finished_later(tmp_path: Path) -> None:
    class Half:
        """Takes four bytes, then none, then all: as a disk that fills up and is freed."""

        name, taken, calls = "half", b"", 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            if self.calls == 2:
                raise OSError(28, "full")
            part = data[:4] if self.calls == 1 else data
            self.taken += part
            return len(part)

    metrics = LineFile(tmp_path / "metrics.jsonl", 0)
    metrics.close()
    metrics._file = half = Half()  # type: ignore[assignment]
    metrics.write({"step": 1})
    metrics.write({"step": 2})
    assert half.taken == b'{"step": 1}\n{"step": 2}\n'


def test_a_log_on_a_full_disk_is_left_out_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full.log").symlink_to("/dev/full")
    with console(tmp_path / "full.log", main=True):
        logging.getLogger("autodo_dist.test").info("said on the terminal")
    out, err = capsys.readouterr()
    assert out == "said on the terminal\n"
    assert err == ""


def test_an_item_that_is_none_does_not_end_the_waiting() -> None:
    clock = Clock(time.time())
    assert list(clock.waiting(iter([None, 1, None]))) == [None, 1, None]
    assert clock.seconds["data"] > 0


def test_a_thread_shows_phase_and_step() -> None:
    """Linux keeps fifteen characters: a number that does not fit whole is left out."""
    shown = []

    def work() -> None:
        comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
        for name, step in (("start", None), ("hyper", 0), ("task", 1200), ("evaluation", 9999), ("evaluation", 12345)):
            clock = Clock(time.time())
            if step is not None:
                clock.steps = lambda step=step: step
            with clock.phase(name):
                shown.append(comm.read_text().strip())

    thread = threading.Thread(target=work)  # pytest keeps its own name
    thread.start()
    thread.join()
    assert shown == ["start", "hyper:0", "task:1200", "evaluation:9999", "evaluation"]
