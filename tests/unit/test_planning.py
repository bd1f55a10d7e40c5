"""`invdpo power`: its numbers are those of the statistics, and what is wrong with a question is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from evidence_fixture import make_study

from invdpo import cli
from invdpo.config import dump_study
from invdpo.evidence.load import load_evidence
from invdpo.evidence.planning import spread_of_study
from invdpo.evidence.statistics import components, detectable_difference, needed_prompts


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], question: str) -> tuple[int, str]:
    """`invdpo power` with these arguments: its exit code and what it says."""
    monkeypatch.setattr(sys, "argv", ["invdpo", "power", *question.split()])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


def test_votes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for share, votes in ((0.53, "2,178"), (0.55, "783"), (0.58, "305"), (0.6, "194")):
        code, said = ask(monkeypatch, capsys, f"--share {share}")
        assert code == 0 and said.startswith(f"{votes} decided votes")
    assert ask(monkeypatch, capsys, "--share 0.55 --power 0.9")[1].startswith("1,047 ")
    assert ask(monkeypatch, capsys, "--share 0.55 --votes-per-cluster 20 --correlation 0.1")[1].startswith("2,270 ")


def test_given_standard_deviations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = ask(monkeypatch, capsys, "--prompt-sd 0.007 --difference 0.001 --seeds 1")
    assert code == 0 and "with 1 seed: 387 prompts" in said and "those runs' prompts alone" in said
    said = ask(monkeypatch, capsys, "--seed-sd 0.1 --prompt-sd 1 --residual-sd 0.5 --difference 0.2 --prompts 96")[1]
    size = detectable_difference((0.01, 1.0, 0.25), 3, 96)
    assert f"3 seeds x 96 prompts: a difference of {size:.3g}" in said
    assert "no number of prompts" in said and "no number of training seeds" in said and "with more of both: " in said


def test_a_finished_studys_spread(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(prompts=30)
    Path("study.json").write_text(dump_study(study))
    values, base = load_evidence(study).paired("diffusion_dpo", "base", "hps")
    spread = spread_of_study(study, "diffusion_dpo", scorer="hps")
    assert spread.variances == components(values - base) and (spread.seeds, spread.prompts) == (3, 30)
    code, said = ask(
        monkeypatch, capsys, "--study study.json --arm diffusion_dpo --scorer hps --difference 0.004 --seeds 5"
    )
    assert code == 0 and "diffusion_dpo minus base, HPS" in said
    needed = needed_prompts(0.004, spread.variances, 5)
    assert needed is not None and f"with 5 seeds: {needed:,} prompts" in said
    said = ask(monkeypatch, capsys, "--study study.json --arm p_single --baseline q_single")[1]
    assert "p_single minus q_single, Oracle utility" in said and "needs" not in said


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("--difference 1", "Nothing to plan with"),
        ("--share 0.5", "is not 0.5"),
        ("--prompt-sd 1 --difference 0", "--difference is 0"),
        ("--study study.json", "needs --arm"),
        ("--study study.json --arm dpo", "no arm `dpo`"),
        ("--study study.json --arm sft --baseline sft", "both `sft`"),
        ("--study study.json --arm sft --scorer pick", "no pick scores (scores of the study: oracle_utility"),
        ("--study study.json --arm sft --seed-sd 1", "both say how much differences vary"),
    ],
)
def test_what_is_wrong_is_said(
    question: str, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("study.json").write_text(dump_study(make_study(prompts=4)))
    code, said = ask(monkeypatch, capsys, question)
    assert code == 1 and said.startswith("error: ") and answer in said
