"""The report: its facts against what runs wrote by other ways, what it does without them, and that names stay text."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shutil
import statistics
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from test_autodo import learning
from test_train import run_train, settings
from typer.testing import CliRunner

from autodo_dist import label_errors, ledger
from autodo_dist.cli import app
from autodo_dist.data import order, pil
from autodo_dist.data.shards import Shards
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, read_json_lines
from autodo_dist.learnt import Columns, Numbers
from autodo_dist.method import warp
from autodo_dist.parallel.checkpoint_header import write_header
from autodo_dist.report import charts, facts, learnings, pictures
from autodo_dist.report.learnings import Learnt
from autodo_dist.report.page import write_report

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"'&quot;`${1}`{{ 7 * 7 }}",
    "👩‍🔬 école",
    "שלום \u202e abc",
    "long " + "x" * 300,
    "line\u2028separator\nand\x0bcontrol",
    "$\\frac{1}{0}$",
]


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every group per sample, and noisy labels."""
    return run_train(learning(digits, tmp_path_factory.mktemp("report"), data__label_noise=0.3))


@pytest.fixture(scope="module")
def learnt(run: Path) -> Learnt:
    return learnings.read_learnt(run, None, [])


@pytest.fixture(scope="module")
def labels(run: Path) -> list[dict[str, str]]:
    """What the run wrote from its memory."""
    with (run / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """The page's elements and texts, as a browser's parser divides them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def made(run: Path, out: Path, *words: object) -> str:
    """The page that the command makes, which must end well."""
    result = CliRunner().invoke(app, ["report", str(run), "--out", str(out), *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return out.read_text()


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run in which something may be broken."""
    return Path(shutil.copytree(run, folder / run.name))


def test_curves_are_those_of_the_lines(run: Path) -> None:
    """Six steps of 100 pictures an epoch and a line after four: weights 4 and 2."""
    rows = read_json_lines(run / "metrics.jsonl")
    found = facts.read_run(run)
    assert [point["epoch"] for point in found.points] == [1, 2]
    for point in found.points:
        task = [row for row in rows if row["kind"] == "task" and point["epoch"] - 1 < row["epoch"] <= point["epoch"]]
        assert len(task) == 2
        for name, of in (("train_loss", lambda row: row["loss"]), ("train_error", lambda row: 1 - row["accuracy"])):
            assert point[name] == pytest.approx((4 * of(task[0]) + 2 * of(task[1])) / 6, rel=1e-9)
        (evaluation,) = [row for row in rows if row["kind"] == "evaluation" and row["epoch"] == point["epoch"]]
        assert point["test_loss"] == evaluation["test_loss"]
        assert point["validation_error"] == 1 - evaluation["validation_accuracy"]
        per_class = evaluation["test_accuracy_per_class"]
        assert point["test_error_per_class"] == {name: 1 - value for name, value in per_class.items()}
    before, end = found.class_errors()
    assert (before, end) == tuple(point["test_error_per_class"] for point in found.points)
    assert (found.state, found.start_epoch, found.missing) == ("finished", 1, [])
    assert found.seconds == read_json(run / "summary.json")["seconds"]


def test_the_pace_counts_hyper_passes() -> None:
    """1,000 pictures in 10 s, then as many in 10 s and a hyper pass of 15 s."""
    rows = [
        {"kind": "task", "epoch": 1.0, "seconds": 10.0, "images_per_second": 100.0},
        {"kind": "hyper", "epoch": 1.0, "seconds": 15.0, "images_per_second": 66.0},
        {"kind": "task", "epoch": 2.0, "seconds": 10.0, "images_per_second": 100.0},
    ]
    assert facts.pace(rows, 1) == pytest.approx((10.0, 25.0))
    assert facts.pace(rows[:1], 1) is None


def test_classes_and_pairs_are_those_of_labels_csv(learnt: Learnt, labels: list[dict[str, str]]) -> None:
    rows = dict(zip(learnt.classes, learnings.by_class(learnt), strict=True))
    manifest = learnt.source.manifest
    for name, row in rows.items():
        mine = [line for line in labels if line["given_label"] == name]
        wrong = [manifest.classes[manifest.label_N[int(line["id"])]] != name for line in mine]
        assert row.samples == len(mine)
        assert row.wrong == pytest.approx(sum(wrong) / len(mine))
        assert row.changed == pytest.approx(sum(line["suggested_label"] != name for line in mine) / len(mine))
        for values, kept in ((row.weights, None), (row.clean_weights, False), (row.wrong_weights, True)):
            weights = [
                float(line["weight"]) for line, is_wrong in zip(mine, wrong, strict=True) if kept in (None, is_wrong)
            ]
            if len(weights) > 1:
                twentieths = statistics.quantiles(weights, n=20, method="inclusive")
                assert values == pytest.approx([twentieths[at] for at in (0, 4, 9, 14, 18)], rel=1e-5)
    pairs = Counter((line["given_label"], line["suggested_label"]) for line in labels)
    assert {(a, b): count for a, b, count in learnings.changed_pairs(learnt.columns, learnt.classes)} == {
        pair: count for pair, count in pairs.items() if pair[0] != pair[1]
    }
    edges, groups = learnings.weight_shares(learnt)
    assert [name for name, _ in groups] == ["label as packed", "label is wrong"]
    assert [share.sum() for _, share in groups] == pytest.approx([1, 1])
    light = sum(row["weight"] != "" and float(row["weight"]) < edges[5] for row in labels) / len(labels)
    wrong_share = float(learnt.wrong_N.mean()) if learnt.wrong_N is not None else 0.0
    both = [share[:5].sum() for _, share in groups]
    assert (1 - wrong_share) * both[0] + wrong_share * both[1] == pytest.approx(light, abs=2 / len(labels))


def test_suspects_are_those_with_the_highest_scores(
    learnt: Learnt, labels: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(columns: Columns) -> Numbers:
        return np.where(columns.id_N == columns.id_N[5], np.nan, np.sin(columns.id_N)).astype(np.float32)

    monkeypatch.setattr(label_errors, "scores", scores)
    found, share = learnings.suspects(learnt, 50)
    ids = sorted((int(line["id"]) for line in labels if line is not labels[5]), key=lambda id_: -math.sin(id_))[:50]
    assert [each.id for each in found] == ids
    by_id, manifest = {int(line["id"]): line for line in labels}, learnt.source.manifest
    wrong = 0
    for each in found:
        line = by_id[each.id]
        assert (each.key, each.given, each.suggested) == (line["key"], line["given_label"], line["suggested_label"])
        assert each.weight == pytest.approx(float(line["weight"]), rel=1e-5)
        assert each.probability == pytest.approx(float(line["suggested_probability"]), rel=1e-5)
        wrong += manifest.classes[manifest.label_N[each.id]] != each.given
    assert share == wrong / 50
    assert len(learnings.suspects(learnt, 10**6)[0]) == len(labels) - 1  # not the one whose score is no number


def opened(uri: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_pictures_are_those_of_the_data_set(learnt: Learnt) -> None:
    ids = learnt.source.split.train[[3, 70, 400]]
    encoded = Shards(learnt.source.manifest).read(ids.tolist())
    for uri, each in zip(pictures.thumbnails(Shards(learnt.source.manifest), ids.tolist()), encoded, strict=True):
        assert uri is not None
        assert np.array_equal(opened(uri), pil.decode(each.tobytes()))
    assert pictures.thumbnail(np.frombuffer(b"no picture", np.uint8)) is None
    large = io.BytesIO()
    Image.new("RGB", (640, 480), (200, 30, 30)).save(large, "JPEG")
    uri = pictures.thumbnail(np.frombuffer(large.getvalue(), np.uint8))
    assert uri is not None
    assert opened(uri).shape == (84, 112, 3)


def test_the_contact_sheet_does_what_was_learnt(learnt: Learnt) -> None:
    """Each draw's operations, worked out number by number, and the pictures where nothing was drawn."""
    source = learnt.source
    ids = source.split.train[[3, 70, 400]]
    rows = source.layout.split(source.reader.rows("hyper.rows.value", np.array([3, 70, 400])).double())
    unchanged = 0
    for at, sample in enumerate(pictures.sheet(source, ids)):
        assert sample.id == ids[at]
        assert sample.pictures[0].operations == {}
        gates, magnitudes = rows["gate_logit"][at].tolist(), rows["magnitude_logit"][at].tolist()
        assert list(sample.probability.values()) == pytest.approx([1 / (1 + math.exp(-g)) for g in gates], rel=1e-5)
        for number, drawn in enumerate(sample.pictures[1:]):
            noise = order.stream(source.config.train.seed, number, "task", sample.id).random(14).astype(np.float32)
            expected = {
                name: statistics.NormalDist().inv_cdf(float(noise[7 + k])) / (1 + math.exp(-magnitudes[k])) * reach
                for k, (name, reach) in enumerate(zip(warp.AFFINE, warp.RANGES, strict=False))
                if gates[k] + math.log(noise[k] / (1 - noise[k])) > 0
            }
            assert drawn.operations == pytest.approx(expected, rel=1e-4, abs=1e-6)
            same = np.array_equal(opened(drawn.picture), opened(sample.pictures[0].picture))
            assert same == (not expected)
            unchanged += same
    assert unchanged > 0
    one = pil.decode(Shards(source.manifest).read([int(ids[0])])[0].tobytes())
    shown = opened(pictures.sheet(source, ids[:1])[0].pictures[0].picture)
    assert shown.shape == (16, 16, 3)
    assert abs(shown.mean() - one.mean()) < 2  # resized


def test_a_fork_begins_where_it_left_the_other(digits: Path, tmp_path: Path) -> None:
    plain = run_train(settings(digits, tmp_path, run__name="plain"))
    fork = run_train(learning(digits, tmp_path, run__name="fork", run__fork=f"{plain}@6"))
    points, others = facts.read_run(fork).points, facts.read_run(plain).points
    assert [point["epoch"] for point in points] == [1, 2]
    assert points[0] == others[0]
    assert points[1] != others[1]
    differing = dict(facts.differing([facts.read_run(plain), facts.read_run(fork)]))
    assert differing["run.fork"] == ["", f"{plain}@6"]
    assert differing["learn.weight"] == [False, True]
    assert not {"run.name", "optim.lr"} & differing.keys()
    out = tmp_path / "report.html"
    missing = write_report([plain, fork, plain], out, most_suspects=10)
    assert [line for line in missing if "fork" in line] == []
    assert out.read_text().count('class="run" id=') == 2
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(fork, moved / "fork")
    shutil.move(plain, tmp_path / "gone")
    told = facts.read_run(moved / "fork")
    assert [point["epoch"] for point in told.points] == [2]
    assert any("forked from is not at" in line for line in told.missing)


def test_shared_augmentation_alone(digits: Path, tmp_path: Path) -> None:
    """One row for all samples, as `autodo rows` shows it, and no suspicion."""
    only = {"learn__augment": "shared", "learn__weight": False, "learn__soft_label": False}
    run = run_train(learning(digits, tmp_path, **only))
    text = made(run, tmp_path / "report.html")
    assert "no label is suspected" in text
    assert 'class="gallery"' not in text
    shared = learnings.read_learnt(run, None, []).source.shared()
    assert shared is not None
    shown = re.findall(r'title="all samples, (\w+): (probability|magnitude) ([\d.]+)"', text)
    assert len(shown) == 14
    for operation, kind, value in shown:
        assert float(value) == pytest.approx(shared[operation][kind], abs=5e-5)


def without_tables(run: Path) -> str:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["learn"] |= {"augment": "none", "weight": False, "soft_label": False}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return "learns nothing of its samples"


def without_test(run: Path) -> str:
    rows = read_json_lines(run / "metrics.jsonl")
    for row in rows:
        row |= {name: None for name in row if name.startswith("test_")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "The test part was not evaluated"


def under_way(run: Path) -> str:
    (run / "summary.json").unlink()
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: len(text) - 40])
    (run / "lock.1.json").write_text("{}")
    start = next(it for it in ledger.read(run) if it["event"] == "start")
    ledger.add(run, start | {"time": time.time()})
    return ""


def before_the_first_evaluation(run: Path) -> str:
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    return "no checkpoint yet"


def older(run: Path) -> str:
    """Another version's settings, lines and files."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["learn"]["colour"] = tree["learn"].pop("color")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    rows = [{"step": 3}, {"kind": "task", "epoch": "one"}, {"kind": "evaluation", "epoch": 1, "test_accuracy": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[]\n")
    (run / "environment.json").unlink()
    (run / "ledger.jsonl").unlink()
    (run / "summary.json").write_text('{"seconds": 7}')
    return "unknown key learn.colour"


def broken_yaml(run: Path) -> str:
    (run / "config.yaml").write_text("a: [")
    return "config.yaml cannot be read"


def another_checkpoint_format(run: Path) -> str:
    for path in (run / "checkpoints").iterdir():
        header = read_json(path / "checkpoint.json")
        header.pop("sha256")
        write_header(path, header | {"format": 99})
    return "is newer than"


def data_gone(run: Path) -> str:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["root"] = "/nowhere"
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return "data /nowhere: no such folder"


@pytest.mark.parametrize(
    "change",
    [
        without_tables,
        without_test,
        under_way,
        before_the_first_evaluation,
        older,
        broken_yaml,
        another_checkpoint_format,
        data_gone,
    ],
)
def test_the_page_is_made_with_what_there_is(run: Path, tmp_path: Path, change: Any) -> None:
    broken = copied(run, tmp_path)
    says = change(broken)
    text = made(broken, tmp_path / "report.html", "--suspects", 5)
    boxes = re.findall(r'<aside class="missing".*?</aside>', text, re.S)
    assert len(boxes) == bool(says)
    assert says in "".join(boxes)
    assert ('class="gallery"' in text) == (change in (under_way, without_test))
    if change is under_way:
        assert 'class="state running"' in text


def test_data_that_was_moved_is_found(run: Path, digits: Path, tmp_path: Path) -> None:
    broken = copied(run, tmp_path)
    data_gone(broken)
    text = made(broken, tmp_path / "report.html", "--data", "/nowhere", "--data", digits, "--suspects", 3)
    assert "Not on this page" not in text
    assert len(json.loads(re.findall(r'id="galleries">(.*?)</script>', text)[0])[0]["suspects"]) == 3


def test_pictures_that_are_gone(run: Path, digits: Path, tmp_path: Path) -> None:
    """The manifest is there, tars are not: labels are shown without pictures."""
    broken, data = copied(run, tmp_path), Path(shutil.copytree(digits, tmp_path / "data"))
    for tar in data.glob("*.tar"):
        tar.unlink()
    data_gone(broken)
    text = made(broken, tmp_path / "report.html", "--data", data, "--suspects", 3)
    assert text.count("Pictures are not shown.") == 1
    assert json.loads(re.findall(r'id="galleries">(.*?)</script>', text)[0])[0]["suspects"][0]["picture"] is None


def test_only_no_run_is_an_error(tmp_path: Path, run: Path) -> None:
    with pytest.raises(AutodoError, match="no run there") as caught:
        made(tmp_path / "none", tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    with pytest.raises(AutodoError, match="cannot be written"):
        made(run, tmp_path / "no/such/report.html", "--suspects", 0)


def test_names_stay_text(tmp_path: Path) -> None:
    """Class names, settings and a run's own name, in a page without scripts of theirs."""
    folder = tmp_path / HOSTILE[2].replace("/", "")
    folder.mkdir()
    settings_ = {"model": {"name": HOSTILE[0]}, "data": {"root": HOSTILE[1]}, "run": {"fork": ""}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings_))
    accuracy = {name: 0.1 * at for at, name in enumerate(HOSTILE)}
    line = {
        "kind": "evaluation",
        "epoch": 1,
        "test_accuracy": 0.5,
        "test_loss": 1.0,
        "test_accuracy_per_class": accuracy,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(made(folder, tmp_path / "report.html"))
    assert page.tags["script"] == 2
    assert page.tags["img"] == 0
    assert not {name for name in page.attributes if name.startswith("on")}
    for name in HOSTILE:
        assert name in page.texts
    assert not any(text.strip() == "49" for text in page.texts)


def test_charts_have_ids_of_their_own_and_tooltips() -> None:
    lines = [charts.Line("a<b>", 0, [1, 2, 3], [3.0, 2.0, 1.0], 1), charts.Line("$x$", 1, [2, 3], [2.0, 1.0])]
    first = charts.curves("one", "error, %", lines, "%", alone=False)
    second = charts.boxes("two", "weight", [("<&>", [charts.Box("all", 0, [0.1, 0.2, 0.3, 0.4, 0.5])])])
    ids = re.findall(r'\bid="([^"]+)"', first + second)
    assert len(ids) == len(set(ids))
    assert all(id_.startswith(("one", "two")) for id_ in ids)
    for target in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', first + second):
        assert (target[0] or target[1]) in ids
    assert "<title>a&lt;b&gt;, epoch 2: 2%</title>" in first
    assert ">$x$</text>" in first
    assert "<title>&lt;&amp;&gt;, all: median 0.3, half within 0.2 to 0.4</title>" in second
    assert not re.search(r"#0[0-9a-f]{5}\b", first + second)  # all colours are the style sheet's
    assert "var(--series-1)" in first
