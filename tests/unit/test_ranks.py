"""Processes that train together: the same weights as one process, in all of them, and an end when one of them dies.

The ranks are forks of the test, which has imported everything; the launcher is tested with small programs, and once as
`invdpo train` starts it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file

from invdpo.config import StudyConfig, dump_study
from invdpo.errors import InvdpoError
from invdpo.training import loop, ranks, shards, state

CPU = torch.device("cpu")
MakeStudy = Callable[..., StudyConfig]
SLOW = 300  # seconds that what exchanges weights may take where two processes share one core with other work
IMPLIED = {"method": "inversion_dpo_implied", "recipe": {"trajectory": {"steps": 3}}, "training": {"chunk": 4}}


def together(work: Callable[[int], object], size: int = 2, limit: float = 60) -> list[int]:
    """Run `work` in forks that are the ranks of one group; their exit statuses, as `invdpo` would end with."""
    port, children = ranks._free_port(), []
    for number in range(size):
        child = os.fork()
        if child == 0:
            place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            try:
                work(number)
                code = 0
            except KeyboardInterrupt:
                code = 130
            except InvdpoError as error:
                Path(f"error{number}.txt").write_text(str(error))
                code = 1
            finally:
                sys.stdout.flush()
            os._exit(code)
        children.append(child)
    codes, deadline = [], time.monotonic() + limit
    for child in children:
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        codes.append(os.waitstatus_to_exitcode(done[1]))
    return codes


def train(study: StudyConfig, arm: str) -> None:
    torch.set_num_threads(1)
    loop.train(study, arm, [0], CPU)


def out(arm: str) -> Path:
    return Path("results/tiny/runs") / arm / "seed0"


def weights(arm: str) -> dict[str, torch.Tensor]:
    return load_file(out(arm) / "unet" / "diffusion_pytorch_model.safetensors")


def rows(arm: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out(arm) / "train.jsonl").read_text().splitlines()]


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], moved: float) -> float:
    """Distance of two sets of weights, over how far training moved them."""
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5 / moved


def interrupted(number: int, step: int) -> Callable[[loop.Stepper], dict[str, Any]]:
    """`Stepper.step` with a Ctrl-C for one rank alone, during that step."""
    real = loop.Stepper.step

    def stepping(self: loop.Stepper) -> dict[str, Any]:
        if self.ranks.number == number and self.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    return stepping


def test_two_ranks_give_the_weights_of_one_that_takes_its_batch_in_two_parts(
    prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: a + b is one sum, whether an accumulation or two ranks form it. And both ranks hold those weights."""
    whole = {"method": "diffusion_dpo"}
    study = prepared(arms={"two": whole, "parts": {**whole, "training": {"micro_batch": 2}}})
    real = loop.Run._keep

    def keep(self: loop.Run, policy: Any, step: int, adapted: Any) -> None:
        torch.save(state.trained(policy), f"rank{self.ranks.number}.pt")
        real(self, policy, step, adapted)

    monkeypatch.setattr(loop.Run, "_keep", keep)
    assert together(lambda _: train(study, "two")) == [0, 0]
    train(study, "parts")
    held = [torch.load(f"rank{number}.pt") for number in (0, 1)]
    one = weights("parts")
    for found in (*held, weights("two")):
        assert found.keys() == one.keys() and all(torch.equal(found[name], one[name]) for name in one)
    run = json.loads((out("two") / "run.json").read_text())
    assert (
        run["processes"] == 2 and run["unet_evals"] == json.loads((out("parts") / "run.json").read_text())["unet_evals"]
    )
    apart = ("seconds", "memory_bytes")
    for mine, theirs in zip(rows("two"), rows("parts"), strict=True):
        assert {key: mine[key] for key in mine if key not in apart} == pytest.approx(
            {key: theirs[key] for key in theirs if key not in apart}, rel=1e-6
        )


@pytest.mark.parametrize("arm", [{"method": "diffusion_dpo"}, IMPLIED], ids=lambda arm: arm["method"])
def test_two_ranks_give_the_weights_of_one(prepared: MakeStudy, arm: dict[str, Any]) -> None:
    """Up to rounding: the sum over pairs is another (4e-5 of the way here). AdamW gives gradients of rounding size
    steps as long as any, so it is more than fp32's 1e-7."""
    study = prepared(arms={"two": arm, "one": arm})
    assert together(lambda _: train(study, "two")) == [0, 0]
    train(study, "one")
    moved = rows("one")[-1]["reference_distance"]
    assert relative_difference(weights("two"), weights("one"), moved) < 2e-4


def test_every_rank_draws_its_own_pairs(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = prepared(
        training={"batch": 6, "micro_batch": 1, "steps": 1, "checkpoints": []},
        arms={"arm": {"method": "diffusion_dpo"}},
    )
    real = loop.draw

    def drawing(cache: Any, flipped: Any, pairs: list[int], seed: int, step: int, first: int, *rest: Any) -> Any:
        with open(f"pairs{os.environ.get('RANK', '')}.txt", "a") as file:
            file.write(f"{first} {pairs}\n")
        return real(cache, flipped, pairs, seed, step, first, *rest)

    monkeypatch.setattr(loop, "draw", drawing)
    assert together(lambda _: train(study, "arm"), size=3) == [0, 0, 0]
    train(study, "dpo")
    drawn = [Path(f"pairs{number}.txt").read_text().splitlines() for number in ("0", "1", "2", "")]
    assert [len(lines) for lines in drawn] == [2, 2, 2, 6]
    assert sum(drawn[:3], []) == drawn[3]


def test_inversions_of_all_ranks_are_counted(prepared: MakeStudy) -> None:
    study = prepared(arms={"first": IMPLIED, "second": IMPLIED}, trajectory_cache_gb=0.1, training={"steps": 2})
    for arm, found in (("first", 0), ("second", 4)):
        assert together(lambda _, arm=arm: train(study, arm)) == [0, 0]
        cached = json.loads((out(arm) / "run.json").read_text())["trajectory_cache"]
        assert (cached["asked"], cached["found"]) == (4, found)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]
) -> None:
    settings = {"steps": 4, "checkpoints": [], "batch": 4}
    arms = {"whole": {"method": "diffusion_dpo"}, "stopped": {"method": "diffusion_dpo"}}
    study = prepared(training=settings, arms=arms)
    assert study.arm("whole").hash == prepared(training=settings | {"processes": 2}, arms=arms).arm("whole").hash
    together(lambda _: train(study, "whole"), size=sizes[1])
    with monkeypatch.context() as patch:
        # The last rank alone is asked to stop: all of them do, after the same step.
        patch.setattr(loop.Stepper, "step", interrupted(sizes[0] - 1, 2))
        assert together(lambda _: train(study, "stopped"), size=sizes[0]) == [130] * sizes[0]
    folder = study.root / "state" / "stopped" / "seed0" / study.arm("stopped").hash
    assert len((folder / "train.jsonl").read_text().splitlines()) == 2 and not (out("stopped") / "run.json").exists()
    assert together(lambda _: train(study, "stopped"), size=sizes[1]) == [0] * sizes[1]
    assert [row["step"] for row in rows("stopped")] == [1, 2, 3, 4]
    one, other = weights("whole"), weights("stopped")
    if sizes[0] == sizes[1]:
        assert all(torch.equal(one[name], other[name]) for name in one)
    else:
        assert 0 < relative_difference(one, other, rows("whole")[-1]["reference_distance"]) < 2e-4


def test_weights_that_part_are_noticed(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sum of gradients, as the released script trains on several GPUs."""
    study = prepared(arms={"arm": {"method": "diffusion_dpo"}})
    monkeypatch.setattr(ranks.Ranks, "add", lambda *_: None)
    assert together(lambda _: train(study, "arm")) == [1, 1]
    assert "after step 1 the processes have different weights" in Path("error0.txt").read_text()
    assert not (out("arm") / "run.json").exists()


@pytest.mark.parametrize(
    ("how", "status", "shard"), [("raises", 1, False), ("is killed", -signal.SIGKILL, False), ("raises", 1, True)]
)
def test_a_rank_that_loses_another_ends_by_itself(
    prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch, how: str, status: int, shard: bool
) -> None:
    study = prepared(arms={"arm": {"method": "diffusion_dpo", "training": {"shard": shard}}})
    real = loop.Stepper._accumulate

    def failing(self: loop.Stepper, number: int) -> Any:
        if self.ranks.number == 1 and number == 2:
            if how == "raises":
                raise InvdpoError("the pairs of rank 1 are spoilt")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, number)

    monkeypatch.setattr(loop.Stepper, "_accumulate", failing)
    began = time.monotonic()
    assert together(lambda _: train(study, "arm")) == [ranks.LOST, status]
    assert time.monotonic() - began < 30
    assert not list(study.root.rglob("*.part"))


def test_sums_go_through_buckets_of_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranks, "BUCKET", 10)
    shapes = [(3, 2), (4,), (30,), (), (2, 3, 2, 2), (9,)]
    parts = [[tensor.numel() for tensor in bucket] for bucket in ranks._buckets([torch.zeros(s) for s in shapes])]
    assert parts == [[6, 4], [30], [1], [24], [9]]

    def work(number: int) -> None:
        mine, _ = ranks.join(CPU)
        tensors = [torch.full(shape, float(number + 1)) for shape in shapes]
        tensors[4] = tensors[4].contiguous(memory_format=torch.channels_last)
        mine.add(tensors)
        torch.save(tensors, f"sum{number}.pt")
        assert mine.gather(number) == [0, 1, 2] and list(mine.share(6)) == [2 * number, 2 * number + 1]

    assert together(work, size=3) == [0, 0, 0]
    for number in range(3):
        assert all(
            torch.equal(tensor, torch.full(s, 6.0))
            for tensor, s in zip(torch.load(f"sum{number}.pt"), shapes, strict=True)
        )


# One pair a process, streamed in two calls: each has a factor of its own, from the second step on.
SHARDED = {
    "method": "inversion_dpo_implied",
    "recipe": {"trajectory": {"steps": 2}},
    "training": {"chunk": 2, "micro_batch": 1, "batch": 2, "steps": 3, "gradient_checkpointing": True, "shard": True},
}


def kill_first(study: Callable[[int], StudyConfig], arm: str, step: int) -> list[int]:
    """Exit statuses of two ranks, each of its own study, the first of which is killed before that step."""
    real = loop.Stepper.step

    def stepping(self: loop.Stepper) -> dict[str, Any]:
        if self.ranks.number == 0 and self.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Stepper, "step", stepping)
        return together(lambda number: train(study(number), arm), limit=SLOW)


def state_of(study: StudyConfig, arm: str) -> Path:
    return study.root / "state" / arm / "seed0" / study.arm(arm).hash


def test_a_killed_run_goes_on_from_the_state_that_was_due(prepared: MakeStudy) -> None:
    arms, settings = {name: {"method": "diffusion_dpo"} for name in ("whole", "killed")}, {"checkpoints": []}
    study = prepared(arms=arms, training=settings)
    assert together(lambda _: train(study, "whole")) == [0, 0]
    assert kill_first(lambda _: study, "killed", 3) == [-signal.SIGKILL, ranks.LOST]
    assert not (state_of(study, "killed") / "state.pt").exists(), "thirty minutes have not passed"
    timed = prepared(arms=arms, training=settings | {"save_minutes": 1e-9})
    assert kill_first(lambda _: timed, "killed", 3) == [-signal.SIGKILL, ranks.LOST]
    folder = state_of(study, "killed")
    assert len((folder / "train.jsonl").read_text().splitlines()) == 2
    (folder / ".state.pt.1.part").touch()  # what a process leaves that is killed while it writes
    assert together(lambda _: train(study, "killed")) == [0, 0]
    one, other = weights("whole"), weights("killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(folder.glob(".*"))


def test_two_sharded_ranks_give_the_weights_of_one(prepared: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding, while each holds half of everything; the checkpoints are those of a network that is whole. A
    killed run goes on exactly with as many processes, and up to rounding with one."""
    plain = {**SHARDED, "training": {**SHARDED["training"], "shard": False}}
    arms = {"one": plain} | {name: SHARDED for name in ("two", "killed", "alone")}
    study = prepared(arms=arms)
    real = loop.Stepper._update

    def update(self: loop.Stepper, *arguments: Any) -> None:
        real(self, *arguments)
        networks = [[shards.part(value) for value in unet.parameters()] for unet in self.networks]
        gradients = [value.grad for value in self.parameters if value.grad is not None]
        moments = [value for values in self.optimizer.state.values() for value in values.values() if value.ndim]
        whole = sum(value.numel() for value in self.networks[0].parameters())
        held = [sum(value.numel() for value in each) / whole for each in (*networks, gradients, moments)]
        Path(f"held{self.ranks.number}.json").write_text(json.dumps(held))

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stepper, "_update", update)
        assert together(lambda _: train(study, "two"), limit=SLOW) == [0, 0]
    for number in (0, 1):
        assert json.loads(Path(f"held{number}.json").read_text()) == pytest.approx([0.5, 0.5, 0.5, 1.0], rel=1e-3)
    train(study, "one")
    moved = rows("one")[-1]["reference_distance"]
    assert relative_difference(weights("two"), weights("one"), moved) < 2e-4
    for mine, theirs in zip(rows("two"), rows("one"), strict=True):
        names = ("loss", "grad_norm", "reference_distance", "logratio_win")
        assert [mine[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-3)
    runs = [json.loads((out(arm) / "run.json").read_text()) for arm in ("two", "one")]
    assert runs[0]["relative_reference_distance"] == pytest.approx(runs[1]["relative_reference_distance"], rel=1e-4)
    for step in ("step000002", "step000003"):
        configs = [(out(arm) / "checkpoints" / step / "unet" / "config.json").read_text() for arm in ("two", "one")]
        assert configs[0] == configs[1]
    loaded: Any = UNet2DConditionModel.from_pretrained(out("two") / "unet", output_loading_info=True)
    assert loaded[0].dtype == torch.float32 and not any(loaded[1].values())

    # All save when the first one's clock says so: at any other's word they would wait for each other.
    timed = [prepared(arms=arms, training={"checkpoints": [], "save_minutes": minutes}) for minutes in (1e-9, None)]
    assert state_of(timed[0], "killed") == state_of(timed[1], "killed")
    assert kill_first(lambda number: timed[number], "killed", 3) == [-signal.SIGKILL, ranks.LOST]
    assert len((state_of(timed[0], "killed") / "train.jsonl").read_text().splitlines()) == 2
    shutil.copytree(study.root / "state" / "killed", study.root / "state" / "alone")
    assert together(lambda _: train(timed[1], "killed"), limit=SLOW) == [0, 0]
    two, killed = weights("two"), weights("killed")
    assert all(torch.equal(two[name], killed[name]) for name in two)
    train(timed[1], "alone")
    assert [row["step"] for row in rows("alone")] == [1, 2, 3]
    assert 0 < relative_difference(two, weights("alone"), moved) < 2e-4


def test_sharded_ranks_invert_together_or_not_at_all(prepared: MakeStudy) -> None:
    """One inversion of four is lost: the process that has the other one of its pass inverts too."""
    arm = {**SHARDED, "training": {"micro_batch": 1, "batch": 4, "steps": 1, "checkpoints": [], "shard": True}}
    study = prepared(arms={"first": arm, "second": arm}, trajectory_cache_gb=0.1)
    for name, found in (("first", 0), ("second", 2)):
        assert together(lambda _, name=name: train(study, name), limit=SLOW) == [0, 0]
        cached = json.loads((out(name) / "run.json").read_text())["trajectory_cache"]
        assert (cached["asked"], cached["found"]) == (4, found)
        kept = sorted((study.root / "trajectories").glob("*/*.safetensors"))
        assert len(kept) == 4
        kept[0].unlink()
    one, other = weights("first"), weights("second")
    assert all(torch.equal(one[name], other[name]) for name in one)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--mixed_precision=no"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_start_ranks_too(prepared: MakeStudy, launcher: str) -> None:
    """On a CPU `accelerate launch` starts two processes with `--multi_gpu` only; the study's device is still the
    CPU."""
    arm = {"method": "diffusion_dpo"}
    study = prepared(arms={"two": arm, "parts": {**arm, "training": {"micro_batch": 2}}}, training={"steps": 2})
    Path("study.json").write_text(dump_study(study))
    port = f"--{'master-port' if launcher == 'torchrun' else 'main_process_port'}={ranks._free_port()}"
    command = [sys.executable, "-m", *LAUNCHERS[launcher], port, "-m", "invdpo.cli", "train"]
    options = ["--study", "study.json", "--arm", "two", "--seed", "0", "--threads", "1"]
    # No configuration of accelerate's of whoever runs the tests.
    done = subprocess.run(
        [*command, *options], env=os.environ | {"HF_HOME": "none"}, capture_output=True, text=True, timeout=SLOW
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out("two") / "run.json").read_text())["processes"] == 2
    train(study, "parts")
    one, other = weights("two"), weights("parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_accelerate_is_not_left_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.NOT_LEFT_TO_ACCELERATE:
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            with pytest.raises(InvdpoError, match=f"{name}=true: .*would be ignored.*`training.shard: true`"):
                ranks.join(CPU)
            patch.setenv(name, "false")
            assert ranks.join(CPU) == (ranks.Ranks(), CPU)


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "training.compile"),
    ],
)
def test_what_the_study_says_is_not_said_to_accelerate(
    name: str, value: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvdpoError, match=rf"{name}={value}: this would be ignored, .*\(`{setting}`\)"):
        ranks.join(CPU)
    monkeypatch.setenv(name, "NO")  # as accelerate writes one of them
    assert ranks.join(CPU) == (ranks.Ranks(), CPU)


def test_what_cannot_be_shared_is_refused(prepared: MakeStudy) -> None:
    kto = {"method": "diffusion_kto"}
    study = prepared(arms={"kto": kto, "cut": {"method": "diffusion_dpo", "training": {"micro_batch": 4}}})
    with pytest.raises(InvdpoError, match=r"shared by 2 process.*kto.*`processes: 1`"):
        loop._check_passes(study.arm("kto"), ranks.Ranks(0, 2))
    likelihood = prepared(arms={"arm": {"method": "likelihood_dpo", "training": {"shard": True}}}).arm("arm")
    loop._check_passes(likelihood, ranks.Ranks())
    with pytest.raises(InvdpoError, match=r"`arms.arm`: `training.shard` and recipe likelihood_dpo exclude each other"):
        loop._check_passes(likelihood, ranks.Ranks(0, 2))
    with pytest.raises(InvdpoError, match=r"`arms.dpo.training`: 3 processes cannot share batch 4 equally"):
        loop._check_passes(study.arm("dpo"), ranks.Ranks(0, 3))
    with pytest.raises(InvdpoError, match=r"micro_batch 4 does not divide a process's share 2 of batch 4"):
        loop._check_passes(study.arm("cut"), ranks.Ranks(0, 2))
    with pytest.raises(InvdpoError, match=r"(?s)training.*3 processes cannot share batch 4 equally"):
        prepared(training={"processes": 3})


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks.check_devices(torch.device("cuda"), 2)
    ranks.check_devices(CPU, 8)
    with pytest.raises(InvdpoError, match=r"4 processes are to train together.*but 2 can be seen"):
        ranks.check_devices(torch.device("cuda"), 4)
    with pytest.raises(InvdpoError, match=r"`device: cuda:1` names one GPU"):
        ranks.check_devices(torch.device("cuda:1"), 2)


def program(text: str) -> list[str]:
    """A rank that imports nothing of ours: `number` is its rank."""
    return [sys.executable, "-c", f"import os, signal, sys, time\nnumber = int(os.environ['RANK'])\n{text}"]


SLEEP = "time.sleep(60)"


def test_launch_waits_for_all_and_tells_each_its_place(tmp_path: Path) -> None:
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    text = f"open(f'{tmp_path}/{{number}}', 'w').write(' '.join(os.environ[key] for key in {keys}))"
    ranks.launch(2, program(text))
    assert [(tmp_path / name).read_text() for name in "01"] == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]


def children() -> set[str]:
    """Ids of this process's children, ended ones that nobody waited for included."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sys.exit(3) if number == 1 else " + SLEEP, "Rank 1 of 2 failed with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL) if number == 1 else " + SLEEP, "Rank 1 of 2 was killed by SIGKILL"),
        # Rank 0 only lost rank 1, which takes longer to end.
        (f"sys.exit({ranks.LOST}) if number == 0 else (time.sleep(0.5), sys.exit(1))", "Rank 1 of 2 failed with"),
    ],
)
def test_launch_ends_with_the_rank_that_died(monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.2)
    began, before = time.monotonic(), children()
    with pytest.raises(InvdpoError, match=told):
        ranks.launch(2, program(text))
    assert time.monotonic() - began < 10
    assert children() <= before, "none is left"


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        ([-signal.SIGABRT, 1], (1, 1)),
        ([-signal.SIGABRT, ranks.LOST, -signal.SIGKILL], (2, -signal.SIGKILL)),
        ([None, -signal.SIGABRT], (1, -signal.SIGABRT)),
        ([ranks.LOST, -signal.SIGABRT], (1, -signal.SIGABRT)),
    ],
)
def test_the_rank_that_failed_is_told_from_those_that_abort_over_it(
    codes: list[int | None], named: tuple[int, int]
) -> None:
    """Ended between two looks at them, as where a watchdog is as fast as the failing one's own end."""
    processes: Any = [SimpleNamespace(poll=lambda code=code: code) for code in codes]
    assert ranks._first_failure(processes) == named


def test_launch_passes_a_stop_on_once_and_lets_the_ranks_finish(tmp_path: Path) -> None:
    """A Ctrl-C of the terminal goes to every process of the foreground group, and a second one means at once."""
    rank = f"""
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
open(f'{tmp_path}/{{number}}', 'w').close()
while not heard: time.sleep(0.01)
time.sleep(1)
open(f'{tmp_path}/{{number}}', 'w').write(str(len(heard)))
sys.exit(130)
"""
    text = f"""
import sys
from invdpo.training import ranks
try: ranks.launch(2, {program(rank)!r})
except KeyboardInterrupt: sys.exit(42)
"""
    launcher = subprocess.Popen([sys.executable, "-c", text], start_new_session=True)
    wait_for(launcher, lambda: len(list(tmp_path.iterdir())) == 2)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(30) == 42
    assert [(tmp_path / name).read_text() for name in "01"] == ["1", "1"]


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    """Killed, so that it can tell nobody: the ranks would go on, and a second start train beside them."""
    follow = "from invdpo.training import ranks; open(f'{folder}/{os.getpid()}', 'w').close(); ranks._follow_launcher()"
    rank = f"folder = {str(tmp_path)!r}\n{follow}"
    text = f"from invdpo.training import ranks; ranks.launch(2, {program(rank)!r})"
    launcher = subprocess.Popen([sys.executable, "-c", text])
    wait_for(launcher, lambda: len(list(tmp_path.iterdir())) == 2)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while any(runs(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(process: int) -> bool:
    """Whether a process that is not a child of ours is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(process: subprocess.Popen[Any], what: Callable[[], bool]) -> None:
    """Until something is so, or the process has ended."""
    while process.poll() is None and not what():
        time.sleep(0.02)


def test_the_command_starts_its_ranks_and_stops_cleanly(prepared: MakeStudy) -> None:
    study = prepared(training={"steps": 4000, "checkpoints": [2], "processes": 2})
    Path("study.json").write_text(dump_study(study))
    options = ["--study", "study.json", "--arm", "dpo", "--seed", "0", "--threads", "2", "--log", "train.log"]
    with open("stderr.txt", "w") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "invdpo.cli", "train", *options], stderr=stderr)
    wait_for(process, (out("dpo") / "train.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert "Traceback" not in Path("stderr.txt").read_text()
    lines = Path("train.log").read_text().splitlines()
    stopped = [line for line in lines if "the same command goes on from there" in line]
    assert len(stopped) == 2 and sum(line.startswith("[rank 1] dpo/seed0: stopped") for line in stopped) == 1
