"""The benchmark of the rivals: what its table says of given outcomes, and a short run of it."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from autodo_dist.errors import AutodoError
from autodo_dist.experiment.rivals import RIVALS, Outcome
from benchmarks import rivals
from benchmarks.rivals import ALL, CASES, PLAIN, Cell, cells, figures, table

NOISE, IMBALANCE = CASES


def outcomes(errors: dict[str, tuple[float, float]]) -> dict[Cell, Outcome]:
    """Of two seeds, with these test errors (percent) by method and 10 for the others; a minute each."""
    found = {}
    for cell in cells(2):
        error = errors.get(cell.method, (10.0, 10.0))[cell.seed]
        found[cell] = Outcome(1 - error / 100, 1.0, 3e9 if cell.method == "meta_weight_net" else 1e9, 60.0)
    return found


def test_every_rival_is_tried() -> None:
    assert {name for _, names in CASES.values() for name in names} == set(RIVALS)


def test_a_trend_shows_below_the_standard_error_of_paired_differences() -> None:
    """Plain 10 and 12. ELR −2 and −4: mean −3, standard error 1. SOP −1 and +2. MWN −4 and +1: mean −1.5, error 2.5."""
    done = outcomes({PLAIN: (10.0, 12.0), "elr": (8.0, 8.0), "sop": (9.0, 14.0), "meta_weight_net": (6.0, 13.0)})
    rows = {row["name"]: row for row in figures(2, done)}
    for method, mean, error, holds in (
        ("elr", -3, 1, True),
        ("sop", 0.5, 1.5, False),
        ("meta_weight_net", -1.5, 2.5, False),
    ):
        row = rows[f"test error, {NOISE}, {method} - plain"]
        assert (row["value"], row["standard_error"]) == pytest.approx((mean, error))
        assert row["holds"] is holds
    assert rows[f"test error, {NOISE}, {ALL} - plain"]["holds"] is None
    assert rows[f"operations, {IMBALANCE}, meta_weight_net"]["value"] == pytest.approx(3)
    assert rows["time of training"]["value"] == len(done)
    shown = table(list(rows.values()), 2)
    assert f"| {NOISE}: elr | 8.00 ± 0.00 % | -3.00 ± 1.00 % | 1.00 | shows |" in shown
    assert f"| {NOISE}: sop | 11.50 ± 3.54 % | +0.50 ± 1.50 % | 1.00 | **not reproduced** |" in shown


def test_it_trains_and_goes_on(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain training and a rival; the second call only reads, other settings are refused."""
    monkeypatch.setattr(rivals, "CASES", {NOISE: (CASES[NOISE][0], ("elr",))})
    monkeypatch.setattr(rivals, "ProcessPoolExecutor", lambda *_, **__: Here())
    file = tmp_path / "rows.json"
    call = functools.partial(rivals.main, root=tmp_path, data=digits, seeds=2, jobs=1, quick=True, json_file=file)
    call(words=[])
    shown = capsys.readouterr().out
    lines = (tmp_path / "quick" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 6
    cell = {"case": NOISE, "method": PLAIN, "seed": 0}
    (first,) = [found for found in map(json.loads, lines) if found["cell"] == cell]
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    error = 100 * (1 - first["outcome"]["test_accuracy"])
    assert rows[f"test error, {NOISE}, {PLAIN}"]["seeds"][0] == pytest.approx(error)
    with monkeypatch.context() as nothing_starts:
        nothing_starts.setattr(rivals, "train", None)
        call(words=[])
    assert capsys.readouterr().out == shown
    with pytest.raises(AutodoError, match=r"results\.jsonl: made with other settings"):
        call(words=["optim.lr=0.1"])


class Here(ProcessPoolExecutor):
    """A pool that works at once, in this process."""

    def __init__(self) -> None:
        super().__init__(1)

    def submit(self, work, *arguments, **_):  # type: ignore[no-untyped-def,override]
        from concurrent.futures import Future

        future: Future[object] = Future()
        future.set_result(work(*arguments))
        return future
