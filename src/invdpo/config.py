"""A study in one YAML: strict pydantic models, so that a typing error is an error and not a default.

Nothing here imports torch, so that Snakemake can read a study in a fraction of a second.
Paths in a study are relative to the folder that the command runs in.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from invdpo.errors import InvdpoError
from invdpo.provenance import read_checksums

if TYPE_CHECKING:
    from invdpo.objectives import Recipe

METHODS = Path("config/methods")
TUNED = Path("config/tuned")  # where `invdpo tune` leaves its choices
DEFAULT = "default"  # the grid of beta of every arm that has none of its own
NO_TRAINING = "no_training"
ON_PAIRS = ("inversion_error", "precision", "audit")  # the experiments on pairs that no run was trained on
MEASURED = (*ON_PAIRS, "preference_accuracy", "weight_distances")
# Settings of training that came when runs had been published: left as it was, one changes no hash.
LATER = ("channels_last", "compile", "reference_offload", "lora", "micro_conditioning")
# Settings of training that a run may change when it goes on: its weights are the same, the second two up to rounding.
SURROUNDINGS = {"save_minutes", "processes", "shard"}
PREPARED = {"resolution", "max_undecodable"}  # training settings that `invdpo prepare` applies, once a study


class Strict(BaseModel):
    """Unknown keys are errors, text is not a number, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class LoraConfig(Strict):
    """Low-rank adapters in place of new weights; the defaults are those of diffusers' Diffusion-DPO scripts
    (examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py: `--rank`, `unet_lora_config`)."""

    rank: PositiveInt = 4
    alpha: PositiveInt | None = Field(None, description="the adapters count alpha / rank times; null: rank")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        ["to_k", "to_q", "to_v", "to_out.0"], description="layers whose names end so"
    )


class TrainingConfig(Strict):
    """How a run is optimised. `batch` counts pairs an optimizer step, `micro_batch` pairs a backward pass."""

    steps: PositiveInt = 40
    batch: PositiveInt = 32
    micro_batch: PositiveInt | None = Field(
        None, description="pairs a backward pass; must divide a process's share of batch; null: that share"
    )
    checkpoints: list[PositiveInt] = Field(
        [], description="optimizer steps after which the policy is kept and scored; the last step always is"
    )
    processes: PositiveInt = Field(
        1, description="how many `invdpo train` starts to train together, one a GPU; must divide batch"
    )
    shard: bool = Field(
        False,
        description="FSDP: each process holds a part of the weights, the gradients and AdamW's state, and gathers the "
        "weights block by block when they are used",
    )
    save_minutes: PositiveFloat | None = Field(
        30.0, description="a killed run loses at most so much; null: it is saved at checkpoints and when stopped only"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        "adamw", description="adamw_8bit: needs bitsandbytes; adafactor: as the papers for SDXL"
    )
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises linearly")
    max_grad_norm: PositiveFloat = 1.0
    gradient_checkpointing: bool = False
    channels_last: bool = Field(False, description="memory format of the UNets' weights; convolutions may be faster")
    compile: bool = Field(
        False, description="torch.compile; policy and reference then round differently where their weights are equal"
    )
    reference_offload: bool = Field(False, description="the reference is on the GPU only for its passes, once a pass")
    lora: LoraConfig | None = Field(
        None, description="train adapters; the reference is the same network without them. null: train all weights"
    )
    learning_rate: PositiveFloat | None = Field(None, description="null: the recipe's")
    beta: PositiveFloat | None = Field(None, description="null: the recipe's")
    resolution: PositiveInt = Field(512, description="pixels; images are resized and centre-cropped to a square")
    max_undecodable: float = Field(0.01, ge=0, le=1, description="share of pairs that may be skipped as undecodable")
    chunk: PositiveInt | None = Field(256, description="latents a policy call with graph; null: all at once")
    micro_conditioning: Literal["image", "fixed"] = Field(
        "image",
        description="sizes that SDXL is told: each image's own and its crop's, as SDXL was trained, or "
        "(1024, 1024, 0, 0, 1024, 1024) for all, as the released Inversion-DPO (train_ddim.py:471)",
    )
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of pairs trained with the empty prompt")

    @model_validator(mode="after")
    def _divides(self) -> TrainingConfig:
        self.pairs_a_pass(self.processes)
        return self

    @model_validator(mode="after")
    def _one_network(self) -> TrainingConfig:
        if self.lora is not None and self.reference_offload:
            raise ValueError(
                "with lora the reference is the policy's own network without its adapters, so there is nothing to "
                "offload; leave reference_offload out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_cut(self) -> TrainingConfig:
        against = {
            f"optimizer: {self.optimizer}": (
                self.optimizer != "adamw",
                "only adamw's state is one value for each weight",
            ),
            "lora": (self.lora is not None, "gradients and moments of adapters are too small to be worth it"),
            "reference_offload": (
                self.reference_offload,
                "the reference is cut into parts too, which stay on the GPUs",
            ),
            "channels_last": (self.channels_last, "FSDP cuts weights in the plain memory format only"),
            "compile": (self.compile, "the graph would break at every block that gathers its weights"),
        }
        for name, (chosen, reason) in against.items():
            if self.shard and chosen:
                raise ValueError(f"shard and {name} exclude each other: {reason}. Leave one of them out")
        return self

    def pairs_a_pass(self, processes: int) -> int:
        """Pairs a backward pass of each of the processes; ValueError where batch cannot be divided so."""
        if self.batch % processes:
            raise ValueError(f"{processes} processes cannot share batch {self.batch} equally")
        share = self.batch // processes
        if share % (self.micro_batch or share):
            whose = f"batch {self.batch}" if processes == 1 else f"a process's share {share} of batch {self.batch}"
            raise ValueError(f"micro_batch {self.micro_batch} does not divide {whose}")
        return self.micro_batch or share

    @property
    def grid(self) -> list[int]:
        """The steps after which a checkpoint is kept, ascending; ends with the last step."""
        return sorted({step for step in self.checkpoints if step < self.steps} | {self.steps})


class DataConfig(Strict):
    """Which of the preference pairs are encoded, and how their images become squares."""

    shards: PositiveInt | Literal["auto", "all"] | None = Field(
        None,
        description="all: every pair of every file; auto or a number: only pairs that a run draws, from as many files, "
        "chosen at random, as hold enough of them, or from that many; null: all of local files, auto of a hub data set",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set; null: its main branch")
    seed: int = Field(0, ge=0, description="of the choice of files, and of random crops and flips")
    workers: int = Field(0, ge=0, description="processes that decode images; 0: none but the one that encodes them")
    crop: Literal["center", "random"] = "center"
    flip: Literal["none", "shared", "independent"] = Field(
        "none", description="left and right: never, both images of a pair or neither, each image by its own coin"
    )
    storage: Literal["float32", "float16", "bfloat16"] = Field(
        "float32",
        description="type of stored latents and embeddings; a pair's latents at 1024 pixels take 1 MB in float32, half "
        "of that in the others",
    )


class OwnSamplesConfig(Strict):
    """Preference pairs made of the base's own samples: several a prompt, scored by the study's scorers and ranked
    (Inversion-DPO, section 4.2). The workflow makes the file that `preferences` names.
    """

    prompts: str = Field(description="as the study's; prompts that are neither tuned nor reported on")
    images: Annotated[int, Field(ge=2)] = Field(4, description='of a prompt; section 4.2: "we generate four samples"')
    guidance_scale: float | None = Field(None, description="null: sampling.guidance_scale")
    seed: int = Field(description="of the noise: image k of a prompt has that of sampling.seed = seed + k")
    by: list[str] = Field(
        min_length=1, description="scores whose mean decides a pair (Eq. 17); each alone is a column label_0_<score>"
    )


class SamplingConfig(Strict):
    """How images are drawn for scoring: deterministic DDIM, noise seeded per prompt."""

    steps: PositiveInt = 20
    guidance_scale: float = 7.5
    batch: PositiveInt = 16
    seed: int = 2025
    prompts: PositiveInt | None = Field(None, description="how many of the prompts, from the first; null: all")


class PickScoreConfig(Strict):
    model: str = Field(description="transformers CLIPModel folder or hub id")
    processor: str | None = Field(None, description="folder or hub id of the processor where it is another one")


Preprocessing = Annotated[
    Literal["open_clip", "authors", "authors_aliased"],
    Field(
        description="open_clip: the model's own; authors: as the paper's and HPSv2's scripts with today's torchvision "
        "(tensor, longer side, padded); authors_aliased: with torchvision before 0.17"
    ),
]


class ClipConfig(Strict):
    model: str = Field(description="open_clip architecture, or hf-hub:ID, or local-dir:FOLDER")
    pretrained: str | None = Field(None, description="open_clip tag of the weights")
    preprocessing: Preprocessing = "open_clip"


class AestheticConfig(Strict):
    model: str = Field(description="the five-layer head: path, or file of the hub as owner/name/path/in/it")
    tower: str = Field(description="open_clip model whose image embedding the head reads")
    pretrained: str | None = Field(None, description="open_clip tag of the tower's weights")


class HpsConfig(Strict):
    model: str = Field(description="open_clip architecture, or hf-hub:ID, or local-dir:FOLDER")
    pretrained: str | None = None
    checkpoint: str | None = Field(
        None, description="checkpoint with a `state_dict`: path, or file of the hub as owner/name/path/in/it"
    )
    version: Literal["v2.0", "v2.1"] | None = Field(
        None, description="which of HPSv2's weights these are, for the rows: values of the two cannot be compared"
    )
    preprocessing: Preprocessing = "open_clip"


class ImageRewardConfig(Strict):
    """Runs in the environment of envs/imagereward; with neither file, ImageReward-v1.0 from the hub."""

    checkpoint: str | None = Field(None, description="path of ImageReward.pt")
    med_config: str | None = Field(None, description="path of med_config.json")


class OracleConfig(Strict):
    world: Literal["shapes"]


class ScorersConfig(Strict):
    """Which scores are taken, and where their weights are; an absent entry is a score not taken."""

    pickscore: PickScoreConfig | None = None
    clip: ClipConfig | None = None
    aesthetic: AestheticConfig | None = None
    hps: HpsConfig | None = None
    imagereward: ImageRewardConfig | None = None
    oracle: OracleConfig | None = None


class TunedValues(Strict):
    """What the tuning grid chose for one method."""

    learning_rate: PositiveFloat | None = None
    beta: PositiveFloat | None = None


_NUMBERS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "number", "exclusiveMinimum": 0}}


class TuningConfig(Strict):
    """The grid that `invdpo tune` runs for some arms, apart from everything that is reported."""

    arms: list[str] = Field(min_length=1, description="one arm a method; its tuned values serve all arms of the method")
    learning_rate: list[PositiveFloat] = Field(min_length=1)
    beta: Annotated[
        dict[str, Annotated[list[PositiveFloat], Field(min_length=1)]],
        BeforeValidator(lambda value: {DEFAULT: value} if isinstance(value, list) else value),
        WithJsonSchema({"anyOf": [_NUMBERS, {"type": "object", "additionalProperties": _NUMBERS}]}),
    ] = Field(description="one list for all arms, or arm -> list, for losses of another scale, with the key `default`")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="none of the study's own seeds")
    prompts: str = Field(description="a prompt file that is not the study's")

    def betas(self, arm: str) -> list[float]:
        """The grid of beta of one of `arms`."""
        return self.beta.get(arm, self.beta[DEFAULT])


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
LABEL_COLUMN = "label_0_"  # how the columns of `preferences` begin whose labels an arm may take in place of label_0's
Labels = Annotated[
    str,
    Field(pattern=rf"^(true|shuffled|swapped|{LABEL_COLUMN}.+)$"),
    BeforeValidator(lambda value: "true" if value is True else value),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": [True, "true", "shuffled", "swapped"]},
                {"type": "string", "pattern": f"^{LABEL_COLUMN}.+$"},
            ]
        }
    ),
]


class ArmEntry(Strict):
    """One line of a table: a method, its labels, and what differs from the study's training settings."""

    method: str = Field(description="a recipe of config/methods, the path of one, or no_training")
    labels: Labels = Field(
        "true",
        description="true: label_0 of `preferences`; shuffled, swapped: controls; or another column of `preferences`, "
        "label_0_…, where it decides a pair that label_0 decides too",
    )
    tuned: bool = Field(True, description="whether the study's tuned values apply")
    initial_rounding: Literal["float16", "bfloat16"] | None = Field(
        None, description="the policy starts from weights rounded to this type: noise of rounding size"
    )
    base: Name | None = Field(None, description="one of `bases`, for an arm that does not train; null: the study's")
    weights: str | None = Field(
        None,
        description="published weights in place of the base's, for an arm that does not train: folder or hub id of a "
        "UNet, a pipeline or a LoRA, or a safetensors file; a path inside a hub repository may follow its id",
    )
    published: str | None = Field(
        None, description="the method in the paper's tables whose numbers stand beside those of these `weights`"
    )
    recipe: dict[str, Any] = Field({}, description="overrides of the recipe")
    training: dict[str, Any] = Field({}, description="overrides of the study's training settings")


class BaseConfig(Strict):
    """Another base model beside the study's, and how it is sampled; everything else is the study's."""

    model: str = Field(description="diffusers pipeline folder or hub id, as the study's `base`")
    vae: str | None = Field(None, description="as the study's")
    variant: str | None = Field(None, description="as the study's")
    resolution: PositiveInt | None = Field(None, description="pixels a side; null: training.resolution")
    guidance_scale: float | None = Field(None, description="null: sampling.guidance_scale")


class ArmList(Strict):
    arms: list[Name]


class GridsConfig(Strict):
    arms: list[Name]
    prompts: PositiveInt = 6


class InversionErrorConfig(Strict):
    """How far sampling back from the end of an inversion misses the picture, for the base model."""

    solvers: list[Literal["ddim", "dpm_solver", "edict", "fixed_point", "renoise"]] = Field(min_length=1)
    steps: list[PositiveInt] = Field(min_length=1, description="numbers of inversion steps N")
    guidance_scales: list[Annotated[float, Field(ge=0)]] = Field([1.0], min_length=1)
    latents: PositiveInt = Field(description="winners of held-out pairs")
    pictures: PositiveInt = Field(3, description="how many of them are shown on their way there and back")


class RecipeEntry(Strict):
    """A recipe, written as the arms are."""

    method: str | None = Field(None, description="a name in config/methods or a path; null: the entry's own name")
    recipe: dict[str, Any] = Field({}, description="overrides of the recipe")


class PrecisionConfig(Strict):
    """How well the log-ratio of each recipe agrees with the true one of trained policies."""

    arms: list[Name] = Field(min_length=1, description="the policies: their last checkpoints, every seed")
    recipes: dict[Name, RecipeEntry] = Field(min_length=1)
    pairs: PositiveInt = Field(description="held-out pairs")
    steps: list[PositiveInt] = Field(min_length=1, description="N of every recipe that inverts or has a grid")
    truth_steps: PositiveInt = Field(description="N of the sampler whose likelihood is the truth")
    truth: Literal["exact", "hutchinson"] = Field(
        "exact", description="its log-determinants: exact, or by random probes"
    )
    probes: Annotated[int, Field(ge=2)] = Field(8, description="of hutchinson, a latent and step; policies share them")
    draws: list[PositiveInt] = Field([1], min_length=1, description="draws that a recipe with random points averages")


class AuditConfig(Strict):
    """Where the gradient of each recipe points, before training and along it."""

    arms: list[Name] = Field(min_length=1, description="their recipes, with the arm's overrides and beta")
    policies: list[Name] = Field([], description="arms whose checkpoints are audited beside the base, first seed")
    pairs: PositiveInt = Field(description="held-out pairs a batch")
    batches: PositiveInt = Field(description="disjoint batches; an interval needs two")
    images: Annotated[int, Field(gt=0, multiple_of=2)] = Field(
        description="images of the study's prompts that the reward's gradient is the mean of: two halves, also compared"
    )
    precisions: list[Literal["fp32", "bf16", "fp16"]] = Field(
        ["fp32"], min_length=1, description="of the networks' passes, with weights as they are"
    )
    roundings: list[Literal["none", "float16", "bfloat16", "gaussian"]] = Field(
        ["none"],
        min_length=1,
        description="noise of the base's weights, in fp32: none, or of rounding size; policies are as they are",
    )


class ReferenceConfig(Strict):
    """The pictures that generated ones are held against: files, or a world's own."""

    path: str | None = Field(None, description="folder of images, or parquet with a column `png`, `jpg` or `image`")
    world: Literal["shapes"] | None = Field(None, description="a world that draws clean pictures, in place of files")
    images: PositiveInt | None = Field(None, description="how many, of files the first by name; null: all of them")
    seed: int = Field(0, description="of the world's pictures")
    side: PositiveInt | None = Field(
        None, description="pixels; each is squashed to a square of this side first; null: they have one size already"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ReferenceConfig:
        if (self.path is None) == (self.world is None):
            raise ValueError("either `path` or `world`, and not both, says where the reference pictures are")
        if self.world is not None and self.images is None:
            raise ValueError("a `world` draws as many pictures as `images` says")
        return self


class DistributionConfig(Strict):
    """FID, KID, precision and recall of some arms' pictures against a reference set."""

    arms: list[Name] = Field(min_length=1, description="their last checkpoints, every seed")
    reference: ReferenceConfig
    model: str | None = Field(
        None, description="open_clip model whose image tower gives the features, as `scorers.clip`; null: Inception"
    )
    pretrained: str | None = Field(None, description="open_clip tag of the model's weights")
    inception_weights: str | None = Field(
        None, description="file of Inception's weights in torch-fidelity's format; null: its release, downloaded once"
    )
    kid_subset_size: Annotated[int, Field(ge=2)] = Field(1000, description="no more than the smaller set has")
    batch: PositiveInt = 64


class PreferenceAccuracyConfig(Strict):
    """How often each score of the study agrees with held-out votes, ties included."""

    votes: str | None = Field(
        None, description="pairs with ties, as `preferences`, that accuracy is measured on; null: `held_out`"
    )
    validation: str | None = Field(
        None, description="pairs that the tie threshold is chosen on; null: half of the prompts of `votes`"
    )
    scales: dict[str, PositiveFloat] = Field(
        {},
        description="score -> what its difference is multiplied by before the sigmoid (PickScore's own script: the "
        "checkpoint's logit scale); a score that is not named: fitted to the votes of validation",
    )


class WeightBound(Strict):
    """How far a training recipe can have moved the weights at most."""

    rms: PositiveFloat = Field(description="root mean square of the change, over all weights")
    source: str = Field(description="where that follows from, for the table's notes")


class WeightDistancesConfig(Strict):
    """How far the weights of some arms lie from their base's, by layer."""

    arms: list[Name] = Field(min_length=1, description="published weights, and last checkpoints of trained arms")
    bounds: dict[Name, WeightBound] = Field(
        {}, description="arm -> the most that its stated recipe could have moved it"
    )
    against: dict[Name, str] = Field(
        {}, description="arm -> a model that it is also held against, beside its base: as the arm's `weights`"
    )

    @model_validator(mode="after")
    def _are_of_arms(self) -> WeightDistancesConfig:
        for key, entries in (("bounds", self.bounds), ("against", self.against)):
            for arm in entries:
                if arm not in self.arms:
                    raise ValueError(f"`{key}` names `{arm}`, which is not in `arms`.{nearest(arm, self.arms)}")
        return self


class OverOptimisationConfig(Strict):
    """Whether gains on the score of the training votes are gains at all."""

    trained: str = Field(description="the score that was trained on votes of the kind that `preferences` holds")
    held_out: list[str] = Field(min_length=1, description="scores that no method was trained for")

    @model_validator(mode="after")
    def _apart(self) -> OverOptimisationConfig:
        if self.trained in self.held_out:
            raise ValueError(f"{self.trained} is held against itself; leave it out of `held_out`")
        return self


class ToTargetConfig(Strict):
    """How soon each arm of the comparison reaches the final score of one of them."""

    arm: Name


class ExperimentsConfig(Strict):
    """Which arms are set against each other in which table or figure, and the experiments on held-out pairs."""

    comparison: ArmList | None = None
    q_vs_p: ArmList | None = None
    inversion_steps: dict[Name, dict[Annotated[int, Field(strict=False, gt=0)], Name]] = Field(
        {}, description="family -> number of inversion steps -> arm"
    )
    controls: dict[Name, dict[Literal["shuffled", "swapped"], Name]] = Field(
        {}, description="arm with true labels -> control -> arm"
    )
    grids: GridsConfig | None = None
    distribution: DistributionConfig | None = None
    over_optimisation: OverOptimisationConfig | None = None
    to_target: ToTargetConfig | None = None
    held_out: str | None = Field(
        None,
        description="pairs that no arm trains on, as `preferences`; null: those of the study's own no run has seen",
    )
    inversion_error: InversionErrorConfig | None = None
    precision: PrecisionConfig | None = None
    audit: AuditConfig | None = None
    preference_accuracy: PreferenceAccuracyConfig | None = None
    weight_distances: WeightDistancesConfig | None = None

    @property
    def measured(self) -> list[str]:
        """The experiments that this study has: each a stage of its own, of this name."""
        return [name for name in MEASURED if getattr(self, name) is not None]

    def trained_arms(self, experiment: str) -> list[str]:
        """The arms whose runs an experiment reads, where they train."""
        arms = {
            "precision": self.precision.arms if self.precision else [],
            "audit": self.audit.policies if self.audit else [],
            "weight_distances": self.weight_distances.arms if self.weight_distances else [],
        }
        return arms.get(experiment, [])

    def named_arms(self) -> dict[str, str]:
        """Place in the YAML -> arm named there."""
        places = {}
        for field in ("comparison", "q_vs_p", "grids", "distribution", "precision", "audit", "weight_distances"):
            entry = getattr(self, field)
            for number, arm in enumerate(entry.arms if entry else []):
                places[f"experiments.{field}.arms[{number}]"] = arm
        for number, arm in enumerate(self.audit.policies if self.audit else []):
            places[f"experiments.audit.policies[{number}]"] = arm
        if self.to_target is not None:
            places["experiments.to_target.arm"] = self.to_target.arm
        for family, points in self.inversion_steps.items():
            places |= {f"experiments.inversion_steps.{family}.{steps}": arm for steps, arm in points.items()}
        for true_arm, controls in self.controls.items():
            places[f"experiments.controls.{true_arm}"] = true_arm
            places |= {f"experiments.controls.{true_arm}.{kind}": arm for kind, arm in controls.items()}
        return places


def tuned_file(study: str) -> Path:
    """Where `invdpo tune` writes the choices of the study of that name."""
    return TUNED / f"{study}.yaml"


def _read_tuned(value: Any, info: ValidationInfo) -> Any:
    """`tuned:` may be the path of a YAML, or a list of paths; their content takes the paths' place.

    The study's own file may be missing where the study has a grid: it is this grid that makes the file, so the study
    must be readable without it. `StudyConfig.awaits_tuning` says which arms have to wait for it.
    """
    if value is None:
        return {}
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list):
        return value
    own = tuned_file(info.data.get("study", "")) if info.data.get("tuning") else None
    found: dict[str, Any] = {}
    source: dict[str, str] = {}
    for path in paths:
        if not isinstance(path, str):
            raise ValueError("a list here names YAML files")
        if own is not None and Path(path) == own and not own.exists():
            continue
        content = read_yaml(Path(path))
        if not isinstance(content, dict):
            raise InvdpoError(f"`tuned`: {path} holds no mapping of methods to values. Name another file.")
        for method in content:
            if method in source:
                raise InvdpoError(
                    f"`tuned`: {source[method]} and {path} both hold values of `{method}`. Keep one of them."
                )
            source[method] = path
        found |= content
    return found


class StudyConfig(Strict):
    """Everything that decides what a study computes."""

    study: Name
    base: str = Field(description="diffusers pipeline folder of the SD1.5 or SDXL family, or hub id")
    vae: str | None = Field(None, description="folder or hub id of an image codec; null: the base's own")
    variant: str | None = Field(None, description="which of the base's weight files, as fp16; null: the plain ones")
    bases: dict[Name, BaseConfig] = Field({}, description="further base models, for arms that do not train")
    preferences: str = Field(
        "",
        description="Pick-a-Pic v2 parquet file, folder of them, or hub dataset id, with `:split` where it is not "
        "train; not needed where no arm trains",
    )
    prompts: str = Field(description="txt, csv, tsv, json, jsonl or parquet file, or a published set by its name")
    scorers: ScorersConfig
    checksums: str | None = Field(None, description="sha256sum listing, paths relative to its folder")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    training: TrainingConfig = TrainingConfig.model_validate({})
    data: DataConfig = DataConfig.model_validate({})
    own_samples: OwnSamplesConfig | None = Field(None, description="what `preferences` is made of; null: it is there")
    trajectory_cache_gb: PositiveFloat | None = Field(
        None, description="gigabytes for inversions by the reference, which arms share; null: none are kept"
    )
    sampling: SamplingConfig
    # Before `tuned`, which is read knowing whether the study has a grid.
    tuning: TuningConfig | None = Field(None, description="the grid behind `tuned`")
    tuned: Annotated[
        dict[str, TunedValues],
        BeforeValidator(_read_tuned),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}},
                    {"type": "object"},
                    {"type": "null"},
                ]
            }
        ),
    ] = Field({}, description="method -> tuned values, or the YAML that holds them, or several YAMLs")
    arms: dict[Name, ArmEntry] = Field(min_length=1)
    experiments: ExperimentsConfig = ExperimentsConfig.model_validate({})
    claims: str | None = Field(None, description="the YAML of the claims to judge")
    user_study: dict[str, Any] | None = Field(
        None, description="a blind study with people; its keys are those of user_study_app/settings.py"
    )

    _root: Path | None = PrivateAttr(None)

    @property
    def root(self) -> Path:
        """The folder of this study's results."""
        return self._root or Path("results") / self.study

    def placed(self, root: Path) -> StudyConfig:
        """The same study with its results in another folder."""
        study = self.model_copy()
        study._root = root
        return study

    @property
    def samples_pairs(self) -> bool:
        """Whether only those pairs are encoded that a run draws (`data.shards`)."""
        shards = self.data.shards
        if shards is None:
            return self.own_samples is None and not Path(self.preferences).exists()
        return shards != "all"

    @property
    def label_columns(self) -> list[str]:
        """Columns of `preferences` that arms take labels from in place of label_0, each once, in the arms' order."""
        named = (entry.labels for entry in self.arms.values() if entry.method != NO_TRAINING)
        return list(dict.fromkeys(name for name in named if name.startswith(LABEL_COLUMN)))

    @property
    def draws(self) -> dict[int, int]:
        """Seed -> pairs that its longest run draws, over all optimizer steps; the grid's seeds have its arms' runs."""
        runs = (
            [(self.seeds, self.arms), (self.tuning.seeds, self.tuning.arms)]
            if self.tuning
            else [(self.seeds, self.arms)]
        )
        found: dict[int, int] = {}
        for seeds, arms in runs:
            training = [arm.training for arm in map(self.arm, arms) if arm.trains]
            longest = max((settings.steps * settings.batch for settings in training), default=0)
            found |= {seed: longest for seed in seeds}
        return found

    def awaits_tuning(self, name: str) -> bool:
        """Whether an arm uses values that the study's own grid chooses and has not chosen yet."""
        tuning, entry = self.tuning, self.arms[name]
        methods = {self.arms[arm].method for arm in tuning.arms} if tuning else set()
        return entry.tuned and entry.method in methods and entry.method not in self.tuned

    def arm(self, name: str) -> ArmConfig:
        """The arm with everything resolved: study's training < tuned values < the arm's own.

        Raises InvdpoError for a name that the study has not.
        """
        if name not in self.arms:
            raise InvdpoError(f"Study `{self.study}` has no arm `{name}`.{nearest(name, self.arms)}")
        entry = self.arms[name]
        for key in PREPARED & entry.training.keys():
            raise InvdpoError(
                f"`arms.{name}.training.{key}` of study `{self.study}`: all arms share one preparation of "
                f"the pairs. Set `training.{key}` for the whole study instead."
            )
        tuned = self.tuned.get(entry.method) if entry.tuned else None
        values = self.training.model_dump()
        values |= tuned.model_dump(exclude_none=True) if tuned else {}
        values |= entry.training
        try:
            training = TrainingConfig.model_validate(values)
        except ValidationError as error:
            where = f"arm `{name}` of study `{self.study}`"
            raise InvdpoError(explain(error, TrainingConfig, where, f"arms.{name}.training.")) from error
        return ArmConfig(
            name=name,
            method=entry.method,
            labels=entry.labels,
            initial_rounding=entry.initial_rounding,
            training=training,
            recipe_overrides=entry.recipe,
            weights=entry.weights,
            identity=self._identity | self._own_weights(entry),
        )

    def with_base_of(self, arm: str) -> StudyConfig:
        """The study as an arm sees it that names another base: that model, and how it is sampled."""
        name = self.arms[arm].base
        if name is None:
            return self
        own = self.bases[name]
        training = {} if own.resolution is None else {"resolution": own.resolution}
        sampling = {} if own.guidance_scale is None else {"guidance_scale": own.guidance_scale}
        return self.model_copy(
            update={
                "base": own.model,
                "vae": own.vae,
                "variant": own.variant,
                "training": self.training.model_copy(update=training),
                "sampling": self.sampling.model_copy(update=sampling),
            }
        )

    def _own_weights(self, entry: ArmEntry) -> dict[str, Any]:
        """What an arm that names a base or weights is known by, beside the study's identity."""
        own = {"weights": entry.weights} if entry.weights is not None else {}
        return own if entry.base is None else own | {"base": self.bases[entry.base].model_dump()}

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What, beside the arm itself, decides the weights of a run."""
        identity: dict[str, Any] = {
            "base": self.base,
            "preferences": self.preferences,
            "device": self.device,
            "precision": self.precision,
        }
        identity |= {key: value for key in ("vae", "variant") if (value := getattr(self, key)) is not None}
        if self.own_samples is not None:
            sampling = self.sampling.model_dump(include={"steps", "guidance_scale", "batch"})
            identity["own_samples"] = sampling | self.own_samples.model_dump(exclude_none=True)
        if self.checksums is not None and Path(self.checksums).is_file():
            listing = Path(self.checksums)
            entries = {str(listing.parent / name): digest for name, digest in read_checksums(listing).items()}
            inputs = (self.base, self.preferences)
            identity["assets"] = {
                path: digest for path, digest in entries.items() if any(_lies_in(path, source) for source in inputs)
            }
        return identity


class ArmConfig(Strict):
    """One arm with all its settings final."""

    name: str
    method: str
    labels: str
    initial_rounding: Literal["float16", "bfloat16"] | None
    training: TrainingConfig
    recipe_overrides: dict[str, Any]
    weights: str | None
    identity: dict[str, Any]

    @property
    def trains(self) -> bool:
        """False for the untouched base model and for published weights."""
        return self.method != NO_TRAINING

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with the arm's overrides and its beta (imports torch). Not for an arm that does not
        train.
        """
        from invdpo.objectives import load_recipe

        overrides = dict(self.recipe_overrides)
        if self.training.beta is not None:
            overrides["beta"] = self.training.beta
        recipe = load_recipe(self.method)
        return recipe.with_overrides(overrides) if overrides else recipe

    @property
    def learning_rate(self) -> float:
        """The study's, or else the recipe's own."""
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        return self.recipe.learning_rate

    @cached_property
    def hash(self) -> str:
        """16 hex digits of everything that decides the weights of this arm's runs, the seed apart."""
        training = self.training.model_dump(exclude=SURROUNDINGS)
        for name in LATER:
            if training[name] == TrainingConfig.model_fields[name].default:
                del training[name]
        content = {
            "method": self.method,
            "labels": self.labels,
            "initial_rounding": self.initial_rounding,
            "training": training,
            "recipe": read_yaml(method_path(self.method)) if self.trains else None,
            "recipe_overrides": self.recipe_overrides,
            "identity": self.identity,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def method_path(method: str) -> Path:
    """The YAML of a recipe: a path as it is, a name from `config/methods` of the package's repository or
    here.

    Raises InvdpoError with the nearest name where there is none.
    """
    if method.endswith((".yaml", ".yml")):
        candidates = [Path(method)]
    else:
        repository = Path(__file__).resolve().parents[2]
        candidates = [repository / METHODS / f"{method}.yaml", METHODS / f"{method}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = {path.stem for candidate in candidates for path in candidate.parent.glob("*.yaml")} | {NO_TRAINING}
    raise InvdpoError(f"There is no method `{method}` (looked for {candidates[0]}).{nearest(method, known)}")


def load_study(path: str | Path) -> StudyConfig:
    """Read a study from its YAML, or from the resolved `study.json` of its results.

    Raises InvdpoError that names the place in the file, what is wrong and the nearest valid key.
    """
    return parse_study(read_yaml(Path(path)), str(path))


def parse_study(data: Any, where: str) -> StudyConfig:
    """Validate a study that is already a mapping; `where` names its source in error messages."""
    try:
        study = StudyConfig.model_validate(data)
    except ValidationError as error:
        raise InvdpoError(explain(error, StudyConfig, where, "")) from error
    for place, arm in study.experiments.named_arms().items():
        if arm not in study.arms:
            raise InvdpoError(
                f"{where}: `{place}` names the arm `{arm}`, which is not in `arms`.{nearest(arm, study.arms)}"
            )
    if study.tuning is not None:
        _check_tuning(study, study.tuning, where)
    _check_bases(study, where)
    _check_pairs(study, where)
    _check_measured(study, where)
    for name, entry in study.arms.items():
        study.arm(name)
        if entry.method != NO_TRAINING:
            try:
                method_path(entry.method)
            except InvdpoError as error:
                raise InvdpoError(f"{where}: `arms.{name}.method`: {error}") from error
    return study


def _check_bases(study: StudyConfig, where: str) -> None:
    """Other bases and published weights are for arms that do not train; whatever trains needs pairs."""
    for name, entry in study.arms.items():
        if entry.base is not None and entry.base not in study.bases:
            known = nearest(entry.base, study.bases) if study.bases else " The study has no `bases`."
            raise InvdpoError(f"{where}: `arms.{name}.base` names `{entry.base}`, which is not in `bases`.{known}")
        for key in ("base", "weights"):
            if getattr(entry, key) is not None and entry.method != NO_TRAINING:
                raise InvdpoError(
                    f"{where}: `arms.{name}.{key}` is for arms with `method: {NO_TRAINING}`. All arms that train start "
                    "from the study's `base`; train from another in a study of its own."
                )
        if entry.published is not None and entry.weights is None:
            raise InvdpoError(
                f"{where}: `arms.{name}.published` is for arms with `weights`; other arms are found by their method."
            )
    trained = [name for name, entry in study.arms.items() if entry.method != NO_TRAINING]
    needing = [*trained[:1], *(name for name in study.experiments.measured if name in ON_PAIRS)]
    if needing and not study.preferences:
        raise InvdpoError(f"{where}: `preferences` is missing, and `{needing[0]}` needs pairs. Set it.")


def _check_pairs(study: StudyConfig, where: str) -> None:
    """Labels of a column need all pairs; pairs that the workflow makes need a place and prompts of their own."""
    if study.label_columns and study.samples_pairs:
        column = study.label_columns[0]
        arm = next(name for name, entry in study.arms.items() if entry.labels == column)
        raise InvdpoError(
            f"{where}: `arms.{arm}.labels: {column}` needs every pair encoded. Only those are that an order over all "
            "pairs that label_0 decides draws (`data.shards`), and this arm draws from those that the column decides "
            "too. Set `data.shards: all`."
        )
    own = study.own_samples
    if own is None:
        return
    if not study.preferences.endswith(".parquet"):
        raise InvdpoError(
            f"{where}: `own_samples` needs the place of the file that is made of them: set `preferences` to a path "
            f"that ends in .parquet (found {study.preferences!r})."
        )
    reported = {"prompts": study.prompts, "tuning.prompts": study.tuning.prompts if study.tuning else None}
    for key, prompts in reported.items():
        if own.prompts == prompts:
            raise InvdpoError(f"{where}: `own_samples.prompts` is the file of `{key}`. Train on other prompts.")


def _check_tuning(study: StudyConfig, tuning: TuningConfig, where: str) -> None:
    """Tuning on what is reported would make every interval a lie."""
    for arm in tuning.arms:
        if arm not in study.arms:
            raise InvdpoError(f"{where}: `tuning.arms` names `{arm}`, not in `arms`.{nearest(arm, study.arms)}")
        if not study.arm(arm).trains:
            raise InvdpoError(f"{where}: `tuning.arms` names `{arm}`, which does not train. Leave it out.")
    for arm in tuning.beta.keys() - {DEFAULT, *tuning.arms}:
        raise InvdpoError(f"{where}: `tuning.beta` names `{arm}`, not in `tuning.arms`.{nearest(arm, tuning.arms)}")
    if DEFAULT not in tuning.beta:
        raise InvdpoError(f"{where}: `tuning.beta` has no key `{DEFAULT}`, the grid of all arms not named. Add it.")
    for arm, betas in tuning.beta.items():
        if len(betas) != len(tuning.beta[DEFAULT]):
            raise InvdpoError(
                f"{where}: `tuning.beta.{arm}` has {len(betas)} values and `tuning.beta.{DEFAULT}` "
                f"{len(tuning.beta[DEFAULT])}. Give every method the same number, or the tuning is not equal."
            )
    if shared := sorted(set(tuning.seeds) & set(study.seeds)):
        raise InvdpoError(f"{where}: `tuning.seeds` holds {shared}, which the study reports. Choose other seeds.")
    if tuning.prompts == study.prompts:
        raise InvdpoError(f"{where}: `tuning.prompts` is the study's own prompt file. Choose another.")


def _check_measured(study: StudyConfig, where: str) -> None:
    """What the experiments name must exist, and have what they look at."""
    experiments = study.experiments
    unseen = [name for name in ("inversion_error", "precision", "audit") if name in experiments.measured]
    if unseen and study.samples_pairs and experiments.held_out is None:
        raise InvdpoError(
            f"{where}: `experiments.{unseen[0]}` needs pairs that no run has seen, but only those that a run draws are "
            "encoded (`data.shards`). Name others in `experiments.held_out`; behind a hub id may stand a split, as in "
            "`owner/name:validation`."
        )
    named = {"precision": experiments.precision, "audit": experiments.audit}
    for name, settings in named.items():
        arms: list[str] = [*(settings.arms if settings else []), *experiments.trained_arms(name)]
        for arm in arms:
            if not study.arm(arm).trains:
                raise InvdpoError(f"{where}: `experiments.{name}` names `{arm}`, which does not train. Leave it out.")
    for label, entry in (experiments.precision.recipes if experiments.precision else {}).items():
        try:
            method_path(entry.method or label)
        except InvdpoError as error:
            raise InvdpoError(f"{where}: `experiments.precision.recipes.{label}`: {error}") from error
    if experiments.audit is not None and study.scorers.pickscore is None:
        raise InvdpoError(
            f"{where}: `experiments.audit` needs `scorers.pickscore`, whose gradient it compares with. Add it, or "
            "leave the audit out."
        )
    for arm in experiments.weight_distances.arms if experiments.weight_distances else []:
        if study.arm(arm).weights is None and not study.arm(arm).trains:
            raise InvdpoError(f"{where}: `experiments.weight_distances` names `{arm}`, a base itself. Leave it out.")
    votes = experiments.preference_accuracy
    if votes is not None and votes.votes is None and experiments.held_out is None:
        raise InvdpoError(
            f"{where}: `experiments.preference_accuracy` needs votes that no method was trained on. Set its `votes`, "
            "or `experiments.held_out`."
        )
    if experiments.to_target is not None and not study.arm(experiments.to_target.arm).trains:
        raise InvdpoError(
            f"{where}: `experiments.to_target` names `{experiments.to_target.arm}`, which does not train. Name an arm "
            "whose final score is a target."
        )
    if experiments.held_out is not None and experiments.held_out == study.preferences:
        raise InvdpoError(
            f"{where}: `experiments.held_out` is the study's own `preferences`. Name others, or leave it out."
        )


def load_scorers(path: Path) -> ScorersConfig:
    """Read the scorers of a YAML that holds what a study has under `scorers:`, or that is a study.

    Raises InvdpoError that names the place in the file, what is wrong and the nearest valid key.
    """
    data = read_yaml(path)
    if isinstance(data, dict) and isinstance(data.get("scorers"), dict):
        data = data["scorers"]
    try:
        scorers = ScorersConfig.model_validate(data)
    except ValidationError as error:
        raise InvdpoError(explain(error, ScorersConfig, str(path), "scorers.", "list of scorers")) from error
    if not scorers.model_fields_set:
        raise InvdpoError(f"{path} names no scorer. Name at least one of {', '.join(ScorersConfig.model_fields)}.")
    return scorers


def dump_study(study: StudyConfig) -> str:
    """The resolved study as JSON text; `load_study` reads it back to an equal study, its arms in the same order."""
    return json.dumps(study.model_dump(mode="json"), indent=2) + "\n"


def json_schema() -> str:
    """The JSON schema of a study, for editors that complete and check YAML."""
    return json.dumps(StudyConfig.model_json_schema(), indent=2, sort_keys=True) + "\n"


def read_yaml(path: Path) -> Any:
    """The content of a YAML or JSON file; InvdpoError where it cannot be read."""
    # JSON writes 3e-05, which is a number there and text in YAML 1.1.
    load = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        return load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvdpoError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InvdpoError(f"{path} is not valid YAML: {error}") from error


def _lies_in(path: str, source: str) -> bool:
    return Path(path) == Path(source) or Path(source) in Path(path).parents


def nearest(word: str, known: Any) -> str:
    """Closing words of an error about an unknown name: the known one most like it, or all of them."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{matches[0]}`?" if matches else f" Valid: {', '.join(sorted(known))}."


def explain(error: ValidationError, model: type[BaseModel], where: str, prefix: str, what: str = "study") -> str:
    """What is wrong at which place of `where`, a line each; `prefix` is the place of `model` in the YAML."""
    lines = [f"{where} is not a valid {what}:"]
    for item in error.errors():
        place = prefix + _dotted(item["loc"])
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            lines.append(f"  unknown key `{place}`.{nearest(str(item['loc'][-1]), known)}")
        elif item["type"] == "missing":
            lines.append(f"  `{place}` is missing.")
        else:
            lines.append(f"  `{place}`: {item['msg']} (found {item['input']!r}).{_number_hint(item['input'])}")
    return "\n".join(lines)


def _dotted(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".").removesuffix(".[key]")


def _number_hint(value: Any) -> str:
    """YAML 1.1 reads 1e-5 as text: a number needs a dot before its exponent."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return ""
    if number is None:
        return ""
    mantissa, _, exponent = value.lower().partition("e")
    better = f"{mantissa}.0e{exponent}" if exponent and "." not in mantissa else value
    return f" YAML reads this as text: write {better}" + ("" if better != value else " without quotes") + "."


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that are valid at a place inside a model."""
    kind: Any = model
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        else:  # an entry of a dict or list
            kind = get_args(kind)[-1]
        while get_origin(kind) in (Annotated, Union, UnionType):
            kind = get_args(kind)[0]
    return list(kind.model_fields)
