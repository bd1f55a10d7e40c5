"""Several images a prompt from a study's base, as files: what `invdpo score` reads and `invdpo rank` makes pairs of."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from invdpo.backbones.files import fingerprint
from invdpo.backbones.pipeline import UNetEps
from invdpo.config import ScorersConfig
from invdpo.device import memory_for, resolve_dtype
from invdpo.errors import InvdpoError
from invdpo.evaluate import Studio, png
from invdpo.files import remove, replace_when_done, write_json
from invdpo.prompts import read_prompts
from invdpo.provenance import stamp
from invdpo.sampling import unet_evaluations

if TYPE_CHECKING:
    from invdpo.config import StudyConfig

PROMPTS = "prompts.csv"  # written last: with it the folder is whole
SETTINGS = "samples.json"


def draw_samples(
    study: StudyConfig,
    prompts: Path | str,
    images: int,
    out: Path,
    device: torch.device,
    *,
    guidance_scale: float | None = None,
    seed: int | None = None,
    replace: bool = False,
) -> Path:
    """Draw `images` images of every prompt from the study's base into the folder `out`; the path of its prompts.csv.

    prompts: as `read_prompts` takes them. guidance_scale, seed: None for the study's. Everything else is as `sampling`
    and `training.resolution` say. Image k of prompt i is i_k.png, six digits and one or more; its noise is that of an
    evaluation with `sampling.seed: seed + k`, so that more images leave those that are there as they are, and two seeds
    that lie closer than `images` share some. prompts.csv has the columns `file` and `prompt`; samples.json says how the
    images were made.

    A stopped run goes on with the first batch that is not whole, with the same batches, so that the images have the
    same bits. Raises InvdpoError where `out` holds something else, or images of other settings (with `replace` these
    are deleted); as `read_prompts` and evaluation do; and where a disk is full or a GPU is out of memory.
    """
    texts = read_prompts(prompts)
    sampling = study.sampling.model_copy(
        update={
            "guidance_scale": study.sampling.guidance_scale if guidance_scale is None else guidance_scale,
            "seed": study.sampling.seed if seed is None else seed,
        }
    )
    study = study.model_copy(update={"sampling": sampling, "prompts": str(prompts), "scorers": ScorersConfig()})
    settings = {
        "base": fingerprint(study.base, study.vae, study.variant),
        "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        **sampling.model_dump(include={"steps", "guidance_scale", "seed", "batch"}),
        "resolution": study.training.resolution,
        "dtype": str(resolve_dtype(device, study.precision)).removeprefix("torch."),
    }
    _take(out, settings, images, replace)
    names = {(prompt, image): f"{prompt:06d}_{image}.png" for prompt in range(len(texts)) for image in range(images)}
    lower = [f"`sampling.batch: {sampling.batch // 2}` (now {sampling.batch})"] if sampling.batch > 1 else []
    started = time.time()
    if any(not (out / name).is_file() for name in names.values()):
        with memory_for("sampling", [*lower, f"`training.resolution` (now {study.training.resolution})"]):
            _draw(Studio(study, texts, device), images, out, names)
    spent = unet_evaluations(len(names), sampling.steps, sampling.guidance_scale)
    provenance = stamp(study, device=device, dtype=settings["dtype"], started=started, unet_evals=spent)
    write_json(out / SETTINGS, {"settings": settings, "images": images, "provenance": provenance})
    with (
        replace_when_done(out / PROMPTS) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file", "prompt"])
        rows.writerows([name, texts[prompt]] for (prompt, _), name in names.items())
    return out / PROMPTS


def _take(out: Path, settings: dict[str, Any], images: int, replace: bool) -> None:
    """Make the folder ready for images of these settings: those that are there stay, where they are such."""
    path = out / SETTINGS
    if not path.is_file():
        if out.exists() and any(out.iterdir()):
            raise InvdpoError(
                f"--out {out} holds files that `invdpo sample` did not write. Name a new or empty folder."
            )
    else:
        stored = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key, value in settings.items() if stored["settings"].get(key) != value]
        differing += ["images (more than are asked for)"] if stored["images"] > images else []
        if differing and not replace:
            raise InvdpoError(
                f"--out {out} holds images of other settings: {', '.join(differing)}. Name another folder, or say "
                "`--replace` to delete them."
            )
        for file in out.glob("*.png") if differing else out.glob(".*.part"):  # by a process that was killed
            remove(file)
        remove(out / PROMPTS)
    write_json(path, {"settings": settings, "images": images})


def _draw(studio: Studio, images: int, out: Path, names: dict[tuple[int, int], str]) -> None:
    """Those batches of which an image is missing."""
    sampling = studio.study.sampling
    model = UNetEps(studio.base, studio.dtype)
    with tqdm(total=len(names), unit="image", desc="sample") as bar:
        for image in range(images):
            for ids in studio.batches():
                files = [out / names[prompt, image] for prompt in ids]
                if not all(file.is_file() for file in files):
                    pictures = studio.draw(model, sampling.guidance_scale, ids, sampling.seed + image)
                    for file, picture in zip(files, pictures, strict=True):
                        with replace_when_done(file) as temporary:
                            temporary.write_bytes(png(picture))
                bar.update(len(ids))
