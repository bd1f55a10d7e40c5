"""The training loop: one policy, one frozen reference, any recipe."""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invdpo import objectives
from invdpo.backbones.pipeline import UNetEps, load_schedule, load_unet
from invdpo.config import ArmConfig, StudyConfig, TrainingConfig
from invdpo.device import compiling, memory_for, resolve_dtype
from invdpo.errors import InvdpoError
from invdpo.files import remove, write_json
from invdpo.inversion import invert
from invdpo.inversion.cache import Inverter, Savings, TrajectoryCache, identity
from invdpo.memory import Denoiser, remedies
from invdpo.network_size import denoiser
from invdpo.preferences.cache import PreferenceCache, cache_key, load_cache
from invdpo.preferences.labels import drawn_pairs, flips, strengths
from invdpo.preferences.order import pair_order
from invdpo.provenance import code_hash, lock_hash, peak_memory, stamp
from invdpo.schedule import NoiseSchedule
from invdpo.tracking.live import live_run
from invdpo.training import lora, shards, state
from invdpo.training.data import draw
from invdpo.training.offload import Offloaded
from invdpo.training.optim import build_optimizer, distance, warmed_up
from invdpo.training.ranks import Ranks, join
from invdpo.types import EpsModel

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

log = logging.getLogger("invdpo")

FP16_LOSS_SCALE = 2.0**16  # where torch's own GradScaler starts
# The modules that decide a run's weights, and what is said when a stored state was made with others.
NUMERICS = (
    "schedule",
    "inversion",
    "likelihood",
    "objectives",
    "preferences",
    "backbones",
    "training",
    "device",
    "types",
)
TRAJECTORIES = "trajectories"  # the folder of a study's inversions
CHANGED = {"data_key": "the preference pairs", "code_hash": "the code", "lock_hash": "the locked libraries"}
FP16_GROWTH_INTERVAL = 2000  # good steps before the scale doubles, as torch's GradScaler


def train(study: StudyConfig, arm_name: str, seeds: list[int], device: torch.device) -> None:
    """Train an arm for each seed into root/runs/<arm>/seed<k>; a finished seed is only brought back to its
    place. Processes that a launcher started together (`training.ranks`) train each run together, and the first of them
    writes.

    Raises InvdpoError (bad input, non-finite loss, full disk, out of GPU memory) and KeyboardInterrupt (a clean stop
    that resumes).
    """
    ranks, device = join(device)
    arm = study.arm(arm_name)
    _check_passes(arm, ranks)
    runs = [Run(study, arm, seed, device, ranks) for seed in seeds]
    if not arm.trains:
        for run in runs:
            run.finish_untrained()
        return
    scored = arm.recipe.loss.weight_by_strength
    key = cache_key(study.root / "preferences", scored)
    for run in runs:
        run.settle(key)
    ranks.wait()
    if all(run.finished for run in runs):
        for run in runs:
            run.publish()
        return
    # Where the whole base does not stay on the device, it need not fit there either.
    elsewhere = arm.training.reference_offload or runs[0].sharded
    place = torch.device("cpu") if elsewhere else device
    with memory_for(f"{arm_name}: the base", ["a larger GPU: even its weights alone do not fit"]):
        base = load_unet(study.base, place, arm.training.gradient_checkpointing, variant=study.variant)
    schedule = load_schedule(study.base)
    columns = [arm.labels] if arm.labels in study.label_columns else []
    cache = load_cache(study.root / "preferences", device, scored, columns)
    for run in runs:
        if not run.finished:
            run.train(base, schedule, cache)
        run.publish()


def _check_passes(arm: ArmConfig, ranks: Ranks) -> None:
    """InvdpoError where the settings of an arm's passes and its recipe exclude each other.

    A loss that looks at its whole batch, for instance, cannot be summed over parts of it.
    """
    training = arm.training
    likelihood = arm.trains and arm.recipe.log_ratio.form == "likelihood"
    if training.compile and likelihood:
        raise InvdpoError(
            f"`arms.{arm.name}`: `training.compile` and recipe {arm.recipe.name} exclude each other: the gradient of "
            "its log-ratio (`log_ratio.form: likelihood`) goes through gradients, which torch.compile cannot "
            "differentiate again. Leave `compile` out for this arm."
        )
    if training.shard and ranks.size > 1 and likelihood:
        raise InvdpoError(
            f"`arms.{arm.name}`: `training.shard` and recipe {arm.recipe.name} exclude each other: the gradient of its "
            "log-ratio (`log_ratio.form: likelihood`) goes through gradients, for which FSDP does not gather the "
            "weights again. Leave `shard` out for this arm."
        )
    try:
        pairs = training.pairs_a_pass(ranks.size)
    except ValueError as error:
        raise InvdpoError(f"`arms.{arm.name}.training`: {error}. Change `batch` or `micro_batch`.") from error
    if arm.trains and arm.recipe.loss.kind == "kto" and pairs != training.batch:
        raise InvdpoError(
            f"`arms.{arm.name}`: `training.micro_batch` is {training.micro_batch} and `training.batch` is "
            f"{training.batch}, shared by {ranks.size} process(es), but the loss of recipe {arm.recipe.name} "
            "(`loss.kind: kto`) measures every pair from the mean log-ratio of its backward pass, so it would be "
            "another method for every `micro_batch`. Leave `micro_batch` out for this arm (null) and set `processes: "
            "1`; `training.chunk` bounds its memory."
        )
    if training.lora is not None and arm.initial_rounding is not None:
        raise InvdpoError(
            f"`arms.{arm.name}`: `initial_rounding` and `training.lora` exclude each other: the reference is the "
            "policy's network without its adapters, and would be rounded too. Leave one of them out."
        )


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event that the loop looks at between steps; the second one
    interrupts.

    Outside the main thread, where Python allows no handlers, the event just never comes.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handler(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        log.warning("stopping after this step (press Ctrl-C again to stop at once)")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Run:
    """One arm and seed: its output folder, its state folder, its training."""

    def __init__(
        self, study: StudyConfig, arm: ArmConfig, seed: int, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.study = study
        self.arm = arm
        self.seed = seed
        self.device = device
        self.ranks = ranks or Ranks()
        self.sharded = arm.training.shard and self.ranks.size > 1
        self.name = f"{arm.name}/seed{seed}"
        self.out = study.root / "runs" / arm.name / f"seed{seed}"
        self.state = study.root / "state" / arm.name / f"seed{seed}" / arm.hash

    @property
    def finished(self) -> bool:
        """Whether the state says that the run is complete."""
        return (self.state / "run.json").is_file()

    def settle(self, data_key: str) -> None:
        """Clear whatever this configuration, code, libraries and pairs did not make: it is never resumed."""
        if not self.ranks.writes:
            return
        identity = {
            "config_hash": self.arm.hash,
            "data_key": data_key,
            "code_hash": code_hash(NUMERICS),
            "lock_hash": lock_hash(),
        }
        path = self.state / "identity.json"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            changed = [words for key, words in CHANGED.items() if stored.get(key) != identity[key]]
            if changed:
                log.warning(f"{self.name}: {', '.join(changed)} changed since it was trained: it starts from zero")
                remove(self.state)
        write_json(path, identity)
        for left in self.state.glob(".*.part"):  # by a process that was killed while it wrote
            remove(left)
        made_by = _made_by(self.out / "run.json")
        if made_by not in (None, self.arm.hash):
            log.warning(
                f"{self.out} was made by another configuration (hash {made_by}, now {self.arm.hash}): "
                f"it is replaced, and {self.name} does not resume from it"
            )
        if made_by != self.arm.hash or not self.finished:
            remove(self.out)

    def publish(self) -> None:
        """Bring the output folder in line with the state."""
        if not self.ranks.writes:
            return
        kept = [step for step in self.arm.training.grid if (self.state / state.checkpoint_folder(step)).is_dir()]
        state.publish(self.state, self.out, kept, self.finished)

    def finish_untrained(self) -> None:
        """The base model's run: nothing trained, nothing spent."""
        if not self.ranks.writes:
            return
        remove(self.out)
        state.write_rows(self.out / "train.jsonl", [])
        write_json(self.out / "run.json", self._describe(state.Progress(), time.time(), None, {}))

    def train(self, base: UNet2DConditionModel, schedule: NoiseSchedule, cache: PreferenceCache) -> None:
        """Train from the stored state (or from `base`) to the last step, keeping checkpoints on the grid.

        With `training.lora`, `base` wears the adapters meanwhile.
        """
        started, training = time.time(), self.arm.training
        dtype = resolve_dtype(self.device, self.study.precision)
        savings = Savings()
        adapted = None
        try:
            with memory_for(f"{self.name}: weights and optimizer", self._remedies(base, cache, before_steps=True)):
                reference = frozen_reference(base, self.arm.recipe.reference_dtype, self.device)
                inverter = self._inverter(reference, dtype, savings)
                if training.lora is not None:
                    policy = adapted = lora.attach(base, training.lora, self.seed)
                elif self.sharded:
                    policy = self._shard(initial_policy(base, self.arm.initial_rounding))
                    # `base` stays whole, on the CPU, for the next seed.
                    kept = self._shard(copy.deepcopy(base))
                    reference, base = kept if reference is base else self._shard(reference), kept
                else:
                    policy = initial_policy(base, self.arm.initial_rounding).to(self.device)  # pyright: ignore[reportArgumentType]
                for unet in (policy, reference):
                    _arrange(unet, training)
                trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
                optimizer = build_optimizer(
                    shards.parts(policy) if self.sharded else trainable, training, self.arm.learning_rate
                )
                progress = state.load_state(self.state, policy, optimizer)
                stepper = Stepper(
                    self, policy, reference, base, optimizer, schedule, cache, dtype, progress, inverter, savings
                )
            self._steps(stepper, policy, optimizer, adapted)
        finally:
            if adapted is not None:
                lora.detach(adapted)
        last = progress.rows[-1]
        moved = {
            "reference_distance": last["reference_distance"],
            "relative_reference_distance": last["reference_distance"] / stepper.reference_norm,
            "data_key": cache.key,
            "pairs": len(stepper.drawn),
        }
        if not self.ranks.writes:
            return
        state.finish(self.state, self._describe(progress, started, dtype, moved))
        if (savings := progress.savings).asked:
            log.info(
                f"{self.name}: {savings.found} of {savings.asked} inversions were in {self.study.root / TRAJECTORIES}, "
                f"which saved {savings.unet_evals:,} UNet evaluations and {savings.seconds:.0f} s"
            )

    def _steps(
        self,
        stepper: Stepper,
        policy: UNet2DConditionModel,
        optimizer: torch.optim.Optimizer,
        adapted: UNet2DConditionModel | None,
    ) -> None:
        """The steps that are left; raises KeyboardInterrupt after a clean stop."""
        from tqdm import tqdm

        training, progress, ranks = self.arm.training, stepper.progress, self.ranks
        if progress.step:
            log.info(f"{self.name}: resuming after step {progress.step} of {training.steps}")
            self.publish()
        elif stepper.fp16:
            progress.loss_scale = FP16_LOSS_SCALE
        saved, saved_at = progress.step, time.monotonic()
        limit = math.inf if training.save_minutes is None else 60 * training.save_minutes

        def save() -> None:
            nonlocal saved, saved_at
            if ranks.writes or self.sharded:
                state.save_state(self.state, policy, optimizer, progress, ranks.writes)
            saved, saved_at = progress.step, time.monotonic()

        bar = tqdm(
            total=training.steps,
            initial=progress.step,
            desc=self.name,
            unit="step",
            mininterval=0.5,
            disable=not ranks.writes,
        )
        shown = (self.study, self.arm.name, self.seed, progress.rows, self.device)
        watched = live_run(*shown) if ranks.writes else nullcontext()
        together = shards.calling() if self.sharded else nullcontext()
        with bar, stop_requests() as stop, watched as show, together:
            while progress.step < training.steps:
                step = f"{self.name}: step {progress.step + 1}"
                with memory_for(step, self._remedies(policy, stepper.cache)), compiling(step):
                    row = stepper.step()
                if show is not None:
                    show(row)
                stopped, late = self._agree(row, stop.is_set(), time.monotonic() - saved_at >= limit)
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                if progress.step in training.grid:
                    self._keep(policy, progress.step, adapted)
                    save()
                    self.publish()
                    log.debug(f"{self.name}: step {progress.step}, loss {row['loss']:.6g}")
                elif late:
                    save()
                if stopped and progress.step < training.steps:
                    if saved != progress.step:
                        save()
                    log.warning(
                        f"{self.name}: stopped after step {progress.step} of {training.steps}; "
                        "the same command goes on from there"
                    )
                    raise KeyboardInterrupt

    def _agree(self, row: dict[str, Any], stop: bool, late: bool) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether the first one's clock says that it is time to save; the
        row then tells the largest memory of all.

        Raises InvdpoError where the processes have come to have different weights.
        """
        own = stop, late, row["memory_bytes"], row["reference_distance"]
        stops, overdue, memory, distances = zip(*self.ranks.gather(own), strict=True)
        row["memory_bytes"] = max(memory)
        if len(set(distances)) > 1:
            raise InvdpoError(
                f"{self.name}: after step {row['step']} the processes have different weights (their distances from "
                f"the reference are {', '.join(map(str, distances))}). Train on GPUs of one kind, with one version of "
                "the libraries; the last saved state is from before."
            )
        return any(stops), overdue[0]

    def _remedies(
        self, unet: UNet2DConditionModel, cache: PreferenceCache, before_steps: bool = False
    ) -> Iterator[str]:
        """As `memory.remedies`, by the sizes of the network and the pairs that are there."""
        training = self.arm.training.model_copy(update={"processes": self.ranks.size})
        arm = self.arm.model_copy(update={"training": training})
        sizes = Denoiser(**denoiser(unet.config, cache.win_mean.shape[-1], cache.embeds.shape[1]))
        yield from remedies(arm, sizes, before_steps=before_steps)

    def _shard(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        return shards.shard(unet, self.device, self.ranks.size)

    def _keep(self, policy: UNet2DConditionModel, step: int, adapted: UNet2DConditionModel | None) -> None:
        """The checkpoint of a step: a whole UNet, with what adapters add merged into a fresh copy of the base."""
        weights = shards.gathered(policy.state_dict(), self.ranks.writes) if self.sharded else None
        if not self.ranks.writes:
            return
        if weights is not None:
            policy = shards.unet_of(policy, weights)
        if adapted is not None:
            fresh = load_unet(self.study.base, torch.device("cpu"), variant=self.study.variant)
            policy = lora.merged(adapted, fresh)
        state.save_checkpoint(self.state, policy, step, adapted)

    def _inverter(self, reference: UNet2DConditionModel, dtype: torch.dtype, savings: Savings) -> Inverter:
        """What inverts by the reference: with the study's trajectories, where it keeps them and the recipe has any."""
        recipe, limit = self.arm.recipe, self.study.trajectory_cache_gb
        spec = recipe.trajectory
        whole = spec.kind == "inversion" and spec.model == "reference" and recipe.timesteps != "single"
        if limit is None or not whole:
            return invert
        model = f"{identity(reference, dtype)} told in {recipe.reference_label_dtype}"
        # A sharded reference inverts with all processes: where one has to, all do.
        agree = (lambda found: all(self.ranks.gather(found))) if self.sharded else bool
        return TrajectoryCache(self.study.root / TRAJECTORIES, int(limit * 1e9), model, savings, agree).invert

    def _describe(
        self, progress: state.Progress, started: float, dtype: torch.dtype | None, extra: dict[str, Any]
    ) -> dict[str, Any]:
        """The content of run.json: provenance, what was run, what it cost."""
        return {
            **stamp(
                self.study,
                config_hash=self.arm.hash,
                seed=self.seed,
                device=self.device,
                dtype=None if dtype is None else str(dtype).removeprefix("torch."),
                started=started,
                unet_evals=progress.unet_evals,
            ),
            "arm": self.arm.name,
            "method": self.arm.method,
            "labels": self.arm.labels,
            "initial_rounding": self.arm.initial_rounding,
            "base": self.study.base,
            "recipe": self.arm.recipe.model_dump(mode="json") if self.arm.trains else None,
            "training": self.arm.training.model_dump(mode="json"),
            "processes": self.ranks.size,
            "learning_rate": self.arm.learning_rate if self.arm.trains else None,
            "beta": self.arm.recipe.beta if self.arm.trains else None,
            "steps": progress.step,
            "pairs_seen": progress.pairs_seen,
            "seconds": progress.seconds,  # in training steps only, over all resumes, without the trajectory cache
            "trajectory_cache": asdict(progress.savings),
            **extra,
        }


class Stepper:
    """The optimizer steps of one run; advances `progress` by one step a call."""

    def __init__(
        self,
        run: Run,
        policy: UNet2DConditionModel,
        reference: UNet2DConditionModel,
        base: UNet2DConditionModel,
        optimizer: torch.optim.Optimizer,
        schedule: NoiseSchedule,
        cache: PreferenceCache,
        dtype: torch.dtype,
        progress: state.Progress,
        inverter: Inverter = invert,
        savings: Savings | None = None,
    ) -> None:
        """savings: what `inverter` counts into, and each step takes over into `progress`."""
        self.arm, self.seed, self.device = run.arm, run.seed, run.device
        self.name, self.state_folder, self.ranks = run.name, run.state, run.ranks
        self.policy: EpsModel = UNetEps(policy, dtype)
        self.reference: EpsModel = UNetEps(reference, dtype)
        self.parameters: list[Tensor] = [value for value in policy.parameters() if value.requires_grad]
        if reference is policy:
            self.reference = lora.switched_off(policy, self.reference)
        if run.arm.training.reference_offload:
            self.reference = Offloaded(self.reference, reference, run.device)
            self.policy = self.reference.released_before(self.policy)
        # After offloading, which puts the weights into other memory.
        self.base_parameters: list[Tensor] = list(lora.base_weights(base))
        self.sharded, self.networks = run.sharded, (policy, reference)
        if run.sharded:
            self.parameters = optimizer.param_groups[0]["params"]  # this process's parts
            self.base_parameters = [shards.part(value) for value in self.base_parameters]
        self.distance = partial(distance, self.parameters, self.base_parameters)
        if run.arm.training.lora is not None:
            self.distance = partial(lora.distance, policy)
        self.inverter, self.savings = inverter, savings or Savings()
        self.optimizer, self.schedule, self.cache, self.progress = optimizer, schedule, cache, progress
        self.fp16 = dtype == torch.float16
        self.flipped = flips(run.arm.labels, len(cache), run.seed, cache.labels)
        self.drawn = drawn_pairs(run.arm.labels, len(cache), cache.labels)
        self.strength = None
        if run.arm.recipe.loss.weight_by_strength:
            assert cache.scores is not None  # `train` asks for them
            self.strength = strengths(cache.scores)
        norm = torch.linalg.vector_norm(torch.stack([p.norm() for p in self.base_parameters]))
        self.reference_norm = float(self._of_all(norm))

    def step(self) -> dict[str, Any]:
        """One optimizer step; returns its row of train.jsonl.

        Raises InvdpoError when the loss or the gradient is not finite; the policy is then as it was before
        the step.
        """
        progress, training = self.progress, self.arm.training
        began, saved = time.perf_counter(), progress.savings.seconds
        number = progress.step + 1
        while True:
            outputs = self._accumulate(number)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            if not self.sharded:  # whose parts are sums already
                self.ranks.add(gradients)
            norm = self._of_all(torch.nn.utils.get_total_norm(gradients)) / progress.loss_scale
            loss, numbers = self._exchange(outputs)
            if not math.isfinite(loss):
                self._fail(number, "loss", loss)
            if torch.isfinite(norm):
                break
            if not self.fp16 or progress.loss_scale <= 1:
                self._fail(number, "gradient norm", float(norm))
            # fp16's gradients overflowed: the same step again with a smaller scale
            progress.loss_scale, progress.good_steps = progress.loss_scale / 2, 0

        rate = warmed_up(self.arm.learning_rate, number, training.warmup_steps)
        self._update(norm, rate)
        if isinstance(self.reference, Offloaded):
            self.reference.release()
        if self.sharded and self.arm.recipe.calls_reference:
            shards.forget_calls(self.networks[1])
        progress.step = number
        progress.pairs_seen += training.batch
        if self.fp16:
            progress.good_steps += 1
            if progress.good_steps == FP16_GROWTH_INTERVAL:
                progress.loss_scale, progress.good_steps = progress.loss_scale * 2, 0
        grad_norm, moved = torch.stack([norm.float(), self._of_all(self.distance()).float()]).tolist()
        # As if nothing had been found: a method's time must not depend on which other method ran first.
        progress.seconds += time.perf_counter() - began + progress.savings.seconds - saved
        row = {
            "step": number,
            "loss": loss,
            **numbers,
            "grad_norm": grad_norm,
            "reference_distance": moved,
            "learning_rate": rate,
            "pairs_seen": progress.pairs_seen,
            "unet_evals": progress.unet_evals,
            "seconds": progress.seconds,
            "memory_bytes": peak_memory(self.device),
        }
        progress.rows.append(row)
        return row

    def _accumulate(self, number: int) -> list[objectives.LossOutput]:
        """Forward and backward of every micro-batch of this process; gradients carry fp16's loss scale, and each
        process's are its part of the whole batch's, or where weights are sharded the whole batch's for its part of
        them."""
        training = self.arm.training
        self.optimizer.zero_grad(set_to_none=True)
        chosen = self.drawn[pair_order(self.seed, number, training.batch, len(self.drawn))].tolist()
        share, size = self.ranks.share(training.batch), training.pairs_a_pass(self.ranks.size)
        outputs = []
        for first in range(share.start, share.stop, size):
            pairs = chosen[first : first + size]
            batch = draw(
                self.cache,
                self.flipped,
                pairs,
                self.seed,
                number,
                first,
                training.caption_dropout,
                training.micro_conditioning,
            )
            outputs.append(
                objectives.backward(
                    self.arm.recipe,
                    self.policy,
                    self.reference,
                    batch.x0_win,
                    batch.x0_lose,
                    batch.cond,
                    self.schedule,
                    batch.generators,
                    strength=None if self.strength is None else self.strength[pairs],
                    loss_scale=self.progress.loss_scale * size / training.batch,
                    chunk=training.chunk,
                    inverter=self.inverter,
                    cond_lose=batch.cond_lose,
                    reference_first=training.reference_offload,
                    final_at_once=self.sharded,
                )
            )
        if self.sharded:
            shards.move_gradients(self.networks[0], self.parameters)
        return outputs

    def _of_all(self, norm: Tensor) -> Tensor:
        """The norm of weights or gradients, of this process's: the same where it has all of them."""
        if not self.sharded:
            return norm
        square = norm.double().square()
        self.ranks.add([square])
        return square.sqrt().to(norm)

    def _update(self, norm: Tensor, rate: float) -> None:
        """Unscale, clip to the total norm, and step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        limit = self.arm.training.max_grad_norm
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0) / self.progress.loss_scale
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def _exchange(self, outputs: list[objectives.LossOutput]) -> tuple[float, dict[str, float | None]]:
        """The loss and what is logged beside it, means over the batch; the processes' counts go into `progress`."""
        own = self._numbers(outputs), sum(output.unet_evals for output in outputs), self.savings
        numbers, evals, savings = zip(*self.ranks.gather(own), strict=True)
        self.progress.unet_evals += sum(evals)
        total = self.progress.savings
        total.asked += sum(each.asked for each in savings)
        total.found += sum(each.found for each in savings)
        total.unet_evals += sum(each.unet_evals for each in savings)
        total.seconds += max(each.seconds for each in savings)  # the processes would have taken that time together
        self.savings.asked = self.savings.found = self.savings.unet_evals = 0
        self.savings.seconds = 0.0
        means = {name: sum(each[name] for each in numbers) / len(numbers) for name in numbers[0]}
        return means.pop("loss"), {"logratio_lose": None, "implicit_accuracy": None, **means}

    def _numbers(self, outputs: list[objectives.LossOutput]) -> dict[str, float]:
        """Means over this process's pairs, brought from the device in one transfer; without those that need a loser
        where the recipe has none.

        logratio_win, logratio_lose: the surrogate log p_theta - log p_ref, before beta, of the images that the arm's
        labels make winners and losers. implicit_accuracy: the share of pairs whose winner has the larger one, one half
        where policy and reference are equal. A recipe that reverses labels itself (Diffusion-NPO) drives it below one
        half; with strengths (SmPO) it is still by the labels, not by the scorer; where a pair's draws are independent
        (Diffusion-KTO) it compares two images at timesteps and noises of their own, and so is noisier.

        Without a reference (sft, MaPO) there is no log-ratio: logratio_* are minus the denoising errors, and
        implicit_accuracy is the share of pairs whose winner is denoised better: at the start, the base's own.
        """
        win = torch.cat([output.logratio_win.detach() for output in outputs]).float()
        losers = [output.logratio_lose.detach() for output in outputs if output.logratio_lose is not None]
        values = [torch.stack([output.loss.detach().float() for output in outputs]).mean(), win.mean()]
        names = ["loss", "logratio_win"]
        if losers:
            lose = torch.cat(losers).float()
            # A draw counts half: at the start policy and reference are equal and every pair is one.
            values += [lose.mean(), (torch.sign(win - lose) / 2 + 0.5).mean()]
            names += ["logratio_lose", "implicit_accuracy"]
        return dict(zip(names, torch.stack(values).float().tolist(), strict=True))

    def _fail(self, number: int, what: str, value: float) -> None:
        kept = [step for step in self.arm.training.grid if step < number]
        last = (
            f"the checkpoint of step {kept[-1]} in {self.state_folder} is kept" if kept else "no checkpoint was due yet"
        )
        raise InvdpoError(
            f"{self.name}: the {what} of step {number} is {value}, so training stopped; {last}. Lower "
            f"`learning_rate` (now {self.arm.learning_rate:g}) or beta (now {self.arm.recipe.beta:g}), use "
            "`precision: fp32`, or check the pairs of that step."
        )


def _arrange(unet: UNet2DConditionModel, training: TrainingConfig) -> None:
    """Memory format and compilation of a UNet, in place; its weights keep their names."""
    if training.channels_last:
        unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if training.compile:
        unet.compile()


def initial_policy(base: UNet2DConditionModel, rounding: str | None) -> UNet2DConditionModel:
    """A trainable copy of the base, its weights rounded to the precision of dtype `rounding` where there is one."""
    policy = copy.deepcopy(base) if rounding is None else _rounded(base, rounding)
    return policy.requires_grad_(True)


def frozen_reference(base: UNet2DConditionModel, dtype: str, device: torch.device) -> UNet2DConditionModel:
    """The base itself in fp32, or a half-precision copy for a recipe that compares against one.

    CPUs multiply half precision a hundred times slower, so there only the weights are rounded to it and the pass runs
    in fp32: the same noise of rounding size at the start, by another route.
    """
    base.requires_grad_(False)
    if dtype == "float32":
        return base
    return _rounded(base, dtype) if device.type == "cpu" else copy.deepcopy(base).to(getattr(torch, dtype))


def _rounded(base: UNet2DConditionModel, dtype: str) -> UNet2DConditionModel:
    """A copy in fp32 whose weights have only the precision of `dtype`."""
    rounded = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    return rounded


def _made_by(path: Path) -> str | None:
    """The configuration hash in a run.json; None where there is no readable one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config_hash"]
    except (OSError, ValueError, KeyError):
        return None
