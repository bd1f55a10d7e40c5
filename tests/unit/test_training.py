"""The training loop: every recipe runs, data are functions of (seed, step), and nothing is lost on the
way.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from invdpo import objectives
from invdpo.backbones import pipeline
from invdpo.config import StudyConfig, dump_study
from invdpo.errors import InvdpoError
from invdpo.preferences.cache import cache_key, load_cache
from invdpo.preferences.labels import flips, strengths
from invdpo.preferences.order import pair_order
from invdpo.training import loop
from invdpo.training.data import draw
from invdpo.training.optim import warmed_up

CPU = torch.device("cpu")
MakeStudy = Callable[..., StudyConfig]
WEIGHTS = "diffusion_pytorch_model.safetensors"


SCORES = torch.tensor([0.20, 0.23, 0.21, 0.19, 0.22, 0.20, 0.24, 0.18, 0.21, 0.25])  # of winners, losers in reverse


def save_scored(folder: Path, key: str, scored_key: str) -> None:
    """Add PickScores to a cache, under those keys."""
    path = folder / "cache.safetensors"
    tensors = load_file(path) | {"scores": torch.stack([SCORES, SCORES.flip(0)], dim=1)}
    save_file(tensors, path, metadata={"key": key, "scored_key": scored_key})


@pytest.fixture
def study_with_cache(tiny_study: MakeStudy, tiny_cache: Path) -> MakeStudy:
    """As `tiny_study`, the pairs already encoded and scored."""

    def make(**changes: Any) -> StudyConfig:
        study = tiny_study(**changes)
        shutil.copytree(tiny_cache, study.root / "preferences", dirs_exist_ok=True)
        save_scored(study.root / "preferences", cache_key(tiny_cache), "scored")
        return study

    return make


def out(arm: str = "dpo", seed: int = 0) -> Path:
    return Path("results/tiny/runs") / arm / f"seed{seed}"


def state(study: StudyConfig, arm: str = "dpo", seed: int = 0) -> Path:
    return study.root / "state" / arm / f"seed{seed}" / study.arm(arm).hash


def weights(arm: str = "dpo", seed: int = 0) -> bytes:
    return (out(arm, seed) / "unet" / WEIGHTS).read_bytes()


def rows(arm: str = "dpo", seed: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out(arm, seed) / "train.jsonl").read_text().splitlines()]


def train(study: StudyConfig, arm: str = "dpo", seeds: list[int] | None = None) -> None:
    loop.train(study, arm, seeds or [0], CPU)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C during the given step."""
    real = loop.Stepper.step

    def stepping(self: loop.Stepper) -> dict[str, Any]:
        if self.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    monkeypatch.setattr(loop.Stepper, "step", stepping)


def without_cost(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("seconds", "memory_bytes")}


SMPO = {"method": "smpo", "recipe": {"trajectory": {"steps": 3}}}
METHODS = sorted(path.stem for path in (Path(__file__).parents[2] / "config" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_every_recipe(study_with_cache: MakeStudy, method: str) -> None:
    published = objectives.load_recipe(method)
    small = {} if published.trajectory.steps is None else {"trajectory": {"steps": 3}}
    arm = {"method": method, "recipe": small, "training": {"steps": 2, "batch": 2, "chunk": 4}}
    study = study_with_cache(arms={"arm": arm})
    train(study, "arm")
    found = rows("arm")
    assert [row["step"] for row in found] == [1, 2] and [row["pairs_seen"] for row in found] == [2, 4]
    assert all(math.isfinite(row[key]) for row in found for key in ("loss", "grad_norm", "reference_distance"))
    assert 0 < found[0]["unet_evals"] < found[1]["unet_evals"]
    assert (found[0]["implicit_accuracy"] is None) == (method == "sft")
    if method in ("inversion_dpo_paper", "inversion_dpo_minus"):
        assert found[0]["grad_norm"] == 0  # Eq. 16 is even in the difference of policy and reference
    elif method != "inversion_dpo_code":  # whose half-precision reference makes it what rounding makes it
        assert found[0]["grad_norm"] > 0
    if (
        published.log_ratio.form == "four_term" and method != "inversion_dpo_exact"
    ):  # whose reference rounds differently
        assert found[0]["implicit_accuracy"] == 0.5 and found[0]["logratio_win"] == found[0]["logratio_lose"] == 0
        assert found[1]["logratio_win"] != 0 and found[1]["logratio_lose"] != 0
    run = json.loads((out("arm") / "run.json").read_text())
    assert run["config_hash"] == study.arm("arm").hash and run["steps"] == 2 and run["seed"] == 0
    assert run["unet_evals"] == found[1]["unet_evals"] and run["recipe"]["name"] == method
    assert {"git_commit", "lock_hash", "versions", "wall_seconds", "peak_memory_bytes", "device"} <= set(run)


def test_a_trained_checkpoint_loads_as_a_unet_and_differs_from_the_base(
    study_with_cache: MakeStudy, tiny_base: Path
) -> None:
    train(study_with_cache())
    assert sorted(path.name for path in (out() / "checkpoints").iterdir()) == ["step000002", "step000004"]
    base = pipeline.load_unet(tiny_base, CPU).state_dict()
    early = pipeline.load_unet(out() / "checkpoints" / "step000002", CPU).state_dict()
    final = pipeline.load_unet(out(), CPU).state_dict()
    assert (out() / "checkpoints" / "step000004" / "unet" / WEIGHTS).read_bytes() == weights()
    distance = math.sqrt(sum(float((final[key] - base[key]).square().sum()) for key in base))
    assert distance > 0 and any(not torch.equal(early[key], final[key]) for key in final)
    assert rows()[-1]["reference_distance"] == pytest.approx(distance, rel=1e-4)
    norm = math.sqrt(sum(float(value.square().sum()) for value in base.values()))
    run = json.loads((out() / "run.json").read_text())
    assert run["relative_reference_distance"] == pytest.approx(distance / norm, rel=1e-4)


def test_loss_and_accuracy_start_where_policy_and_reference_are_equal(study_with_cache: MakeStudy) -> None:
    train(study_with_cache(training={"steps": 1}))
    (row,) = rows()
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["implicit_accuracy"] == 0.5
    assert row["logratio_win"] == row["logratio_lose"] == 0


def test_without_a_reference_the_log_tells_how_well_each_image_is_denoised(study_with_cache: MakeStudy) -> None:
    arm = {"method": "mapo", "training": {"steps": 1, "batch": 10}}
    study = study_with_cache(arms={"arm": arm})
    train(study, "arm")
    (row,) = rows("arm")
    cache, schedule = load_cache(study.root / "preferences", CPU), pipeline.load_schedule(study.base)
    base = pipeline.UNetEps(pipeline.load_unet(study.base, CPU))
    pairs = pair_order(0, 1, 10, 10)
    batch = draw(cache, torch.zeros(10, dtype=torch.bool), pairs, 0, 1, 0, 0.0)
    drawn = [(torch.randint(1000, (1,), generator=g), torch.randn((1, 4, 4, 4), generator=g)) for g in batch.generators]
    t, noise = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    with torch.no_grad():
        win, lose = (
            (base(schedule.add_noise(x0, noise, t), t, batch.cond) - noise).square().mean(dim=(1, 2, 3))
            for x0 in (batch.x0_win, batch.x0_lose)
        )
    assert row["logratio_win"] == pytest.approx(-float(win.mean()), rel=1e-5)
    assert row["logratio_lose"] == pytest.approx(-float(lose.mean()), rel=1e-5)
    assert row["implicit_accuracy"] == pytest.approx(float((win < lose).float().mean()))


def test_a_preference_that_is_there_is_learnt(study_with_cache: MakeStudy) -> None:
    study = study_with_cache(
        training={"steps": 30, "batch": 10, "learning_rate": 3.0e-4, "beta": 50.0, "checkpoints": []}
    )
    path = study.root / "preferences" / "latents" / "00000.safetensors"
    tensors = load_file(path)
    for key, value in {"win_mean": 1.0, "lose_mean": -1.0, "win_std": 0.0, "lose_std": 0.0}.items():
        tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, path, metadata={"key": "winners are 1, losers -1"})
    train(study)
    found = rows()
    assert sum(row["implicit_accuracy"] for row in found[-10:]) / 10 > 0.9
    assert sum(row["loss"] for row in found[-10:]) / 10 < 0.3


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("stopped_at", [1, 3, 4])
def test_resumed_run_equals_an_uninterrupted_one(
    study_with_cache: MakeStudy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    optimizer: str,
    stopped_at: int,
) -> None:
    settings = {"steps": 5, "batch": 4, "checkpoints": [2], "optimizer": optimizer, "warmup_steps": 4}
    study = study_with_cache(training=settings)
    train(study)
    whole, whole_rows, early = (
        weights(),
        rows(),
        (out() / "checkpoints/step000002/unet" / WEIGHTS).read_bytes(),
    )
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "second")
    study = study_with_cache(training=settings)
    monkeypatch.chdir(tmp_path / "second")
    shutil.copytree(tmp_path / "results/tiny/preferences", study.root / "preferences", dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stopped_at)
        with pytest.raises(KeyboardInterrupt):
            train(study)
    assert not (out() / "run.json").exists()
    assert len((state(study) / "train.jsonl").read_text().splitlines()) == stopped_at
    train(study)
    assert weights() == whole
    assert (out() / "checkpoints/step000002/unet" / WEIGHTS).read_bytes() == early
    assert [without_cost(row) for row in rows()] == [without_cost(row) for row in whole_rows]
    assert [row["seconds"] for row in rows()] == sorted(row["seconds"] for row in rows())


def test_the_state_is_saved_when_so_many_minutes_have_passed(
    study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes a step: after the third and every third from a checkpoint on."""
    step, save, clock, saved = loop.Stepper.step, loop.state.save_state, [0.0], []

    def stepping(self: loop.Stepper) -> dict[str, Any]:
        clock[0] += 600
        return step(self)

    def saving(*arguments: Any) -> None:
        saved.append(arguments[3].step)
        save(*arguments)

    ours = types.SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter, time=time.time)
    monkeypatch.setattr(loop, "time", ours)
    monkeypatch.setattr(loop.Stepper, "step", stepping)
    monkeypatch.setattr(loop.state, "save_state", saving)
    settings = {"steps": 8, "batch": 2, "checkpoints": [4]}
    found = []
    for minutes in (None, 25):
        study = study_with_cache(training=settings | {"save_minutes": minutes})
        shutil.rmtree("results/tiny/state", ignore_errors=True)
        train(study)
        found.append((saved[:], weights()))
        saved.clear()
    assert [steps for steps, _ in found] == [[4, 8], [3, 4, 7, 8]]
    assert found[0][1] == found[1][1]


def test_ctrl_c_on_the_command_line_stops_cleanly_and_resumes(study_with_cache: MakeStudy, tmp_path: Path) -> None:
    study = study_with_cache(training={"steps": 40, "checkpoints": [2]})
    Path("study.json").write_text(dump_study(study))
    command = [
        sys.executable,
        "-m",
        "invdpo.cli",
        "train",
        "--study",
        "study.json",
        "--arm",
        "dpo",
        "--seed",
        "0",
    ]
    with open("stderr.txt", "w") as stderr:
        process = subprocess.Popen([*command, "--threads", "1", "--log", "train.log"], stderr=stderr)
        while process.poll() is None and not (out() / "train.jsonl").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    text = Path("stderr.txt").read_text()
    assert "Traceback" not in text and "the same command goes on from there" in text
    assert "the same command goes on from there" in Path("train.log").read_text()
    done = len((state(study) / "train.jsonl").read_text().splitlines())
    assert 2 <= done < 40
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(study)
        resumed = weights()
        shutil.rmtree("results/tiny/state")
        shutil.rmtree("results/tiny/runs")
        train(study)
    finally:
        torch.set_num_threads(threads)
    assert weights() == resumed


def test_second_interrupt_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), loop.stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def gradient_of_first_step(study: StudyConfig, arm: str = "dpo") -> tuple[torch.Tensor, list[Any]]:
    base = pipeline.load_unet(study.base, CPU, study.arm(arm).training.gradient_checkpointing)
    run = loop.Run(study, study.arm(arm), 0, CPU)
    policy = loop.initial_policy(base, None)
    assert policy.is_gradient_checkpointing == study.arm(arm).training.gradient_checkpointing
    stepper = loop.Stepper(
        run,
        policy,
        loop.frozen_reference(base, "float32", CPU),
        base,
        torch.optim.SGD(policy.parameters(), lr=0.0),
        pipeline.load_schedule(study.base),
        load_cache(study.root / "preferences", CPU, scored=True),
        torch.float32,
        loop.state.Progress(),
    )
    with torch.no_grad():  # away from the reference, where every pair has the same weight
        for parameter in policy.parameters():
            parameter.mul_(1.02)
    outputs = stepper._accumulate(1)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), outputs


@pytest.mark.parametrize(
    "arm",
    [
        {"method": "diffusion_dpo"},
        {"method": "sft"},
        {"method": "p_single", "recipe": {"trajectory": {"steps": 4}}},
        {"method": "inversion_dpo_implied", "recipe": {"trajectory": {"steps": 3}}},
        SMPO,
        {"method": "mapo"},
        {"method": "dspo"},
    ],
    ids=lambda arm: arm["method"],
)
def test_one_pair_eight_times_accumulated_equals_eight_pairs(study_with_cache: MakeStudy, arm: dict[str, Any]) -> None:
    gradients, losses = [], []
    for micro_batch in (8, 2, 1):
        training = {"batch": 8, "micro_batch": micro_batch, "caption_dropout": 0.3, "beta": 1.0}
        study = study_with_cache(training=training, arms={"arm": arm})
        gradient, outputs = gradient_of_first_step(study, "arm")
        assert len(outputs) == 8 // micro_batch
        gradients.append(gradient)
        losses.append(torch.stack([output.loss for output in outputs]).mean())
    scale = gradients[0].abs().max()
    assert scale > 0
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient / scale, gradients[0] / scale, rtol=1e-3, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(study_with_cache: MakeStudy) -> None:
    plain, outputs = gradient_of_first_step(study_with_cache())
    saved, saved_outputs = gradient_of_first_step(study_with_cache(training={"gradient_checkpointing": True}))
    assert torch.equal(outputs[0].loss, saved_outputs[0].loss)
    torch.testing.assert_close(saved, plain, rtol=1e-5, atol=1e-7)


def test_inversions_are_shared_by_arms_and_change_nothing(study_with_cache: MakeStudy) -> None:
    """The second arm asks for the inversions that the first computed; neither its weights nor its costs show it."""
    arm = {"method": "inversion_dpo_implied", "recipe": {"trajectory": {"steps": 3}}}
    arms = {"one": arm, "two": arm | {"training": {"learning_rate": 2e-4}}, "other": arm | {"labels": "swapped"}}
    alone = study_with_cache(arms=arms)
    train(alone, "two")
    expected, costs = weights("two"), [row["unet_evals"] for row in rows("two")]
    assert json.loads((out("two") / "run.json").read_text())["trajectory_cache"]["asked"] == 0
    shutil.rmtree("results/tiny/runs")
    shutil.rmtree("results/tiny/state")

    study = study_with_cache(arms=arms, trajectory_cache_gb=0.1)
    found = {}
    for name in arms:
        train(study, name)
        found[name] = json.loads((out(name) / "run.json").read_text())["trajectory_cache"]
    steps = study.arm("two").training.steps
    assert [found[name]["found"] for name in arms] == [0, steps, 0] and found["one"]["asked"] == steps
    assert weights("two") == expected
    assert [row["unet_evals"] for row in rows("two")] == costs
    assert 0 < found["two"]["unet_evals"] < costs[-1]
    # What was found still counts as time, so that the order of the arms does not favour the later one.
    assert rows("two")[-1]["seconds"] > found["two"]["seconds"] > 0


def test_savings_survive_an_interruption(study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = {"method": "inversion_dpo_paper", "recipe": {"trajectory": {"steps": 3}}}
    study = study_with_cache(arms={"one": arm, "two": arm}, trajectory_cache_gb=0.1, training={"checkpoints": [1]})
    train(study, "one")
    step = loop.Stepper.step

    def interrupted(stepper: loop.Stepper) -> dict[str, Any]:
        if stepper.progress.step:
            raise KeyboardInterrupt
        return step(stepper)

    monkeypatch.setattr(loop.Stepper, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(study, "two")
    monkeypatch.setattr(loop.Stepper, "step", step)
    train(study, "two")
    savings = json.loads((out("two") / "run.json").read_text())["trajectory_cache"]
    assert savings["asked"] == savings["found"] == study.arm("two").training.steps > 1


def test_order_is_one_permutation_an_epoch() -> None:
    order = [pair for step in range(1, 8) for pair in pair_order(0, step, 3, 7)]
    assert all(sorted(order[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert order[:7] != order[7:14]
    assert order != [pair for step in range(1, 8) for pair in pair_order(1, step, 3, 7)]
    larger = [pair for step in range(1, 4) for pair in pair_order(0, step, 7, 7)]
    assert larger == order  # the order of pairs does not depend on the batch size


def test_swapped_labels_exchange_the_latents_and_nothing_else(tiny_cache: Path) -> None:
    cache = load_cache(tiny_cache, CPU)
    plain = draw(cache, torch.zeros(10, dtype=torch.bool), [3, 1], 0, 1, 0, 0.0)
    swapped = draw(cache, torch.ones(10, dtype=torch.bool), [3, 1], 0, 1, 0, 0.0)
    assert torch.equal(plain.x0_win, swapped.x0_lose) and torch.equal(plain.x0_lose, swapped.x0_win)
    assert torch.equal(plain.cond.embeds, swapped.cond.embeds)
    assert not torch.equal(plain.x0_win, cache.win_mean[[3, 1]])  # drawn, not the mean
    assert torch.equal(plain.cond.embeds, cache.embeds[cache.caption_index[[3, 1]]])


def test_caption_dropout_gives_the_empty_prompt(tiny_cache: Path) -> None:
    cache = load_cache(tiny_cache, CPU)
    none = torch.zeros(10, dtype=torch.bool)
    always = draw(cache, none, [0, 1], 0, 1, 0, 1.0)
    assert torch.equal(always.cond.embeds, cache.uncond.expand_as(always.cond.embeds))


@pytest.mark.parametrize("arm", [{"method": "diffusion_dpo"}, SMPO], ids=lambda arm: arm["method"])
def test_label_controls_reach_the_gradient(study_with_cache: MakeStudy, arm: dict[str, Any]) -> None:
    arms = {"true": arm, "swapped": {**arm, "labels": "swapped"}}
    study = study_with_cache(arms=arms, training={"beta": 0.01})  # so small that no pair's weight depends on its loss
    true, _ = gradient_of_first_step(study, "true")
    swapped, _ = gradient_of_first_step(study, "swapped")
    assert true.norm() > 0
    assert torch.nn.functional.cosine_similarity(true, swapped, dim=0) < -0.99


@pytest.mark.parametrize("labels", ["true", "shuffled", "swapped"])
def test_strengths_stay_with_their_pairs_whatever_the_labels(
    study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    """The latents change places and the strengths keep their sign: if both changed, nothing would."""
    arm = {**SMPO, "labels": labels, "training": {"micro_batch": 2}}
    study = study_with_cache(arms={"arm": arm}, training={"batch": 10})
    real, told = objectives.backward, []

    def listening(*arguments: Any, **options: Any) -> objectives.LossOutput:
        told.append((arguments[3], options["strength"]))
        return real(*arguments, **options)

    monkeypatch.setattr(objectives, "backward", listening)
    gradient_of_first_step(study, "arm")
    x0_win, strength = (torch.cat(parts) for parts in zip(*told, strict=True))
    cache, pairs = load_cache(study.root / "preferences", CPU, scored=True), pair_order(0, 1, 10, 10)
    assert len(told) == 5 and cache.scores is not None
    assert torch.equal(strength, strengths(cache.scores)[pairs])
    assert strength.min() < 0 < strength.max()
    flipped = flips(study.arm("arm").labels, 10, 0)
    assert torch.equal(x0_win, draw(cache, flipped, pairs, 0, 1, 0, 0.0).x0_win)
    assert int(flipped.sum()) == {"true": 0, "swapped": 10}.get(labels, int(flipped.sum()))


def test_strengths_need_a_scored_cache(study_with_cache: MakeStudy, tiny_cache: Path) -> None:
    study = study_with_cache(arms={"arm": SMPO})
    shutil.copytree(tiny_cache, study.root / "preferences", dirs_exist_ok=True)
    with pytest.raises(InvdpoError, match="holds no PickScores.* Run `invdpo prepare"):
        train(study, "arm")
    train(study, "dpo")


def test_another_scorer_starts_only_runs_with_strengths_again(study_with_cache: MakeStudy) -> None:
    study = study_with_cache(training={"steps": 1}, arms={"arm": SMPO})
    started = []
    for scored_key in ("one scorer", "another"):
        save_scored(study.root / "preferences", "pairs", scored_key)
        shutil.rmtree("results/tiny/runs", ignore_errors=True)  # as Snakemake does when an input changed
        for arm in ("dpo", "arm"):
            train(study, arm)
            run = json.loads((out(arm) / "run.json").read_text())
            started.append((run["started"], run["data_key"]))
    assert started[0] == started[2] and started[0][1] == "pairs"
    assert started[1][0] < started[3][0] and [started[1][1], started[3][1]] == ["one scorer", "another"]


def test_kto_is_not_cut_into_micro_batches(study_with_cache: MakeStudy) -> None:
    cut = {"method": "diffusion_kto", "training": {"micro_batch": 2}}
    whole = {"method": "diffusion_kto", "training": {"micro_batch": 4, "steps": 1}}
    study = study_with_cache(arms={"cut": cut, "whole": whole})
    with pytest.raises(InvdpoError, match=r"`arms\.cut`: `training\.micro_batch` is 2 and `training\.batch` is 4.*kto"):
        train(study, "cut")
    assert not Path("results/tiny/state/cut").exists()
    train(study, "whole")
    assert len(rows("whole")) == 1


def test_the_reference_is_told_its_timesteps_in_the_recipes_type(study_with_cache: MakeStudy) -> None:
    """Told 668 for 667, which bfloat16 lacks, the reference differs from the policy, and Eq. 16 has a gradient."""
    arm = {"method": "inversion_dpo_paper", "recipe": {"trajectory": {"steps": 3}}, "training": {"steps": 1}}
    rounded = {**arm, "recipe": {**arm["recipe"], "reference_label_dtype": "bfloat16"}}
    study = study_with_cache(arms={"exact": arm, "rounded": rounded})
    norms = []
    for name in ("exact", "rounded"):
        train(study, name)
        norms.append(rows(name)[0]["grad_norm"])
    assert norms[0] == 0 < norms[1]


def test_warm_up() -> None:
    assert [warmed_up(1.0, step, 4) for step in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert warmed_up(0.3, 1, 0) == 0.3


def test_gradient_clipping_and_learning_rate_are_applied(study_with_cache: MakeStudy, tiny_base: Path) -> None:
    norms = []
    for limit in (1.0e9, 1.0e-12):
        settings = {"steps": 1, "max_grad_norm": limit, "weight_decay": 0.0, "learning_rate": 1.0e-3}
        study = study_with_cache(training=settings)
        train(study)
        norms.append(rows()[0]["reference_distance"])
    # AdamW's epsilon 1e-8 dwarfs a gradient of norm 1e-12, so the clipped step is next to none.
    assert norms[1] < 1e-2 * norms[0]


def test_initial_rounding_starts_the_policy_from_rounded_weights(study_with_cache: MakeStudy, tiny_base: Path) -> None:
    arm = {
        "method": "diffusion_dpo",
        "initial_rounding": "bfloat16",
        "training": {"steps": 1, "learning_rate": 1.0e-20},
    }
    train(study_with_cache(arms={"arm": arm}, training={"weight_decay": 0.0}), "arm")
    base = pipeline.load_unet(tiny_base, CPU).state_dict()
    trained = load_file(out("arm") / "unet" / WEIGHTS)
    for key, value in base.items():
        torch.testing.assert_close(trained[key], value.bfloat16().float(), rtol=0, atol=1e-12)
    assert rows("arm")[0]["reference_distance"] > 0


def test_base_arm_trains_nothing(study_with_cache: MakeStudy) -> None:
    train(study_with_cache(), "base", [0, 1])
    run = json.loads((out("base", 1) / "run.json").read_text())
    assert (run["steps"], run["unet_evals"], run["recipe"]) == (0, 0, None)
    assert rows("base", 1) == [] and not (out("base") / "unet").exists()


def test_finished_run_is_not_trained_again_but_put_back(
    study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_with_cache()
    train(study)
    whole, run = weights(), (out() / "run.json").read_text()
    assert not (state(study) / "state.pt").exists()
    shutil.rmtree(out())  # as Snakemake does with the outputs of a failed job
    monkeypatch.setattr(loop, "load_unet", lambda *_: pytest.fail("the run is finished"))
    train(study)
    assert weights() == whole and (out() / "run.json").read_text() == run
    assert (out() / "checkpoints" / "step000002" / "unet" / WEIGHTS).is_file() and len(rows()) == 4


def test_run_folder_of_another_configuration_is_not_resumed(
    study_with_cache: MakeStudy, caplog: pytest.LogCaptureFixture
) -> None:
    train(study_with_cache())
    old = weights()
    study = study_with_cache(training={"learning_rate": 5.0e-4, "checkpoints": [3]})
    train(study)
    assert "was made by another configuration" in caplog.text and "does not resume" in caplog.text
    assert weights() != old and len(rows()) == 4
    assert sorted(path.name for path in (out() / "checkpoints").iterdir()) == ["step000003", "step000004"]
    fresh = weights()
    shutil.rmtree("results/tiny/runs")
    shutil.rmtree("results/tiny/state")
    train(study)
    assert weights() == fresh


def test_unfinished_state_of_another_configuration_is_not_resumed(
    study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(study_with_cache())
    study = study_with_cache(training={"learning_rate": 5.0e-4})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(study)
    assert len((state(study) / "train.jsonl").read_text().splitlines()) == 1  # from step 1, not from step 4
    assert not (out() / "checkpoints" / "step000002").exists()


def test_changed_pairs_start_a_run_again(study_with_cache: MakeStudy, caplog: pytest.LogCaptureFixture) -> None:
    study = study_with_cache()
    train(study)
    path = study.root / "preferences" / "cache.safetensors"
    save_file(load_file(path), path, metadata={"key": "other"})
    train(study)
    assert "the preference pairs changed since it was trained: it starts from zero" in caplog.text
    assert json.loads((out() / "run.json").read_text())["data_key"] == "other"


def test_changed_code_starts_a_run_again(
    study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = study_with_cache()
    train(study)
    started = json.loads((out() / "run.json").read_text())["started"]
    monkeypatch.setattr(loop, "code_hash", lambda _: "edited")
    train(study)
    assert "the code changed since it was trained" in caplog.text
    assert json.loads((out() / "run.json").read_text())["started"] > started


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_non_finite_numbers_stop_the_run_and_keep_the_last_good_checkpoint(
    study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    study = study_with_cache(training={"steps": 6, "checkpoints": [2]})
    real, calls = objectives.backward, []

    def failing(recipe: Any, policy: pipeline.UNetEps, *arguments: Any, **options: Any) -> objectives.LossOutput:
        calls.append(1)
        output = real(recipe, policy, *arguments, **options)
        if len(calls) < 4:
            return output
        if what == "loss":
            return objectives.LossOutput(output.loss * math.nan, output.logratio_win, output.logratio_lose, 1)
        next(policy.unet.parameters()).grad.fill_(math.inf)  # pyright: ignore[reportOptionalMemberAccess]
        return output

    with monkeypatch.context() as patch:
        patch.setattr(objectives, "backward", failing)
        with pytest.raises(InvdpoError) as caught:
            train(study)
    assert f"dpo/seed0: the {what} of step 4 is" in str(caught.value)
    assert "the checkpoint of step 2" in str(caught.value)
    assert (out() / "checkpoints" / "step000002" / "unet" / WEIGHTS).is_file()
    assert not (out() / "run.json").exists()
    train(study)  # goes on from step 2
    assert len(rows()) == 6


def limit_file_size(size: int) -> tuple[int, int]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return before


def test_full_disk_is_reported_with_the_path_and_leaves_no_partial_file(study_with_cache: MakeStudy) -> None:
    study = study_with_cache(training={"steps": 4, "checkpoints": [2]})
    before = limit_file_size(50_000)  # any larger file fails half-way, as on a full disk
    try:
        with pytest.raises(InvdpoError, match="The disk is full: .*step000002 could not be written"):
            train(study)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in study.root.rglob("*") if path.name.endswith(".part")]
    assert not (state(study) / "checkpoints" / "step000002").exists()
    train(study)
    assert len(rows()) == 4


def test_full_disk_while_the_state_is_saved_keeps_the_older_state(
    study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_with_cache(training={"steps": 4, "checkpoints": [2]})
    size = 120_000  # above the weights' file, below the state's, which has the optimizer too
    real = loop.state.save_state

    def with_limit(*arguments: Any) -> None:
        before = limit_file_size(size)
        try:
            real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(loop.state, "save_state", with_limit)
    with pytest.raises(InvdpoError, match="The disk is full: .*state.pt could not be written"):
        train(study)
    assert not [path for path in study.root.rglob("*") if path.name.endswith(".part")]
    assert (state(study) / "checkpoints" / "step000002").is_dir()


def test_damaged_state_is_named(study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_with_cache()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(study)
    (state(study) / "state.pt").write_bytes(b"damaged")
    with pytest.raises(InvdpoError, match=r"(?s)state.pt cannot be resumed from .* Delete"):
        train(study)


def test_bf16_autocast_trains_and_starts_at_the_reference(study_with_cache: MakeStudy) -> None:
    train(study_with_cache(precision="bf16", training={"steps": 2}))
    assert rows()[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert math.isfinite(rows()[1]["loss"])
    assert json.loads((out() / "run.json").read_text())["dtype"] == "bfloat16"


def test_fp16_overflow_repeats_the_step_with_a_smaller_scale(
    study_with_cache: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_with_cache(precision="fp16", training={"steps": 2, "batch": 2, "beta": 1.0})
    real, scales = objectives.backward, []

    def overflowing(recipe: Any, policy: pipeline.UNetEps, *arguments: Any, **options: Any) -> objectives.LossOutput:
        scales.append(options["loss_scale"])
        output = real(recipe, policy, *arguments, **options)
        if len(scales) == 1:
            next(policy.unet.parameters()).grad.fill_(math.inf)  # pyright: ignore[reportOptionalMemberAccess]
        return output

    monkeypatch.setattr(objectives, "backward", overflowing)
    train(study)
    assert scales == [2.0**16, 2.0**15, 2.0**15]
    assert len(rows()) == 2 and rows()[0]["grad_norm"] < 1e3


def test_a_half_precision_reference_has_rounded_weights_on_a_cpu(tiny_base: Path) -> None:
    base = pipeline.load_unet(tiny_base, CPU)
    reference = loop.frozen_reference(base, "float16", CPU)
    assert {parameter.dtype for parameter in reference.parameters()} == {torch.float32}
    pairs = list(zip(reference.parameters(), base.parameters(), strict=True))
    assert all(torch.equal(rounded, weight.half().float()) for rounded, weight in pairs)
    assert not all(torch.equal(rounded, weight) for rounded, weight in pairs)


def test_rounding_alone_moves_eq_16_off_the_reference(study_with_cache: MakeStudy) -> None:
    """In fp32 its first gradient is exactly zero; from weights rounded to fp16 it is not."""
    steps = {"method": "inversion_dpo_paper", "recipe": {"trajectory": {"steps": 3}}}
    study = study_with_cache(arms={"exact": steps, "rounded": {**steps, "initial_rounding": "float16"}})
    norms = {}
    for arm in ("exact", "rounded"):
        loop.train(study, arm, [0], CPU)
        norms[arm] = json.loads((out(arm) / "train.jsonl").read_text().splitlines()[0])["grad_norm"]
    assert norms["exact"] == 0.0
    assert norms["rounded"] > 0.0
