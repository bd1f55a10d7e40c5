"""`invdpo world …`: the shapes world's assets from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, help="Build the shapes world's assets (base model, votes, judges) from nothing."
)

Out = Annotated[Path, typer.Option(help="The folder to build in.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]


@app.command()
def vae(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Train the autoencoder of the base pipeline."""
    from invdpo.world import build

    _threads(threads)
    build.build_vae(out)


@app.command()
def base(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Train the text encoder and UNet of the base pipeline (needs vae)."""
    from invdpo.world import build

    _threads(threads)
    build.build_base(out)


@app.command()
def votes(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Sample and vote on preference pairs; write the prompt lists (needs base)."""
    from invdpo.world import build

    _threads(threads)
    build.build_votes(out)


@app.command()
def scenes(out: Out = Path("assets/shapes"), threads: Threads = 1) -> None:
    """Write the prompt lists of complex scenes (needs votes; a second)."""
    from invdpo.world import build

    _threads(threads)
    build.build_scenes(out)


@app.command()
def clip(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Train the CLIP on captioned pictures (needs votes, for its accuracy)."""
    from invdpo.world import build

    _threads(threads)
    build.build_clip(out)


@app.command()
def pickscore(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Train the PickScore-shaped judge on its own votes (needs votes)."""
    from invdpo.world import build

    _threads(threads)
    build.build_pickscore(out)


@app.command()
def hps(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Train the HPS-shaped judge on its own votes (needs clip)."""
    from invdpo.world import build

    _threads(threads)
    build.build_hps(out)


@app.command()
def aesthetic(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Train the aesthetic head (needs clip and votes)."""
    from invdpo.world import build

    _threads(threads)
    build.build_aesthetic(out)


@app.command()
def quality(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Measure the parser and the base model (needs base)."""
    from invdpo.world import build

    _threads(threads)
    build.measure_quality(out)


@app.command()
def card(out: Out = Path("assets/shapes")) -> None:
    """Write the card (README.md) and SHA256SUMS from the facts of the other steps."""
    from invdpo.world.build import write_checksums
    from invdpo.world.card import write_card

    write_card(out)
    write_checksums(out)


@app.command()
def sdxl_layout(
    base: Annotated[Path, typer.Option(help="The base pipeline to convert.")] = Path("assets/shapes/base"),
    out: Out = Path("results/world/shapes_xl"),
    threads: Threads = 1,
) -> None:
    """Convert the base pipeline to SDXL's layout, making the same pictures (seconds)."""
    from invdpo.world.sdxl_layout import convert

    _threads(threads)
    convert(base, out)


@app.command()
def build(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """All steps in order: about three hours on two cores."""
    vae(out, threads)
    base(out, threads)
    votes(out, threads)
    scenes(out, threads)
    clip(out, threads)
    pickscore(out, threads)
    hps(out, threads)
    aesthetic(out, threads)
    quality(out, threads)
    card(out)


def _threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
