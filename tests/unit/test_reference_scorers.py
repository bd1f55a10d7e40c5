"""The scorer `hps` against HPSv2's own package, and the process in which ImageReward's package runs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from invdpo.errors import InvdpoError
from invdpo.scorers import imagereward
from invdpo.scorers.hps import HumanPreferenceScore
from invdpo.scorers.imagereward import ImageReward
from invdpo.scorers.openclip import OpenClip

CPU = torch.device("cpu")
ENVS = Path(__file__).parents[2] / "envs"
PROMPTS = ["a red circle", "A photo,  of a CAT & a dog's café", "one " * 100, "赤い円"]


def noise(width: int, height: int, seed: int) -> Image.Image:
    """A picture with detail at every scale, so that ways of resizing differ."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    return Image.blend(coarse, Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)), 0.5)


def test_hps_agrees_with_its_authors_package(tmp_path: Path) -> None:
    """Tensor resize, padding, tokens and towers, on a small architecture with random weights."""
    python = ENVS / "hpsv2" / ".venv" / "bin" / "python"
    if not python.is_file():
        pytest.skip("envs/hpsv2 is not installed; `uv sync --project envs/hpsv2` installs 5 GB")
    import open_clip

    config = tmp_path / "ViT-tiny-hps.json"
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    config.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    checkpoint = tmp_path / "hps.pt"
    torch.save({"state_dict": open_clip.create_model(config.stem).state_dict()}, checkpoint)

    images = [noise(*size, seed) for seed, size in enumerate([(32, 32), (128, 128), (96, 64), (50, 90)])]
    contents = []
    for image in images:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        contents.append(stream.getvalue())
    pq.write_table(pa.table({"png": contents, "prompt": PROMPTS}), tmp_path / "batch.parquet")
    command = [python, "-W", "ignore", ENVS / "hpsv2" / "score.py", "batch.parquet", "scores.json"]
    command += ["--checkpoint", checkpoint, "--config", config]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    expected = json.loads((tmp_path / "scores.json").read_text())["scores"]

    def found(kind: str) -> np.ndarray:
        tower = OpenClip(config.stem, CPU, checkpoint=checkpoint, preprocessing=kind)  # pyright: ignore
        return HumanPreferenceScore(tower, "v2.1").score(images, PROMPTS)["hps"]

    np.testing.assert_allclose(found("authors"), expected, rtol=0, atol=1e-5)
    for other in ("open_clip", "authors_aliased"):
        assert np.abs(found(other)[1:] - expected[1:]).max() > 1e-3


UV = """#!{python}
import json, sys
import pyarrow.parquet as pq
if "broken.pt" in " ".join(sys.argv):
    sys.exit("broken.pt lacks 7 of the model's tensors")
print(json.dumps({{"version": "imagereward:0:test"}}), flush=True)
for line in sys.stdin:
    rows = pq.read_table(line.strip()).to_pylist()
    print(json.dumps({{"scores": [len(row["png"]) and len(row["prompt"]) for row in rows]}}), flush=True)
"""


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of uv, a program that answers as envs/imagereward/score.py does: a prompt's length."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "uv").write_text(UV.format(python=sys.executable))
    (folder / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder / "uv"


def test_imagereward_hands_batches_to_its_process(uv: Path) -> None:
    scorer = ImageReward(CPU)
    assert scorer.version == "imagereward:0:test"
    for prompts in (["ab", "a\nbc"], ["x"]):
        found = scorer.score([noise(8, 8, 0)] * len(prompts), prompts)["imagereward"]
        assert found.tolist() == [len(prompt) for prompt in prompts] and found.dtype == np.float32


def test_imagereward_says_what_failed(uv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvdpoError, match="scorers.imagereward.checkpoint: there is no file .*none.pt"):
        ImageReward(CPU, checkpoint=str(tmp_path / "none.pt"))
    (tmp_path / "broken.pt").write_bytes(b"")
    with pytest.raises(InvdpoError, match="scorers.imagereward: .*it said: broken.pt lacks 7"):
        ImageReward(CPU, checkpoint=str(tmp_path / "broken.pt"))
    uv.unlink()
    monkeypatch.setattr(imagereward, "REPOSITORY", tmp_path)
    with pytest.raises(InvdpoError, match="through uv; one of the two is not there"):
        ImageReward(CPU)
