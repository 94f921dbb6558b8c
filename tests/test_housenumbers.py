"""House numbers: each picture shows its label, is a pure function of its name, and is what the command packs."""

from __future__ import annotations

import hashlib
import io
import math
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import get_data_path
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from PIL import Image, features
from typer.testing import CliRunner

from autodo_dist.commands.pack import app
from autodo_dist.data import housenumbers as house
from autodo_dist.data.housenumbers import FONTS, GLYPH, SIDE, Look
from autodo_dist.data.manifest import PARTS, Manifest, check_files, read_manifest, verify_bytes
from autodo_dist.data.sources import TEST, TRAIN
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import load_config

ROOT = Path(__file__).parent.parent
TOP = (SIDE - GLYPH) // 2  # where an undistorted digit begins


def pixels(digit: int, look: Look, seed: int = 0) -> npt.NDArray[np.int16]:
    return np.asarray(house.render(digit, look, np.random.default_rng(seed)), np.int16)


def decoded(png: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (SIDE, SIDE))
        return np.asarray(image)


# ------------------------------------------------------------------------------------------------- digit and label


@pytest.mark.parametrize("font", FONTS)
def test_a_glyph_is_the_outline_of_its_digit_in_its_font(font: str) -> None:
    """Of matplotlib's own readings of the ten digits, laid over the glyph's box, its own digit's agrees best."""
    file = FontProperties(fname=f"{get_data_path()}/fonts/ttf/{font}.ttf")
    outlines = [TextPath((0, 0), str(digit), prop=file) for digit in range(10)]
    for digit in range(10):
        ours = np.asarray(house.glyph(font, digit)) > 127
        agreement = [(ours == within(outline, *ours.shape)).mean() for outline in outlines]
        assert np.argmax(agreement) == digit
        assert agreement[digit] > 0.88
        (left, bottom), (right, top) = outlines[digit].get_extents().get_points()
        assert abs(ours.shape[1] - GLYPH * (right - left) / (top - bottom)) < 1


def within(outline: TextPath, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Which pixels of the outline's box have their centre inside: within an odd number of its loops."""
    (left, bottom), (right, top) = outline.get_extents().get_points()
    x = left + (right - left) * (np.arange(width) + 0.5) / width
    y = top - (top - bottom) * (np.arange(height) + 0.5) / height
    centres = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    loops = [Outline(polygon).contains_points(centres) for polygon in outline.to_polygons()]
    return np.asarray(np.bitwise_xor.reduce(loops)).reshape(height, width)


def on_white(strip: npt.NDArray[np.uint8], start: int) -> npt.NDArray[np.int16]:
    """The picture that shows this strip of black ink from column `start` on, which may lie outside."""
    sheet = np.full((SIDE, 3 * SIDE), 255, np.int16)
    sheet[TOP : TOP + GLYPH, SIDE + start : SIDE + start + strip.shape[1]] -= strip
    return np.repeat(sheet[:, SIDE : 2 * SIDE, None], 3, 2)


@pytest.mark.parametrize("font", FONTS)
def test_without_distortion_a_picture_is_the_glyph_of_its_label(font: str) -> None:
    for digit in range(10):
        mask = np.asarray(house.glyph(font, digit))
        assert np.array_equal(pixels(digit, Look(font=font)), on_white(mask, SIDE // 2 - math.ceil(mask.shape[1] / 2)))


def test_a_packed_picture_shows_the_digit_of_its_label() -> None:
    for index, digit in enumerate([3, 1, 4, 1, 5, 9, 2, 6, 8, 7, 0]):
        generator = house._stream(7, TEST, index)
        drawn = house.render(digit, house.draw_look(generator), generator)
        assert np.array_equal(decoded(house.picture(7, TEST, index, digit)), np.asarray(drawn))


def test_ten_digits_of_a_font_differ_and_so_do_the_fonts() -> None:
    assert len({house.glyph(font, digit).tobytes() for font in FONTS for digit in range(10)}) == 10 * len(FONTS)


@pytest.mark.parametrize(("digit", "left", "right"), [(1, 7, 4), (3, 8, None), (0, None, 1)])
def test_neighbours_stand_beside_the_digit(digit: int, left: int | None, right: int | None) -> None:
    def ink(number: int | None, width: int = 0) -> npt.NDArray[np.uint8]:
        return np.zeros((GLYPH, width), np.uint8) if number is None else np.asarray(house.glyph(FONTS[0], number))

    strip = np.hstack([ink(left), ink(None, 2), ink(digit), ink(None, 3), ink(right)])
    start = SIDE // 2 - math.ceil(ink(digit).shape[1] / 2) - 2 - ink(left).shape[1]
    assert np.array_equal(pixels(digit, Look(left=left, right=right, gap=(2, 3))), on_white(strip, start))


def test_ink_and_ground_have_their_colours() -> None:
    shown = pixels(0, Look(ink=(10, 120, 200), ground=(250, 30, 90)))
    mask = 255 - pixels(0, Look())[..., 0]
    assert {tuple(pixel) for pixel in shown[mask == 255].tolist()} == {(10, 120, 200)}
    assert {tuple(pixel) for pixel in shown[mask == 0].tolist()} == {(250, 30, 90)}


@given(contrast=st.floats(30, 140), seed=st.integers(0, 999))
def test_colours_differ_by_the_contrast_in_every_channel(contrast: float, seed: int) -> None:
    ink, ground = house._colours(np.random.default_rng(seed), contrast)
    for a, b in zip(ink, ground, strict=True):
        assert contrast - 15 - 1e-9 <= abs(a - b) <= contrast + 15 + 1e-9


# ------------------------------------------------------------------------------------------------------- distortions


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), x=st.floats(-16, 16), y=st.floats(-16, 16))
def test_homography_is_scale_rotation_shear_and_perspective(seed: int, x: float, y: float) -> None:
    look = house.draw_look(np.random.default_rng(seed))
    a, b, c, d, e, f, g, h = house._homography(look)
    u, v = SIDE / 2 + look.shift[0] + x, SIDE / 2 + look.shift[1] + y
    place = np.array([a * u + b * v + c, d * u + e * v + f]) / (g * u + h * v + 1)
    angle = 2 * math.atan(look.turn)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    shear = np.array([[1, look.shear], [0, 1]])
    scale = np.diag([GLYPH / look.height / look.aspect, GLYPH / look.height])
    depth = 1 + look.perspective[0] * x + look.perspective[1] * y
    assert place == pytest.approx(np.array([64, 32]) + scale @ rotation @ shear @ [x, y] / depth)


def test_a_whole_shift_moves_the_picture() -> None:
    still, moved = pixels(5, Look()), pixels(5, Look(shift=(3.0, -1.0)))
    assert np.array_equal(moved[:-1, 3:], still[1:, :-3])


def test_light_is_a_ramp_and_a_shadow_behind_an_edge() -> None:
    """Beside the digit, on a ground of 100: brightness by distance from the centre, pixel by pixel."""
    look = Look(ground=(100, 100, 100), light=(0.01, -0.02), shade=0.5, edge=(1.0, 0.0, 6.0))
    axis = np.arange(SIDE) + 0.5 - SIDE / 2
    expected = 100 * (1 + 0.01 * axis[None, :] - 0.02 * axis[:, None])
    expected *= 1 - 0.5 * np.clip(axis - 6, 0, 1)[None, :]
    blank = pixels(1, Look())[..., 0] == 255
    assert np.abs(pixels(1, look)[..., 0] - expected)[blank].max() <= 0.501


def test_the_digit_throws_its_shadow_to_the_right_and_down() -> None:
    shown = pixels(1, Look(ink=(200, 200, 200), ground=(100, 100, 100), relief=(2, 1)))[..., 0]
    mask = 255 - pixels(1, Look())[..., 0]
    behind = (np.roll(mask, (1, 2), (0, 1)) == 255) & (mask == 0)
    assert behind.any()
    assert set(shown[behind].tolist()) == {60}
    assert set(shown[mask == 255].tolist()) == {200}


def test_noise_has_mean_nought_and_variance_one() -> None:
    noise = house._bell(np.random.default_rng(0), (1000, 1000)).astype(np.float64)
    assert abs(noise.mean()) < 5 / 1000
    assert abs(noise.var() - 1) < 5 * math.sqrt(2) / 1000


def test_fewer_camera_pixels_lose_detail_and_keep_brightness() -> None:
    fine = pixels(8, Look()).astype(float)
    coarse = pixels(8, Look(pixels=16)).astype(float)
    blocks = fine.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(coarse.reshape(16, 2, 16, 2, 3).mean((1, 3)) - blocks).mean() < 10
    assert np.abs(np.diff(coarse, axis=1)).max() < np.abs(np.diff(fine, axis=1)).max()


@pytest.mark.parametrize("change", [{"blur": 1.0}, {"noise": 9.0}, {"jpeg": 30}, {"patches": 20.0}, {"turn": 0.1}])
def test_every_distortion_changes_the_picture(change: dict[str, float]) -> None:
    look = Look(ink=(60, 60, 60), ground=(180, 180, 180))
    assert not np.array_equal(pixels(4, look), pixels(4, replace(look, **change)))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- determinism


def names() -> Iterator[tuple[int, int, int, int]]:
    return (
        (seed, part, index, digit)
        for seed in (0, 2**63 - 1)
        for part in (0, 2)
        for index in range(5)
        for digit in (3, 8)
    )


def test_a_picture_depends_on_its_name_alone() -> None:
    """In order, backwards, over threads, and in a process of its own."""
    first = {name: house.picture(*name) for name in names()}
    assert len(set(first.values())) == len(first)
    backwards = {name: house.picture(*name) for name in reversed(list(first))}
    assert backwards == first
    with ThreadPoolExecutor(4) as threads:
        assert dict(zip(first, threads.map(lambda name: house.picture(*name), first), strict=True)) == first
    program = (
        "import hashlib; from autodo_dist.data.housenumbers import picture;"
        f"print(hashlib.sha256(b''.join(picture(*name) for name in {list(first)})).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert other.stdout.strip() == hashlib.sha256(b"".join(first.values())).hexdigest()


@pytest.mark.skipif(
    (platform.machine(), features.version("freetype2")) != ("x86_64", "2.14.3"), reason="written with that FreeType"
)
def test_the_pictures_are_those_whose_difficulty_was_measured() -> None:
    """A change of what is drawn asks for a new measurement (the module's docstring), then for a new sum here."""
    drawn = b"".join(house.picture(0, part, index, index % 10) for part in (TRAIN, TEST) for index in range(500))
    assert hashlib.sha256(drawn).hexdigest() == "4abfabafce134d42a352a22f016a8b7bd60fec4ecbaab049694542d94178aa96"


def test_pictures_are_colour_pngs_of_32_pixels() -> None:
    shown = np.stack([decoded(house.picture(0, TRAIN, index, index % 10)) for index in range(50)])
    assert shown.shape == (50, SIDE, SIDE, 3)
    assert (shown.std((1, 2, 3)) > 1).all()  # none is blank
    assert len({tuple(pixel) for pixel in shown.mean((1, 2)).round().tolist()}) == 50


def test_a_larger_set_begins_with_the_same_pictures() -> None:
    for balanced in (True, False):
        _, few = house.housenumbers_sources(4, 30, 10, 0.0, balanced=balanced)
        _, many = house.housenumbers_sources(4, 200, 20, 0.0, balanced=balanced)
        longer = {source.key: source for source in many}
        assert all(source.label == longer[source.key].label for source in few)
        assert all(source.read() == longer[source.key].read() for source in few[::7])


# ------------------------------------------------------------------------------------------------------------ labels


def labels(sources: list[Any], *parts: int) -> dict[int, int]:
    return dict(Counter(source.label for source in sources if source.part in parts))


def test_the_default_has_the_class_counts_of_svhn() -> None:
    classes, sources = house.housenumbers_sources(0, house.TRAIN_PICTURES, house.TEST_PICTURES, 0.2, balanced=False)
    assert classes == [str(digit) for digit in range(10)]
    assert len(sources) == 73257 + 26032
    # The labels of torchvision's SVHN(split="train"), counted.
    svhn = {0: 4948, 1: 13861, 2: 10585, 3: 8497, 4: 7458, 5: 6882, 6: 5727, 7: 5595, 8: 5045, 9: 4659}
    assert sum(svhn.values()) == 73257
    assert labels(sources, 0, 1) == svhn
    assert labels(sources, 1) == {digit: round(0.2 * count) for digit, count in svhn.items()}
    for digit, count in labels(sources, TEST).items():
        assert abs(count - 26032 * svhn[digit] / 73257) <= 1


def test_balanced_classes_are_equal_to_the_picture() -> None:
    _, sources = house.housenumbers_sources(0, 1250, 503, 0.2, balanced=True)
    assert labels(sources, 0) == dict.fromkeys(range(10), 100)
    assert labels(sources, 1) == dict.fromkeys(range(10), 25)
    assert labels(sources, TEST) == {digit: 51 if digit < 3 else 50 for digit in range(10)}
    assert len({source.key for source in sources}) == len(sources)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=10), st.data())
def test_every_beginning_of_the_labels_is_as_mixed_as_the_whole(counts: list[int], data: st.DataObject) -> None:
    """At place t of the whole, round(t·n) of a class's n have come; summed over C classes that may be off by C/2."""
    order = house.label_order(tuple(counts))
    assert Counter(order) == Counter(dict(enumerate(counts)))
    length = data.draw(st.integers(0, len(order)))
    for label, count in enumerate(counts):
        share = count / len(order)
        assert abs(order[:length].count(label) - length * share) <= 0.5 + share * len(counts) / 2 + 1e-9


def test_ten_pictures_hold_ten_digits() -> None:
    for balanced in (True, False):
        _, sources = house.housenumbers_sources(0, 10, 0, 0.0, balanced=balanced)
        assert sorted(source.label for source in sources) == list(range(10))


# ----------------------------------------------------------------------------------------------------------- command


def invoke(*words: Any) -> str:
    """Run `autodo pack housenumbers ...` and return what it printed; its exception goes up, as in cli.main."""
    result = CliRunner().invoke(app, ["housenumbers", *(str(word) for word in words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def stored(manifest: Manifest, id_: int) -> bytes:
    with (manifest.root / manifest.shards[manifest.shard_N[id_]].name).open("rb") as file:
        file.seek(manifest.offset_N[id_])
        return file.read(manifest.size_N[id_])


def test_the_command_packs_what_the_sources_hold(tmp_path: Path) -> None:
    words = ("--train", 50, "--test", 20, "--validation-fraction", 0.4, "--shard-samples", 12, "--balanced")
    printed = invoke(tmp_path / "a", *words, "--seed", 5)
    assert "housenumbers, 10 classes, 70 samples, 7 shards" in printed
    manifest = read_manifest(tmp_path / "a")
    check_files(manifest)
    verify_bytes(manifest)
    assert np.bincount(manifest.part_N).tolist() == [30, 20, 20]
    assert manifest.classes == tuple("0123456789")
    assert set(manifest.height_N) == set(manifest.width_N) == {SIDE}
    for part, each in enumerate((3, 2, 2)):
        assert np.bincount(manifest.label_N[manifest.part_N == part]).tolist() == [each] * 10
    for id_ in range(len(manifest)):
        part, index = manifest.keys[id_].as_py().split("-")
        assert stored(manifest, id_) == house.picture(5, PARTS.index(part), int(index), int(manifest.label_N[id_]))
    invoke(tmp_path / "b", *words, "--seed", 5)
    invoke(tmp_path / "c", *words, "--seed", 6)
    assert read_manifest(tmp_path / "b").checksum == manifest.checksum != read_manifest(tmp_path / "c").checksum


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--train", 9), "--train 9 cannot hold ten classes; give 10 or more"),
        (("--train", -1), "--train -1 cannot hold ten classes"),
        (("--train", 10, "--test", -5), "--test -5; give 0 or more"),
        (("--train", 10, "--test", 0, "--validation-fraction", 1), "class '0' has no picture in train"),
    ],
)
def test_bad_numbers_are_one_line(tmp_path: Path, words: tuple[Any, ...], said: str) -> None:
    with pytest.raises(AutodoError, match=said) as caught:
        invoke(tmp_path / "out", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_settings_normalise_by_the_mean_and_deviation_of_the_pictures() -> None:
    data = load_config(ROOT / "configs" / "housenumbers.yaml", []).data
    shown = np.stack([decoded(house.picture(1, TRAIN, index, index % 10)) for index in range(1000)]) / 255
    assert shown.mean((0, 1, 2)) == pytest.approx(data.mean, abs=0.03)
    assert shown.std((0, 1, 2)) == pytest.approx(data.std, abs=0.03)
