"""The committed tables, figures and verdicts are what the committed scores give."""

from __future__ import annotations

from pathlib import Path

import pytest

from invdpo.evidence import rebuild

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path.parent.name for path in (ROOT / rebuild.REFERENCE).glob("*/provenance.json"))


@pytest.mark.parametrize("study", STUDIES)
def test_published_evidence_is_made_again_byte_for_byte(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures as well: matplotlib is given no dates, ids or fonts that differ between two runs."""
    monkeypatch.chdir(ROOT)
    found = rebuild.rebuild(study, tmp_path / "again")
    assert found.same, found.text()
    assert {"tables/table1.csv", "tables/costs.csv", "costs.json", "figures/fig3.pdf", "figures/fig1.png"} <= set(
        found.equal
    )
