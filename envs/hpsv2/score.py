"""HPSv2's own package as a reference for the scorer `hps`: its copy of open_clip, its preprocessing, its score().

uv run --project envs/hpsv2 python envs/hpsv2/score.py images.parquet scores.json --checkpoint HPS_v2.1_compressed.pt
    images.parquet: columns `png` (bytes) and `prompt`, for instance an images parquet of a study
    scores.json: {"scores": [...]}, raw cosines in the order of the rows

Slow, since the package reads the checkpoint again for every prompt: for comparisons, not for studies.
"""

import argparse
import gzip
import io
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import open_clip
import pyarrow.parquet as pq
from PIL import Image


def load_package() -> tuple[ModuleType, ModuleType]:
    """hpsv2.img_score and hpsv2.src.open_clip, which cannot be imported without help."""
    # The package imports a name from `turtle` by mistake, which needs Tk.
    sys.modules["turtle"] = ModuleType("turtle")
    sys.modules["turtle"].forward = None
    # Its wheel lacks the vocabulary, which it opens while it is imported; open_clip has the same one.
    vocabulary = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    own_open = gzip.open
    gzip.open = lambda path, *options: own_open(vocabulary if Path(path).name == vocabulary.name else path, *options)
    try:
        return import_module("hpsv2.img_score"), import_module("hpsv2.src.open_clip")
    finally:
        gzip.open = own_open


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--config", type=Path, help="JSON of another architecture than ViT-H-14")
    options = parser.parse_args()
    img_score, package_open_clip = load_package()
    if options.config:
        package_open_clip.add_model_config(options.config)
    # As img_score.initialize_model() does it, without LAION's weights, which the checkpoint replaces anyway.
    model, _, preprocess = img_score.create_model_and_transforms(
        options.config.stem if options.config else "ViT-H-14",
        precision="amp",
        device=img_score.device,
        light_augmentation=True,
        output_dict=True,
    )
    img_score.model_dict |= {"model": model, "preprocess_val": preprocess}
    scores = []
    for row in pq.read_table(options.images, columns=["png", "prompt"]).to_pylist():
        image = Image.open(io.BytesIO(row["png"]))
        scores.append(float(img_score.score(image, row["prompt"], cp=options.checkpoint)[0]))
    options.out.write_text(json.dumps({"scores": scores}))


if __name__ == "__main__":
    main()
