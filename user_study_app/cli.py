"""`invdpo study <command>`: each command's work is in its own module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from invdpo.config import StudyConfig, load_study
from invdpo.errors import InvdpoError
from user_study_app.settings import Places, read_settings

app = typer.Typer(
    help="A blind study of human preferences: freeze the images, serve them, analyse the votes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Study = Annotated[Path, typer.Option("--study", help="YAML of the study, or its resolved study.json.")]
Database = Annotated[
    str | None,
    typer.Option(help="URL, SQLite or PostgreSQL. Default: INVDPO_USER_STUDY_DB, else a file in the study's results."),
]
Bundle = Annotated[
    Path | None, typer.Option("--bundle", help="Folder of another bundle, such as one of user_study/earlier/.")
]
Share = Annotated[float, typer.Option(min=0, max=1)]


def _places(study: Path) -> tuple[StudyConfig, Places]:
    config = load_study(study)
    return config, Places(config)


def _database(places: Places, given: str | None) -> str:
    from user_study_app.storage import database_url

    return database_url(places.bundle, given)


@app.command()
def bundle(study: Study) -> None:
    """Freeze images, schedule and texts: results/STUDY/user_study/bundle and key.json."""
    from user_study_app.bundle import build

    typer.echo(build(load_study(study)))


@app.command()
def serve(
    study: Study,
    database: Database = None,
    frozen: Bundle = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    admin_password_file: Annotated[
        Path | None, typer.Option(help="Its first line; else INVDPO_ADMIN_PASSWORD.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path under which a proxy publishes the study.")] = "",
    trust_proxy: Annotated[bool, typer.Option(help="A proxy that speaks HTTPS stands in front.")] = False,
) -> None:
    """Serve the study: prints a link to take part with and the experimenter's page."""
    from user_study_app.server import serve as run

    _, places = _places(study)
    run(frozen or places.bundle, _database(places, database), host, port, admin_password_file, root_path, trust_proxy)


@app.command()
def invite(
    study: Study,
    count: Annotated[int, typer.Option(min=1)] = 1,
    base: Annotated[str, typer.Option(help="Address under which participants reach the study.")] = (
        "http://127.0.0.1:7860"
    ),
    database: Database = None,
    frozen: Bundle = None,
) -> None:
    """Make personal links, one a participant."""
    from user_study_app.offline import invite as run

    _, places = _places(study)
    for link in run(_database(places, database), frozen or places.bundle, count, base):
        typer.echo(link)


@app.command()
def export(
    study: Study,
    out: Annotated[Path | None, typer.Option(help="csv, jsonl or parquet. Default: where the analysis reads.")] = None,
    with_key: Annotated[bool, typer.Option(help="Also write which method is which.")] = False,
    database: Database = None,
    frozen: Bundle = None,
) -> None:
    """Write the votes to a file."""
    from user_study_app.offline import export as run

    _, places = _places(study)
    key = (frozen.parent / "key.json" if frozen else places.key) if with_key else None
    typer.echo(run(_database(places, database), frozen or places.bundle, out or places.votes, key))


@app.command()
def delete(
    study: Study,
    rater: Annotated[str, typer.Option(help="Participant number, or the id a crowd platform gave.")],
    database: Database = None,
) -> None:
    """Delete all that is stored of a participant."""
    from user_study_app.offline import delete as run

    _, places = _places(study)
    counts = run(_database(places, database), rater)
    typer.echo("Deleted: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


@app.command()
def analyse(
    study: Study,
    votes: Annotated[Path | None, typer.Option(help="An export as csv. Default: the study's own votes.csv.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder. Default: the study's tables; of other votes, beside them.")
    ] = None,
) -> None:
    """Table S4, reliability and agreement with the scores; without the study's votes, Table S4 says what is missing."""
    from user_study_app.analysis import analyse as run
    from user_study_app.analysis import without_votes

    config, places = _places(study)
    folder = out or (votes.with_suffix("") if votes else config.root / "tables")
    paths = run(config, votes or places.votes, folder) if votes or places.voted else without_votes(config, folder)
    for path in paths:
        typer.echo(path)


@app.command()
def simulate(
    study: Study,
    win_rate: Annotated[list[float], typer.Option(help="Of each group's second arm, in the study's order.")],
    tie_rate: Share = 0.15,
    left_bias: Annotated[float, typer.Option(min=0, max=1, help="Share of trials answered left, unseen.")] = 0.0,
    careless: Annotated[float, typer.Option(min=0, max=1, help="Share answered by the toss of a coin.")] = 0.0,
    pair_correlation: Annotated[float, typer.Option(min=0, max=0.99, help="How far raters agree on a pair.")] = 0.0,
    raters: Annotated[int | None, typer.Option(min=1, help="Default: the study's.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Default: simulated.csv beside the study's votes.")] = None,
) -> None:
    """Raters of known behaviour vote through the real interface, on a database of their own."""
    from user_study_app.simulate import Behaviour
    from user_study_app.simulate import simulate as run

    config, places = _places(study)
    settings = read_settings(config)
    if len(win_rate) != len(settings.groups):
        raise InvdpoError(f"The study has {len(settings.groups)} groups: give --win-rate so many times.")
    arms: list[tuple[str, str]] = [(group.arms[0], group.arms[1]) for group in settings.groups]
    rates = dict(zip(arms, win_rate, strict=True))
    behaviour = Behaviour(rates, tie_rate, left_bias, careless, pair_correlation)
    path = out or places.root / "simulated.csv"
    votes = run(places.bundle, places.key, [behaviour], raters or settings.raters, seed, path)
    typer.echo(f"{votes} votes in {path}. Analyse them: invdpo study analyse --study {study} --votes {path}")
    for first, second in arms:
        typer.echo(
            f"  {second} against {first}: planted win rate {behaviour.win_rate((first, second)):.3f} with ties as "
            f"half, {behaviour.tie_free((first, second)):.3f} without"
        )
    typer.echo(f"  planted share of left {behaviour.left_share():.3f}")


@app.command()
def power(
    win_rate: Annotated[float, typer.Option(help="To detect, among decisive votes.")] = 0.6,
    study: Annotated[Path | None, typer.Option(help="Also say what this study detects as it is.")] = None,
    tie_rate: Annotated[float, typer.Option(help="Share of votes that are ties.")] = 0.15,
    per_pair: Annotated[int, typer.Option(min=1, help="Raters who see a pair.")] = 3,
    trials: Annotated[int, typer.Option(min=1, help="Trials a rater, over all groups.")] = 60,
    groups: Annotated[int, typer.Option(min=1, help="Comparisons of two methods.")] = 2,
    rho_pair: Annotated[float, typer.Option(help="Correlation of votes on one pair (alpha of a pilot).")] = 0.2,
    rho_rater: Annotated[float, typer.Option(help="Correlation of votes of one rater.")] = 0.01,
    target: Annotated[float, typer.Option("--power", help="Probability to detect it.")] = 0.8,
    level: Annotated[float, typer.Option(help="Two-sided level.")] = 0.05,
) -> None:
    """Raters, pairs and votes that a comparison needs."""
    from user_study_app.power import of_study, plan

    common = {"tie_rate": tie_rate, "rho_pair": rho_pair, "rho_rater": rho_rater, "power": target, "level": level}
    found = plan(win_rate, per_pair=per_pair, trials=trials, comparisons=groups, **common)
    typer.echo(
        f"A win rate of {win_rate:.1%} with {target:.0%} power at the two-sided {level:.0%} level, for each of "
        f"{groups} groups:\n"
        f"  {found.decisive:,} decisive votes if all were independent\n"
        f"  {found.votes:,} votes: {tie_rate:.0%} ties, design effect {found.design_effect:.2f}\n"
        f"  {found.pairs:,} pairs seen by {per_pair} raters each\n"
        f"  {found.raters:,} raters of {trials} trials over all groups"
    )
    if study is not None:
        typer.echo(f"{study} as it is:")
        for name, votes, rate in of_study(read_settings(load_study(study)), **common):
            reach = "no win rate" if rate is None else f"a win rate of {rate:.1%} or more"
            typer.echo(f"  {name}: {votes:,} votes detect {reach}")
