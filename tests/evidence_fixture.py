"""A whole study's scores, logs and images made up from a few numbers, for the tests of evidence and tracking."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from invdpo.config import StudyConfig

STEPS = 40
CHECKPOINTS = [10, 20, 40]
SPREAD = {"oracle_utility": 1.0, "pickscore": 0.01, "clip": 0.02, "aesthetic": 0.5, "hps": 0.01}
# What every run record and score file says of where it was made.
STAMP = {"git_commit": "abc", "git_dirty": False, "lock_hash": "l", "device": "cpu", "dtype": "float32",
         "python": "3.11", "versions": {"torch": "9"}}  # fmt: skip
# Final gain over the base in units of each score's spread, and UNet evaluations per optimizer step.
GAINS = {
    "sft": (0.3, 100),
    "diffusion_dpo": (0.8, 250),
    "diffusion_dpo_shuffled": (0.0, 250),
    "diffusion_dpo_swapped": (-0.9, 250),
    "inversion_dpo_paper": (None, 5000),
    "inversion_dpo_paper_shuffled": (None, 5000),
    "inversion_dpo_code": (-0.5, 5000),
    "inversion_dpo_code_published": (0.0, 5000),
    "inversion_dpo_implied": (1.2, 5000),
    "inversion_dpo_implied_shuffled": (0.05, 5000),
    "q_single": (0.7, 250),
    "p_single_n10": (0.2, 350),
    "p_single": (0.75, 450),
    "p_single_n40": (0.8, 650),
}


def make_config(scorers: tuple[str, ...] = tuple(SPREAD), seeds: int = 3) -> StudyConfig:
    arms: dict[str, dict] = {"base": {"method": "no_training"}}
    for name in GAINS:
        stem, _, suffix = name.rpartition("_")
        special = suffix in ("shuffled", "swapped", "published", "n10", "n40")
        arms[name] = {"method": stem if special else name}
        if suffix in ("shuffled", "swapped"):
            arms[name]["labels"] = suffix
    families = {"p_single": {10: "p_single_n10", 20: "p_single", 40: "p_single_n40"}}
    comparison = ["base", "sft", "diffusion_dpo", "inversion_dpo_paper", "inversion_dpo_code",
                  "inversion_dpo_code_published", "inversion_dpo_implied"]  # fmt: skip
    controls = {
        "diffusion_dpo": {"shuffled": "diffusion_dpo_shuffled", "swapped": "diffusion_dpo_swapped"},
        "inversion_dpo_paper": {"shuffled": "inversion_dpo_paper_shuffled"},
        "inversion_dpo_implied": {"shuffled": "inversion_dpo_implied_shuffled"},
    }
    return StudyConfig.model_validate(
        {
            "study": "toy",
            "base": "assets/base",
            "preferences": "assets/pairs.parquet",
            "prompts": "assets/prompts.txt",
            "scorers": {"oracle": {"world": "shapes"}} if "oracle_utility" in scorers else {},
            "seeds": list(range(seeds)),
            "training": {"steps": STEPS, "batch": 8, "checkpoints": CHECKPOINTS, "learning_rate": 1e-4, "beta": 10.0},
            "sampling": {"steps": 5},
            "arms": arms,
            "experiments": {
                "comparison": {"arms": comparison},
                "q_vs_p": {"arms": ["q_single", "p_single"]},
                "inversion_steps": families,
                "controls": controls,
                "over_optimisation": {"trained": "pickscore", "held_out": ["hps"]},
                "to_target": {"arm": "diffusion_dpo"},
                "grids": {"prompts": 4, "arms": ["base", "diffusion_dpo", "inversion_dpo_implied"]},
            },
            "claims": str(Path(__file__).resolve().parents[1] / "config" / "claims.yaml"),
        }
    )


def make_study(
    scorers: tuple[str, ...] = tuple(SPREAD),
    seeds: int = 3,
    prompts: int = 24,
    skip: tuple[str, ...] = (),
    study: StudyConfig | None = None,
) -> StudyConfig:
    """Write results/<study> below the working directory; arms in `skip` are left out as if they had not run."""
    study = study or make_config(scorers, seeds)
    rng = np.random.default_rng(7)
    ease = {name: rng.normal(size=prompts) for name in scorers}
    start = {name: ease[name] + 0.3 * rng.normal(size=prompts) for name in scorers}
    for arm in study.arms:
        if arm in skip:
            continue
        gain, evals = (None, 0) if arm == "base" else GAINS.get(arm, (0.5, 500))
        for seed in [0] if arm == "base" else study.seeds:
            luck = 0.08 * rng.normal()
            rows = []
            for step in [0] if arm == "base" else CHECKPOINTS:
                for name in scorers:
                    value = start[name].copy()
                    if gain is not None:
                        value += (gain + luck) * (1 - np.exp(-step / 12)) + 0.3 * rng.normal(size=prompts)
                    for k in range(prompts):
                        prompt = f"a red circle left of a blue square, take {k}"
                        score = 0.2 + SPREAD.get(name, 1.0) * value[k]
                        rows.append((arm, seed, step, "test", k, prompt, f"{arm}{seed}{step}{k}", name, "1", score))
            columns = ["method", "seed", "step", "prompt_set", "prompt_id", "prompt", "image_sha256", "scorer"]
            frame = pd.DataFrame(rows, columns=[*columns, "scorer_version", "score"])
            path = study.root / "scores" / arm / f"seed{seed}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            noted = STAMP | {"config_hash": study.arm(arm).hash, "unet_evals": 100}
            noted["sampling"] = study.sampling.model_dump(mode="json")
            write_scores(path, frame, noted)
            _write_images(study, arm, seed, 0 if arm == "base" else STEPS, prompts)
            _write_run(study, arm, seed, evals)
    return study


def write_scores(path: Path, frame: pd.DataFrame, noted: dict | None = None) -> None:
    """A score file with its provenance; `noted` None: that of the file which is already there."""
    provenance = json.loads(pq.read_schema(path).metadata[b"provenance"]) if noted is None else noted
    table = pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(table.replace_schema_metadata({"provenance": json.dumps(provenance)}), path)


def make_small_study(name: str = "toy") -> StudyConfig:
    """The base, q and p alone, on three prompts, one training seed and two scores."""
    skip = tuple(arm for arm in GAINS if arm not in ("q_single", "p_single"))
    scorers = ("pickscore", "hps")
    study = make_config(scorers, 1).model_copy(update={"study": name})
    return make_study(scorers, 1, 3, skip, study)


def _write_images(study: StudyConfig, arm: str, seed: int, step: int, prompts: int) -> None:
    rng = np.random.default_rng(seed + len(arm))
    rows = []
    for k in range(prompts):
        pixels = np.full((64, 64, 3), 235, np.uint8)
        x, y = rng.integers(4, 40, size=2)
        pixels[y : y + 18, x : x + 18] = rng.integers(0, 255, size=3)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append((arm, seed, step, "test", k, "p", f"{arm}{seed}{step}{k}", buffer.getvalue()))
    columns = ["method", "seed", "step", "prompt_set", "prompt_id", "prompt", "sha256", "png"]
    path = study.root / "images" / arm / f"seed{seed}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=columns).to_parquet(path)


def _write_run(study: StudyConfig, arm: str, seed: int, evals: int) -> None:
    run = study.root / "runs" / arm / f"seed{seed}"
    run.mkdir(parents=True, exist_ok=True)
    record = STAMP | {"started": 1_750_000_000.0, "config_hash": study.arm(arm).hash, "wall_seconds": 12.5,
                      "unet_evals": evals * STEPS, "steps": STEPS if evals else 0}  # fmt: skip
    record |= {"data_key": 64 * "d"} if evals else {}
    (run / "run.json").write_text(json.dumps(record))
    if arm == "base":
        return
    still = arm.startswith("inversion_dpo_paper")
    scale = 1e-5 if arm.endswith("published") else 1.0
    rows = [
        {"step": step, "loss": 0.693, "logratio_win": None if arm == "sft" else 0.1, "logratio_lose": -0.1,
         "implicit_accuracy": 0.5, "grad_norm": 0.0 if still else 1.5, "learning_rate": 1e-4,
         "reference_distance": 0.0 if still else scale * step, "pairs_seen": 8 * step, "unet_evals": evals * step,
         "seconds": 0.02 * step * (1 + evals / 1000), "memory_bytes": 1_000_000 + step}
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    (run / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
