# Shared by all rules: the validated study, and functions from wildcards to inputs, keys and priorities.

import hashlib
import json
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from invdpo.config import dump_study, method_path, parse_study, read_yaml, tuned_file
from invdpo.errors import InvdpoError
from invdpo.lease import devices
from invdpo.places import places
from invdpo.provenance import code_hash, lock_hash

try:
    study = parse_study(config, "the study's configuration")
except InvdpoError as error:
    raise WorkflowError(str(error))

SETTINGS = study.model_dump(mode="json")
TUNING = SETTINGS.get("tuning") or {}
STUDY = f"{study.root}/study.json"
SHAPES_XL = "results/world/shapes_xl"  # a base that a rule makes
OWN_SAMPLES = study.own_samples
# What rules make of what studies name as if it were there.
MADE = {SHAPES_XL, *([study.preferences] if OWN_SAMPLES else [])}
GRID = tuned_file(study.study).with_suffix(".csv")  # what every method reached with every value that was tried
TRAINED = [name for name in study.arms if study.arm(name).trains]
UNTRAINED = [name for name in study.arms if not study.arm(name).trains]
# What `invdpo plan --save` expects of each arm, where it was asked of the arm as it is, with as many seeds.
PLAN = Path(study.root, "plan.json")
PLANNED = {
    name: arm
    for name, arm in (json.loads(PLAN.read_text())["arms"] if PLAN.is_file() else {}).items()
    if name in TRAINED and (arm.get("hash"), arm.get("runs")) == (study.arm(name).hash, len(study.seeds))
}


def one_of(arms):
    """The constraint of a wildcard to those arms; to nothing where there is none, which "" would not be."""
    return "|".join(map(re.escape, arms)) or "(?!)"


# GPUs that jobs may use at a time, without which Snakemake would start every GPU job at once: what --resources gpu=N or
# a cluster's profile says, whose login node's own devices mean nothing, and else this machine's.
if "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", len(devices()))
GPUS = workflow.global_resources["gpu"].value
CUDA = study.device.startswith("cuda") or (study.device == "auto" and GPUS > 0)
GPU = 1 if CUDA else 0
# On a CPU, independent runs of one thread each use the cores better than one run of many threads.
STAGE_THREADS = 4 if CUDA else 1

# A locked environment is not software Snakemake can see: its hash is a parameter of every rule.
LOCK = lock_hash()

# Nor does it see through a command line: these modules of the package decide the numbers of each stage, and a hash of their
# syntax is a parameter too. Comments, the wording of errors and how files are written change no number.
# Preparing the pairs scores them too, where a method weights them by PickScore.
SCORING = ("scorers/pickscore", "scorers/openclip", "scorers/pictures", "scorers/texts", "scorers/weights")
ENCODING = ("preferences", "backbones", "schedule", "device", *SCORING)
TRAINING = (*ENCODING, "training", "objectives", "likelihood", "inversion", "types")
WORLD = ("world/oracle", "world/benchmarks", "world/parser", "world/render", "world/scenes")
EVALUATION = ("evaluate", "prompts", "sampling", "scorers", "inversion", "types", *ENCODING[1:], *WORLD)
READING = ("evidence/load", "evidence/statistics", "scorers/composition")
CLAIMS = ("evidence/claims", "evidence/claims_held_out", "evidence/deviations", "evidence/ledger")
EXPERIMENTS = ("experiments", "evidence/statistics", *TRAINING, *EVALUATION)

MODULES = {
    "sample": ("samples", *EVALUATION),
    "score": ("score", "image_files", *EVALUATION),
    "rank": ("rank", "image_files", *EVALUATION),
    "preferences": ENCODING,
    "train": TRAINING,
    "evaluate": EVALUATION,
    "distribution": (
        "distribution",
        "device",
        "image_files",
        "prompts",
        *(f"scorers/{name}" for name in ("distribution", "openclip", "pictures", "texts", "weights")),
        *(f"world/{name}" for name in ("reference", "render", "scenes")),
    ),
    "tables": (
        "evidence/tables",
        "evidence/comparisons",
        "evidence/compositional",
        "evidence/paper",
        "evidence/printing",
        "evidence/provenance",
        *READING,
    ),
    "figures": (
        "evidence/figures",
        "evidence/grids",
        "evidence/paper",
        "evidence/printing",
        "evidence/provenance",
        *READING,
    ),
    "claims": (*CLAIMS, "evidence/printing", "evidence/provenance", *READING),
    "model_cards": ("evidence/model_card",),
    "report": (
        "evidence/report",
        *CLAIMS,
        "evidence/figures",
        "evidence/paper",
        "evidence/printing",
        "evidence/provenance",
        *READING,
    ),
    "mlflow": ("tracking", "evidence/ledger", *READING),
    "tune": ("tuning", *TRAINING, *EVALUATION),
    "experiments": EXPERIMENTS,
    "present": (
        "evidence/experiments",
        "evidence/figures",
        "evidence/comparisons",
        "evidence/paper",
        "evidence/printing",
        "evidence/provenance",
        *READING,
    ),
    "assets": ("world", "scorers/composition", "scorers/scene_graph"),
}
CODE = {stage: code_hash(modules)[:16] for stage, modules in MODULES.items()}

# `snakemake` may be called by its path, without the environment being active.
shell.prefix(f'set -euo pipefail; export PATH="{Path(sys.executable).parent}:$PATH"; ')


def weights_by_strength(name):
    """Whether an arm weights its pairs by PickScore, read as YAML: arm.recipe would import torch."""
    arm = study.arm(name)
    loss = read_yaml(method_path(arm.method)).get("loss", {}) | arm.recipe_overrides.get("loss", {})
    return loss.get("weight_by_strength", False)


# PickScore's settings where the pairs are scored as they are encoded.
PAIR_SCORER = SETTINGS["scorers"]["pickscore"] if any(map(weights_by_strength, TRAINED)) else None


def write_study():
    """Write the merged, validated configuration that the jobs read, leaving an equal file alone."""
    path = Path(STUDY)
    text = dump_study(study)
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def how_to_resume(log):
    """Closing words of a run that failed or was stopped."""
    lines = [
        "",
        f"{study.study} stopped early. Read the log named beside the failed job (logs/{study.study}/), or Snakemake's own: {log[0]}",
        "The same command again resumes: finished jobs are kept and training continues from its last saved state.",
    ]
    return "\n".join(lines)


def digest(*values):
    """Hash of those settings, for `params`: a change of one of them runs the rule again."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def local(*places):
    """Files behind those places that are local files or folders, or what a rule makes there; hub ids have none, and the
    stage checks the rest."""
    files = []
    for place in places:
        path = Path(str(place or "").removeprefix("local-dir:"))
        if place in MADE:
            files.append(place)
        elif place and path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.is_file())
        elif place and path.is_file():
            files.append(path)
    return list(map(str, files))


def scorer_files():
    """Local weights of every scorer of the study."""
    scorers = SETTINGS["scorers"].values()
    return local(*(place for scorer in scorers if scorer for place in scorer.values()))


def distribution_images():
    """Images of the arms that are held against the reference set."""
    arms = DISTRIBUTION["arms"] if DISTRIBUTION else []
    return [path for path in IMAGES if Path(path).parent.name in arms]


def distribution_files():
    """Local weights and reference images of that comparison."""
    places = (*DISTRIBUTION["reference"].values(), DISTRIBUTION["model"], DISTRIBUTION["inception_weights"])
    return local(*(place for place in places if isinstance(place, str)))


def every_run(name):
    """That file of every arm's runs."""
    return expand("<results>/runs/{arm}/seed{seed}/{name}", arm=study.arms, seed=study.seeds, name=name)


def every_evaluation(folder):
    """That folder's file of every arm and seed; the base model has nothing to seed and is evaluated once, as seed 0."""
    trained = expand("<results>/{folder}/{arm}/seed{seed}.parquet", folder=folder, arm=TRAINED, seed=study.seeds)
    return trained + expand("<results>/{folder}/{arm}/seed0.parquet", folder=folder, arm=UNTRAINED)


def experiment_key(name):
    """What decides an experiment's result beside its input files."""
    experiments, scorers = SETTINGS["experiments"], SETTINGS["scorers"]
    settings = experiments[name]
    recipes = [read_yaml(method_path(entry["method"] or label)) for label, entry in settings.get("recipes", {}).items()]
    arms = [study.arm(arm).hash for arm in (*study.experiments.trained_arms(name), *settings.get("arms", []))]
    judged = {
        "inversion_error": [scorers],
        "audit": [scorers, study.prompts, SETTINGS["sampling"]],
        "preference_accuracy": [scorers],
    }.get(name)
    return digest(PREFERENCES_KEY, experiments["held_out"], SETTINGS["seeds"], settings, recipes, arms, judged)


def runs_of(name, part):
    """That file of the runs that an experiment reads."""
    arms = [arm for arm in study.experiments.trained_arms(name) if arm in TRAINED]
    return expand("<results>/runs/{arm}/seed{seed}/{part}", arm=arms, seed=study.seeds, part=part)


def own_base(arm):
    """Local files of the base model that an arm is sampled from, and of weights that take its place."""
    seen = study.with_base_of(arm)
    return local(seen.base, seen.vae, study.arms[arm].weights)


def evaluation_key(wildcards):
    """What decides the scores of an arm that does not train beside its input files."""
    entry = study.arms[wildcards.arm]
    return digest(EVALUATION_KEY, arm_key(wildcards)) if entry.base or entry.weights else EVALUATION_KEY


def arm_key(wildcards):
    return study.arm(wildcards.arm).hash


def tuning_key(wildcards):
    """What decides a grid's result beside its input files; the values chosen last time and other arms' grids do not."""
    arm = SETTINGS["arms"][wildcards.arm]
    grid = TUNING | {"arms": [wildcards.arm], "beta": study.tuning.betas(wildcards.arm)}
    recipe = read_yaml(method_path(arm["method"]))
    return digest(EVALUATION_KEY, study.preferences, grid, SETTINGS["training"], arm, recipe)


def processes(wildcards):
    """How many processes train an arm together."""
    arm = study.arm(wildcards.arm)
    return arm.training.processes if arm.trains else 1


def train_threads(wildcards):
    return STAGE_THREADS * processes(wildcards)


def train_gpus(wildcards):
    return GPU * processes(wildcards)


def train_minutes(wildcards):
    """Minutes that a scheduler gives an arm: twice as long as planned and an hour to start, or two days."""
    arm = PLANNED.get(wildcards.arm)
    return 2880 if arm is None else 60 + round(2 * 60 * arm["train_hours"] / arm["devices"])


def arm_cost(wildcards):
    """Priority of an arm: the longest run starts first, so that none is left to finish alone."""
    arm = study.arm(wildcards.arm)
    recipe = read_yaml(method_path(arm.method))  # not arm.recipe, which would import torch
    recipe |= arm.recipe_overrides | {"trajectory": recipe["trajectory"] | arm.recipe_overrides.get("trajectory", {})}
    inverted = recipe["trajectory"]["steps"] if recipe["trajectory"]["kind"] == "inversion" else 0
    compared = inverted if recipe["timesteps"] == "all" else 1
    determinant = recipe["log_ratio"].get("order", 0)  # Krylov products a point, where it takes any
    return arm.training.steps * arm.training.batch * (inverted + 4 * compared * (1 + determinant))


TABLES = {
    "table1": "Table 1: methods and scores",
    "table2": "Table 2: compositional generation",
    "win_rates": "Win rates between methods",
    "over_optimisation": "Over-optimisation",
    "to_target": "Cost to reach a score",
    "table3": "Table 3: inversion steps",
    "table_s5": "Table S5: q against p",
    "controls": "Label controls",
    "composition": "Compositional benchmarks",
    "costs": "Costs",
}
FIGURES = {
    "fig3": "Figure 3: PickScore",
    "fig_s7": "Figure S7: aesthetic score",
    "fig_s8": "Figure S8: CLIP score",
    "fig_oracle": "Oracle utility",
    "inversion_steps": "Inversion steps",
    "controls": "Label controls",
    "fig1": "Figure 1: samples",
    "fig4": "Figure 4: details",
    "fig5": "Figure 5: composition",
    "fig_s6": "Figure S6: more samples",
    "fig_s10": "Figure S10: failures",
}


# experiment -> what its table shows, and its figures
MEASURED = {
    "inversion_error": (
        "Inversion error",
        {
            "inversion_error": "Inversion error",
            "inversion_levels": "Inversion error by noise level",
            "fig_s9": "Figure S9: inversion and sampling, side by side",
        },
    ),
    "precision": ("Precision of the surrogates", {"precision": "Precision of the surrogates"}),
    "audit": ("Gradient audit", {"audit": "Gradient audit"}),
    "preference_accuracy": ("Preference accuracy of the scores", {}),
    "weight_distances": ("Distance of the weights", {"weight_distances": "Distance of the weights"}),
}
STUDIED = {name: shows for name, shows in MEASURED.items() if name in study.experiments.measured}


def shown(title, path, caption, category):
    """That output file as an entry of the report."""
    return report(path, caption=caption, category=category, labels={"shows": title})


# Table S4 stands in every study with people; user_study.smk makes it.
TABLE_S4 = ["<results>/tables/table_s4.csv"] if study.user_study else []

RUNS = every_run("run.json")
CURVES = every_run("train.jsonl")
IMAGES = every_evaluation("images")
SCORES = every_evaluation("scores")

# How pairs are chosen and cut where it is not as by default; how many processes decode them changes nothing.
PREPARED_AS = study.data.model_dump(exclude_defaults=True, exclude={"workers"})
if study.samples_pairs:
    PREPARED_AS |= {"draws": study.draws}
# What decides a stage's result beside its input files; an arm has a hash of its own.
PREFERENCES_KEY = digest(
    study.base,
    study.preferences,
    study.device,
    study.training.resolution,
    study.training.max_undecodable,
    *filter(None, [study.vae, study.variant, PREPARED_AS, PAIR_SCORER, study.label_columns]),
)
EVALUATION_KEY = digest(
    study.base,
    study.prompts,
    study.device,
    study.precision,
    SETTINGS["scorers"],
    SETTINGS["sampling"],
    *filter(None, [study.vae, study.variant]),
)
# The samples that pairs are made of; what else decides them is in the files and the rules' own parameters.
OWN_SAMPLES_KEY = digest(
    study.base,
    study.vae,
    study.variant,
    study.device,
    study.precision,
    study.training.resolution,
    {key: SETTINGS["sampling"][key] for key in ("steps", "guidance_scale", "batch")},
)
DISTRIBUTION = SETTINGS["experiments"]["distribution"]
APART = {*MEASURED, "held_out", "distribution"}
COMPARED = {key: value for key, value in SETTINGS["experiments"].items() if key not in APART}
EVIDENCE_KEY = digest(SETTINGS["arms"], COMPARED, SETTINGS["seeds"])
