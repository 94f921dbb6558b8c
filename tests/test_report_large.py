"""The report of a run of 1,000 classes, as the benchmark makes it: the telling classes in charts, all in tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from autodo_dist.report import learnings
from autodo_dist.report.page import write_report
from benchmarks import report


def test_a_thousand_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PICTURES", 3)
    run, out = report.make_run(tmp_path, 3000), tmp_path / "report.html"
    assert write_report([run], out, most_suspects=40) == []
    text = out.read_text()
    classes = text[text.index('<section id="run0-classes"') : text.index('<section id="run0-labels"')]
    assert len(re.findall(r'<tr><th scope="row">', classes)) == 1000
    assert len(re.findall(r"<title>[^<]* % at the end</title>", classes)) == 20
    gates = text[text.index('<section id="run0-augmentation"') : text.index('<section id="run0-cost"')]
    assert len(re.findall(r'<td class="heat', gates)) == 20 * 14
    assert len(re.findall(r'class="strip"', gates)) == 8
    (gallery,) = json.loads(re.findall(r'id="galleries">(.*?)</script>', text)[0])
    assert len(gallery["suspects"]) == 40
    assert len({it["picture"] for it in gallery["suspects"]}) == 3  # thumbnails of what is shown alone
    learnt = learnings.read_learnt(run, None, [])
    changed = learnt.columns.learnt_N != learnt.columns.given_N
    assert learnt.wrong_N is not None
    assert learnt.wrong_N.mean() == pytest.approx(0.1, abs=0.02)
    assert 0.03 < np.mean(changed) < 0.07  # half of the wrong ones, as made
    assert not np.any(changed & ~learnt.wrong_N)
