"""What a study will cost, before anything is fetched or trained: `invdpo plan`.

Counts are exact where the configuration decides them; time, memory and disk are estimates, and every assumption behind
them is printed below the tables.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.config import read_yaml
from invdpo.errors import InvdpoError
from invdpo.lease import devices
from invdpo.prompts import read_prompts

if TYPE_CHECKING:
    from invdpo.config import ArmConfig, ScorersConfig, StudyConfig

SIZES = Path("config/sizes.yaml")
GB = 1e9
# Share of a GPU's rated bf16 products that training reaches: the goal of this project's own benchmark is 0.5 of the
# measured rate; published SDXL-sized training on A100s lies near 0.4.
EFFICIENCY = 0.4
# One core of a CPU, fp32: the shapes study on the AMD EPYC of the reference run, 1,500 UNet evaluations a second.
CORE_TFLOPS = 0.03
CUDA_CONTEXT = 1.0e9  # bytes: the driver's and the libraries' own
DECODING = 8.0e9  # bytes of a VAE that decodes `sampling.DECODED_PIXELS` at once in fp32
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "adafactor": 0.02}  # a trained parameter
LORA_SHARE = 0.01  # of the parameters, at most, for ranks up to 16 in the attention layers
CPU_HOURS = 100  # of all cores, beyond which a CPU's hours are no plan


@dataclass(frozen=True)
class Machine:
    """What work is planned for. tflops: of one device, at full rate. memory: GB of one device. kind: gpu or cpu."""

    name: str
    kind: str
    devices: int
    tflops: float
    memory: float
    efficiency: float


@dataclass(frozen=True)
class Networks:
    """Sizes of a pipeline at the study's resolution; see `invdpo.network_size.networks`."""

    unet_parameters: float
    vae_parameters: float
    text_parameters: float
    unet_flops: float
    encode_flops: float
    decode_flops: float
    graph_bytes: float
    checkpointed_bytes: float
    latent_elements: float
    caption_elements: float


@dataclass
class Arm:
    """One arm, all seeds. evaluations: of the UNet, a backward pass counting two. hours: of one device."""

    runs: int
    train_evaluations: float
    evaluate_evaluations: float
    train_hours: float
    evaluate_hours: float
    memory: float
    gpus: int


@dataclass
class Plan:
    """Everything that is printed. downloads and disk: GB. stages: name -> jobs, evaluations, hours of one device."""

    study: str
    base: str
    machine: Machine
    evaluations_per_second: float
    jobs: dict[str, int]
    downloads: dict[str, float | None]
    stages: dict[str, dict[str, float]]
    arms: dict[str, Arm]
    disk: dict[str, float]
    memory: dict[str, float]
    problems: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    @property
    def hours(self) -> float:
        return sum(stage["hours"] for stage in self.stages.values())


def sizes() -> dict[str, Any]:
    """config/sizes.yaml, of the package's repository or here."""
    repository = Path(__file__).resolve().parents[2] / SIZES
    return read_yaml(repository if repository.is_file() else SIZES)


def plan(
    study: StudyConfig,
    throughput: float | None = None,
    gpu: str | None = None,
    gpu_memory: float | None = None,
    gpus: int | None = None,
) -> Plan:
    """The plan of a study. throughput: UNet evaluations a second of one device, measured. gpu: a name in
    config/sizes.yaml; null: this machine's. gpu_memory: GB of one. gpus: how many.

    Raises InvdpoError for a base or data set whose size is not known, and for a study that is not valid.
    """
    from invdpo import cost

    known, assumptions, problems = sizes(), [], []
    networks = networks_of(study, known, assumptions)
    prompts = count_prompts(study, known, assumptions)
    pairs, data_gb, data_downloads = preference_data(study, known, assumptions)
    spent = {}
    for name in study.arms:
        arm = study.arm(name)
        seeds = study.seeds if arm.trains else [0]
        trained = cost.runs(arm, seeds) if arm.trains else cost.NOTHING
        spent[name] = (len(seeds), trained, len(seeds) * cost.drawing(arm, study.sampling, prompts))
    settings = study.experiments.inversion_error
    experiments = cost.inversion_error(settings) if settings else 0

    evaluations = sum(trained.evaluations + drawn for _, trained, drawn in spent.values()) + experiments
    machine = machine_for(study, known, gpu, gpu_memory, gpus, evaluations * networks.unet_flops, problems)
    rate = throughput or machine.tflops * 1e12 * machine.efficiency / networks.unet_flops
    if throughput is None:
        assumptions.append(
            f"time: {networks.unet_flops / 1e12:.3g} TFLOP a UNet evaluation (counted from the architecture), at "
            f"{machine.efficiency:.0%} of {machine.tflops:g} TFLOP/s ({machine.name}): {rate:.3g} evaluations a "
            "second. Give a measured one: --throughput NUMBER, or a run.json of a finished run."
        )
    else:
        assumptions.append(f"time: {rate:.3g} UNet evaluations a second and device, as given with --throughput")

    def hours(evaluations: float, flops: float = 0.0) -> float:
        return (evaluations + flops / networks.unet_flops) / rate / 3600

    arms = {}
    for name, (runs, trained, drawn) in spent.items():
        arm = study.arm(name)
        images = runs * prompts * (len(arm.training.grid) if arm.trains else 1)
        arms[name] = Arm(
            runs,
            trained.evaluations,
            drawn,
            # A measured rate has in it what a run of its kind does twice.
            hours(trained.evaluations + (trained.repeated if throughput is None else 0)),
            hours(drawn, images * networks.decode_flops),
            training_memory(arm, networks, machine.kind) / GB if arm.trains else 0.0,
            arm.training.processes if arm.trains else 1,
        )
    stages = {
        "preferences": {"jobs": 1, "evaluations": 0, "hours": hours(0, 2 * pairs * networks.encode_flops)},
        "train": {
            "jobs": len(arms),
            "evaluations": sum(arm.train_evaluations for arm in arms.values()),
            "hours": sum(arm.train_hours for arm in arms.values()),
        },
        "evaluate": {
            "jobs": len(arms),
            "evaluations": sum(arm.evaluate_evaluations for arm in arms.values()),
            "hours": sum(arm.evaluate_hours for arm in arms.values()),
        },
    }
    if settings:
        stages["inversion_error"] = {"jobs": 1, "evaluations": experiments, "hours": hours(experiments)}
    memory = {
        "train": max((arm.memory for arm in arms.values()), default=0.0),
        "evaluate": evaluation_memory(study, networks, known, machine.kind) / GB,
    }
    problems += misfits(study, arms, memory, machine)
    uncounted = [name for name in study.experiments.measured if name != "inversion_error"]
    assumptions += [
        "memory: fp32 weights of policy and base (also the reference, where it is not another), gradients and "
        "optimizer; half-precision copies and activations of a pass with graph as counted from the architecture; "
        f"{CUDA_CONTEXT / GB:g} GB for CUDA. Scoring models are beside the UNet in evaluation.",
        "evaluations: a forward pass of one latent counts 1, its backward pass 2; what gradient checkpointing computes "
        "again is in the hours alone; inversions as if none were kept "
        "(trajectory_cache_gb); scoring models and text encoders take no time here.",
        f"hours are of one {'GPU' if machine.kind == 'gpu' else 'core'}; a failed or repeated job is not in them.",
    ]
    if uncounted:
        assumptions.append(f"not counted: experiments {', '.join(uncounted)}")
    return Plan(
        study=study.study,
        base=study.base,
        machine=machine,
        evaluations_per_second=rate,
        jobs=count_jobs(study),
        downloads=downloads(study, networks, known) | data_downloads,
        stages=stages,
        arms=arms,
        disk=disk(study, networks, pairs, prompts, data_gb),
        memory=memory,
        problems=problems,
        assumptions=assumptions,
    )


def networks_of(study: StudyConfig, known: dict[str, Any], assumptions: list[str]) -> Networks:
    """Sizes of the study's base at its resolution: of a folder counted from its configuration, else as known."""
    resolution = study.training.resolution
    folder = Path(study.base)
    if folder.is_dir():
        from invdpo.network_size import networks_of as count

        text = sum(path.stat().st_size for path in folder.glob("text_encoder*/*.safetensors")) / 4
        width = read_yaml(folder / "unet" / "config.json")["cross_attention_dim"]
        return Networks(**count(folder, resolution), text_parameters=text, caption_elements=77 * width)
    for entry in known["pipelines"].values():
        if study.base in entry["ids"]:
            return scaled(entry, resolution, assumptions)
    names = ", ".join(name for entry in known["pipelines"].values() for name in entry["ids"])
    raise InvdpoError(
        f"`base: {study.base}` is no folder here, and its size is not known. Known are {names}; add it to {SIZES} "
        "(same architecture: to the `ids` of one), or make or download it first."
    )


def scaled(entry: dict[str, Any], resolution: int, assumptions: list[str]) -> Networks:
    """A known pipeline's sizes at another resolution: what grows with the pixels is taken to grow as they do."""
    values = {key: float(value) for key, value in entry.items() if key not in ("ids", "resolution")}
    if resolution != entry["resolution"]:
        factor = (resolution / entry["resolution"]) ** 2
        for key in values:
            if not key.endswith("parameters") and key != "caption_elements":
                values[key] *= factor
        assumptions.append(
            f"resolution {resolution}: operations and activations are those of {entry['resolution']} times "
            f"{factor:.3g}, the ratio of pixels (attention grows faster)"
        )
    return Networks(**values)


def count_prompts(study: StudyConfig, known: dict[str, Any], assumptions: list[str]) -> int:
    """How many prompts a checkpoint is sampled on."""
    limit = study.sampling.prompts
    if Path(study.prompts).is_file():
        return len(read_prompts(study.prompts, limit))
    found = known["prompts"].get(study.prompts)
    if found is None:
        found = limit or 500
        assumptions.append(f"prompts: `{study.prompts}` is no file here; {found} are assumed")
    return min(found, limit or found)


def preference_data(
    study: StudyConfig, known: dict[str, Any], assumptions: list[str]
) -> tuple[int, float, dict[str, float | None]]:
    """Pairs to encode, GB of the files that hold them, and what of that is downloaded."""
    if Path(study.preferences).exists():
        from invdpo.preferences.plan import make_plan

        found = make_plan(study)
        return found.pairs, 0.0, {}
    name = study.preferences.partition(":")[0]
    entry = known["datasets"].get(name)
    if entry is None:
        entry = next(iter(known["datasets"].values()))
        assumptions.append(f"preferences: the size of `{name}` is not known; it is taken for Pick-a-Pic v2's")
    each = entry["decided"] / entry["files"]
    draws = study.draws
    if study.samples_pairs:
        wanted = study.data.shards if isinstance(study.data.shards, int) else math.ceil(sum(draws.values()) / each)
    else:
        wanted = entry["files"]
    files = max(1, min(entry["files"], wanted))
    rows = files * each
    missed = math.prod(1 - min(1.0, count / rows) for count in draws.values())
    pairs = round(rows * (1 - missed)) if study.samples_pairs else round(rows)
    gb = entry["gb"] * files / entry["files"]
    assumptions.append(f"preferences: {files} of {entry['files']} files, {pairs:,} pairs, by the data set's mean file")
    return pairs, gb, {f"preferences: {name} ({files} files)": gb}


def downloads(study: StudyConfig, networks: Networks, known: dict[str, Any]) -> dict[str, float | None]:
    """What is fetched -> GB; None where that is not known. What lies here already is not in it."""
    found: dict[str, float | None] = {}
    if not Path(study.base).is_dir():
        width = 2 if study.variant in ("fp16", "bf16") else 4
        parameters = networks.unet_parameters + networks.text_parameters
        if study.vae is None:
            parameters += networks.vae_parameters
        found[f"base: {study.base}"] = parameters * width / GB
    if study.vae is not None and not Path(study.vae).exists():
        found[f"vae: {study.vae}"] = known["files"].get(study.vae)
    for place in scorer_places(study.scorers):
        if not Path(place.removeprefix("local-dir:")).exists():
            found[f"scorer: {place}"] = known["files"].get(place, known["files"].get(Path(place).name))
    return found


def scorer_places(scorers: ScorersConfig) -> list[str]:
    """Every file, folder or id that the scorers read weights from, each once."""
    places: list[str] = []
    for name in type(scorers).model_fields:
        settings = getattr(scorers, name)
        if settings is None or name == "oracle":
            continue
        values = settings.model_dump()
        if name == "imagereward":
            places.append(values["checkpoint"] or "ImageReward.pt")
            continue
        model, pretrained = values["model"], values.get("pretrained")
        if checkpoint := values.get("checkpoint"):
            places.append(checkpoint)  # `model` is then an architecture
        else:
            places.append(f"{model}:{pretrained}" if pretrained else model)
        if tower := values.get("tower"):
            places.append(tower)
    return list(dict.fromkeys(places))


def training_memory(arm: ArmConfig, networks: Networks, kind: str) -> float:
    """Bytes on one device while the arm trains."""
    training, recipe, parameters = arm.training, arm.recipe, networks.unet_parameters
    mixed = kind == "gpu" and arm.identity["precision"] != "fp32"  # half-precision passes over fp32 weights
    if training.lora is None:
        trained = parameters
        weights = 8 * parameters  # policy and base
        if recipe.calls_reference and recipe.reference_dtype != "float32" and mixed:
            weights += 2 * parameters
        if training.reference_offload:
            weights -= 4 * parameters
    else:
        trained = LORA_SHARE * parameters
        weights = 4 * parameters + 4 * trained
    held = weights + trained * (4 + OPTIMIZER_BYTES[training.optimizer]) + (2 * parameters if mixed else 0)
    latents = latents_with_graph(arm)
    each = networks.checkpointed_bytes if training.gradient_checkpointing else networks.graph_bytes
    working = latents * each * (1 if mixed else 2)
    if training.reference_offload:
        working = max(working, 4 * parameters)  # the reference comes before the graph
    return held + working + (CUDA_CONTEXT if kind == "gpu" else 0)


def latents_with_graph(arm: ArmConfig) -> int:
    """Latents whose graph is alive at once."""
    training, recipe = arm.training, arm.recipe
    sides = 1 if recipe.loss.kind == "winner_only" else 2
    points = {"single": 1, "subset": recipe.subset_size, "all": recipe.trajectory.steps}[recipe.timesteps] or 1
    together = sides * points * training.pairs_a_pass(training.processes)
    return min(together, training.chunk or together)


def evaluation_memory(study: StudyConfig, networks: Networks, known: dict[str, Any], kind: str) -> float:
    """Bytes on one device while checkpoints are sampled and scored: all networks in fp32, and the decoder at work."""
    scorers = sum(
        known["files"].get(place, known["files"].get(Path(place).name)) or 0 for place in scorer_places(study.scorers)
    )
    networks_bytes = 4 * (networks.unet_parameters + networks.text_parameters + networks.vae_parameters)
    decoding = DECODING if kind == "gpu" else 0.0
    return networks_bytes + scorers * GB + decoding + (CUDA_CONTEXT if kind == "gpu" else 0)


def disk(study: StudyConfig, networks: Networks, pairs: int, prompts: int, data_gb: float) -> dict[str, float]:
    """What -> GB in results/, and the files of the preferences."""
    width = 4 if study.data.storage == "float32" else 2
    arms = [study.arm(name) for name in study.arms]
    trained = [arm for arm in arms if arm.trains]
    checkpoints = sum(len(study.seeds) * len(arm.training.grid) for arm in trained)
    state = max(
        (4 + OPTIMIZER_BYTES[arm.training.optimizer] for arm in trained if arm.training.lora is None), default=0
    )
    runs = sum(len(study.seeds) if arm.trains else 1 for arm in arms)
    pixels = study.training.resolution**2
    found = {
        "preference files": data_gb,
        "latents and embeddings": pairs * width * (4 * networks.latent_elements + networks.caption_elements) / GB,
        f"checkpoints ({checkpoints})": checkpoints * 4 * networks.unet_parameters / GB,
        "state of a run while it trains": state * networks.unet_parameters / GB,
        "images": runs * prompts * pixels * 3 / 2 / GB,  # PNG: half of the pixels' bytes
        "kept inversions, at most": study.trajectory_cache_gb or 0.0,
    }
    return {name: gb for name, gb in found.items() if gb > 0}


def count_jobs(study: StudyConfig) -> dict[str, int]:
    """Stage -> jobs of `make reproduce`, as the rules have them."""
    arms, experiments = len(study.arms), study.experiments
    trains = any(study.arm(name).trains for name in study.arms)
    evidence = ["tables", "speed", "figures", "mlflow", "report"]
    evidence += [*(["claims"] if study.claims else []), *(["model_cards"] if trains else [])]
    evidence += ["present"] if experiments.measured else []
    evidence += ["user_study_bundle", "user_study_analysis"] if study.user_study else []
    return {
        "preferences": int(trains),
        "train": arms,
        "evaluate": arms,
        "experiments": len(experiments.measured) + (experiments.distribution is not None),
        "evidence": len(evidence),
    }


def machine_for(
    study: StudyConfig,
    known: dict[str, Any],
    gpu: str | None,
    gpu_memory: float | None,
    gpus: int | None,
    flops: float,
    problems: list[str],
) -> Machine:
    """The machine that is named, or this one; an A100 stands in for a machine without GPUs that would take for ever."""
    here = None if study.device == "cpu" else this_gpu()
    name = gpu or (here[0] if here else None)
    if name is None and gpu_memory is None:
        cores = len(os.sched_getaffinity(0))
        if flops / (cores * CORE_TFLOPS * 1e12) / 3600 < CPU_HOURS:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
            return Machine("this machine's CPU", "cpu", cores, CORE_TFLOPS, memory, 1.0)
        problems.append(
            f"This machine has no GPU, and its {cores} CPU cores would take "
            f"{flops / (cores * CORE_TFLOPS * 1e12) / 86400:,.0f} days: the study does not fit it. What follows is for "
            "A100 GPUs with 80 GB; --gpu NAME, --gpu-memory GB and --gpus N plan for others."
        )
    name = name or "A100 80GB"
    entry = next((entry for key, entry in known["gpus"].items() if _plain(key) in _plain(name)), None)
    if entry is None:
        if gpu is not None:
            raise InvdpoError(f"--gpu {gpu}: not known. Known are {', '.join(known['gpus'])}; add it to {SIZES}.")
        entry = known["gpus"]["A100 80GB"]
        problems.append(
            f"The speed of {name} is not known: an A100's is used. Add it to {SIZES}, or give --throughput."
        )
    memory = gpu_memory or (here[1] if here and gpu is None else entry["memory"])
    return Machine(
        name, "gpu", gpus or (len(devices()) if here and gpu is None else 1), entry["tflops"], memory, EFFICIENCY
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def this_gpu() -> tuple[str, float] | None:
    """Name and GB of this machine's first GPU, by nvidia-smi; None where there is none."""
    if not devices() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    if not lines:
        return None
    name, _, mebibytes = lines[0].rpartition(",")
    return name.strip(), float(mebibytes) * 2**20 / GB


def misfits(study: StudyConfig, arms: dict[str, Arm], memory: dict[str, float], machine: Machine) -> list[str]:
    """What the machine is too small for, a sentence each."""
    found = []
    have = f"{machine.memory:.3g} GB of {machine.name}"
    worst = max(arms, key=lambda name: arms[name].memory)
    if arms[worst].memory > machine.memory:
        remedies = []
        training = study.arm(worst).training
        if not training.gradient_checkpointing:
            remedies.append("gradient_checkpointing: true")
        if latents_with_graph(study.arm(worst)) > 1:
            remedies.append("a smaller chunk")
        if training.optimizer == "adamw":
            remedies.append("optimizer: adafactor")
        if training.lora is None and not training.reference_offload:
            remedies.append("reference_offload: true")
        advice = f" Try {', '.join(remedies)} in `training`." if remedies else " Take a larger GPU, or lora."
        others = sum(arm.memory > machine.memory for arm in arms.values()) - 1
        found.append(
            f"Training `{worst}`{f' and {others} more' if others else ''} needs about {arms[worst].memory:.3g} GB on "
            f"each GPU, more than the {have}: the study does not fit.{advice}"
        )
    if memory["evaluate"] > machine.memory:
        found.append(f"Sampling and scoring need about {memory['evaluate']:.3g} GB, more than the {have}.")
    most = max(arm.gpus for arm in arms.values())
    if machine.kind == "gpu" and most > machine.devices:
        found.append(
            f"An arm trains with {most} processes, one a GPU, and there are {machine.devices}: it does not fit."
        )
    return found


def read_throughput(text: str) -> float:
    """UNet evaluations a second: a number, or a JSON file with `unet_evals` and `seconds`, as a run.json has them."""
    try:
        value = float(text)
    except ValueError:
        content = read_yaml(Path(text))
        try:
            value = content["unet_evals"] / content["seconds"]
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise InvdpoError(
                f"--throughput {text}: expected `unet_evals` and `seconds` in it, as in the run.json of a finished "
                "run; or give a number, UNet evaluations a second of one device."
            ) from error
    if not value > 0:
        raise InvdpoError(f"--throughput {text}: it must be positive.")
    return value


def to_json(found: Plan) -> str:
    """The plan as JSON text."""
    return json.dumps(asdict(found) | {"hours": found.hours}, indent=2)


def to_text(found: Plan) -> str:
    """The plan as tables for a terminal."""
    machine = found.machine
    unit = "GPU" if machine.kind == "gpu" else "core"
    count = f"{machine.devices} {unit}{'s' if machine.devices > 1 else ''}"
    lines = [f"{found.study}: {found.base}, planned for {count}, {machine.name} ({machine.memory:.3g} GB)", ""]
    lines += [f"!! {problem}" for problem in found.problems] + [""] * bool(found.problems)
    lines += _table(["jobs", ""], [[name, str(count)] for name, count in found.jobs.items()], sum(found.jobs.values()))
    known = [gb for gb in found.downloads.values() if gb is not None]
    rows = [[name, "?" if gb is None else _number(gb)] for name, gb in found.downloads.items()]
    lines += _table(["downloads", "GB"], rows, _number(sum(known))) if rows else ["downloads: none", ""]
    rows = [[name, _number(stage["evaluations"]), _number(stage["hours"])] for name, stage in found.stages.items()]
    total = [_number(sum(stage["evaluations"] for stage in found.stages.values())), _number(found.hours)]
    lines += _table(["stage", "UNet evaluations", f"{unit}-hours"], rows, *total)
    rows = [
        [name, str(arm.runs), _number(arm.train_evaluations), _number(arm.train_hours)]
        + [_number(arm.evaluate_hours), _number(arm.memory), str(arm.gpus)]
        for name, arm in found.arms.items()
    ]
    lines += _table(["method", "runs", "UNet evaluations", "train h", "evaluate h", "GB a device", "devices"], rows)
    rows = [[name, _number(gb)] for name, gb in found.disk.items()]
    lines += _table(["disk", "GB"], rows, _number(sum(found.disk.values())))
    lines += _table(
        [f"memory a {'GPU' if unit == 'GPU' else 'job'}", "GB"], [[k, _number(v)] for k, v in found.memory.items()]
    )
    lines += [f"With {count} at work all the time: {_duration(found.hours / machine.devices)}.", "", "Assumptions"]
    lines += [f"- {text}" for text in found.assumptions]
    return "\n".join(lines)


def _table(head: list[str], rows: Iterable[list[str]], *total: object) -> list[str]:
    """A table with its first column to the left and numbers to the right, a total below, and an empty line."""
    body = [head, *rows]
    if total:
        body.append(["total", *map(str, total)])
    widths = [max(len(row[i]) for row in body) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in body
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [*(line.rstrip() for line in lines), ""]


def _number(value: float) -> str:
    """Three digits of what is estimated; large numbers in full thousands, millions and so on."""
    if value == 0:
        return "0"
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{float(f'{value:.3g}'):,.10g}"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.2g} minutes"
    return f"{hours:.3g} hours" if hours < 48 else f"{float(f'{hours / 24:.3g}'):,.10g} days"
