"""The card beside a trained checkpoint: what it is, how it was made, how to load it, what it must not be used for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invdpo.files import replace_when_done
from invdpo.provenance import sha256_file

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

LABELS = {
    "true": "as voted",
    "shuffled": "shuffled (a control: each pair's label is a coin)",
    "swapped": "swapped (a control: the loser of each vote is trained as the winner)",
}


def write(study: StudyConfig) -> list[Path]:
    """Write README.md beside the weights of every run that has trained; the paths written."""
    written = []
    for arm in filter(lambda name: study.arm(name).trains, study.arms):
        for run in (study.root / "runs" / arm / f"seed{seed}" for seed in study.seeds):
            if not (run / "run.json").is_file():
                continue
            record = json.loads((run / "run.json").read_text(encoding="utf-8"))
            with replace_when_done(run / "README.md") as temporary:
                temporary.write_text(model_card(record, _weights(run), run), encoding="utf-8")
            written.append(run / "README.md")
    return written


def _weights(run: Path) -> dict[str, str]:
    """Path below the run -> sha256, of its last weights and of every checkpoint's."""
    files = [path for part in ("unet", "checkpoints") for path in sorted((run / part).rglob("*.safetensors"))]
    return {path.relative_to(run).as_posix(): sha256_file(path) for path in files}


def model_card(record: Mapping[str, Any], weights: Mapping[str, str], run: Path) -> str:
    """The card as Markdown, with front matter as on the model hub. record: content of run.json. weights: path below
    `run` -> sha256.
    """
    recipe, training = record["recipe"], record["training"]
    kept = sorted({*training["checkpoints"], record["steps"]})
    changed = " with uncommitted changes" if record["git_dirty"] else ""
    made = {
        "method": f"{recipe['name']}: {recipe['source']}",
        "study, arm, seed": f"{record['study']}, {record['arm']}, {record['seed']}",
        "labels": LABELS.get(record["labels"], f"those of the column `{record['labels']}` of the preferences"),
        "base": f"`{record['base']}`"
        + (f", weights rounded to {rounding}" if (rounding := record["initial_rounding"]) else ""),
        "preferences": f"{record['pairs']:,} pairs (key {record['data_key'][:16]}), {record['pairs_seen']:,} seen",
        "optimizer": f"{training['optimizer']}, weight decay {training['weight_decay']:g}, {record['steps']} steps of "
        f"{training['batch']} pairs, {training['warmup_steps']} of them warm-up, gradients clipped to norm "
        f"{training['max_grad_norm']:g}",
        "learning rate, beta": f"{record['learning_rate']:g}, {record['beta']:g}",
        "precision": str(record["dtype"]),
        "distance from the base": f"{record['relative_reference_distance']:.3g} of the norm of its weights",
        "cost": f"{record['unet_evals']:,} UNet evaluations, {record['seconds']:,.0f} s on {record['device']}",
        "code": f"commit {record['git_commit'] or 'unknown'}{changed}, configuration {record['config_hash']}, "
        f"uv.lock {str(record['lock_hash'])[:16]}",
        "libraries": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    lines = [
        "---",
        "library_name: diffusers",
        f"base_model: {record['base']}",
        "tags: [diffusion, preference-optimisation, reproducibility-study]",
        "---",
        "",
        f"# {record['arm']}, seed {record['seed']}",
        "",
        "A UNet trained by one method of a reproducibility study of Inversion-DPO (arXiv:2507.11554), to be compared "
        "with those of the others. Only the UNet was trained.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in made.items()),
        "",
        "## Loading",
        "",
        "```python",
        "from diffusers import DiffusionPipeline, UNet2DConditionModel",
        "",
        f'unet = UNet2DConditionModel.from_pretrained("{run}/unet")',
        f'pipeline = DiffusionPipeline.from_pretrained("{record["base"]}", unet=unet)',
        "```",
        "",
        "The run's checkpoints, which curves over training are drawn from, load alike, and this card is theirs too: "
        f"{', '.join(f'`checkpoints/step{step:06d}/unet`' for step in kept)}. `unet` is the last of them.",
        "",
    ]
    if recipe["sampling_branch"] == "unconditional":
        lines += [
            "This UNet is the unconditional branch of guidance, beside the base's own conditional one: in a plain "
            "pipeline it draws what people like less.",
            "",
        ]
    command = f"invdpo evaluate --study config/{record['study']}.yaml --arm {record['arm']}"
    lines += [
        f"`{command}` samples and scores it as reported.",
        "",
        "## Weights",
        "",
        "| file | sha256 |",
        "|---|---|",
        *(f"| `{name}` | `{digest}` |" for name, digest in weights.items()),
        "",
        "## Not for",
        "",
        "- making images for anything but this comparison: there is no safety checker, and nothing was done about bias",
        "- saying what the method does at another scale, with another base or other preferences",
        "- a verdict on the method from this seed alone: verdicts rest on all seeds of the study",
    ]
    if record["labels"] in ("shuffled", "swapped"):
        lines.append("- use as an aligned model: it is a control, trained on labels that were changed on purpose")
    return "\n".join([*lines, ""])
