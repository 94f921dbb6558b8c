"""Shards kept on a node: each fetched once, whole or not at all, never more than fits; training does not notice."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import RankError, RankPool
from servers import Site, serve
from test_train import assert_equal_states, lines, run_train, settings, weights
from typer.testing import CliRunner

from autodo_dist.build_data import expand
from autodo_dist.cli import app
from autodo_dist.commands.evaluate import evaluate_checkpoint
from autodo_dist.config import differences
from autodo_dist.data import cache as caching
from autodo_dist.data import staging
from autodo_dist.data.cache import ShardCache
from autodo_dist.data.manifest import Manifest, Shard, read_manifest
from autodo_dist.data.shards import Shards
from autodo_dist.data.staging import Share, Turn
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config
from autodo_dist.parallel import comm

IDS = list(range(0, 1797, 13))  # of every shard of the digits
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def site(digits: Path) -> Iterator[Site]:
    with serve(digits) as site:
        yield site


@pytest.fixture
def manifest(site: Site, tmp_path: Path) -> Manifest:
    return read_manifest(site.url, tmp_path / "manifest")


def alone(share: Share) -> list[Share]:
    return [share]


def staged(manifest: Manifest, folder: Path, limit: int | None = None) -> Shards:
    shards = Shards(manifest)
    shards.keep(folder, limit, Turn(), alone)
    return shards


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_reads_right(shards: Shards, digits: Path) -> None:
    local = Shards(read_manifest(digits)).read(IDS)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(shards.read(IDS), local, strict=True))


def whole(digits: Path, *names: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in digits.glob("*.tar") if not names or path.name in names}


@pytest.mark.parametrize("place", ["folder", "http"])
def test_all_shards_staged_first(
    place: str, digits: Path, manifest: Manifest, site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shards = staged(manifest if place == "http" else read_manifest(digits), tmp_path / "kept")
    assert tars(tmp_path / "kept") == whole(digits)
    assert caplog.messages[-1] == f"9 of 9 shards (0.00 of 0.00 GB) are in {tmp_path / 'kept'}"
    site.asked.clear()
    assert_reads_right(shards, digits)
    assert site.asked == []
    staged(manifest, tmp_path / "kept")
    assert site.asked == []  # what is there is not fetched again


def test_shards_fetched_while_training_reads(digits: Path, manifest: Manifest, site: Site, tmp_path: Path) -> None:
    site.delay_s = 0.05
    shards = Shards(manifest)
    shards.keep(tmp_path / "kept", None, Turn())
    assert_reads_right(shards, digits)
    pictures = sum(size < 2000 for _, name, size in site.asked if name.endswith(".tar"))
    assert pictures > len(IDS) / 2  # by byte ranges, as their shards were not there yet
    wait_until(lambda: names(tmp_path / "kept") == whole(digits).keys())
    shards.close()
    assert tars(tmp_path / "kept") == whole(digits)
    site.asked.clear()
    assert_reads_right(shards, digits)
    assert site.asked == []


def wait_until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shard_is_read_in_blocks_of_any_size(
    digits: Path, manifest: Manifest, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "BLOCK", 100_001)
    monkeypatch.setattr(caching, "PARTS", 3)
    staged(manifest, tmp_path / "kept")
    assert tars(tmp_path / "kept") == whole(digits)
    assert max(size for _, name, size in site.asked if name.endswith(".tar")) == 100_001


def test_closing_ends_the_fetching_and_leaves_nothing_half(manifest: Manifest, site: Site, tmp_path: Path) -> None:
    site.delay_s = 0.3
    shards = Shards(manifest)
    shards.keep(tmp_path / "kept", None, Turn())
    wait_until(lambda: any((tmp_path / "kept").glob("*.partial")))
    shards.close()
    assert not list((tmp_path / "kept").glob("*.partial"))
    assert len(list((tmp_path / "kept").iterdir())) <= 1


def test_the_limit_is_kept_to_the_byte(digits: Path, manifest: Manifest, site: Site, tmp_path: Path) -> None:
    sizes = [shard.size for shard in manifest.shards]
    limit = sum(sizes[:3])
    shards = staged(manifest, tmp_path / "kept", limit)
    assert sorted(tars(tmp_path / "kept")) == [shard.name for shard in manifest.shards[:3]]
    assert_reads_right(shards, digits)
    staged(manifest, tmp_path / "kept", limit - 1)  # frees nothing
    assert len(tars(tmp_path / "kept")) == 3
    staged(manifest, tmp_path / "other", limit - 1)  # a smaller shard takes the place of the third
    assert sum(map(len, tars(tmp_path / "other").values())) == sum(sizes[:2]) + sizes[5] < limit


def test_what_does_not_fit_is_said_with_numbers(
    manifest: Manifest, site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    staged(manifest, tmp_path / "kept", 600_000)
    assert caplog.messages == [
        f"1 of 9 shards (0.00 of 0.00 GB) are in {tmp_path / 'kept'}, at most 0.0006 GB (data.cache_gb); the rest is "
        f"read from {site.url}"
    ]


class Fixed(ShardCache):
    """A cache whose shards are there or not as told."""

    def __init__(self, sizes: list[int], limit: int, here: set[int]) -> None:
        super().__init__(Path("nowhere"), [Shard(str(n), size, 1, "", "") for n, size in enumerate(sizes)], limit)
        self.here = here

    def has(self, number: int) -> bool:
        return number in self.here


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(0, 30), st.data())
def test_the_part_that_is_kept_is_the_same_however_much_of_it_is_there(
    sizes: list[int], limit: int, data: st.DataObject
) -> None:
    """Ranks of a node may look at different moments: no lock, and yet no byte over the limit."""
    part = set(Fixed(sizes, limit, set()).wanted())
    assert sum(sizes[number] for number in part) <= limit
    left = set(range(len(sizes))) - part
    assert all(sum(sizes[number] for number in part) + sizes[number] > limit for number in left)
    here = data.draw(st.sets(st.sampled_from(sorted(part)))) if part else set()
    assert set(Fixed(sizes, limit, here).wanted()) == part - here


def test_a_shard_that_was_written_to_is_fetched_again(
    digits: Path, manifest: Manifest, site: Site, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    staged(manifest, folder)
    with (folder / "train-00000.tar").open("r+b") as tar:
        tar.seek(int(manifest.offset_N[0]))
        tar.write(b"x")  # the size stays
    (folder / "train-00001.tar").write_bytes(bytes(100))
    (folder / "train-00002.tar").unlink()
    site.asked.clear()
    shards = Shards(manifest)
    shards.cache = ShardCache(folder, manifest.shards, 0)
    assert_reads_right(shards, digits)  # from the source, before they are mended
    site.asked.clear()
    staged(manifest, folder)
    assert {name for _, name, _ in site.asked} == {"train-00000.tar", "train-00001.tar", "train-00002.tar"}
    assert tars(folder) == whole(digits)


@pytest.mark.parametrize("first", [True, False])
def test_wrong_bytes_at_the_source_are_an_error(
    first: bool, digits: Path, manifest: Manifest, site: Site, tmp_path: Path
) -> None:
    site.root = Path(shutil.copytree(digits, tmp_path / "copy"))
    with (site.root / "train-00001.tar").open("r+b") as tar:
        tar.seek(5000)
        tar.write(b"!")
    message = rf"data {site.url}: the bytes of train-00001\.tar are not those that were packed"
    shards = Shards(manifest)

    def until_it_fails() -> None:
        shards.keep(tmp_path / "kept", None, Turn(), alone if first else None)
        wait_until(lambda: not shards.read([0]))

    with pytest.raises(AutodoError, match=message):
        until_it_fails()
    assert tars(tmp_path / "kept") == whole(digits, "train-00000.tar")


# Full disks


def test_the_last_of_a_disk_stays_free(
    digits: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kept"

    def usage(path: Path) -> DiskUsage:
        used = sum(file.stat().st_size for file in folder.iterdir())
        return DiskUsage(10**10, 10**10 - (10**9 + 2_000_000 - used), 10**9 + 2_000_000 - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    shards = staged(manifest, folder)
    assert len(tars(folder)) == 3  # of 0.6 MB each: a fourth would leave less than 1 GB
    assert re.match(r"the disk of .* has 1\.0 of 10\.0 GB free, and 5 %, at least 1 GB, stays so", caplog.messages[0])
    assert "3 of 9 shards" in caplog.messages[1]
    assert_reads_right(shards, digits)
    assert len(tars(folder)) == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**12, 0, 49_999_999_999))
    staged(manifest, folder)
    assert len(tars(folder)) == 3  # 5 % of 1 TB is more than 1 GB


def test_ranks_that_write_at_once_leave_room_for_each_other(manifest: Manifest, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, manifest.shards, None)
    shard = manifest.shards[0].size
    free = shutil.disk_usage(tmp_path)
    spare = free.free - max(0.05 * free.total, 10**9)
    with pytest.raises(caching.Full):
        cache.fetch(0, Shards(manifest).source, writers=int(spare / shard) + 1000)


@pytest.mark.parametrize("first", [True, False])
def test_a_disk_that_becomes_full_is_a_warning(
    first: bool, digits: Path, manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit on file sizes makes the kernel refuse the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    shards = Shards(manifest)
    try:
        shards.keep(tmp_path / "kept", None, Turn(), alone if first else None)
        wait_until(lambda: any(found.levelname == "WARNING" for found in caplog.records))
        shards.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    (warning,) = [found.getMessage() for found in caplog.records if found.levelname == "WARNING"][:1]
    assert warning.startswith(f"{tmp_path / 'kept'} cannot be written (File too large)")
    assert tars(tmp_path / "kept") == {}
    assert_reads_right(shards, digits)


def test_a_folder_that_cannot_be_written_is_an_error(manifest: Manifest) -> None:
    with pytest.raises(AutodoError, match=r"cache /proc/kept: cannot be written .*; set data\.cache or data\.stage_to"):
        staged(manifest, Path("/proc/kept"))


# Processes


def test_killed_while_staging(digits: Path, site: Site, tmp_path: Path) -> None:
    """SIGKILL at several moments: no shard is there but whole ones, and the next start does the rest alone."""
    folder = tmp_path / "kept"
    program = textwrap.dedent(f"""
        from pathlib import Path
        from autodo_dist.data.cache import ShardCache
        from autodo_dist.data.manifest import read_manifest
        from autodo_dist.data import cache, staging
        from autodo_dist.data.remote import Remote
        cache.BLOCK, cache.PARTS = 100_000, 1
        manifest = read_manifest({site.url!r}, Path({str(tmp_path / "manifest")!r}))
        kept = ShardCache(Path({str(folder)!r}), manifest.shards, None)
        kept.prepare()
        print("ready", flush=True)
        staging.stage(kept, Remote({site.url!r}), staging.Turn(), lambda share: [share])
    """)
    site.delay_s = 0.02
    known: dict[str, bytes] = {}
    for moment_s in (0.08, 0.3):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        wait_until(lambda: any(folder.glob("*.partial")))
        time.sleep(moment_s)
        process.kill()
        process.wait()
        process.stdout.close()
        found = {name: data for name, data in tars(folder).items() if not name.endswith(".partial")}
        assert found.items() <= whole(digits).items()
        assert known.items() <= found.items()
        known = found
    assert len(known) < 9
    site.delay_s = 0
    site.asked.clear()
    staged(read_manifest(site.url, tmp_path / "manifest"), folder)
    assert tars(folder) == whole(digits)  # and no partial file
    again = [name for _, name, size in site.asked if size > 100_000]  # the killed process asked for no more than that
    assert sorted(again) == sorted(whole(digits).keys() - known.keys())


def test_unfinished_files_of_others_are_left_alone(manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    ours, theirs, old = (folder / f"train-00000.tar~{end}.partial" for end in (f"{host()}~1~1", "else~9~9", "else~8~8"))
    for path in (ours, theirs, old):
        path.touch()
    os.utime(old, (0, 0))
    ShardCache(folder, manifest.shards, None).prepare()
    assert set(folder.iterdir()) == {ours, theirs}  # process 1 lives


def host() -> str:
    import socket

    return socket.gethostname()


def test_two_runs_may_use_a_folder_at_once(digits: Path, manifest: Manifest, site: Site, tmp_path: Path) -> None:
    site.delay_s = 0.02
    runs = [Shards(manifest), Shards(manifest)]
    for shards in runs:
        shards.keep(tmp_path / "kept", None, Turn())
    wait_until(lambda: names(tmp_path / "kept") == whole(digits).keys())
    for shards in runs:
        shards.close()
        assert_reads_right(shards, digits)
    assert tars(tmp_path / "kept") == whole(digits)


def stage_on_rank(url: str, manifest_folder: Path, folder: Path) -> list[str]:
    """Stage with small rounds; the progress that this rank logged."""
    import logging

    staging.ROUND_S = 0.05
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("autodo_dist")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        shards = Shards(read_manifest(url, manifest_folder))
        with comm.process_group(comm.place(), comm.torch.device("cpu")) as ranks:
            shards.keep(folder, None, Turn(ranks.rank, ranks.ranks), ranks.gather)
            assert shards.read([0, 1796])
    finally:
        log.removeHandler(handler)
    return said


def test_two_ranks_stage_each_shard_once(pool: RankPool, digits: Path, site: Site, tmp_path: Path) -> None:
    site.delay_s = 0.05
    said = pool.run(2, stage_on_rank, site.url, tmp_path / "manifest", tmp_path / "kept")
    assert tars(tmp_path / "kept") == whole(digits)
    fetched = sorted((name, size) for _, name, size in site.asked if name.endswith(".tar"))
    assert fetched == sorted((name, len(data)) for name, data in whole(digits).items())
    for lines_ in said:
        progress = [line for line in lines_ if line.startswith("staging: ")]
        assert progress
        assert all(re.fullmatch(r"staging: 0\.0 of 0\.0 GB, \d+ MB/s(, \d+ s left)?", line) for line in progress)
        assert "9 of 9 shards" in lines_[-1]


def test_a_rank_that_finds_wrong_bytes_ends_all(pool: RankPool, digits: Path, site: Site, tmp_path: Path) -> None:
    site.root = Path(shutil.copytree(digits, tmp_path / "copy"))
    (site.root / "train-00001.tar").write_bytes(bytes((digits / "train-00001.tar").stat().st_size))
    with pytest.raises(RankError, match=r"the bytes of train-00001\.tar are not those that were packed"):
        pool.run(2, stage_on_rank, site.url, tmp_path / "manifest", tmp_path / "kept")


# Whole runs


@pytest.fixture(scope="module")
def expected(pool: RankPool, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the local folder, on two ranks."""
    folder: Path = pool.run(2, run_train, short(digits, tmp_path_factory.mktemp("local")))[0]
    return folder


def short(root: str | Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Six steps over one epoch."""
    return settings(root, folder, train__epochs=1, optim__warmup_epochs=0, **changes)


@pytest.mark.parametrize("way", ["ranges", "default", "cache", "stage_to"])
def test_a_run_from_a_url_is_the_run_from_the_folder(
    way: str, pool: RankPool, digits: Path, site: Site, expected: Path, tmp_path: Path
) -> None:
    """Bit for bit: by ranges alone, with shards arriving meanwhile, and with all of them there first."""
    changes: dict[str, dict[str, Any]] = {
        "ranges": {"data__cache_gb": 0},
        "default": {},
        "cache": {"data__cache": str(tmp_path / "cache")},
        "stage_to": {"data__stage_to": "${NODE_DISK}/cache"},
    }
    folder = pool.run(2, on_node, tmp_path, short(site.url, tmp_path, **changes[way]))[0]
    assert_equal_states(weights(folder, 6), weights(expected, 6))
    assert lines(folder) == lines(expected)
    checksum = json.loads((folder / "environment.json").read_text())["data_checksum"]
    kept = tmp_path / ("cache" if way in ("cache", "stage_to") else "default") / checksum[:16]
    assert len(list(kept.glob("*.tar"))) == (0 if way == "ranges" else 9)
    if way == "stage_to":
        assert {size for _, name, size in site.asked if name.endswith(".tar") and size} == {
            shard.size for shard in read_manifest(digits).shards
        }


def on_node(folder: Path, tree: dict[str, Any]) -> Path:
    """A run whose default cache and node's disk are folders of the test's."""
    from autodo_dist.data import manifest

    manifest.DEFAULT_CACHE = folder / "default"
    os.environ["NODE_DISK"] = str(folder)
    return run_train(tree)


def test_commands_take_a_run_whose_data_is_at_a_url(
    digits: Path, site: Site, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autodo_dist.data import manifest

    monkeypatch.setattr(manifest, "DEFAULT_CACHE", tmp_path / "default")
    run = Path(shutil.copytree(expected, tmp_path / "run"))
    text = (run / "config.yaml").read_text().replace(f"root: {digits}\n", f"root: {site.url}\n")
    (run / "config.yaml").write_text(text)
    assert site.url in text
    accuracy = json.loads((run / "summary.json").read_text())["test_accuracy_final"]
    assert evaluate_checkpoint(run, None, None)["accuracy"] == accuracy
    assert evaluate_checkpoint(expected, None, site.url)["accuracy"] == accuracy
    site.status = 404
    with pytest.raises(AutodoError, match=r"manifest\.json: no such file; check data\.root"):
        evaluate_checkpoint(run, None, None)
    site.status = None
    plan = CliRunner().invoke(app, ["plan", str(run / "config.yaml")], catch_exceptions=False)
    assert plan.exit_code in (0, 1)
    assert "636" in plan.output  # train pictures, out of the manifest
    with pytest.raises(AutodoError, match="only a folder is read through"):
        CliRunner().invoke(app, ["pack", "--verify", site.url], catch_exceptions=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__cache": "x", "data__stage_to": "y"}, "data.stage_to and data.cache: set one"),
        ({"data__cache_gb": -1}, "data.cache_gb = -1"),
        ({"data__root": ""}, "data.root = ''"),
    ],
)
def test_settings_that_contradict(digits: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodoError, match=re.escape(message)):
        check_config(settings(digits, tmp_path, **changes), "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__stage_to": "$NO_SUCH_DIR/x"}, r"data\.stage_to = \$NO_SUCH_DIR/x: NO_SUCH_DIR is not set on "),
        ({"data__cache": "/proc/x"}, r"cache /proc/x/\w{16}: cannot be written"),
        ({"data__cache_gb": 3}, r"data\.cache_gb = 3: of a copy that is not made; set data\.cache or"),
    ],
)
def test_folders_that_a_run_cannot_use(digits: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodoError, match=message):
        run_train(settings(digits, tmp_path, **changes))


def test_a_resume_may_have_its_data_elsewhere(digits: Path, tmp_path: Path) -> None:
    old = check_config(settings(digits, tmp_path, data__cache="x", data__cache_gb=3), "old")
    new = check_config(settings("s3://bucket/digits", tmp_path, data__stage_to="$TMPDIR"), "new")
    assert differences(old, new) == []
    assert new.data.root == "s3://bucket/digits"


def test_home_and_variables_are_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", "/disk")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("data.cache", "$NODE_DISK/a") == Path("/disk/a")
    assert expand("data.cache", "~/${NODE_DISK}b") == Path("/home/me//diskb")
    monkeypatch.setenv("NODE_DISK", "")
    with pytest.raises(AutodoError, match="NODE_DISK is not set"):
        expand("data.cache", "$NODE_DISK/a")
