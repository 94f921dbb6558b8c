"""Packing: what webdataset, DALI and the manifest read back is what went in; bad input stops or is counted."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def, types
from PIL import ExifTags, Image
from typer.testing import CliRunner
from wds2idx import IndexCreator

from autodo_dist.commands.pack import app
from autodo_dist.data import pack as packing
from autodo_dist.data import unfinished
from autodo_dist.data.digits import digits_sources
from autodo_dist.data.manifest import PARTS, Manifest, check_files, read_manifest
from autodo_dist.data.probe import EXTENSIONS
from autodo_dist.data.sources import TRAIN, Source
from autodo_dist.errors import AutodoError

CLASSES = ("cat", "dog", "eel")


def invoke(*words: Any) -> str:
    """Run `autodo pack ...` and return what it printed; its exception goes up, as in cli.main."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 9), **options: Any) -> Path:
    """Write a noise picture of (height, width); the format follows the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_HWC = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise_HWC).save(path, **options)
    return path


def tree(src: Path, folder: str = "train", each: int = 10) -> Path:
    for label, name in enumerate(CLASSES):
        for number in range(each):
            picture(src / folder / name / f"{number:03d}.png", seed=100 * label + number)
    return src


def pack_sources(out: Path, sources: list[Source], **changes: Any) -> dict[str, str]:
    classes = [str(label) for label in range(1 + max(source.label for source in sources))]
    options: dict[str, Any] = {
        "seed": 0,
        "shard_samples": 4,
        "skip_unreadable": False,
        "origin": {},
        "report": lambda *_: None,
    }
    return packing.pack(out, "test", classes, sources, **(options | changes))


def files(root: Path, *suffixes: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.suffix in suffixes}


def everything(root: Path) -> dict[str, bytes]:
    """Every file of a data set but the one that holds times."""
    return {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.name != "stamps.json"}


def stored(manifest: Manifest, id_: int) -> bytes:
    """Encoded bytes of a picture by the manifest's offsets."""
    with (manifest.root / manifest.shards[manifest.shard_N[id_]].name).open("rb") as file:
        file.seek(manifest.offset_N[id_])
        return file.read(manifest.size_N[id_])


def keys(manifest: Manifest, part: str) -> set[str]:
    return {manifest.keys[id_].as_py() for id_ in np.flatnonzero(manifest.part_N == PARTS.index(part)).tolist()}


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def read_with_dali(tars: list[str], indexes: list[str]) -> Any:
    return tuple(
        fn.readers.webdataset(paths=tars, index_paths=indexes, ext=["png", "id"], dtypes=[types.UINT8, types.INT64])
    )


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def decode_with_dali(raw: bytes) -> Any:
    return fn.decoders.image(fn.external_source(lambda: [np.frombuffer(raw, np.uint8)]), device="cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("packed") / "digits"
    printed = invoke("digits", root)
    assert str(root) in printed
    assert "10 classes, 1797 samples" in printed
    return read_manifest(root)


# ------------------------------------------------------------------------------------------------ what is read back


def test_webdataset_reads_every_sample_once_with_the_bytes_of_its_source(digits: Manifest) -> None:
    _, sources = digits_sources(0, 0.2, 0.2)
    source_of = {source.key: source for source in sources}
    seen = []
    for shard in digits.shards:
        for sample in webdataset.WebDataset(str(digits.root / shard.name), shardshuffle=False):
            id_ = int.from_bytes(sample["id"], "little", signed=True)
            source = source_of[digits.keys[id_].as_py()]
            seen.append(id_)
            assert sample["__key__"] == f"{id_:08d}"
            assert sample["png"] == source.read() == stored(digits, id_)
            assert digits.shards[digits.shard_N[id_]].name == shard.name
            assert (digits.label_N[id_], digits.part_N[id_]) == (source.label, source.part)
    assert seen == list(range(len(sources)))


def test_dali_reads_every_sample_by_our_index(digits: Manifest) -> None:
    tars = [str(digits.root / shard.name) for shard in digits.shards]
    pipeline = read_with_dali(tars, [tar[:-3] + "idx" for tar in tars])
    pipeline.build()
    for id_ in range(len(digits)):
        raw, number = pipeline.run()
        assert number.at(0).tolist() == [id_]
        assert raw.at(0).tobytes() == stored(digits, id_)


def test_our_index_is_the_one_that_wds2idx_writes(digits: Manifest, tmp_path: Path) -> None:
    for shard in digits.shards:
        with IndexCreator(str(digits.root / shard.name), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        ours = (digits.root / shard.name).with_suffix(".idx").read_text()
        assert ours == (tmp_path / "theirs.idx").read_text()


def test_digits_are_the_scans_of_scikit_learn(digits: Manifest) -> None:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    assert digits.classes == tuple("0123456789")
    assert sorted(digits.keys.to_pylist()) == [f"digit-{index:05d}" for index in range(1797)]
    for id_ in range(0, len(digits), 97):
        index = int(digits.keys[id_].as_py().removeprefix("digit-"))
        with Image.open(io.BytesIO(stored(digits, id_))) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))
            means = np.asarray(image, dtype=float).reshape(8, 4, 8, 4).mean((1, 3))
        assert digits.label_N[id_] == labels[index]
        # A block of 4 x 4 pixels keeps about the value of the scan's pixel; bicubic overshoots at edges.
        assert np.abs(means - scans[index].reshape(8, 8) * 255 / 16).mean() < 20


def test_parts_are_shares_of_each_class_and_come_in_the_order_of_ids(digits: Manifest) -> None:
    assert np.array_equal(digits.part_N, np.sort(digits.part_N))
    for label in range(10):
        train, validation, test = np.bincount(digits.part_N[digits.label_N == label], minlength=3).tolist()
        total = train + validation + test
        assert test == round(0.2 * total)
        assert validation == round(0.2 * (total - test))


def test_every_shard_is_a_random_sample_of_its_part(digits: Manifest) -> None:
    names = [shard.name for shard in digits.shards]
    assert names == [
        *(f"train-{number:05d}.tar" for number in range(5)),
        *(f"{part}-{number:05d}.tar" for part in ("validation", "test") for number in range(2)),
    ]
    for number, shard in enumerate(digits.shards):
        here = digits.shard_N == number
        assert shard.samples == here.sum() <= 256
        assert set(digits.label_N[here]) == set(range(10))
        assert {PARTS[part] for part in digits.part_N[here]} == {shard.name.split("-")[0]}


def test_manifest_columns_have_the_documented_types(digits: Manifest) -> None:
    check_files(digits)
    assert {name: getattr(digits, name).dtype.name for name in vars(digits) if name.endswith("_N")} == {
        "shard_N": "int32",
        "offset_N": "int64",
        "size_N": "int64",
        "height_N": "int32",
        "width_N": "int32",
        "label_N": "int32",
        "part_N": "int8",
    }
    assert set(digits.height_N) == set(digits.width_N) == {32}


def test_the_seed_alone_decides_the_bytes(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        invoke("folder", src, tmp_path / name, "--seed", seed, "--shard-samples", 7)
    suffixes = (".tar", ".idx", ".parquet")
    assert files(tmp_path / "a", *suffixes) == files(tmp_path / "b", *suffixes)
    assert read_manifest(tmp_path / "a").checksum == read_manifest(tmp_path / "b").checksum
    a, c = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "c")
    assert sorted(a.keys.to_pylist()) == sorted(c.keys.to_pylist())
    assert a.keys.to_pylist() != c.keys.to_pylist()
    assert keys(a, "test") != keys(c, "test")


def test_pictures_are_shuffled_within_their_part(tmp_path: Path) -> None:
    """Sources come class by class, yet each third of them holds every class; another seed, another order."""
    src = tree(tmp_path / "src")
    options = ("--shard-samples", 10, "--validation-fraction", 0, "--test-fraction", 0)
    invoke("folder", src, tmp_path / "a", "--seed", 0, *options)
    invoke("folder", src, tmp_path / "b", "--seed", 1, *options)
    a, b = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert [set(a.label_N[a.shard_N == number]) for number in range(3)] == [{0, 1, 2}] * 3
    assert sorted(a.keys.to_pylist()) == sorted(b.keys.to_pylist())
    assert a.keys.to_pylist() != b.keys.to_pylist()


# ----------------------------------------------------------------------------------------------------------- folders


def test_folder_draws_the_missing_parts_from_train(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    printed = invoke("folder", src, tmp_path / "out", "--test-fraction", 0.3, "--validation-fraction", 0.5)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.name == "src"
    assert manifest.classes == CLASSES
    for label in range(3):
        counts = np.bincount(manifest.part_N[manifest.label_N == label], minlength=3)
        assert counts.tolist() == [3, 4, 3]  # 10: 3 test; 7 left: round(3.5) = 4 validation
    assert sorted(manifest.keys.to_pylist()) == sorted(
        f"train/{name}/{number:03d}.png" for name in CLASSES for number in range(10)
    )
    assert all(stored(manifest, id_) == (src / manifest.keys[id_].as_py()).read_bytes() for id_ in range(30))
    assert [line.split()[:2] for line in printed.splitlines()[1:]] == [
        ["train", "9"],
        ["validation", "12"],
        ["test", "9"],
    ]


def test_folder_keeps_the_parts_that_are_there(tmp_path: Path) -> None:
    src = tree(tree(tmp_path / "src"), "val", each=2)
    invoke("folder", src, tmp_path / "out", "--test-fraction", 0)
    manifest = read_manifest(tmp_path / "out")
    assert np.bincount(manifest.part_N).tolist() == [30, 6]
    assert {key.split("/")[0] for key in keys(manifest, "train")} == {"train"}
    assert {key.split("/")[0] for key in keys(manifest, "validation")} == {"val"}
    invoke("folder", tree(src, "test", each=1), tmp_path / "three")
    assert np.bincount(read_manifest(tmp_path / "three").part_N).tolist() == [30, 6, 3]


def test_folder_passes_over_hidden_and_loose_files_and_lowers_extensions(tmp_path: Path) -> None:
    src = tmp_path / "src"
    picture(src / "train" / "b" / "ONE.JPEG", format="JPEG")
    picture(src / "train" / "a" / "two.v2.WebP", format="WEBP")
    (src / "train" / "a" / ".DS_Store").write_text("hidden")
    (src / "train" / "README.txt").write_text("loose")
    (src / "train" / ".git").mkdir()
    os.symlink(src / "train" / "b" / "ONE.JPEG", src / "train" / "a" / "link.jpg")
    invoke("folder", src, tmp_path / "out", "--validation-fraction", 0, "--test-fraction", 0)
    manifest = read_manifest(tmp_path / "out")
    extension_of = {
        sample["__key__"]: next(name for name in sample if name in EXTENSIONS)
        for sample in webdataset.WebDataset(str(tmp_path / "out" / "train-00000.tar"), shardshuffle=False)
    }
    assert {manifest.keys[int(key)].as_py(): extension for key, extension in extension_of.items()} == {
        "train/a/link.jpg": "jpg",
        "train/a/two.v2.WebP": "webp",
        "train/b/ONE.JPEG": "jpg",
    }
    assert manifest.classes == ("a", "b")


def test_height_and_width_are_those_that_dali_decodes(tmp_path: Path) -> None:
    """Every format, and every EXIF orientation where the format has one; 5 to 8 swap height and width."""
    src, expected = tmp_path / "src" / "train" / "a", {}
    for name in ("x.bmp", "x.ppm", "x.jp2", "x.png", "x.webp", "x.tif", "x.jpeg"):
        picture(src / name, size=(20, 30))
        expected[f"train/a/{name}"] = (20, 30)
    for suffix in ("jpg", "png", "webp", "tiff"):
        for orientation in range(1, 9) if suffix == "jpg" else (3, 6):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            name = f"{orientation}.{suffix}"
            picture(src / name, size=(20, 30), exif=exif)
            expected[f"train/a/{name}"] = (30, 20) if orientation > 4 else (20, 30)
    invoke("folder", tmp_path / "src", tmp_path / "out", "--validation-fraction", 0, "--test-fraction", 0)
    manifest = read_manifest(tmp_path / "out")
    for id_ in range(len(manifest)):
        pipeline = decode_with_dali(stored(manifest, id_))
        pipeline.build()
        shape = (manifest.height_N[id_], manifest.width_N[id_])
        assert shape == pipeline.run()[0].at(0).shape[:2] == expected.pop(manifest.keys[id_].as_py())
    assert not expected


# ---------------------------------------------------------------------------------------------------- broken pictures


def spoil(src: Path) -> dict[str, str]:
    """Add nine files that cannot be trained on: key -> a piece of what must be said of it."""
    cat = src / "train" / "cat"
    whole = picture(cat / "truncated.jpg", size=(60, 60)).read_bytes()
    (cat / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (cat / "empty.png").write_bytes(b"")
    (cat / "text.jpg").write_text("no picture")
    (cat / "notes.txt").write_text("no picture")
    picture(cat / "gif.jpg", format="GIF")  # PIL reads it, DALI does not
    Image.new("1", (5, 5)).save(cat / "bits.tif")
    Image.new("LA", (5, 5)).save(cat / "grey.tif")
    (cat / "cut.png").write_bytes(picture(cat / "cut.png").read_bytes()[:-12])  # its end is missing; PIL reads it
    os.symlink(cat / "nowhere", cat / "dangling.png")
    pieces = {
        "truncated.jpg": "runcated",
        "empty.png": "zero bytes",
        "text.jpg": "not a JPEG",
        "notes.txt": "not a known picture extension",
        "gif.jpg": "not a JPEG",
        "bits.tif": "DALI does not decode it",
        "cut.png": "DALI does not decode it",
        "grey.tif": "to wrong colours",
        "dangling.png": "No such file",
    }
    return {f"train/cat/{name}": piece for name, piece in pieces.items()}


def test_unreadable_pictures_stop_the_pack_and_are_listed(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    expected = spoil(src)
    with pytest.raises(AutodoError, match=r"9 unreadable: train/cat/.* and 6 more; .*--skip-unreadable") as caught:
        invoke("folder", src, tmp_path / "out")
    assert "\n" not in str(caught.value)
    listed = dict(line.split(": ", 1) for line in (tmp_path / "out" / "unreadable.txt").read_text().splitlines())
    assert listed.keys() == expected.keys()
    assert all(piece in listed[key] for key, piece in expected.items())
    with pytest.raises(AutodoError, match="no complete packed data set"):
        read_manifest(tmp_path / "out")


def test_skipped_pictures_leave_no_gap_and_are_counted(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    expected = spoil(src)
    with pytest.raises(AutodoError):
        invoke("folder", src, tmp_path / "out")
    printed = invoke("folder", src, tmp_path / "out", "--skip-unreadable")
    manifest = read_manifest(tmp_path / "out")
    assert "left out: 9 unreadable" in printed
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["unreadable"] == 9
    assert len(manifest) == 30
    assert not expected.keys() & set(manifest.keys.to_pylist())
    tars = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    ids = [int(sample["__key__"]) for tar in tars for sample in webdataset.WebDataset(tar, shardshuffle=False)]
    assert ids == list(range(30))


def test_class_whose_pictures_are_all_broken_stops_even_when_skipping(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    (src / "train" / "fox").mkdir()
    (src / "train" / "fox" / "a.jpg").write_bytes(b"")
    with pytest.raises(AutodoError, match="class 'fox' has no picture in train"):
        invoke("folder", src, tmp_path / "out", "--skip-unreadable")


# --------------------------------------------------------------------------------------------------------- bad inputs


def without_train(src: Path) -> None:
    (src / "val").mkdir(parents=True)


def without_classes(src: Path) -> None:
    picture(src / "train" / "loose.png")


def empty_class(src: Path) -> None:
    (tree(src) / "train" / "fox").mkdir()


def empty_validation(src: Path) -> None:
    (tree(src) / "val" / "cat").mkdir(parents=True)


def unknown_class(src: Path) -> None:
    picture(tree(src) / "test" / "fox" / "a.png")


def nested(src: Path) -> None:
    picture(tree(src) / "train" / "cat" / "images" / "a.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda src: None, "no such folder"),
        (without_train, "holds no folder train"),
        (without_classes, r"train: holds no picture"),
        (empty_class, "class 'fox' has no picture in train"),
        (empty_validation, r"val: holds no picture"),
        (unknown_class, r"test/fox: train knows no class 'fox'"),
        (nested, r"train/cat/images: a folder inside a class"),
    ],
)
def test_bad_folder_is_one_line_that_names_it(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "src")
    with pytest.raises(AutodoError, match=message) as caught:
        invoke("folder", tmp_path / "src", tmp_path / "out")
    assert str(tmp_path / "src") in str(caught.value) or str(caught.value).startswith("pack src")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_fractions_that_empty_a_class_stop_the_pack(tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match=r"class 'cat' has no picture in train; .*lower the fractions"):
        invoke("folder", tree(tmp_path / "src", each=2), tmp_path / "out", "--validation-fraction", 0.9)


def test_output_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    src, out = tree(tmp_path / "src"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    (out / "train-00000.tar").write_text("also precious, as it lies beside")
    with pytest.raises(AutodoError, match=r"holds other things \('thesis.tex'\)"):
        invoke("folder", src, out)
    assert len(list(out.iterdir())) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(AutodoError, match="not a folder"):
        invoke("folder", src, tmp_path / "file")


def test_a_packed_data_set_is_not_packed_over(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    invoke("folder", src, tmp_path / "out")
    before = files(tmp_path / "out", ".tar", ".idx", ".json", ".parquet")
    with pytest.raises(AutodoError, match="already holds a packed data set"):
        invoke("folder", src, tmp_path / "out", "--seed", 1)
    assert files(tmp_path / "out", ".tar", ".idx", ".json", ".parquet") == before


# --------------------------------------------------------------------------------------------------------- interrupted


def png_sources(count: int, failing: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> list[Any]:
    """Sources in memory; the one numbered `failing` reads well once, when it is probed, and raises when written."""

    def reader(number: int) -> Callable[[], bytes]:
        file = io.BytesIO()
        Image.new("L", (5, 4), number).save(file, "PNG")
        answers: Iterator[bytes] = iter([file.getvalue()])

        def read() -> bytes:
            if number != failing:
                return file.getvalue()
            raw = next(answers, None)
            if raw is None:
                raise error("interrupted")
            return raw

        return read

    return [Source(f"key-{number}", "png", number % 2, TRAIN, reader(number)) for number in range(count)]


def test_interrupted_pack_is_not_trusted_and_goes_on(tmp_path: Path) -> None:
    pack_sources(tmp_path / "whole", png_sources(20))
    last = read_manifest(tmp_path / "whole").keys[18].as_py()
    with pytest.raises(KeyboardInterrupt):
        pack_sources(tmp_path / "out", png_sources(20, failing=int(last.removeprefix("key-"))))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"unfinished", *(f"train-{number:05d}.{suffix}" for number in range(4) for suffix in ("tar", "idx"))}
    with pytest.raises(AutodoError, match="no complete packed data set"):
        read_manifest(tmp_path / "out")
    kept = (tmp_path / "out" / "train-00003.tar").stat()
    pack_sources(tmp_path / "out", png_sources(20))
    assert (tmp_path / "out" / "train-00003.tar").stat() == kept
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_tars_that_are_not_ours_stay(tmp_path: Path) -> None:
    """Webdataset's own tars have the same names, and a data set may have lost its manifest."""
    pack_sources(tmp_path / "out", png_sources(20))
    (tmp_path / "out" / "manifest.json").unlink()
    there = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(AutodoError, match=r"holds other things \('samples.parquet'\); choose an empty or a new folder"):
        pack_sources(tmp_path / "out", png_sources(6))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == there


def test_a_pack_that_ends_while_another_waits_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found the folder usable; the second got the lock when the first was done."""
    out, pack_first = tmp_path / "out", unfinished._alone

    @contextlib.contextmanager
    def after_the_first(folder: Path) -> Iterator[None]:
        monkeypatch.setattr(unfinished, "_alone", pack_first)
        pack_sources(out, png_sources(20))
        with pack_first(folder):
            yield

    monkeypatch.setattr(unfinished, "_alone", after_the_first)
    with pytest.raises(AutodoError, match="already holds a packed data set"):
        pack_sources(out, png_sources(6), seed=1)
    assert len(read_manifest(out)) == 20


def test_picture_that_vanishes_while_being_packed_is_an_error_line(tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match="interrupted; mend that and run the same command again"):
        pack_sources(tmp_path / "out", png_sources(6, failing=2, error=OSError))


def test_progress_counts_every_picture_of_both_passes(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    pack_sources(tmp_path / "out", png_sources(10), report=lambda *call: calls.append(call))
    assert calls == [("reading", 10, 10), *(("writing", done, 10) for done in (4, 7, 10))]


# -------------------------------------------------------------------------------------------------------------- verify


def test_verify_passes_on_good_bytes_and_names_the_bad_tar(tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("folder", tree(tmp_path / "src"), out)
    assert "30 samples in 3 shards, every byte as packed" in invoke("--verify", out)
    raw = bytearray((out / "test-00000.tar").read_bytes())
    raw[1000] ^= 1
    (out / "test-00000.tar").write_bytes(raw)
    with pytest.raises(AutodoError, match=r"test-00000\.tar: its bytes are not those that were packed"):
        invoke("--verify", out)
    with pytest.raises(AutodoError, match="--verify and digits at once"):
        invoke("--verify", out, "digits", tmp_path / "other")
    assert "digits" in invoke()
