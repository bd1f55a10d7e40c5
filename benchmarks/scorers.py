"""Images a second through the scorers, against one image at a time, as ratios within one run.

`python benchmarks/scorers.py` takes minutes and writes a JSON, a markdown and a csv file. The first competitor works
as the selector classes of the authors' scripts do: every scorer opens, decodes, preprocesses and embeds one image and
its prompt at a time, with its model loaded once. The others add one thing after the other. Not a test: no number can
fail.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import open_clip
import pandas as pd
import pyarrow.parquet as pq
import torch
import typer
from measure import Work, compared, interleaved, write_report
from PIL import Image

import invdpo.score
from invdpo.config import ScorersConfig, load_scorers
from invdpo.device import resolve_device
from invdpo.errors import InvdpoError
from invdpo.provenance import device_name, stamp
from invdpo.score import HEAD_NAMES, Item, open_picture, score_items
from invdpo.scorers import Scorer, build_scorers
from invdpo.scorers.aesthetic import AestheticScore
from invdpo.scorers.clip import ClipScore
from invdpo.scorers.hps import HumanPreferenceScore as HPS
from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.pickscore import PickScore, unit_features
from invdpo.scorers.texts import Texts

ONE, BATCHED, SHARED, WORKERS = "one image at a time", "batched", "and shared", "and decoded in workers"
SHAPES = Path("assets/shapes")


def shapes_items(count: int, folder: Path) -> list[Item]:
    """Held-out pairs of the shapes world as PNG files of 64 x 64 pixels: two pictures a prompt."""
    rows = pq.read_table(SHAPES / "preferences" / "validation.parquet", columns=["jpg_0", "jpg_1", "caption"])
    pairs = rows.slice(0, count // 2).to_pylist()
    pictures = (Image.open(io.BytesIO(row[side])) for row in pairs for side in ("jpg_0", "jpg_1"))
    return _stored(pictures, [row["caption"] for row in pairs for _ in range(2)], folder)


def medium_items(count: int, folder: Path, side: int = 512) -> list[Item]:
    """Pictures of that side with some noise, so that they compress about as a photograph does."""
    generator = np.random.default_rng(0)

    def picture() -> Image.Image:
        coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side))
        grain = generator.integers(-8, 9, (side, side, 3))
        return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))

    prompts = [f"a photo of object number {number // 2} on a table" for number in range(count)]
    return _stored((picture() for _ in prompts), prompts, folder)


def _stored(pictures: Iterator[Image.Image], prompts: Sequence[str], folder: Path) -> list[Item]:
    folder.mkdir()
    items = []
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        path = folder / f"{number}.png"
        picture.convert("RGB").save(path)
        values = ("benchmark", 0, 0, "benchmark", number, prompt)
        items.append(Item(path.name, path, dict(zip(HEAD_NAMES, values, strict=True)) | {"image": path.name}))
    return items


def medium_scorers(folder: Path) -> ScorersConfig:
    """CLIP and aesthetics on one tower and HPS on another, random weights: 22 M parameters see 224 x 224 pixels, 18 M
    read 77 tokens."""
    config = folder / "ViT-S-32-random.json"
    vision = {"image_size": 224, "layers": 12, "width": 384, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6}
    config.write_text(json.dumps({"embed_dim": 256, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    for seed, name in enumerate(("clip", "hps")):
        torch.manual_seed(seed)
        torch.save({"state_dict": open_clip.create_model(config.stem).state_dict()}, folder / f"{name}.pt")
    widths = {0: (256, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head = {f"layers.{layer}.weight": torch.randn(b, a) / a**0.5 for layer, (a, b) in widths.items()}
    torch.save(head | {f"layers.{layer}.bias": torch.zeros(b) for layer, (_, b) in widths.items()}, folder / "head.pth")
    clip, hps = ({"model": config.stem, "pretrained": str(folder / f"{name}.pt")} for name in ("clip", "hps"))
    aesthetic = {"model": str(folder / "head.pth"), "tower": clip["model"], "pretrained": clip["pretrained"]}
    return ScorersConfig.model_validate({"clip": clip, "aesthetic": aesthetic, "hps": hps})


@torch.no_grad()
def selector(scorer: Scorer, image: Image.Image, prompt: str) -> float:
    """A score by plain calls of transformers and open_clip, as the authors' selector classes make them."""
    if isinstance(scorer, PickScore):
        pixels = scorer.processor(images=image, return_tensors="pt").to(scorer.device)
        tokens = scorer.processor(
            text=prompt, padding="max_length", truncation=True, max_length=scorer.length, return_tensors="pt"
        ).to(scorer.device)
        seen, read = scorer.model.get_image_features(**pixels), scorer.model.get_text_features(**tokens)
        return float((unit_features(seen) * unit_features(read)).sum())
    assert isinstance(scorer, (ClipScore, AestheticScore, HPS))
    model, device = scorer.tower.model, scorer.tower.device
    embedded = model.encode_image(scorer.preprocessing.transform(image)[None].to(device), normalize=True)
    if isinstance(scorer, AestheticScore):
        return float(scorer.head(embedded))
    return float((embedded * model.encode_text(scorer.tower.tokenize([prompt]).to(device), normalize=True)).sum())


def competitors(scorers: Sequence[Scorer], items: Sequence[Item], batch: int, workers: int) -> dict[str, Work]:
    """The ladder from one image at a time to everything. Raises InvdpoError where its ends do not agree.

    What a scorer remembers of prompts is forgotten before every batch or, where it is shared, before every pass.
    """

    def forget() -> None:
        for text in texts_of(scorers):
            text.forget()

    def one() -> list[float]:
        return [
            selector(scorer, open_picture(item.source)[0], item.head["prompt"]) for scorer in scorers for item in items
        ]

    def batched() -> None:
        for scorer in scorers:
            for start in range(0, len(items), batch):
                forget()
                part = items[start : start + batch]
                images = [open_picture(item.source)[0] for item in part]
                scorer.score(images, [item.head["prompt"] for item in part])

    def shared(workers: int) -> list[dict[str, Any]]:
        forget()
        return score_items(items, scorers, batch, workers)

    scored = {(row["scorer"], row["image"]): row["score"] for row in shared(0)}
    names = [(scorer.version.split(":")[0], item.name) for scorer in scorers for item in items]
    if not np.allclose([scored[name] for name in names], one(), rtol=1e-4, atol=1e-5):
        raise InvdpoError("the scorers do not give the scores of plain calls, so there is nothing to compare")
    return {ONE: one, BATCHED: batched, SHARED: lambda: shared(0), WORKERS: lambda: shared(workers)}


def towers(scorers: Sequence[Scorer]) -> set[OpenClip]:
    """The open_clip models of the scorers."""
    return {scorer.tower for scorer in scorers if isinstance(scorer, (ClipScore, AestheticScore, HPS))}


def texts_of(scorers: Sequence[Scorer]) -> list[Texts]:
    """What the scorers remember of prompts."""
    return [each.texts for each in (*towers(scorers), *scorers) if isinstance(each, (OpenClip, PickScore))]


def shares(scorers: Sequence[Scorer], items: Sequence[Item], batch: int) -> dict[str, float]:
    """Where one pass without workers spends its time, as shares of it. The stopwatches stay: call it last."""
    spent: dict[str, float] = dict.fromkeys(("decode", "preprocess", "tokens", "image towers", "text towers"), 0.0)

    def watch(owner: Any, name: str, part: str) -> None:
        own = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return own(*arguments, **options)
            finally:
                spent[part] += time.perf_counter() - began

        setattr(owner, name, call)

    watch(invdpo.score, "open_picture", "decode")
    watch(invdpo.score, "prepare", "preprocess")
    for tower in towers(scorers):
        watch(tower, "tokenize", "tokens")
        watch(tower.model, "encode_image", "image towers")
        watch(tower.model, "encode_text", "text towers")
    for scorer in scorers:
        if isinstance(scorer, PickScore):
            watch(scorer, "processor", "tokens")
            watch(scorer.model, "get_image_features", "image towers")
            watch(scorer.model, "get_text_features", "text towers")
    for text in texts_of(scorers):
        text.forget()
    began = time.perf_counter()
    score_items(items, scorers, batch, 0)
    total = time.perf_counter() - began
    return {part: value / total for part, value in spent.items()} | {"rest": 1 - sum(spent.values()) / total}


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables."""
    options = report["options"]
    lines = [
        f"# Scoring: {report['device']}, {options['threads']} CPU threads, {options['workers']} workers",
        "",
        f"Batches of {options['batch']}. Rates are medians of {options['rounds']} interleaved rounds, ratios medians",
        "(and ranges) of each round's ratio to the first competitor: plain calls of transformers and open_clip, in",
        "which every scorer opens and embeds one image and its prompt at a time. Every prompt has two images.",
        "",
        "| scorers | images | competitor | images/s | ratio |",
        "|---|--:|---|--:|--:|",
    ]
    for case, found in report["cases"].items():
        for name, values in found["speed"].items():
            low, high = values["ratio_range"]
            ratio = f"{values['ratio']:.2f} ({low:.2f} to {high:.2f})"
            lines.append(f"| {case} | {found['images']} | {name} | {values['per_second']:,.4g} | {ratio} |")
    parts = list(next(iter(report["cases"].values()))["shares"])
    lines += ["", "Where the time of `and shared` goes:", "", f"| scorers | {' | '.join(parts)} |"]
    lines += ["|---|" + "--:|" * len(parts)]
    for case, found in report["cases"].items():
        lines.append(f"| {case} | " + " | ".join(f"{found['shares'][part]:.0%}" for part in parts) + " |")
    return "\n".join(lines) + "\n"


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores it may use.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that decode. Default: the cores.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 32,
    images: Annotated[int, typer.Option(min=1, help="Images of the shapes world; an eighth of it, larger ones.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="JSON. Default: results/benchmarks/scorers-<hardware>.json", show_default=False)
    ] = None,
) -> None:
    """Measure images a second; write a JSON file, and its tables as markdown and csv beside it."""
    started = time.time()
    cores = len(os.sched_getaffinity(0))
    threads, workers = threads or cores, workers or cores
    torch.set_num_threads(threads)
    place = resolve_device(device)
    cases = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for case, config, items in (
            (
                "shapes: 4 at 64 pixels",
                load_scorers(Path("config/shapes.yaml")),
                shapes_items(images, folder / "shapes"),
            ),
            ("random: 3 at 224 pixels", medium_scorers(folder), medium_items(max(1, images // 8), folder / "medium")),
        ):
            # The world's oracle has no tower; it measures colours pixel by pixel, the same for all competitors.
            scorers = build_scorers(config.model_copy(update={"oracle": None}), place)
            print(f"[{time.time() - started:4.0f} s] {case}", file=sys.stderr, flush=True)
            work = competitors(scorers, items, batch, workers)
            speed = compared(interleaved(work, rounds, place), dict.fromkeys(work, len(items)), ONE)
            cases[case] = {"images": len(items), "speed": speed, "shares": shares(scorers, items, batch)}
    options = {"threads": threads, "workers": workers, "batch": batch, "rounds": rounds}
    report = {**stamp(None, device=place, started=started), "options": options, "cases": cases}
    table = pd.DataFrame(
        {"scorers": case, "images": found["images"], "competitor": name, **values}
        for case, found in cases.items()
        for name, values in found["speed"].items()
    )
    table[["ratio_low", "ratio_high"]] = table.pop("ratio_range").tolist()
    hardware = f"scorers {device_name(place)} {threads} threads"
    write_report(report, markdown(report), table, hardware, out)


if __name__ == "__main__":
    try:
        typer.run(main)
    except InvdpoError as error:
        sys.exit(f"error: {error}")
