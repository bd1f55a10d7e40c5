"""The card of the shapes world's assets: how each was made and how good it is, from the facts that its step left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from invdpo.provenance import sha256_file

STEPS = ("vae", "base", "votes", "scenes", "clip", "pickscore", "hps", "aesthetic", "quality")
# place of weights -> the step that makes them
MAKERS = {
    "base/vae": "vae",
    "base/unet": "base",
    "base/text_encoder": "base",
    "scorers/clip": "clip",
    "scorers/pickscore": "pickscore",
    "scorers/hps": "hps",
    "scorers/aesthetic": "aesthetic",
}

INTRODUCTION = """\
# The shapes world

A small world in the formats of the model hub, made by this repository and small enough to run a whole study on two
CPU cores. Pictures are 64x64 RGB: one to three coloured shapes, the first two in a spatial relation.

| path | what it is | stands for |
|---|---|---|
| `base/` | a `StableDiffusionPipeline` folder with SD1.5's noise schedule | Stable Diffusion 1.5 / SDXL |
| `preferences/{train,validation}.parquet` | voted pairs of the base model's samples | Pick-a-Pic v2 |
| `prompts/{test,tuning}.txt` | captions that no voted pair has | the papers' prompt sets |
| `prompts/complex_{train,test}.txt` | captions with three things, none of them above | the paper's annotated scenes |
| `scorers/pickscore/` | a transformers `CLIPModel` folder, trained on its own votes | PickScore |
| `scorers/clip/` | an open_clip folder, trained on captioned renders | CLIP ViT-H-14 |
| `scorers/hps/` | an open_clip folder, trained on votes that nothing else sees | HPS v2 |
| `scorers/aesthetic/head.pth` | five linear layers on the CLIP's image embedding | LAION's aesthetic predictor |

Simulated annotators vote by a hidden utility, 6 x faithfulness + 3 x aesthetics, through Gumbel noise. Faithfulness
and aesthetics are measured in the picture itself by a parser, so every learned score can be held against the truth.
`SHA256SUMS` covers every file; the study checks it before it starts.
"""


def write_card(out: Path) -> None:
    """README.md of the assets folder. A step that has not run raises FileNotFoundError with its name, weights that no
    step makes a KeyError."""
    facts = {step: json.loads((out / "build" / f"{step}.json").read_text()) for step in STEPS}
    lines = [
        INTRODUCTION,
        "## How each part was made\n",
        "| step | command | minutes | hardware | torch |",
        "|---|---|---|---|---|",
    ]
    for step, fact in facts.items():
        lines.append(f"| {step} | `{fact['command']}` | {fact['minutes']} | {fact['hardware']} | {fact['torch']} |")
    lines.append("\nAll of it, in order: `invdpo world build`.\n")
    lines += ["## Weights\n", "| file | step | seed | sha256 |", "|---|---|---|---|"]
    for path in sorted(path for kind in ("safetensors", "pth") for path in out.rglob(f"*.{kind}")):
        name, step = path.relative_to(out), MAKERS[path.parent.relative_to(out).as_posix()]
        lines.append(f"| `{name}` | {step} | {facts[step]['seed']} | `{sha256_file(path)}` |")
    lines.append("")
    lines.append("## Seeds, losses and quality\n")
    for step, fact in facts.items():
        lines += [f"### {step}\n", "| | |", "|---|---|", *_rows("", fact), ""]
    (out / "README.md").write_text("\n".join(lines))


def _rows(prefix: str, facts: dict[str, Any]) -> list[str]:
    rows = []
    for key, value in facts.items():
        if key in ("command", "minutes", "hardware", "torch"):
            continue
        name = f"{prefix} {key}".strip().replace("_", " ")
        rows += _rows(name, value) if isinstance(value, dict) else [f"| {name} | {value} |"]
    return rows
