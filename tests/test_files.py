"""A file is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from autodo_dist.files import own_partial, whole, write_text


def break_off(path: Path, partial: Path | None) -> None:
    with whole(path, partial) as file:
        file.write_text("half")
        raise ZeroDivisionError


@pytest.mark.parametrize("several", [False, True])
def test_a_file_that_breaks_off_leaves_the_old_one_and_nothing_else(tmp_path: Path, several: bool) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError):
        break_off(path, own_partial(path) if several else None)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "old")]
    with whole(path, own_partial(path) if several else None) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "new")]
