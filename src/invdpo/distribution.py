"""The pictures of a study's arms against a reference set: FID, KID, precision and recall of every arm and seed."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from invdpo.device import memory_for
from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done, write_json
from invdpo.image_files import Picture, read_pictures
from invdpo.prompts import read_prompts
from invdpo.provenance import stamp
from invdpo.scorers.distribution import Extractor, PictureSet, Reference, inception, open_clip_tower

if TYPE_CHECKING:
    from invdpo.config import DistributionConfig, ReferenceConfig, StudyConfig


def measure(study: StudyConfig, device: torch.device) -> Path:
    """Write root/distribution.csv, a row an arm and seed, and root/distribution.json, where it came from; returns the
    csv.

    Every set is the last checkpoint's picture of each of the study's prompts. Raises InvdpoError for a study without
    `experiments.distribution`, missing pictures, a GPU that is out of memory, and as `Reference` does.
    """
    settings = study.experiments.distribution
    if settings is None:
        raise InvdpoError(f"Study `{study.study}` has no `experiments.distribution`. Add it: see config/shapes.yaml.")
    started = time.time()
    prompts = len(read_prompts(study.prompts, study.sampling.prompts))
    sets = generated_sets(study, settings.arms, prompts)
    batch = settings.batch
    lower = f"`experiments.distribution.batch: {batch // 2}` (now {batch})" if batch > 1 else "a larger GPU"
    with memory_for("distribution", [lower]):
        network = extractor(settings, device)
        reference = Reference(
            PictureSet(
                reference_set(settings.reference), "experiments.distribution.reference", settings.reference.side
            ),
            network,
            device,
            study.root / "reference_statistics",
            settings.batch,
            settings.kid_subset_size,
        )
        rows = []
        for (arm, seed), pictures in tqdm(sets.items(), unit="set", desc="distribution"):
            found = reference.compare(PictureSet(pictures, f"{arm}, seed {seed}"))
            rows.append({"method": arm, "seed": seed, **asdict(found)})
    path = study.root / "distribution.csv"
    with replace_when_done(path) as temporary:
        # An eigenvalue solver's last digits differ between machines; six are more than a FID is worth.
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    content = settings.model_dump(mode="json")
    provenance = stamp(
        study,
        config_hash=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16],
        device=device,
        dtype="float32",
        started=started,
    )
    facts = {"settings": content, "extractor": network.version, "reference": reference.pictures.hash}
    write_json(path.with_suffix(".json"), provenance | facts)
    return path


def extractor(settings: DistributionConfig, device: torch.device) -> Extractor:
    """The network that the settings name."""
    if settings.model is None:
        return inception(settings.inception_weights)
    return open_clip_tower(settings.model, device, settings.pretrained)


def reference_set(settings: ReferenceConfig) -> list[Picture]:
    """Pictures from files, or those that a world draws."""
    if settings.path is not None:
        return read_pictures(settings.path, settings.images)
    drawn = import_module("invdpo.world.reference").reference_pictures(settings.images, settings.seed)
    return [Picture(f"{settings.world} {number}", png) for number, png in enumerate(drawn)]


def generated_sets(study: StudyConfig, arms: list[str], prompts: int) -> dict[tuple[str, int], list[Picture]]:
    """(arm, seed) -> its pictures, one a prompt; InvdpoError naming every file that is missing or lacks prompts."""
    found, wrong = {}, []
    for arm in arms:
        for seed in study.seeds if study.arm(arm).trains else [0]:
            path = study.root / "images" / arm / f"seed{seed}.parquet"
            if not path.is_file():
                wrong.append(f"{path}: missing")
                continue
            table = pq.read_table(path, columns=["prompt_id", "png"])
            rows = dict(zip(*(table.column(name).to_pylist() for name in ("prompt_id", "png")), strict=True))
            if sorted(rows) != list(range(prompts)) or len(rows) != table.num_rows:
                lacking = sorted(set(range(prompts)) - set(rows))
                wrong.append(f"{path}: {table.num_rows} images for {prompts} prompts; without image: {lacking[:8]}")
            found[arm, seed] = [Picture(f"{path}, prompt {name}", png) for name, png in rows.items()]
    if wrong:
        raise InvdpoError("Images are missing:\n  " + "\n  ".join(wrong) + "\nRun `invdpo evaluate` for these arms.")
    return found
