"""Files that take another's place whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from invdpo.files import mirror, replace_when_done


def test_a_mirror_of_its_own_link_leaves_nothing_behind(tmp_path: Path) -> None:
    """A finished run is brought to its place again: source and target are then one file under two names."""
    source, target = tmp_path / "state", tmp_path / "run"
    source.write_text("rows")
    os.link(source, target)
    mirror(source, target)
    mirror(source, target)
    assert {path.name for path in tmp_path.iterdir()} == {"state", "run"}
    assert target.read_text() == "rows"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(ValueError, match="half-way"), replace_when_done(path) as temporary:
        temporary.write_text("new")
        raise ValueError("half-way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
