"""ImageReward (Xu et al. 2023), run by its own package in the environment of `envs/imagereward`.

The package pins libraries that the main environment cannot have, so a process of its own holds the model and is handed
batches as parquet files.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from invdpo.errors import InvdpoError
from invdpo.scorers.weights import finite, require_file

REPOSITORY = Path(__file__).resolve().parents[3]
PROJECT = REPOSITORY / "envs" / "imagereward"
FIELD = "scorers.imagereward"


class ImageReward:
    """`score` gives {"imagereward": (B,)}: a logit standardised on the authors' data (mean 0.167, deviation 1.033).

    checkpoint: `ImageReward.pt`; med_config: its text tower's JSON; None: those of ImageReward-v1.0 on the hub. Prompts
    are cut at 35 tokens. Raises InvdpoError where uv, the environment or the weights are missing.
    """

    def __init__(self, device: torch.device, checkpoint: str | None = None, med_config: str | None = None):
        command = [_uv(), "run", "--frozen", "--project", str(PROJECT), "python", str(PROJECT / "score.py")]
        command += ["--device", str(device)]
        if checkpoint is not None:
            command += ["--checkpoint", str(require_file(checkpoint, f"{FIELD}.checkpoint").resolve())]
        if med_config is not None:
            command += ["--med-config", str(require_file(med_config, f"{FIELD}.med_config").resolve())]
        # The environment that this process runs in is not that of the other.
        outer = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        self.messages = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.messages, text=True, env=outer
        )
        self.version: str = self._ask(None)["version"]

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """PIL images and their prompts -> {"imagereward": (B,) float32}, higher is better."""
        with tempfile.TemporaryDirectory() as folder:
            batch = Path(folder) / "batch.parquet"
            pq.write_table(pa.table({"png": [_png(image) for image in images], "prompt": prompts}), batch)
            return {"imagereward": finite("imagereward", torch.tensor(self._ask(batch)["scores"]))}

    def _ask(self, batch: Path | None) -> dict[str, Any]:
        """Hand a batch over (None: nothing yet) and read the next line of the answer."""
        question, answer = self.process.stdin, self.process.stdout
        assert question is not None and answer is not None
        try:
            if batch is not None:
                question.write(f"{batch}\n")
                question.flush()
            return json.loads(answer.readline())
        except (OSError, ValueError) as error:
            raise InvdpoError(
                f"{FIELD}: the process of {PROJECT} ended or answered nonsense; it said: {_tail(self.messages)}"
            ) from error


def _uv() -> str:
    """The uv on the path, or the one that `make` puts into the repository."""
    found = shutil.which("uv") or shutil.which("uv", path=str(REPOSITORY / ".uv" / "bin"))
    if found is None or not (PROJECT / "uv.lock").is_file():
        raise InvdpoError(
            f"{FIELD} runs in the environment {PROJECT} through uv; one of the two is not there. Work in the "
            "repository and install uv, or leave this scorer out."
        )
    return found


def _tail(messages: IO[str]) -> str:
    messages.seek(0)
    return " / ".join(messages.read().strip().splitlines()[-5:]) or "nothing"


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
