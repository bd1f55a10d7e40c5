"""What a run says at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from invdpo.config import StudyConfig
from invdpo.files import write_json
from invdpo.places import places


def test_only_what_is_there_is_named(tiny_study: Callable[..., StudyConfig]) -> None:
    study = tiny_study()
    assert places(study) == "\ntiny has no results yet: make reproduce STUDY=tiny"
    (study.root / "tables").mkdir(parents=True)
    lines = places(study).splitlines()
    assert lines[1] == "Results of tiny:" and "results/tiny/tables: csv, md, tex" in lines[2]
    assert len(lines) == 4 and "snakemake_report.html: make report STUDY=tiny writes it" in lines[3]
    (study.root / "snakemake_report.html").write_text("")
    (study.root / "report.html").write_text("")
    lines = places(study).splitlines()
    assert lines[2].startswith("  results/tiny/report.html: open it in a browser") and len(lines) == 5
    assert lines[4].startswith("  results/tiny/snakemake_report.html: the graph")


def test_savings_are_summed_over_the_runs_that_have_them(tiny_study: Callable[..., StudyConfig]) -> None:
    study = tiny_study()
    (study.root / "tables").mkdir(parents=True)
    savings: list[dict[str, Any]] = [
        {"asked": 4, "found": 0, "unet_evals": 0, "seconds": 0.0},
        {"asked": 4, "found": 4, "unet_evals": 150, "seconds": 2.6},
    ]
    for seed, saving in enumerate(savings):
        write_json(study.root / f"runs/one/seed{seed}/run.json", {"unet_evals": 500, "trajectory_cache": saving})
    write_json(study.root / "runs/older/seed0/run.json", {"unet_evals": 500})
    line = places(study).splitlines()[-1]
    assert "4 of 8 inversions" in line and "saved 150 UNet evaluations (10% of all training) and 3 s" in line
    write_json(study.root / "runs/one/seed1/run.json", {"unet_evals": 500, "trajectory_cache": savings[0]})
    assert "inversions" not in places(study)
