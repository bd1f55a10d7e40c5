"""ImageReward of images and prompts, by its authors' package in this folder's own environment.

uv run --project envs/imagereward python envs/imagereward/score.py --batch images.parquet > scores.json
    images.parquet: columns `png` (bytes) and `prompt`, for instance an images parquet of a study

Without --batch it waits for paths of such files on its standard input, a line each, as `invdpo score` sends them.
Writes a line of JSON at its start, {"version": ...}, and one a file, {"scores": [...]}.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from importlib import metadata
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import torch
from huggingface_hub import hf_hub_download
from PIL import Image

# Answers only may go to standard output, and the package prints.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
HUB = "THUDM/ImageReward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", help="score this parquet file and end")
    parser.add_argument("--checkpoint", help="ImageReward.pt; default: the hub's")
    parser.add_argument("--med-config", help="med_config.json; default: the hub's")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    checkpoint = options.checkpoint or hf_hub_download(HUB, "ImageReward.pt")
    model = load(checkpoint, options.med_config or hf_hub_download(HUB, "med_config.json"), options.device)
    with open(checkpoint, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    package = f"image-reward-{metadata.version('image-reward')}"
    answer({"version": f"imagereward:{weights}:shortest-bicubic-224+{package}"})
    for path in [options.batch] if options.batch else map(str.strip, sys.stdin):
        answer({"scores": score(model, pq.read_table(path, columns=["png", "prompt"]).to_pylist())})


def load(checkpoint: str, med_config: str, device: str) -> Any:
    """The model. The package's own load() takes a file without the weights for a model and goes on with random ones."""
    # The package imports OpenAI's clip, which it does not name as a requirement and which no score of ours needs.
    sys.modules["clip"] = ModuleType("clip")
    from ImageReward.ImageReward import ImageReward

    model = ImageReward(med_config=med_config, device=device)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if missing := sorted({name for name, _ in model.named_parameters()} - set(state)):
        sys.exit(f"{checkpoint} lacks {len(missing)} of the model's tensors, for instance {missing[0]}")
    model.load_state_dict(state, strict=False)  # it also holds position ids, which are no parameters
    return model.to(device).eval()


@torch.no_grad()
def score(model: Any, rows: list[dict]) -> list[float]:
    """One image and prompt at a time, as the package does."""
    return [model.score(row["prompt"], Image.open(io.BytesIO(row["png"])).convert("RGB")) for row in rows]


def answer(content: dict) -> None:
    print(json.dumps(content), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
