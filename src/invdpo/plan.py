"""What a study will cost, before anything is fetched or trained: `invdpo plan`.

Counts are exact where the configuration decides them; time, memory and disk are estimates, and every assumption behind
them is printed below the tables.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.config import read_yaml
from invdpo.errors import InvdpoError
from invdpo.machine import GB, Disk, Machine, disk_at, held, machine_for
from invdpo.memory import CUDA_CONTEXT, remedies, training_memory
from invdpo.plan_sizes import (
    Download,
    Networks,
    Pairs,
    count_prompts,
    disk,
    downloads,
    evaluation_memory,
    host_memory,
    in_half,
    made_here,
    networks_of,
    preference_pairs,
    sizes,
)

if TYPE_CHECKING:
    from invdpo.config import StudyConfig
    from invdpo.cost import Spent

log = logging.getLogger("invdpo")

# Seconds that a core takes to decode, resize and turn into numbers a JPEG of one megapixel: measured, 15 to 19 ms.
DECODE_SECONDS = 0.02
# Seconds that a GPU waits for each of torch's operations to be asked for, about: what small networks and batches take.
LAUNCH_SECONDS = 5e-6


@dataclass(frozen=True)
class Arm:
    """One arm, all seeds. hash: of its settings. evaluations: of the UNet, a backward pass counting two. hours: of one
    device. memory: GB of one device."""

    method: str
    hash: str
    runs: int
    train_evaluations: float
    evaluate_evaluations: float
    train_hours: float
    evaluate_hours: float
    train_memory: float
    evaluate_memory: float
    devices: int


@dataclass(frozen=True)
class Stage:
    """jobs: of Snakemake. evaluations: of the UNet. hours: of one device."""

    jobs: int
    evaluations: float
    hours: float


@dataclass
class Plan:
    """Everything that is printed. disk: GB in the results. memory: GB, the most of any arm."""

    study: str
    base: str
    machine: Machine
    evaluations_per_second: float
    jobs: dict[str, int]
    downloads: dict[str, Download]
    stages: dict[str, Stage]
    methods: dict[str, Stage]
    arms: dict[str, Arm]
    disk: dict[str, float]
    disks: list[Disk]
    memory: dict[str, float]
    problems: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages.values())


@dataclass(frozen=True)
class Clock:
    """How long work takes on one device. flops, fp32_flops: a second. launch: seconds an operation."""

    flops: float
    fp32_flops: float
    launch: float

    def unet(self, spent: Spent, networks: Networks, half: bool = True, repeats: bool = True) -> float:
        """Hours of a UNet's passes: of their operations in numbers, or of asking for them where that takes longer."""
        evaluations = spent.evaluations + (spent.repeated if repeats else 0)
        work = evaluations * networks.unet_flops / (self.flops if half else self.fp32_flops)
        return max(work, spent.calls * networks.unet_operations * self.launch) / 3600

    def codec(self, flops: float, half: bool = False) -> float:
        """Hours of an image codec's passes."""
        return flops / (self.flops if half else self.fp32_flops) / 3600


def plan(
    study: StudyConfig,
    throughput: float | None = None,
    gpu: str | None = None,
    gpu_memory: float | None = None,
    gpus: int | None = None,
) -> Plan:
    """The plan of a study. throughput: UNet evaluations a second of one device, measured, of the study's base. gpu: a
    name in config/sizes.yaml; null: this machine's. gpu_memory: GB of one. gpus: how many.

    Raises InvdpoError for a base whose size is not known, and for a study that is not valid.
    """
    from invdpo import cost

    known, assumptions = sizes(), []
    settings = study.experiments.inversion_error
    networks = networks_of(study, known, assumptions)
    prompts = count_prompts(study.prompts, study.sampling.prompts, assumptions)
    own_prompts = count_prompts(study.own_samples.prompts, None, assumptions) if study.own_samples else 0
    pairs, fetched = preference_pairs(study, own_prompts, known, assumptions)
    own = _own_networks(study, networks, known, assumptions)
    arms = {name: study.arm(name) for name in study.arms}
    seeds = {name: study.seeds if arm.trains else [0] for name, arm in arms.items()}
    trained = {name: cost.runs(arm, seeds[name]) if arm.trains else cost.NOTHING for name, arm in arms.items()}
    drawn = {
        name: cost.drawing(arm, study.with_base_of(name).sampling, prompts).times(len(seeds[name]))
        for name, arm in arms.items()
    }
    tried = cost.inversion_error(settings) if settings else cost.NOTHING

    flops = tried.evaluations * networks.unet_flops
    flops += sum((trained[name].evaluations + drawn[name].evaluations) * own[name].unet_flops for name in arms)
    machine, problems = machine_for(known["gpus"], study.device == "cpu", gpu, gpu_memory, gpus, flops)
    half = study.precision != "fp32"
    clock = _clock(machine, networks, throughput, half)
    assumptions.append(_speed(machine, networks, throughput, half))

    found = {}
    for name, arm in arms.items():
        seen = study.with_base_of(name)
        images = len(seeds[name]) * prompts * (len(arm.training.grid) if arm.trains else 1)
        memory = 0.0
        if arm.trains:
            memory = training_memory(arm, own[name], cost.held(arm), machine.kind)
        decoding = clock.codec(images * own[name].decode_flops, in_half(seen, known, machine.kind))
        found[name] = Arm(
            method=arm.method if arm.weights is None else f"{arm.method}, published weights",
            hash=arm.hash,
            runs=len(seeds[name]),
            train_evaluations=trained[name].evaluations,
            evaluate_evaluations=drawn[name].evaluations,
            # A measured rate has in it what a run of its kind does twice.
            train_hours=clock.unet(trained[name], own[name], half, repeats=throughput is None),
            evaluate_hours=clock.unet(drawn[name], own[name], half) + decoding,
            train_memory=memory / GB,
            evaluate_memory=evaluation_memory(seen, arm, own[name], known, machine.kind) / GB,
            devices=arm.training.processes if arm.trains else 1,
        )
    stages = {
        "own_samples": _own_samples(study, own_prompts, networks, clock, half),
        "preferences": Stage(int(pairs.count > 0), 0, _encoding(study, pairs, networks, clock)),
        "train": _sum((arm.train_evaluations, arm.train_hours) for arm in found.values()),
        "evaluate": _sum((arm.evaluate_evaluations, arm.evaluate_hours) for arm in found.values()),
    }
    if settings:  # in fp32, as all experiments
        stages["inversion_error"] = Stage(1, tried.evaluations, clock.unet(tried, networks, half=False))
    stored = disk(study, own, pairs, prompts, machine.devices)
    wanted = fetched | downloads(study, own, known)
    words = f"of a {'GPU' if machine.kind == 'gpu' else 'job'}"
    result = Plan(
        study=study.study,
        base=study.base,
        machine=machine,
        evaluations_per_second=(clock.flops if half else clock.fp32_flops) / networks.unet_flops,
        jobs=({"base": 1} if made_here(study.base, known) else {}) | count_jobs(study),
        downloads=wanted,
        stages={name: stage for name, stage in stages.items() if stage.jobs},
        methods=_methods(found),
        arms=found,
        disk=stored,
        disks=_disks(study, stored, wanted),
        memory={
            f"{words}, training": max(arm.train_memory for arm in found.values()),
            f"{words}, sampling and scoring": max(arm.evaluate_memory for arm in found.values()),
            "of the machine, beside a device": max(
                host_memory(arm, own[name], machine.kind) / found[name].devices / GB for name, arm in arms.items()
            ),
        },
        problems=problems,
        assumptions=assumptions + _assumptions(study, pairs, wanted, machine, throughput),
    )
    result.problems += [*_too_large_for_devices(study, result, own, known), *_too_large_for_disks(study, result)]
    return result


def _own_networks(
    study: StudyConfig, networks: Networks, known: dict[str, Any], assumptions: list[str]
) -> dict[str, Networks]:
    """The networks of each arm: those of the study's base, or of the arm's own."""
    found: dict[str | None, Networks] = {None: networks}
    for name, entry in study.arms.items():
        if entry.base not in found:
            found[entry.base] = networks_of(study.with_base_of(name), known, assumptions)
    return {name: found[entry.base] for name, entry in study.arms.items()}


def _clock(machine: Machine, networks: Networks, throughput: float | None, half: bool) -> Clock:
    """throughput: of passes in half precision, or in fp32."""
    ratio = machine.fp32_tflops / machine.tflops
    if throughput is None:
        flops = machine.tflops * 1e12 * machine.efficiency
        return Clock(flops, flops * ratio, LAUNCH_SECONDS if machine.kind == "gpu" else 0.0)
    measured = throughput * networks.unet_flops
    return Clock(measured, measured * ratio, 0.0) if half else Clock(measured / ratio, measured, 0.0)


def _encoding(study: StudyConfig, pairs: Pairs, networks: Networks, clock: Clock) -> float:
    """Hours of the preparation: the codec waits for images, or encodes while other processes decode the next ones."""
    encode = clock.codec(2 * pairs.count * networks.encode_flops)
    decode = 2 * pairs.count * pairs.megapixels * DECODE_SECONDS / 3600
    workers = study.data.workers
    return max(encode, decode / workers) if workers else encode + decode


def _own_samples(study: StudyConfig, prompts: int, networks: Networks, clock: Clock, half: bool) -> Stage:
    """Drawing the samples that the pairs are made of; scoring them is counted no more than elsewhere."""
    from invdpo import cost

    own = study.own_samples
    if own is None:
        return Stage(0, 0, 0.0)
    scale = study.sampling.guidance_scale if own.guidance_scale is None else own.guidance_scale
    sampling = study.sampling.model_copy(update={"guidance_scale": scale})
    spent = cost.sampled(sampling, prompts).times(own.images)
    decoding = clock.codec(own.images * prompts * networks.decode_flops, half)
    return Stage(3, spent.evaluations, clock.unet(spent, networks, half) + decoding)


def _sum(parts: Iterable[tuple[float, float]]) -> Stage:
    """A job for each part, of its evaluations and hours."""
    evaluations, hours = zip(*parts, strict=True)
    return Stage(len(hours), sum(evaluations), sum(hours))


def _methods(arms: dict[str, Arm]) -> dict[str, Stage]:
    """Method -> what training and evaluating all its arms take."""
    names = dict.fromkeys(arm.method for arm in arms.values())
    return {
        name: _sum(
            (arm.train_evaluations + arm.evaluate_evaluations, arm.train_hours + arm.evaluate_hours)
            for arm in arms.values()
            if arm.method == name
        )
        for name in names
    }


def count_jobs(study: StudyConfig) -> dict[str, int]:
    """Stage -> jobs of `make reproduce`, as the rules have them."""
    arms, experiments = len(study.arms), study.experiments
    trains = any(study.arm(name).trains for name in study.arms)
    evidence = ["tables", "speed", "figures", "mlflow", "report"]
    evidence += [*(["claims"] if study.claims else []), *(["model_cards"] if trains else [])]
    evidence += ["present"] if experiments.measured else []
    evidence += ["user_study_bundle", "user_study_analysis"] if study.user_study else []
    made = {"own_samples": 3} if trains and study.own_samples else {}
    return made | {
        "preferences": int(trains),
        "train": arms,
        "evaluate": arms,
        "experiments": len(experiments.measured) + (experiments.distribution is not None),
        "evidence": len(evidence),
    }


def _disks(study: StudyConfig, stored: dict[str, float], wanted: dict[str, Download]) -> list[Disk]:
    """The disks under the results and under the hub's cache, for what neither holds already."""
    from huggingface_hub.constants import HF_HUB_CACHE

    needed = max(0.0, sum(stored.values()) - held(study.root))
    fetched = sum(download.missing for download in wanted.values())
    return [disk_at(f"{study.root}/", study.root, needed), disk_at("the hub's cache", Path(HF_HUB_CACHE), fetched)]


def _alone(study: StudyConfig, arm: str, networks: Networks, known: dict[str, Any]) -> float:
    """Bytes of a GPU where images are drawn one at a time."""
    sampling = study.sampling.model_copy(update={"batch": 1})
    seen = study.model_copy(update={"sampling": sampling}).with_base_of(arm)
    return evaluation_memory(seen, study.arm(arm), networks, known, "gpu")


def _too_large_for_devices(
    study: StudyConfig, found: Plan, networks: dict[str, Networks], known: dict[str, Any]
) -> list[str]:
    """What the machine's GPUs and memory are too small or too few for, a sentence each."""
    machine, problems = found.machine, []
    if machine.kind == "gpu":
        have = f"the {machine.memory:.3g} GB of {machine.name}"
        large = {name: arm.train_memory for name, arm in found.arms.items() if arm.train_memory > machine.memory}
        if large:
            worst = max(large, key=lambda name: large[name])
            ways = remedies(study.arm(worst), networks[worst])
            steps = "; ".join(f"({number}) {way}" for number, way in enumerate(ways, start=1))
            others = f", as {len(large) - 1} more arms do" if len(large) > 1 else ""
            problems.append(
                f"Training `{worst}` needs about {large[worst]:.3g} GB on each GPU{others}, more than {have}: the "
                f"study does not fit. In the order that helps most: {steps}."
            )
        worst = max(found.arms, key=lambda name: found.arms[name].evaluate_memory)
        scored = found.arms[worst].evaluate_memory
        if scored > machine.memory:
            least = _alone(study, worst, networks[worst], known) / GB
            batch = f"`sampling.batch: 1` (now {study.sampling.batch}): about {least:.3g} GB; "
            problems.append(
                f"Sampling and scoring need about {scored:.3g} GB, more than {have}: the study does not fit. "
                f"{batch if least < scored else ''}fewer `scorers` at a time."
            )
        most = max(arm.devices for arm in found.arms.values())
        if most > machine.devices:
            problems.append(
                f"An arm trains with {most} processes, one a GPU, and there are {machine.devices}: the study does not "
                f"fit. Set `training.processes` to at most {machine.devices}."
            )
    beside = list(found.memory.values())[-1]
    job = beside if machine.kind == "gpu" else beside + max(list(found.memory.values())[:-1])
    if machine.ram is not None and machine.devices * job > machine.ram:
        problems.append(
            f"{machine.devices} jobs at a time need about {machine.devices * job:.3g} GB of memory, and the machine "
            f"has {machine.ram:.3g}: the study does not fit. Run fewer at a time: "
            f"--{'resources gpu' if machine.kind == 'gpu' else 'cores'}={max(1, int(machine.ram / job))}."
        )
    return problems


def _too_large_for_disks(study: StudyConfig, found: Plan) -> list[str]:
    """Disks without the room that is needed, a sentence each."""
    problems = []
    for number in dict.fromkeys(place.device for place in found.disks):
        shared = [place for place in found.disks if place.device == number]
        free = shared[0].free
        if sum(place.needed for place in shared) <= free:
            continue
        where = " and ".join(f"{_gb(place.needed)} GB in {place.name}" for place in shared if place.needed)
        ways = "; ".join(_disk_remedies(study, found))
        problems.append(
            f"Disk: {where} are needed, and {_gb(free)} GB are free there: the study does not fit. Make room, or: "
            f"{ways}."
        )
    return problems


def _disk_remedies(study: StudyConfig, found: Plan) -> list[str]:
    """What makes a study take less disk, the largest part first."""
    latents = found.disk.get("latents and embeddings", 0.0)
    checkpoints = sum(gb for name, gb in found.disk.items() if name.startswith("checkpoints"))
    fetched = sum(download.missing for download in found.downloads.values())
    ways = [(checkpoints, f"keep fewer `training.checkpoints`, or take fewer `seeds` ({_gb(checkpoints)} GB)")]
    if latents and study.data.storage == "float32":
        ways.append((latents, f"`data.storage: float16` (half of {_gb(latents)} GB)"))
    if latents:
        arms = [study.arm(name) for name in study.arms]
        most = max((arm for arm in arms if arm.trains), key=lambda arm: arm.training.steps * arm.training.batch)
        drawn = most.training.steps * most.training.batch
        ways.append(
            (latents / 2, f"fewer pairs (`{most.name}` draws {drawn:,} of them), or a number of files: `data.shards`")
        )
    ways.append((fetched, "HF_HOME on another disk, for the hub's cache"))
    return [way for gb, way in sorted(ways, reverse=True) if gb > 0]


def _gb(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.10g}"


def _speed(machine: Machine, networks: Networks, throughput: float | None, half: bool) -> str:
    """Where the hours come from."""
    if throughput is not None:
        return f"time: {throughput:.3g} UNet evaluations a second and device, as given with --throughput"
    rated = machine.tflops if half else machine.fp32_tflops
    rate = rated * 1e12 * machine.efficiency / networks.unet_flops
    text = (
        f"time: {networks.unet_flops / 1e12:.3g} TFLOP a UNet evaluation (counted from the architecture), at "
        f"{machine.efficiency:.0%} of {rated:g} TFLOP/s ({machine.name}): {rate:.3g} evaluations a second"
    )
    if machine.kind == "gpu":
        text += (
            f", but no faster than {LAUNCH_SECONDS * 1e6:g} microseconds for each of the "
            f"{networks.unet_operations:,.0f} operations of a call"
        )
    return f"{text}. Give a measured rate: --throughput NUMBER, or the run.json of a finished run."


def _assumptions(
    study: StudyConfig, pairs: Pairs, wanted: dict[str, Download], machine: Machine, throughput: float | None
) -> list[str]:
    """What the numbers rest on, and what is not in them."""
    found, here = [], sum(download.here for download in wanted.values())
    if pairs.count:
        workers, share = study.data.workers, machine.fp32_tflops / machine.tflops
        how = f"by {workers} processes beside it" if workers else "between its batches, by the process that runs it"
        found.append(
            f"preparation: the codec in fp32 ({share:.3g} of the rate), and {DECODE_SECONDS:g} s of a core to decode "
            f"an image of a megapixel, {how} (`data.workers: {workers}`); scoring pairs for methods that weight them "
            "is not counted"
        )
    uncounted = [name for name in study.experiments.measured if name != "inversion_error"]
    found += [
        "evaluations: a forward pass of one latent counts 1, its backward pass 2"
        + ("; what gradient checkpointing computes again is in the hours alone" if throughput is None else "")
        + "; inversions as if none were kept (trajectory_cache_gb)",
        "not in the hours: scoring the images, text encoders, loading and saving, a failed or repeated job"
        + "".join(f", experiment {name}" for name in uncounted),
        "memory: fp32 weights of policy and base (also the reference, where it is not another), gradients and "
        "optimizer, with `training.shard` in equal parts and the largest block whole; weights in half precision and "
        "activations of the latents whose graph is alive at once, as the training code keeps them; "
        f"{CUDA_CONTEXT / GB:g} GB for CUDA; in evaluation the scorers beside the UNet, and what a batch of "
        "`sampling.batch` has at a time. Fragments of memory, and what cuDNN takes to work in, are not counted",
        f"downloads: {_gb(here)} GB of them lie in the hub's cache already; weights whose size is not known "
        "as the base's UNet in fp32, the most that they can be",
    ]
    return found


def read_throughput(text: str, base: str) -> float:
    """UNet evaluations a second of one device: a number, or a JSON file with `unet_evals` (of all processes), `seconds`
    and `processes` (1 where it has none), as a run.json has them.

    base: the study's, which a file of another one is said not to be of. Raises InvdpoError for what is no such file or
    number, or not positive and finite.
    """
    try:
        value = float(text)
    except ValueError:
        content = read_yaml(Path(text))
        try:
            spent = [float(content[name]) for name in ("unet_evals", "seconds")]
            value = spent[0] / spent[1] / content.get("processes", 1) if min(spent) > 0 else 0.0
            made = content.get("base", base)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise InvdpoError(
                f"--throughput {text}: expected `unet_evals` and `seconds` in it, as in the run.json of a finished "
                "run; or give a number, UNet evaluations a second of one device."
            ) from error
        if made != base:
            log.warning(f"--throughput {text}: that run's base is {made}, the study's is {base}: hours are by its rate")
    if not (value > 0 and math.isfinite(value)):
        raise InvdpoError(f"--throughput {text}: it must be positive and finite.")
    return value
