"""A data set behind real servers on the loopback interface: the same bytes, trouble survived, refusals in one line."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ranks import free_port
from servers import Site, serve

from autodo_dist.data import remote
from autodo_dist.data.manifest import check_files, read_manifest, verify_bytes
from autodo_dist.data.remote import Remote
from autodo_dist.data.shards import Shards
from autodo_dist.errors import AutodoError

IDS = list(range(0, 1797, 13))  # of every shard of the digits


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between tries."""
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.0, 0.0, 0.0))


@pytest.fixture
def site(digits: Path) -> Iterator[Site]:
    with serve(digits) as site:
        yield site


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, digits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The digits at a URL of S3, with credentials from the environment alone."""
    import boto3
    import s3fs

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # one of an earlier test has that one's environment
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    for path in digits.iterdir():
        client.upload_file(str(path), "pictures", f"packed/digits/{path.name}")
    return "s3://pictures/packed/digits"


def read(root: str | Path, cache: Path, ids: list[int] = IDS) -> list[bytes]:
    manifest = read_manifest(root, cache)
    check_files(manifest)
    return [picture.tobytes() for picture in Shards(manifest).read(ids)]


def test_the_same_bytes_from_folder_http_and_s3(digits: Path, site: Site, bucket: str, tmp_path: Path) -> None:
    expected = read(digits, tmp_path)
    assert read(site.url, tmp_path) == expected
    assert read(bucket + "/", tmp_path) == expected
    local, url = read_manifest(digits), read_manifest(bucket, tmp_path)
    assert (url.checksum, url.shards, url.keys) == (local.checksum, local.shards, local.keys)
    assert (url.place, local.place) == (bucket, str(digits))


def test_only_the_pictures_bytes_are_asked_for(site: Site, tmp_path: Path) -> None:
    manifest = read_manifest(site.url, tmp_path)
    site.asked.clear()
    Shards(manifest).read(IDS)
    assert sorted(size for _, _, size in site.asked) == sorted(manifest.size_N[IDS].tolist())


def test_samples_are_fetched_once_and_fetched_again_where_they_were_changed(site: Site, tmp_path: Path) -> None:
    for _ in range(2):
        manifest = read_manifest(site.url, tmp_path)
    assert (site.gets("manifest.json"), site.gets("samples.parquet")) == (2, 1)
    (manifest.root / "samples.parquet").write_bytes(b"half a fi")
    assert read_manifest(site.url, tmp_path).keys == manifest.keys
    assert sorted(path.name for path in manifest.root.iterdir()) == ["manifest.json", "samples.parquet"]


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_four_threads_may_read_at_once(scheme: str, digits: Path, site: Site, bucket: str, tmp_path: Path) -> None:
    shards, local = (
        Shards(read_manifest(site.url if scheme == "http" else bucket, tmp_path)),
        Shards(read_manifest(digits)),
    )
    batches = [list(range(start, 1797, 60)) for start in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for ids, pictures in zip(batches, pool.map(shards.read, batches), strict=True):
            assert all(a.tobytes() == b.tobytes() for a, b in zip(pictures, local.read(ids), strict=True))


@pytest.mark.parametrize("trouble", ["fail", "cut"])
def test_trouble_that_passes_is_a_warning(
    trouble: str, digits: Path, site: Site, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    shards = Shards(read_manifest(site.url, tmp_path))
    setattr(site, trouble, 40)
    assert [picture.tobytes() for picture in shards.read(IDS)] == read(digits, tmp_path)
    assert re.search(r"data http://.*\.tar and 39 more: .*; try 2 of 5 in 0 s", caplog.messages[0])


def test_trouble_while_sizes_are_asked(
    site: Site, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_manifest(site.url, tmp_path)
    site.fail = 30
    check_files(manifest)
    assert "train-00000.tar and 8 more: HTTP 503 Service Unavailable; try 2 of 5" in caplog.messages[0]


def test_tries_are_bounded_and_wait_longer_each_time(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(remote.WAITS_S) == 4
    assert list(remote.WAITS_S) == sorted(remote.WAITS_S)
    assert 30 <= sum(remote.WAITS_S) <= 60
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    site.status = 500
    with pytest.raises(
        AutodoError, match=r"manifest\.json: HTTP 500 Internal Server Error, 5 times; check the network"
    ):
        read(site.url, tmp_path)
    assert waits == list(remote.WAITS_S)


def test_no_server_there(quick: None, tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match=r"manifest\.json: .*Connect.*, 5 times; check the network and the server"):
        read_manifest(f"http://127.0.0.1:{free_port()}/digits", tmp_path)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "no such file; check data.root"),
        (403, "access denied (HTTP 403 Forbidden); check ~/.netrc"),
        (410, "HTTP 410 Gone; check data.root and the server"),
    ],
)
def test_what_a_web_server_refuses_is_asked_once(site: Site, tmp_path: Path, status: int, message: str) -> None:
    manifest = read_manifest(site.url, tmp_path)
    site.status = status
    for ask in (lambda: read_manifest(site.url, tmp_path), lambda: check_files(manifest)):
        with pytest.raises(AutodoError, match=re.escape(message)) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_server_without_ranges_is_named_before_it_sends_whole_shards(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    manifest = read_manifest(site.url, tmp_path)
    with pytest.raises(AutodoError, match=r"does not answer Range requests .*; serve the folder with one that does"):
        check_files(manifest)
    assert site.gets(".tar") == 0


def test_a_missing_or_wrong_shard_is_named(digits: Path, site: Site, tmp_path: Path) -> None:
    site.root = Path(shutil.copytree(digits, tmp_path / "copy"))
    manifest = read_manifest(site.url, tmp_path)
    with (site.root / "train-00003.tar").open("ab") as tar:
        tar.write(bytes(512))
    with pytest.raises(AutodoError, match=r"/train-00003\.tar: 594432 bytes, 593920 were packed; copy it there again"):
        check_files(manifest)
    (site.root / "train-00002.tar").unlink()
    with pytest.raises(AutodoError, match=r"/train-00002\.tar: no such file; check data\.root"):
        check_files(manifest)
    last = int(manifest.offset_N[1796])
    for size in (last, last + 1):
        (site.root / "test-00001.tar").write_bytes(bytes(size))
        with pytest.raises(AutodoError, match=r"/test-00001\.tar: ends too early; copy it there again"):
            Shards(manifest).read([1796])


def test_a_thousand_shards_are_checked_in_seconds(tmp_path: Path) -> None:
    """ImageNet's 1,282 at once, each by one question without its bytes."""
    names = [f"train-{number:05d}.tar" for number in range(1282)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    with serve(tmp_path) as site:
        begin = time.monotonic()
        assert Remote(site.url).sizes(names) == [len(name) for name in names]
        assert time.monotonic() - begin < 20  # it takes 1 to 2 s
        assert sorted(site.asked) == [("HEAD", name, 0) for name in names]


def test_a_manifest_that_is_wrong_at_its_source(digits: Path, site: Site, tmp_path: Path) -> None:
    site.root = Path(shutil.copytree(digits, tmp_path / "copy"))
    text = (site.root / "manifest.json").read_text()
    for broken, message in (
        (text.replace("train-00001.tar", "../train-00001.tar"), "is no plain file name"),
        (text.replace('"classes"', '"klasses"'), "broken manifest"),
        (text[:100], "broken manifest"),
    ):
        (site.root / "manifest.json").write_text(broken)
        with pytest.raises(AutodoError, match=message) as caught:
            read_manifest(site.url, tmp_path / "cache")
        assert f"data {site.url}/manifest.json: " in str(caught.value)
    (site.root / "manifest.json").write_text(text)
    (site.root / "samples.parquet").write_bytes(b"other")
    with pytest.raises(AutodoError, match=rf"data {site.url}/samples\.parquet: not the file that was packed"):
        read_manifest(site.url, tmp_path / "cache")


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("gs://bucket/digits", "unknown scheme gs://; give a folder, s3://, http:// or https://"),
        ("file:///data/digits", "unknown scheme file://"),
        ("s3:/bucket/digits", "write s3:// with two slashes"),
        ("s3://", "give s3://HOST/FOLDER"),
        ("https://host/digits?token=1", "without ? and #"),
        ("https://me:secret@host/digits", "use ~/.netrc"),
    ],
)
def test_urls_that_cannot_be_a_data_set(root: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match=re.escape(message)) as caught:
        read_manifest(root, tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x", "s3fs"), ("https://host/x", "aiohttp")])
def test_a_missing_package_is_named(url: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AutodoError, match=f"needs {package} .*; pip install {package}"):
        read_manifest(url, tmp_path)


def test_a_cache_that_cannot_be_written(site: Site) -> None:
    with pytest.raises(AutodoError, match=r"cache /proc/cache/\w+: cannot be written .*; set data\.cache"):
        read_manifest(site.url, Path("/proc/cache"))


def test_verify_says_that_it_reads_folders_only(site: Site, tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match="only a folder is read through"):
        verify_bytes(read_manifest(site.url, tmp_path))


def test_what_s3_refuses(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    import s3fs

    for url, message in (
        ("s3://nobucket/digits", "no such bucket; check data.root"),
        ("s3://pictures/elsewhere", "no such file; check data.root"),
    ):
        with pytest.raises(AutodoError, match=re.escape(f"data {url}/manifest.json: {message}")):
            read_manifest(url, tmp_path)
    manifest = read_manifest(bucket, tmp_path)
    boto3.client("s3").delete_object(Bucket="pictures", Key="packed/digits/train-00004.tar")
    with pytest.raises(AutodoError, match=re.escape(f"data {bucket}/train-00004.tar: no such file")):
        check_files(manifest)
    with pytest.raises(AutodoError, match=re.escape(f"data {bucket}/train-00004.tar: no such file")):
        Shards(manifest).read([1000])
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(AutodoError, match=r"profile \(nobody\) could not be found; check data.root, the AWS settings"):
        read_manifest(bucket, tmp_path)
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(AutodoError, match="no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET"):
        read_manifest(bucket, tmp_path)


def test_denied_and_unreachable_s3(
    bucket: str, site: Site, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    site.status = 403
    monkeypatch.setenv("AWS_ENDPOINT_URL", site.url)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(AutodoError, match=r"access denied \(Forbidden\); check AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
        read_manifest(bucket, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(AutodoError, match=r"Could not connect to the endpoint URL.*, 5 times; check the network"):
        read_manifest(bucket, tmp_path)


def test_a_public_bucket_needs_no_credentials(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable that the message names is what fsspec reads when it is imported."""
    import boto3
    import fsspec.config
    import s3fs

    client = boto3.client("s3")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    known: dict[str, dict[str, object]] = {}
    fsspec.config.set_conf_env(known, {"FSSPEC_S3_ANON": "true"})
    monkeypatch.setattr(fsspec.config, "conf", fsspec.config.conf | known)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(AutodoError, match="access denied"):
        read_manifest(bucket, tmp_path)
    for name in ("manifest.json", "samples.parquet"):
        client.put_object_acl(Bucket="pictures", Key=f"packed/digits/{name}", ACL="public-read")
    assert read_manifest(bucket, tmp_path).name == "digits"
