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
def clips(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Train the two CLIPs on captioned renders."""
    from invdpo.world import build

    _threads(threads)
    build.build_clips(out)


@app.command()
def judges(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """Train the PickScore- and HPS-shaped CLIPs on votes, and the aesthetic head (needs votes and clips)."""
    from invdpo.world import build

    _threads(threads)
    build.build_judges(out)


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
def build(out: Out = Path("assets/shapes"), threads: Threads = 2) -> None:
    """All steps in order: about an hour and a half on two cores."""
    vae(out, threads)
    base(out, threads)
    votes(out, threads)
    clips(out, threads)
    judges(out, threads)
    quality(out, threads)
    card(out)


def _threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
