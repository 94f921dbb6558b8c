"""The report in a real browser: headless Chromium, one for all tests, which may ask no host for anything."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from test_autodo import learning
from test_report import HOSTILE
from test_train import run_train

from autodo_dist.data.manifest import read_manifest, write_manifest
from autodo_dist.report.page import write_report

sync_api = pytest.importorskip("playwright.sync_api")
SUSPECTS = 100
# What is in a page, measured as it is laid out.
CHARTS = """() => [...document.querySelectorAll('svg.chart')].map(chart => {
    const marks = [...chart.querySelectorAll('path, use')].map(it => it.getBoundingClientRect());
    const box = chart.getBoundingClientRect();
    return {name: chart.getAttribute('aria-label'), width: box.width, height: box.height,
            marks: marks.filter(it => it.width + it.height > 1).length, tips: chart.querySelectorAll('title').length};
})"""


@pytest.fixture(scope="session")
def chromium() -> Iterator[sync_api.Browser]:
    """The machine's Chromium; without one these tests are skipped, or fail where AUTODO_REQUIRE_BROWSER is 1."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        said = "no Chromium here; get it, as root: apt-get install --no-install-recommends chromium (or make browser)"
        if os.environ.get("AUTODO_REQUIRE_BROWSER") == "1":
            pytest.fail(said)
        pytest.skip(said)
    with sync_api.sync_playwright() as playwright:
        # The page is our own and asks no host; a container's root has no sandbox.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def data(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits under names that would do harm as HTML."""
    root = Path(shutil.copytree(digits, tmp_path_factory.mktemp("names") / "digits"))
    manifest = read_manifest(root)
    samples = pyarrow.parquet.read_table(root / "samples.parquet")
    keys = [f"{HOSTILE[at % len(HOSTILE)]} {at}" for at in range(len(manifest))]
    samples = samples.set_column(samples.schema.get_field_index("key"), "key", pa.array(keys))
    classes = [*HOSTILE, *manifest.classes[len(HOSTILE) :]]
    write_manifest(root, "names", classes, list(manifest.shards), samples, {})
    return root


@pytest.fixture(scope="module")
def page_file(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run whose classes are named so."""
    folder = tmp_path_factory.mktemp("page")
    out = folder / "report.html"
    write_report([run_train(learning(data, folder, data__label_noise=0.3))], out, most_suspects=SUSPECTS)
    return out


class Opened:
    """A page in a window of this width; what it did that it may not is in `faults`."""

    def __init__(self, browser: sync_api.Browser, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        self.page, self.faults, self.file = self.context.new_page(), [], file
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda said: self.faults.append(f"console: {said.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", self._asked)
        self.page.goto(file.as_uri())

    def _asked(self, request: sync_api.Request) -> None:
        if request.url.partition("#")[0] != self.file.as_uri() and not request.url.startswith(("data:", "blob:")):
            self.faults.append(f"request: {request.url[:100]}")


@pytest.fixture
def opened(chromium: sync_api.Browser, page_file: Path) -> Iterator[Opened]:
    """The page in a window of its own."""
    window = Opened(chromium, page_file)
    yield window
    assert window.faults == []
    window.context.close()


def tiles(page: sync_api.Page) -> list[dict[str, str]]:
    """The tiles that are shown, as a reader sees them."""
    found: list[dict[str, str]] = page.eval_on_selector_all(
        ".tile",
        """tiles => tiles.map(it => ({id: it.dataset.id, key: it.querySelector('.key').textContent,
            given: it.querySelector('.given').textContent, facts: it.querySelector('.facts').textContent,
            suggested: (it.querySelector('.suggested') ?? it.querySelector('.given')).textContent,
            new: it.querySelector('.new').value, ticked: it.querySelector('[type=checkbox]').checked}))""",
    )
    return found


def test_charts_are_there(opened: Opened) -> None:
    found = opened.page.evaluate(CHARTS)
    names = [chart["name"].partition(":")[0].partition(",")[0] for chart in found]
    assert names == ["error", "loss", "test error", "weight of a sample", "weight of a sample"]
    for chart in found:
        assert chart["width"] > 300, chart
        assert chart["height"] > 150, chart
        assert chart["marks"] > 10, chart
        assert chart["tips"] > 1, chart
    assert opened.page.locator("#run0-augmentation .heat").count() == 2 * 7 * 10
    images = opened.page.locator(".sheet img")
    assert images.count() == 6 * 8
    images.last.scroll_into_view_if_needed()
    sync_api.expect(images.last).to_have_js_property("naturalWidth", 16)


def test_names_are_text_in_the_gallery(opened: Opened) -> None:
    shown = tiles(opened.page)
    assert {re.sub(r" \d+$", "", each["key"]) for each in shown} <= set(HOSTILE)
    assert len({each["given"] for each in shown} & set(HOSTILE)) > 3
    assert opened.page.locator("script").count() == 2
    first = opened.page.locator(".tile img").first
    sync_api.expect(first).to_have_js_property("naturalWidth", 32)
    assert first.get_attribute("alt") == f"picture {shown[0]['key']}"


def test_gallery_sorts_and_filters(opened: Opened) -> None:
    page = opened.page

    def numbers(name: str) -> list[float]:
        return [float(re.findall(rf"{name} (-?[\d.]+)", each["facts"])[0]) for each in tiles(page)]

    assert numbers("score") == sorted(numbers("score"), reverse=True)
    assert len(numbers("score")) == 48
    page.get_by_role("button", name="Show more").click()
    page.get_by_role("button", name="Show more").click()
    assert len(numbers("score")) == SUSPECTS
    assert numbers("score") == sorted(numbers("score"), reverse=True)
    page.get_by_label("sort by", exact=True).select_option("weight, lowest first")
    assert numbers("weight") == sorted(numbers("weight"))
    page.get_by_label("sort by", exact=True).select_option("id")
    ids = [int(each["id"]) for each in tiles(page)]
    assert ids == sorted(ids)
    wanted = tiles(page)[0]["given"]
    page.get_by_label("given", exact=True).select_option(f"={wanted}")
    assert {each["given"] for each in tiles(page)} == {wanted}
    assert f"of {len(tiles(page))} shown" in page.locator(".count").inner_text()
    page.get_by_label("given", exact=True).select_option("")
    assert len(tiles(page)) == 48


def test_ticks_survive_a_reload_and_are_downloaded(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    assert page.locator(".download").is_disabled()
    shown = tiles(page)
    page.locator(".tile [type=checkbox]").nth(2).focus()
    page.keyboard.press("Space")
    page.locator(".tile img").nth(5).click()
    page.locator(".tile .new").nth(5).fill("8")
    page.locator(".tile .new").nth(2).fill(HOSTILE[2])
    page.locator(".tile [type=checkbox]").nth(7).check()
    page.locator(".tile .new").nth(7).fill("no class")
    page.keyboard.press("Tab")
    page.reload()
    assert [at for at, each in enumerate(tiles(page)) if each["ticked"]] == [2, 5, 7]
    assert "3 ticked, 1 without a new label" in page.locator(".count").inner_text()
    with page.expect_download() as download:
        page.locator(".download").click()
    download.value.save_as(tmp_path / "ticks.csv")
    with (tmp_path / "ticks.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # HTML takes line breaks out of a text box, not out of a key.
    assert rows == [
        {"id": it["id"], "key": it["key"], "given_label": it["given"], "new_label": label}
        for it, label in ((shown[2], HOSTILE[2]), (shown[5], "8"))
    ]
    page.get_by_role("button", name="Select all shown").click()
    assert sum(each["ticked"] for each in tiles(page)) == 48
    page.get_by_role("button", name="Clear ticks").click()
    page.reload()
    assert not any(each["ticked"] for each in tiles(page))


def test_storage_that_is_refused_is_said(chromium: sync_api.Browser, page_file: Path) -> None:
    window = Opened(chromium, page_file)
    window.context.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    window.page.reload()
    assert "does not let the page keep ticks" in window.page.locator(".storage").inner_text()
    window.page.locator(".tile [type=checkbox]").first.check()
    assert "1 ticked" in window.page.locator(".count").inner_text()
    assert window.faults == []
    window.context.close()


def test_tables_sort_and_filter(opened: Opened) -> None:
    page = opened.page
    table = page.locator("#run0-classes table")

    def column(number: int) -> list[float]:
        texts = table.locator(f"tbody tr td:nth-of-type({number})").all_inner_texts()
        return [float(text.rstrip(" %")) for text in texts]

    table.get_by_role("button", name="train samples").click()
    assert column(1) == sorted(column(1), reverse=True)
    table.get_by_role("button", name="train samples").click()
    assert column(1) == sorted(column(1))
    table.get_by_role("button", name="error at the end").click()
    assert column(3) == sorted(column(3), reverse=True)
    page.locator("#run0-settings summary").click()
    page.get_by_role("searchbox", name="filter by setting").fill("hyper.start")
    assert page.locator("#run0-settings tbody tr:visible").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_window_holds_the_page(
    chromium: sync_api.Browser, page_file: Path, digits: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    """Nothing is cut off at the side, and letters stand out from what is behind them (WCAG's 4.5 to 1)."""
    window = Opened(chromium, page_file, width, scheme)
    assert window.page.evaluate("document.documentElement.scrollWidth") == width
    contrast = window.page.evaluate(
        """() => {
        const light = text => {
            const [r, g, b] = text.match(/[\\d.]+/g).map(it => it / 255)
                .map(it => it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const back = light(getComputedStyle(document.body).backgroundColor);
        const ratio = it => { const front = light(it);
            return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05); };
        const shown = ['.note', '.chart text', 'h2', 'nav a'].map(it => getComputedStyle(document.querySelector(it)));
        return [back, ...shown.map((it, at) => ratio(at === 1 ? it.fill : it.color))];
    }"""
    )
    assert (contrast[0] < 0.1) == (scheme == "dark")
    assert min(contrast[1:]) > 4.5
    assert window.faults == []
    window.context.close()


def test_several_runs(chromium: sync_api.Browser, page_file: Path, digits: Path, tmp_path: Path) -> None:
    """A run beside one of another data set, which suggests no label: six charts, a curve each, two galleries."""
    only = {"run__name": "weights", "learn__augment": "shared", "learn__soft_label": False}
    weights = run_train(learning(digits, tmp_path, **only))
    (weights / "predictions.safetensors").unlink()  # with it labels would be suggested by the model
    out = tmp_path / "report.html"
    write_report([page_file.parent / "run", weights], out, most_suspects=5)
    for width in (1280, 390):
        window = Opened(chromium, out, width)
        assert window.page.evaluate("document.documentElement.scrollWidth") == width
        curves = [chart for chart in window.page.evaluate(CHARTS) if " over epochs: run, weights" in chart["name"]]
        assert len(curves) == 6
        assert all(chart["tips"] == 2 * (2 + 1) for chart in curves)  # two points, and where hyper steps begin
        assert "learn.soft_label" in window.page.locator("#differing").inner_text()
        assert window.page.locator("#run1-augmentation tbody tr").count() == 1
        assert window.page.locator("#run1 .tile .suggested").count() == 0
        window.page.locator("#run1 .tile [type=checkbox]").first.check()
        assert "1 ticked, 1 without a new label" in window.page.locator("#run1 .count").inner_text()
        window.page.locator("#run1 .new").first.fill("3")
        window.page.keyboard.press("Tab")
        assert "1 ticked ·" in window.page.locator("#run1 .count").inner_text()
        assert "0 ticked" in window.page.locator("#run0 .count").inner_text()
        assert window.faults == []
        window.context.close()
