"""Packing by several processes, stopped and started again: the same bytes; bad input and a full disk lose nothing."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.progress import Progress
from test_pack import everything, invoke, pack_sources, picture, png_sources, spoil, tree

from autodo_dist.commands import pack_progress
from autodo_dist.data import pack as packing
from autodo_dist.data import unfinished
from autodo_dist.data.manifest import check_files, read_manifest
from autodo_dist.data.sources import TRAIN, FileBytes, Source
from autodo_dist.data.workers import Workers
from autodo_dist.errors import AutodoError

COMMAND = [sys.executable, "-c", "from autodo_dist.cli import main; main()", "pack", "folder"]
PICTURES = 600  # three chunks
ALL = ("--shard-samples", "5", "--validation-fraction", "0.1", "--test-fraction", "0.1")


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    src = tmp_path_factory.mktemp("resume") / "src"
    for number in range(PICTURES):
        picture(src / "train" / f"{number % 3}" / f"{number:03d}.jpg", seed=number, size=(8, 8 + number % 7))
    return src


@pytest.fixture(scope="module")
def unbroken(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    invoke("folder", src, out, *ALL, "--workers", 1)
    return everything(out)


def command(src: Path, out: Path, workers: int, *options: str) -> list[str]:
    return [*COMMAND, str(src), str(out), "--workers", str(workers), *(options or ALL)]


def wait_until(met: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.002)


# ------------------------------------------------------------------------------------------------------------ the bytes


def test_any_number_of_workers_writes_the_same_bytes(src: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    invoke("folder", src, tmp_path / "out", *ALL, "--workers", 3)
    assert everything(tmp_path / "out") == unbroken
    check_files(read_manifest(tmp_path / "out"))


@pytest.mark.parametrize(
    ("pattern", "count", "workers"), [("unfinished/probed-*.json", 1, 2), ("*.tar", 9, 1), ("*.tar", 9, 2)]
)
def test_a_killed_pack_goes_on_to_the_same_bytes(
    src: Path, unbroken: dict[str, bytes], tmp_path: Path, pattern: str, count: int, workers: int
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(src, out, workers), stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(out.glob(pattern))) >= count)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)  # workers must not write on beside a second run
    assert not alive
    assert len(family) >= (0 if workers == 1 else 2)
    tars = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.tar")}
    assert len(tars) < len([name for name in unbroken if name.endswith(".tar")])
    with pytest.raises(AutodoError, match="no complete packed data set"):
        read_manifest(out)
    with pytest.raises(AutodoError, match=r"another command \(seed 0, not 1\); run that one again") as caught:
        invoke("folder", src, out, *ALL, "--seed", 1)
    assert "\n" not in str(caught.value)

    invoke("folder", src, out, *ALL, "--workers", 3 - workers)
    assert everything(out) == unbroken
    # Kept as they were, but for the shards that lacked a note yet.
    assert len([path for path, was in tars.items() if (path.stat().st_ino, path.stat().st_mtime_ns) != was]) <= workers


def test_a_finished_pack_is_not_done_again(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    invoke("folder", src, tmp_path / "out", *ALL)
    with pytest.raises(AutodoError, match="already holds a packed data set"):
        invoke("folder", src, tmp_path / "out", *ALL)
    assert not (tmp_path / "out" / "unfinished").exists()


def test_a_pack_that_was_killed_at_its_very_end_only_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = tree(tmp_path / "src"), tmp_path / "out"

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    sources = file_sources(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            pack_sources(out, sources)
    assert (out / "unfinished").exists()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(AutodoError, match="already holds a packed data set"):
        invoke("folder", src, out)  # another command
    pack_sources(out, sources)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# ------------------------------------------------------------------------------------------------------- what is kept


def stop_at(stage: str, done: int) -> Callable[[str, int, int], None]:
    """A progress function that interrupts, as Ctrl-C would."""

    def report(now: str, count: int, _: int) -> None:
        if now == stage and count >= done:
            raise KeyboardInterrupt

    return report


def file_sources(folder: Path, count: int) -> list[Source]:
    paths = [picture(folder / f"{number:02d}.png", seed=number) for number in range(count)]
    return [Source(path.name, "png", 0, TRAIN, FileBytes(str(path))) for path in paths]


def test_what_has_changed_since_is_packed_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture in a finished shard, one in a shard to come, and some that are gone, so that a shard is, too."""
    monkeypatch.setattr(packing, "CHUNK", 5)
    sources = file_sources(tmp_path, 20)
    with pytest.raises(KeyboardInterrupt):
        pack_sources(tmp_path / "out", sources, report=stop_at("writing", 20))
    for number in (2, 11, 17):
        picture(tmp_path / f"{number:02d}.png", seed=100 + number, size=(20, 21))
    sources = [source for source in sources if source.key not in ("05.png", "06.png", "07.png", "08.png")]
    pack_sources(tmp_path / "out", sources)
    pack_sources(tmp_path / "fresh", sources)
    assert everything(tmp_path / "out") == everything(tmp_path / "fresh")


def test_a_picture_that_changes_while_it_is_packed_is_named(tmp_path: Path) -> None:
    sources = file_sources(tmp_path, 4)

    def change(stage: str, *_: int) -> None:
        if stage == "reading":
            picture(tmp_path / "02.png", seed=9, size=(30, 30))

    with pytest.raises(AutodoError, match=r"02\.png was changed while it was being packed; run the same command again"):
        pack_sources(tmp_path / "out", sources, report=change)
    pack_sources(tmp_path / "out", sources)
    assert sorted(read_manifest(tmp_path / "out").height_N) == [12, 12, 12, 30]


@pytest.mark.parametrize("spoiling", ["shorten", "remove the index", "cut the note", "change the index"])
def test_a_shard_that_was_spoilt_since_is_written_again(tmp_path: Path, spoiling: str) -> None:
    """As after a power cut."""
    sources = png_sources(20)
    with pytest.raises(KeyboardInterrupt):
        pack_sources(tmp_path / "out", sources, report=stop_at("writing", 12))
    tar = tmp_path / "out" / "train-00001.tar"
    if spoiling == "shorten":
        os.truncate(tar, 1000)
    elif spoiling == "remove the index":
        tar.with_suffix(".idx").unlink()
    elif spoiling == "change the index":
        tar.with_suffix(".idx").write_bytes(b"v1.2 0\n")
    else:
        os.truncate(tmp_path / "out" / "unfinished" / "train-00001.json", 100)
    pack_sources(tmp_path / "out", sources)
    pack_sources(tmp_path / "whole", sources)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_only_what_was_not_read_is_read_again(tmp_path: Path) -> None:
    """One broken picture stops the pack; once it is mended, it alone is read anew before all are written."""
    reads: list[int] = []
    good = [source.read for source in png_sources(6)]

    def sources(broken: int | None) -> list[Source]:
        def reader(number: int) -> Callable[[], bytes]:
            return lambda: reads.append(number) or (b"" if number == broken else good[number]())  # type: ignore[func-returns-value]

        return [Source(f"key-{number}", "png", 0, TRAIN, reader(number)) for number in range(6)]

    with pytest.raises(AutodoError, match=r"1 unreadable: key-4 \(zero bytes\)"):
        pack_sources(tmp_path / "out", sources(broken=4))
    assert (tmp_path / "out" / "unreadable.txt").read_text() == "key-4: zero bytes\n"
    assert sorted(reads) == list(range(6))
    reads.clear()
    pack_sources(tmp_path / "out", sources(broken=None))
    assert reads[0] == 4
    assert sorted(reads[1:]) == list(range(6))
    assert not (tmp_path / "out" / "unreadable.txt").exists()


def test_another_source_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    a, b, out = tree(tmp_path / "a"), tree(tmp_path / "b"), tmp_path / "out"
    (a / "train" / "cat" / "broken.png").write_bytes(b"")
    with pytest.raises(AutodoError, match="1 unreadable"):
        invoke("folder", a, out)
    before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for words, message in (
        (("folder", b, out), r"another command \(inputs \['.*/a'\], not \['.*/b'\]\)"),
        (("folder", a, out, "--max-side", 8), r"another command \(max_side None, not 8, quality None, not 90\)"),
        (("digits", out), r"another command \(command 'folder', not 'digits', "),
    ):
        with pytest.raises(AutodoError, match=message):
            invoke(*words)
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    invoke("folder", a, out, "--skip-unreadable")  # decides no byte of what is done, so it is the same command


def test_two_packs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        unfinished.begun(tmp_path / "out", packing.command({}, [])),
        pytest.raises(AutodoError, match="another pack is writing there"),
    ):
        pack_sources(tmp_path / "out", png_sources(4))
    pack_sources(tmp_path / "out", png_sources(4))


# ---------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(src: Path, tmp_path: Path, workers: int) -> None:
    """The kernel refuses to let a file grow beyond a limit, as a full disk would."""
    out, options = tmp_path / "out", ("--shard-samples", "200")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))

    words = command(src, out, workers, *options)
    stopped = subprocess.run(words, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert stopped.returncode == 1
    assert re.fullmatch(
        rf"error: pack {out}: .*File too large; mend that and run the same command again\n", stopped.stderr
    )
    left = {path.name for path in out.iterdir()}
    assert "unfinished" in left
    assert not [name for name in left if name.endswith((".partial", "manifest.json"))]
    probed = {path: path.stat() for path in out.glob("unfinished/probed-*.json")}
    assert len(probed) == 3
    invoke("folder", src, out, *options, "--workers", 1)
    invoke("folder", src, tmp_path / "unbroken", *options, "--workers", 1)
    assert everything(out) == everything(tmp_path / "unbroken")


# ------------------------------------------------------------------------------------------------------------ workers


def broken_files(src: Path, out: Path, workers: int) -> str:
    with pytest.raises(AutodoError, match="9 unreadable"):
        invoke("folder", src, out, "--workers", workers)
    return (out / "unreadable.txt").read_text()


def test_workers_find_the_same_broken_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut-off JPEG among them: nobody but `pack` would notice, as DALI fills it."""
    monkeypatch.setattr(packing, "CHUNK", 8)
    src = tree(tmp_path / "src")
    spoil(src)
    alone, several = (broken_files(src, tmp_path / str(workers), workers) for workers in (1, 3))
    assert alone == several
    assert "train/cat/truncated.jpg" in alone


def test_a_worker_that_is_killed_is_one_line() -> None:
    with Workers(2) as pool:
        assert sorted(pool.run(abs, [(-number,) for number in range(9)])) == list(range(9))
        with pytest.raises(AutodoError, match="a worker process was killed, perhaps for want of memory; run the same"):
            list(pool.run(os._exit, [(9,)]))
    with Workers(2) as pool, pytest.raises(FileNotFoundError):
        list(pool.run(os.stat, [("/nowhere",), *[("/",)] * 9]))


# ----------------------------------------------------------------------------------------------------------- bad input


def test_pictures_are_not_packed_into_their_own_folder(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    for inside in (src / "train", src / "train" / "packed", src / "train" / "cat" / "deep" / "er", src / "val"):
        with pytest.raises(
            AutodoError, match=r"lies inside the pictures of .*src/(train|val); choose a folder outside"
        ):
            invoke("folder", src, inside)
    os.symlink(src / "train", tmp_path / "link")
    with pytest.raises(AutodoError, match="lies inside the pictures"):
        invoke("folder", src, tmp_path / "link" / "packed")
    assert sorted(path.name for path in (src / "train").iterdir()) == ["cat", "dog", "eel"]
    invoke("folder", src, src / "packed")  # beside the pictures is fine


def test_a_file_name_with_a_newline_stays_on_one_line(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    picture(src / "train" / "cat" / "good\nname\x1b[31m.png")
    (src / "train" / "cat" / "bad\nname.png").write_bytes(b"")
    with pytest.raises(AutodoError, match=r"1 unreadable: train/cat/bad\\nname.png \(zero bytes\)") as caught:
        invoke("folder", src, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert len((tmp_path / "out" / "unreadable.txt").read_text().splitlines()) == 1
    invoke("folder", src, tmp_path / "out", "--skip-unreadable")
    assert r"train/cat/good\nname\x1b[31m.png" in read_manifest(tmp_path / "out").keys.to_pylist()
    (src / "train" / "cat" / "sub\nfolder").mkdir()
    (src / "train" / "do\ng").mkdir()
    with pytest.raises(AutodoError, match=r"the name of class 'do\\\\ng' does not print"):
        invoke("folder", src, tmp_path / "other")
    (src / "train" / "do\ng").rmdir()
    with pytest.raises(AutodoError, match=r"cat/sub\\nfolder: a folder inside a class"):
        invoke("folder", src, tmp_path / "other")


def test_two_names_that_print_alike_are_refused(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    picture(src / "train" / "cat" / "a\nb.png")
    picture(src / "train" / "cat" / r"a\nb.png")
    with pytest.raises(AutodoError, match=r"pack src: train/cat/a\\nb\.png is there twice"):
        invoke("folder", src, tmp_path / "out")


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (9_459, 9_460)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    """A PNG that says it is large: 7.5 GB as RGB, and just above the limit."""
    bomb = picture(tmp_path / "src" / "train" / "cat" / "bomb.png", size=(1, 1))
    raw = bytearray(bomb.read_bytes())
    raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    bomb.write_bytes(raw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        AutodoError, match=r"cat/bomb\.png \(more than 89,478,485 pixels by its header; make it smaller\)"
    ):
        invoke("folder", tmp_path / "src", tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


# ------------------------------------------------------------------------------------------------------------ progress


def test_without_a_terminal_a_line_now_and_then(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10**6, 4))  # each look at the clock is 4 s after the last
    monkeypatch.setattr(pack_progress.time, "monotonic", lambda: float(next(clock)))
    with pack_progress.progress() as report:
        for done in range(9):
            report("reading", 1000 * done, 8000)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4  # at most one in 10 s
    assert all(re.fullmatch(r"reading: \d,000 of 8,000(, [\d,]+/s(, \d:\d\d:\d\d left)?)?", line) for line in lines)
    assert any(line.endswith(" left") for line in lines)


def test_rate_and_time_left_are_those_of_the_last_half_minute() -> None:
    now = [0.0]
    bars = Progress(disable=True, get_time=lambda: now[0])
    task = bars.add_task("reading", total=1000)
    assert pack_progress.pace(bars.tasks[0]) == ""
    for second in range(101):
        now[0] = float(second)
        bars.update(task, completed=min(5 * second, 500))
    assert pack_progress.pace(bars.tasks[0]) == ", 5/s, 0:01:40 left"
