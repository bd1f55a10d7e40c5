"""The experiments as stages: which pairs are held out, what is written, what is counted, and how it is shown."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Brightness, tiny_pairs_frame
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from invdpo.backbones.pipeline import UNetEps, load_schedule, load_unet
from invdpo.config import StudyConfig, parse_study
from invdpo.errors import InvdpoError
from invdpo.evidence import experiments as evidence
from invdpo.experiments import stage
from invdpo.experiments.precision import true_log_prob
from invdpo.experiments.stage import Counter, held_out, precision_settings, run, unseen_pairs
from invdpo.inversion.trajectory import SOLVERS
from invdpo.likelihood import log_prob_estimate
from invdpo.preferences.cache import pick_scores
from invdpo.preferences.labels import strengths
from invdpo.preferences.order import pair_order
from invdpo.preferences.reader import Counts, read_pairs

CPU = torch.device("cpu")
MakeStudy = Callable[..., StudyConfig]
INVERSION_ERROR = {"solvers": ["ddim", "edict"], "steps": [2, 4], "guidance_scales": [1.0, 2.0], "latents": 3}
PRECISION = {
    "arms": ["dpo"],
    "recipes": {"diffusion_dpo": {}, "short": {"method": "inversion_dpo_implied"}},
    "pairs": 3,
    "steps": [2, 3],
    "draws": [1, 2],
    "truth_steps": 12,
    "truth": "hutchinson",
    "probes": 2,
}
AUDIT = {
    "arms": ["dpo", "code"],
    "policies": ["dpo"],
    "pairs": 1,
    "batches": 2,
    "images": 2,
    "roundings": ["none", "float16"],
}
ARMS = {"code": {"method": "inversion_dpo_code", "recipe": {"trajectory": {"steps": 3}}}}


@pytest.fixture
def prepared(tiny_study: MakeStudy, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStudy:
    """Makes studies with prepared pairs, Brightness for a scorer, and finished runs of `dpo`: the base moved a little.

    Runs are of one step and one pair, so that most of the ten pairs are unseen.
    """
    monkeypatch.setattr(stage, "build_scorers", lambda scorers, device: [Brightness()])

    def make(**experiments: Any) -> StudyConfig:
        study = tiny_study({"steps": 2, "batch": 1, "checkpoints": [1]}, ARMS, experiments=experiments)
        shutil.copytree(tiny_cache, study.root / "preferences", dirs_exist_ok=True)
        for seed in study.seeds:
            folder = study.root / "runs" / "dpo" / f"seed{seed}"
            unet = load_unet(study.base, CPU)
            for step in (1, 2):
                with torch.no_grad():
                    unet.conv_out.weight.mul_(1 - 0.01 * (seed + 1))
                unet.save_pretrained(folder / "checkpoints" / f"step{step:06d}" / "unet")
            (folder / "run.json").write_text(json.dumps({"config_hash": study.arm("dpo").hash}))
        return study

    return make


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / name)


def provenance(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance.json").read_text())


def test_unseen_pairs_are_those_of_no_step_of_any_seed_and_arm(tiny_study: MakeStudy) -> None:
    arms = {"long": {"method": "sft", "training": {"steps": 7, "batch": 3}}}
    study = tiny_study({"steps": 5, "batch": 4}, arms)
    seen = set()
    for steps, batch in ((5, 4), (7, 3)):
        for seed in study.seeds:
            for step in range(1, steps + 1):
                seen |= set(pair_order(seed, step, batch, 100))
    assert unseen_pairs(study, ["dpo", "long"], 100) == sorted(set(range(100)) - seen)
    assert set(unseen_pairs(study, ["dpo"], 100)) > set(unseen_pairs(study, ["dpo", "long"], 100))
    assert unseen_pairs(study, [], 3) == [0, 1, 2]
    assert unseen_pairs(study, ["dpo"], 15) == [], "20 pairs a run are more than one epoch"


def test_held_out_pairs_of_the_study(prepared: MakeStudy) -> None:
    study = prepared()
    left = unseen_pairs(study, ["dpo"], 10)
    held = held_out(study, ["dpo"], 4, CPU)
    assert len(held.ids) == 4 and set(held.ids) <= set(left)
    assert held_out(study, ["dpo"], 2, CPU).ids == held.ids[:2]
    captions = pd.read_parquet(study.root / "preferences" / "pairs.parquet")["caption"]
    assert held.captions == [captions[index] for index in held.ids]
    assert held.pairs.win.shape == held.pairs.lose.shape == (4, 4, 4, 4)
    assert held.pairs.cond is not None and held.pairs.cond.uncond is not None and len(held.pairs.cond.embeds) == 4
    with pytest.raises(InvdpoError, match=rf"{len(left)} pairs of `preferences.*`dpo`.*{len(left) + 1} are needed"):
        held_out(study, ["dpo"], len(left) + 1, CPU)


def test_held_out_pairs_of_another_file_leave_out_the_studys_own(prepared: MakeStudy) -> None:
    own = tiny_pairs_frame()
    other = tiny_pairs_frame(seed=1)
    pd.concat([own, other], ignore_index=True).to_parquet("other.parquet")
    study = prepared(held_out="other.parquet")
    held = held_out(study, ["dpo"], 5, CPU)
    assert all(12 <= row < 22 for row in held.ids), "rows of the other frame, its ties left out"
    assert held_out(study, [], 10, CPU).ids[:5] == held.ids
    with pytest.raises(InvdpoError, match=r"10 pairs of `experiments.held_out: other.parquet`"):
        held_out(study, ["dpo"], 11, CPU)
    own.to_parquet("other.parquet")
    with pytest.raises(InvdpoError, match="0 pairs of"):
        held_out(study, ["dpo"], 1, CPU)


def test_both_sources_encode_alike(prepared: MakeStudy, tiny_pairs: Path) -> None:
    """The study's own pairs, read again as a file that shares no image with it."""
    study = prepared(held_out="copy.parquet")
    shutil.copy(tiny_pairs, "copy.parquet")
    folder = study.root / "preferences"
    own = pd.read_parquet(folder / "pairs.parquet")
    own.assign(winner_sha256="", loser_sha256="").to_parquet(folder / "pairs.parquet")
    found = held_out(study, [], 10, CPU)
    cached = held_out(prepared(), [], 10, CPU)
    rows = {row: index for index, row in enumerate(found.ids)}
    # Latents are drawn from the posterior by place, so only their means can be compared pair by pair.
    for place, index in enumerate(cached.ids):
        other = rows[int(own["row"][index])]
        assert found.captions[other] == cached.captions[place]
        torch.testing.assert_close(found.pairs.cond.embeds[other], cached.pairs.cond.embeds[place])
    totals = [part.pairs.win.mean() + part.pairs.lose.mean() for part in (found, cached)]
    torch.testing.assert_close(*totals, atol=0.05, rtol=0)


def test_both_sources_have_the_strengths_of_training(prepared: MakeStudy, tiny_pairs: Path) -> None:
    """Held-out pairs are scored in the span of the training pairs' scores, whichever file they come from."""

    class Brightest:
        version = "pickscore:0:none"

        def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
            light = [np.asarray(image).mean() + len(prompt) for image, prompt in zip(images, prompts, strict=True)]
            return {"pickscore": np.array(light, dtype=np.float32)}

    scorer: Any = Brightest()
    study = prepared(held_out="copy.parquet")
    shutil.copy(tiny_pairs, "copy.parquet")
    folder = study.root / "preferences"
    with pytest.raises(InvdpoError, match="holds no PickScores"):
        held_out(study, [], 1, CPU, scorer)
    scores = pick_scores(scorer, list(read_pairs([tiny_pairs], Counts())))
    with safe_open(folder / "cache.safetensors", framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        metadata = stored.metadata() | {"scored_key": "scored"}
    save_file(tensors | {"scores": scores}, folder / "cache.safetensors", metadata=metadata)
    expected = strengths(scores)
    assert expected.abs().max() > 0.1 and len(set(expected.tolist())) > 3

    cached = held_out(prepared_again(study), [], 4, CPU, scorer)
    torch.testing.assert_close(cached.strength, expected[cached.ids])
    own = pd.read_parquet(folder / "pairs.parquet")
    own.assign(winner_sha256="", loser_sha256="").to_parquet(folder / "pairs.parquet")
    found = held_out(study, [], 4, CPU, scorer)
    places = {int(row): place for place, row in enumerate(own["row"])}
    torch.testing.assert_close(found.strength, expected[[places[row] for row in found.ids]])
    assert held_out(study, [], 4, CPU).strength is None


def prepared_again(study: StudyConfig) -> StudyConfig:
    """The study with its own pairs for held-out ones."""
    content = study.model_dump()
    content["experiments"]["held_out"] = None
    return parse_study(content, "tiny")


def test_every_network_evaluation_is_counted(tiny_base: Path) -> None:
    counter, unet = Counter(), load_unet(tiny_base, CPU).requires_grad_(False)
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    from invdpo.types import Conditioning

    cond = Conditioning(torch.zeros(3, 16, 16))
    eps_model = counter.eps_model(unet)
    eps_model(x, torch.full((3,), 5), cond)
    assert counter.evaluations == 3
    found = log_prob_estimate(eps_model, x, cond, load_schedule(tiny_base), 2, chunk=64)
    assert counter.evaluations == 3 + found.unet_evals


def test_inversion_error_writes_errors_levels_and_pictures(prepared: MakeStudy) -> None:
    study = prepared(inversion_error=INVERSION_ERROR)
    folder = run(study, "inversion_error", CPU)
    assert folder == study.root / "experiments" / "inversion_error"
    errors = read(folder, "errors.csv")
    assert len(errors) == 2 * 2 * 2 * 3 and len(read(folder, "levels.csv")) == 2 * 2 * (3 + 5)
    held = held_out(study, [], 3, CPU)
    short = [len(caption.split()) <= 3 for caption in held.captions]
    assert errors["light_change"].notna().all() and errors["long_only_change"].isna().tolist() == short * 8
    assert errors["light_change"].abs().max() > 0
    # There and back at N = 2 and 4, unguided (one call) and guided (two), then the pictures by the first solver.
    calls = sum(SOLVERS[name].calls + SOLVERS[name].calls_back for name in ("ddim", "edict"))
    assert provenance(folder)["unet_evals"] == 3 * 6 * 3 * calls + 3 * 6 * 2
    assert provenance(folder)["held_out"] == held.ids
    pictures = pd.read_parquet(folder / "pictures.parquet")
    assert len(pictures) == 3 * 2 * (3 + 5)  # no more levels than a trajectory has
    with Image.open(io.BytesIO(pictures["png"][0])) as image:
        assert image.size == (32, 32)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
    run(study, "inversion_error", CPU)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def test_precision_holds_every_seed_against_the_truth(prepared: MakeStudy) -> None:
    study = prepared(precision=PRECISION)
    folder = run(study, "precision", CPU)
    latents, agreement = read(folder, "latents.csv"), read(folder, "agreement.csv")
    assert len(agreement) == 2 * (2 + 2) and len(latents) == len(agreement) * 6
    assert set(zip(agreement["arm"], agreement["seed"], strict=True)) == {("dpo", 0), ("dpo", 1)}
    assert agreement.query("recipe == 'short' and seed == 0")["steps"].tolist() == [2, 3]
    assert agreement.query("recipe == 'diffusion_dpo' and seed == 0")["draws"].tolist() == [1, 2]
    held, schedule = held_out(study, ["dpo"], 3, CPU), load_schedule(study.base)
    truth = [
        true_log_prob(UNetEps(load_unet(where, CPU)), held.pairs, schedule, 12, "hutchinson", probes=2)[3:]
        for where in (study.base, study.root / "runs/dpo/seed1/checkpoints/step000002")
    ]
    rows = latents.query("seed == 1 and side == 'lose' and recipe == 'short' and steps == 2")
    assert rows["pair"].tolist() == [0, 1, 2]
    assert rows["truth"].tolist() == pytest.approx((truth[1] - truth[0]).tolist(), abs=1e-3)
    assert rows["truth"].abs().min() > 0.01
    assert agreement["pairs"].eq(3).all() and provenance(folder)["held_out"] == held.ids


def test_precision_settings(prepared: MakeStudy) -> None:
    recipes = {
        "diffusion_dpo": {},
        "q_single": {},
        "renoised": {"method": "inversion_dpo_implied", "recipe": {"trajectory": {"solver": "renoise", "steps": 7}}},
    }
    study = prepared(precision=PRECISION | {"recipes": recipes})
    assert study.experiments.precision is not None
    found = [(r.name, r.trajectory.steps, draws) for r, draws in precision_settings(study.experiments.precision)]
    assert found == [
        *[("diffusion_dpo", None, 1), ("diffusion_dpo", None, 2)],
        *[("q_single", steps, draws) for steps in (2, 3) for draws in (1, 2)],
        ("renoised", 7, 1),
    ]


def test_audit_of_the_base_and_every_checkpoint_of_one_seed(
    prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = with_pickscore(prepared, monkeypatch)
    folder = run(study, "audit", CPU)
    rows = read(folder, "gradients.csv")
    assert len(rows) == 2 * (2 + 1 + 1) * 2  # arms, the base with its rounding and two checkpoints, batches
    assert list(dict.fromkeys(rows["policy"])) == ["initial", "dpo/step1", "dpo/step2"]
    assert set(rows["recipe"]) == {"dpo", "code"}
    start = rows.query("policy == 'initial' and noise == 'none'").groupby("recipe")["gradient_norm"].sum()
    assert start["dpo"] > 0
    rewards = read(folder, "rewards.csv").set_index("policy")
    assert list(rewards.index) == ["initial", "dpo/step1", "dpo/step2"]
    assert (rewards["norm"] > 0).all() and rewards["cosine_of_halves"].between(-1, 1).all()
    evals = read(folder, "summary.csv").query("measure == 'unet_evals'")
    assert len(evals) == 8 and provenance(folder)["unet_evals"] > rows["unet_evals"].sum()
    assert len(provenance(folder)["held_out"]) == 2


def with_pickscore(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A study whose audit asks an image's mean brightness for its reward."""
    monkeypatch.setattr("invdpo.scorers.pickscore.PickScore", lambda *arguments, **options: None)
    monkeypatch.setattr(stage, "pickscore", lambda scorer: lambda images, prompts: images.mean(dim=(1, 2, 3)))
    study = prepared()
    content = study.model_dump() | {"scorers": {"pickscore": {"model": "none"}}, "experiments": {"audit": AUDIT}}
    return parse_study(content, "tiny")


def test_tables_and_figures_of_all_three(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = with_pickscore(prepared, monkeypatch)
    content = study.model_dump()
    content["experiments"] |= {"inversion_error": INVERSION_ERROR, "precision": PRECISION}
    study = parse_study(content, "tiny")
    with pytest.raises(InvdpoError, match=r"errors.csv is missing. Run `invdpo experiment inversion_error"):
        evidence.write(study)
    for name in study.experiments.measured:
        run(study, name, CPU)
    written = evidence.write(study)
    figures = ["inversion_error", "inversion_levels", "fig_s9", "precision", "audit"]
    assert {path.relative_to(study.root).as_posix() for path in written} == {
        *(f"tables/{name}.{kind}" for name in study.experiments.measured for kind in ("csv", "md", "tex")),
        *(f"figures/{name}.{kind}" for name in figures for kind in ("png", "pdf")),
    }
    before = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in evidence.write(study)} == before

    tables = study.root / "tables"
    errors = read(study.root / "experiments" / "inversion_error", "errors.csv")
    rows = list(csv.DictReader((tables / "inversion_error.csv").open()))
    assert len(rows) == 8 and {row["latents"] for row in rows} == {"3"}
    group = errors.query("solver == 'ddim' and steps == 2 and guidance_scale == 2")
    (row,) = [r for r in rows if (r["solver"], r["steps"], r["guidance_scale"]) == ("ddim", "2", "2")]
    assert float(row["rms_error"]) == pytest.approx(group["rms_error"].mean(), rel=1e-5)
    assert float(row["rms_error_low"]) <= float(row["rms_error"]) <= float(row["rms_error_high"])
    assert int(row["unet_evals"]) == 4

    agreement = read(study.root / "experiments" / "precision", "agreement.csv")
    rows = list(csv.DictReader((tables / "precision.csv").open()))
    assert [(row["seeds"], row["pairs"]) for row in rows] == [("2", "3")] * 4
    group = agreement.query("recipe == 'short' and steps == 3")
    (row,) = [r for r in rows if (r["recipe"], r["steps"]) == ("short", "3")]
    assert float(row["spearman"]) == pytest.approx(group["spearman"].mean(), rel=1e-5)
    assert float(row["spearman_low"]) == pytest.approx(group["low"].min(), rel=1e-5)
    assert "3 held-out pairs" in (tables / "precision.md").read_text()

    assert len(list(csv.DictReader((tables / "audit.csv").open()))) == 8
    assert "Diffusion" in (tables / "precision.md").read_text() and "step 2" in (tables / "audit.md").read_text()

    agreement[agreement["seed"] == 0].to_csv(study.root / "experiments/precision/agreement.csv", index=False)
    with pytest.raises(InvdpoError, match=r"seeds \[0\] of .*the study has \[0, 1\].*invdpo experiment precision"):
        evidence.precision_table(study)


def test_what_a_study_may_ask_for(tiny_study: MakeStudy) -> None:
    study = tiny_study()
    assert study.experiments.measured == []
    with pytest.raises(InvdpoError, match=r"has no `experiments.audit`; those it has: none"):
        run(study, "audit", CPU)
    refused = [
        ({"precision": PRECISION | {"arms": ["dop"]}}, r"`experiments.precision.arms\[0\]` names the arm `dop`"),
        ({"precision": PRECISION | {"arms": ["base"]}}, "`experiments.precision` names `base`, which does not train"),
        ({"precision": PRECISION | {"recipes": {"dpo": {}}}}, r"`experiments.precision.recipes.dpo`.*no method `dpo`"),
        ({"audit": AUDIT | {"arms": ["dpo"]}}, r"`experiments.audit` needs `scorers.pickscore`"),
        ({"audit": AUDIT | {"policies": ["dop"]}}, r"`experiments.audit.policies\[0\]` names the arm `dop`"),
        ({"held_out": study.preferences}, "`experiments.held_out` is the study's own"),
        ({"inversion_error": INVERSION_ERROR | {"solvers": ["euler"]}}, r"experiments.inversion_error.solvers\[0\]"),
    ]
    for experiments, message in refused:
        with pytest.raises(InvdpoError, match=message):
            tiny_study(arms=ARMS, experiments=experiments)
