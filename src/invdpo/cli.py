"""`invdpo <stage>`: every rule of the workflow calls one of these, and each runs without Snakemake."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invdpo.errors import InvdpoError

if TYPE_CHECKING:
    import torch

    from invdpo.config import StudyConfig

app = typer.Typer(
    help="Reproduce and evaluate Inversion-DPO against Diffusion-DPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
log = logging.getLogger("invdpo")

StudyOption = Annotated[Path, typer.Option("--study", help="YAML of the study, or its resolved study.json.")]
ArmOption = Annotated[str, typer.Option("--arm", help="An arm of the study.")]
SeedOption = Annotated[
    list[int] | None,
    typer.Option("--seed", help="A seed of the study; may be repeated. Default: all its seeds."),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads. Default: the cores this process may use.")
]
LogOption = Annotated[Path | None, typer.Option("--log", help="Also write messages to this file.")]


def main() -> None:
    """Entry point: an InvdpoError becomes one message and exit code 1, Ctrl-C exit code 130."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except InvdpoError as error:
        if debug:
            raise
        if log.handlers:
            log.error(f"error: {error}")
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _start(study: Path, threads: int | None = None, log_file: Path | None = None) -> StudyConfig:
    """Set up messages and threads, and read the study. Before torch is imported: it reads OMP_NUM_THREADS
    once.
    """
    _log_to(log_file)
    _use_threads(threads)
    from invdpo.config import load_study

    return load_study(study)


def _use_threads(threads: int | None) -> None:
    count = str(threads or len(os.sched_getaffinity(0)))
    os.environ.update(OMP_NUM_THREADS=count, MKL_NUM_THREADS=count)


def _rank() -> int | None:
    """This process's number among those that a launcher started together; None where it is alone."""
    return int(os.environ["RANK"]) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _log_to(log_file: Path | None) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    rank = _rank()
    handlers[0].setLevel(logging.WARNING if rank else logging.INFO)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        if rank is None:
            log_file.write_text("", encoding="utf-8")
        # Appending, line by line: the processes of a run share the file.
        handlers.append(logging.FileHandler(log_file, mode="a", encoding="utf-8"))
    if rank:
        for handler in handlers:
            handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s"))
    for handler in log.handlers:
        handler.close()
    log.handlers = handlers
    log.setLevel(logging.DEBUG)
    log.propagate = False


def _device(study: StudyConfig, gpus: int = 1) -> torch.device:
    """The study's device, with the assets checked first, `gpus` GPUs leased and torch's threads set."""
    import torch

    from invdpo.device import resolve_device
    from invdpo.lease import lease, lease_as_rank
    from invdpo.provenance import verify_checksums

    if study.checksums is not None:
        verify_checksums(study.checksums)
    if _rank() is None:
        lease(study.device, gpus)
    elif gpus:
        lease_as_rank(study.device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return resolve_device(study.device)


def _seeds(study: StudyConfig, chosen: list[int] | None) -> list[int]:
    unknown = sorted(set(chosen or []) - set(study.seeds))
    if unknown:
        raise InvdpoError(f"Study `{study.study}` has no seed {unknown[0]}; its seeds are {study.seeds}.")
    return chosen or study.seeds


def _tuned(study: StudyConfig, arms: Iterable[str]) -> None:
    """Without its tuned values an arm would run with others, and nothing in its results would look wrong."""
    for arm in arms:
        if arm in study.arms and study.awaits_tuning(arm):
            raise InvdpoError(
                f"Arm `{arm}` of study `{study.study}` has no learning rate and beta yet: its method is in `tuning`, "
                f"but has no values in `tuned`. Run `make tune STUDY={study.study}` first, or set `tuned: false`."
            )


@app.command()
def prepare(study: StudyOption, threads: ThreadsOption = None, log_file: LogOption = None) -> None:
    """Read the preference pairs and encode them once: root/preferences/."""
    config = _start(study, threads, log_file)
    if not config.preferences:
        raise InvdpoError(f"Study `{config.study}` has no `preferences`: nothing in it needs pairs.")
    device = _device(config)
    from invdpo.preferences.cache import prepare as run

    report = run(config, device)
    log.info(
        f"{report['pairs']} pairs of {report['rows']} rows ({report['ties']} ties left out, "
        f"{report['undecodable']} undecodable skipped), {report['captions']} captions, "
        f"{report['stored_bytes'] / 1e9:.3g} GB -> "
        f"{config.root / 'preferences'}"
    )


@app.command()
def train(
    study: StudyOption,
    arm: ArmOption,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    log_file: LogOption = None,
) -> None:
    """Train an arm: root/runs/ARM/seedK/. Resumes what was stopped; a finished run is not trained again.

    With `training.processes: N` it starts N processes, one a GPU, and ends with the first of them that fails. Started
    by torchrun or `accelerate launch` it is one of theirs.
    """
    config = _start(study, threads, log_file)
    seeds = _seeds(config, seed)
    settings = config.arm(arm)
    _tuned(config, [arm])
    processes = settings.training.processes if settings.trains else 1
    device = _device(config, gpus=processes if settings.trains else 0)
    if processes > 1 and _rank() is None:
        from invdpo.training.ranks import check_devices, launch

        check_devices(device, processes)
        launch(processes, _once_more("train", study, arm, seeds, processes, log_file))
        return
    from invdpo.training.loop import train as run

    run(config, arm, seeds, device)


def _once_more(stage: str, study: Path, arm: str, seeds: list[int], processes: int, log_file: Path | None) -> list[str]:
    """The command line of one of several processes, which share the threads and the log of this one."""
    threads = max(1, int(os.environ["OMP_NUM_THREADS"]) // processes)
    command = [sys.executable, "-m", "invdpo.cli", stage, "--study", str(study), "--arm", arm]
    command += [part for seed in seeds for part in ("--seed", str(seed))]
    return [*command, "--threads", str(threads), *(["--log", str(log_file)] if log_file else [])]


@app.command()
def evaluate(
    study: StudyOption,
    arm: ArmOption,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    log_file: LogOption = None,
) -> None:
    """Sample and score every checkpoint of an arm: root/images/ARM/ and root/scores/ARM/."""
    config = _start(study, threads, log_file)
    seeds = _seeds(config, seed)
    config.arm(arm)
    device = _device(config)
    from invdpo.evaluate import evaluate as run

    run(config, arm, seeds, device)


@app.command()
def score(
    images: Annotated[Path, typer.Argument(help="Folder of png, jpg and webp files, or an images parquet of a study.")],
    out: Annotated[Path, typer.Option(help="The rows: a file that ends in .parquet, .csv or .jsonl.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="csv, tsv or jsonl with the columns `file` (or `id`: the file without its ending) and `prompt`; or "
            "txt with a line an image in the order of their names (2.png before 10.png). Default: a .txt beside each "
            "image."
        ),
    ] = None,
    scorers: Annotated[Path | None, typer.Option(help="YAML with what a study has under `scorers:`.")] = None,
    study: Annotated[Path | None, typer.Option(help="Instead of --scorers: the scorers of this study.")] = None,
    method: Annotated[str | None, typer.Option(help="What made the images. Default: the folder's name.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 32,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode. Default: the cores.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: ThreadsOption = None,
    log_file: LogOption = None,
) -> None:
    """Score any folder of images with their prompts; one row an image and score, as in a study's score files.

    Example, with the scorers of the default study and one of its image files, and then with your own:

        invdpo score results/shapes/images/base/seed0.parquet --study config/shapes.yaml --out base.csv

        invdpo score my_images --prompts prompts.csv --scorers config/scorers/paper.yaml --out scores.parquet

    The prompts file of the second: a line `file,prompt`, then lines such as `0001.png,a red circle`.
    """
    _log_to(log_file)
    _use_threads(threads)
    if (scorers is None) == (study is None):
        raise InvdpoError("Name the scorers: either --scorers or --study, and not both.")
    from invdpo.config import load_scorers, load_study

    chosen = load_study(study).scorers if study else load_scorers(Path(str(scorers)))
    import torch

    from invdpo.device import resolve_device
    from invdpo.lease import lease
    from invdpo.score import score as run

    lease(device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = run(
        images,
        prompts,
        chosen,
        out,
        resolve_device(device),
        method=method,
        batch=batch,
        workers=len(os.sched_getaffinity(0)) if workers is None else workers,
    )
    for name, values in rows.groupby("scorer")["score"]:
        log.info(f"{name}: mean {values.mean():.6g} of {len(values)} images")
    log.info(f"{len(rows)} rows -> {out}")


@app.command()
def sample(
    study: StudyOption,
    prompts: Annotated[str, typer.Option(help="As a study's `prompts`: a file, or a published set by its name.")],
    out: Annotated[Path, typer.Option(help="Folder for the images, and prompts.csv with their prompts.")],
    images: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 4,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the study's.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the noise; image k has that of seed + k. Default: the study's.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete images of other settings in --out.")] = False,
    threads: ThreadsOption = None,
    log_file: LogOption = None,
) -> None:
    """Draw several images a prompt from the study's base, as PNG files. The same command goes on where it was stopped.

    Preference pairs of one's own samples, with any scores that `invdpo score` writes:

        invdpo sample --study config/shapes.yaml --prompts prompts.txt --out samples

        invdpo score samples --prompts samples/prompts.csv --study config/shapes.yaml --out scores.parquet

        invdpo rank scores.parquet --images samples --by pickscore,aesthetic --out pairs.parquet
    """
    config = _start(study, threads, log_file)
    device = _device(config)
    from invdpo.samples import draw_samples

    log.info(
        str(
            draw_samples(
                config, prompts, images, out, device, guidance_scale=guidance_scale, seed=seed, replace=replace
            )
        )
    )


@app.command()
def rank(
    scores: Annotated[list[Path], typer.Argument(help="What `invdpo score` wrote of the images; one file or several.")],
    images: Annotated[Path, typer.Option(help="The folder that was scored.")],
    by: Annotated[str, typer.Option(help="Scores whose mean decides, as a,b (Eq. 17 of Inversion-DPO).")],
    out: Annotated[Path, typer.Option(help="The pairs: a file that ends in .parquet.")],
    log_file: LogOption = None,
) -> None:
    """Make preference pairs of scored images: all pairs of one prompt's, in Pick-a-Pic v2's columns.

    `label_0` is by the mean of the scores, `label_0_SCORE` by one of them alone, `label_0_fixed` by the mean for the
    first two images of each prompt only. An arm of a study takes one of these with `labels: label_0_SCORE`.
    """
    _log_to(log_file)
    _use_threads(1)
    from invdpo.rank import rank as run

    log.info(f"{run(scores, images, by.split(','), out).text()}\n-> {out}")


@app.command()
def distribution(study: StudyOption, threads: ThreadsOption = None, log_file: LogOption = None) -> None:
    """Hold the arms' images against a reference set (FID, KID, precision, recall): root/distribution.csv."""
    config = _start(study, threads, log_file)
    device = _device(config)
    from invdpo.distribution import measure

    log.info(str(measure(config, device)))


@app.command()
def tables(study: StudyOption, log_file: LogOption = None) -> None:
    """Write root/tables/ from the scores."""
    config = _start(study, 1, log_file)  # small products, which threads only slow down
    from invdpo.evidence.tables import write

    write(config)


@app.command()
def figures(study: StudyOption, log_file: LogOption = None) -> None:
    """Draw root/figures/ from the scores, training logs and images."""
    config = _start(study, None, log_file)
    from invdpo.evidence import figures, grids

    figures.write(config)
    grids.write(config)


@app.command()
def experiment(
    name: Annotated[
        str,
        typer.Argument(
            help="inversion_error, precision, audit, preference_accuracy or weight_distances, where the study has it."
        ),
    ],
    study: StudyOption,
    threads: ThreadsOption = None,
    log_file: LogOption = None,
) -> None:
    """Run an experiment on held-out pairs: root/experiments/NAME/."""
    config = _start(study, threads, log_file)
    _tuned(config, getattr(getattr(config.experiments, name, None), "arms", []))
    device = _device(config)
    from invdpo.experiments.stage import run

    log.info(str(run(config, name, device)))


@app.command()
def preference_accuracy(
    study: StudyOption,
    votes: Annotated[
        str | None, typer.Option(help="Pick-a-Pic parquet, folder or hub id. Default: those of the study.")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(help="Votes that the tie threshold is chosen on. Default: half of the prompts of --votes."),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(help="NAME=NUMBER: what a score is multiplied by before the softmax. Default: fitted."),
    ] = None,
    threads: ThreadsOption = None,
    log_file: LogOption = None,
) -> None:
    """Print how often the study's scores agree with held-out votes, ties included; nothing is written."""
    config = _start(study, threads, log_file)
    device = _device(config)
    from invdpo.config import PreferenceAccuracyConfig
    from invdpo.device import memory_for
    from invdpo.evidence.experiments import accuracy_table
    from invdpo.evidence.printing import to_markdown
    from invdpo.experiments.stage import measure_votes, remedies

    own = config.experiments.preference_accuracy or PreferenceAccuracyConfig.model_validate({})
    given = {"votes": votes, "validation": validation, "scales": dict(map(_named_number, scale or []))}
    if votes is not None and validation is None:
        own = own.model_copy(update={"validation": None})  # the study's goes with the study's votes
    settings = own.model_copy(update={key: value for key, value in given.items() if value})
    with memory_for("scoring votes", remedies(config, "preference_accuracy")):
        files, _ = measure_votes(config, settings, device)
    typer.echo(to_markdown(accuracy_table(files["accuracy.csv"], files["votes.csv"])))


def _named_number(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not name or not value > 0:
        raise InvdpoError(f"--scale {text}: expected NAME=NUMBER with a positive number, as in pickscore=100.")
    return name, value


@app.command()
def plan(
    study: StudyOption,
    throughput: Annotated[
        str | None,
        typer.Option(help="UNet evaluations a second of one device: a number, or a run.json of a finished run."),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="A GPU of config/sizes.yaml. Default: this machine's.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="GB of one GPU.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many GPUs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Also write the JSON to root/plan.json: time limits for a scheduler's jobs.")
    ] = False,
) -> None:
    """Say what a study will cost, before anything is fetched or trained: jobs, downloads, hours, disk, memory."""
    config = _start(study, 1)
    from invdpo.files import replace_when_done
    from invdpo.plan import plan as run
    from invdpo.plan import read_throughput
    from invdpo.plan_text import to_json, to_text

    rate = None if throughput is None else read_throughput(throughput, config.base)
    found = run(config, rate, gpu, gpu_memory, gpus)
    if save:
        with replace_when_done(config.root / "plan.json") as temporary:
            temporary.write_text(to_json(found) + "\n", encoding="utf-8")
    typer.echo(to_json(found) if as_json else to_text(found))


@app.command()
def power(
    difference: Annotated[
        float | None, typer.Option(help="Mean difference to find, in the score's units; needs its spread.")
    ] = None,
    share: Annotated[float | None, typer.Option(help="Share of votes won, to tell from one half.")] = None,
    study: Annotated[Path | None, typer.Option(help="A finished study, for its variance components.")] = None,
    arm: Annotated[str | None, typer.Option(help="An arm of that study.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The arm it is held against. Default: the base model.")] = None,
    scorer: Annotated[str | None, typer.Option(help="A score of that study. Default: its primary one.")] = None,
    seed_sd: Annotated[
        float | None, typer.Option(min=0, help="Standard deviation of the paired difference between training seeds.")
    ] = None,
    prompt_sd: Annotated[float | None, typer.Option(min=0, help="The same between prompts.")] = None,
    residual_sd: Annotated[float | None, typer.Option(min=0, help="What is left of one seed and prompt.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Training seeds. Default: the study's, or 3.")] = None,
    prompts: Annotated[int | None, typer.Option(min=2, help="Prompts. Default: the study's, or 500.")] = None,
    votes_per_cluster: Annotated[
        float, typer.Option(min=1, help="Votes of one rater, or on one pair, where they resemble one another.")
    ] = 1,
    correlation: Annotated[float, typer.Option(min=0, max=1, help="Correlation of two such votes.")] = 0,
    chance: Annotated[
        float, typer.Option("--power", min=0.01, max=0.999, help="Chance of finding what is there.")
    ] = 0.8,
    alpha: Annotated[float, typer.Option(min=1e-6, max=0.5, help="Chance of finding what is not, two-sided.")] = 0.05,
) -> None:
    """Say how many prompts, training seeds or votes a difference needs, or which difference they can find."""
    _log_to(None)
    from invdpo.evidence.planning import Spread, plan_difference, plan_votes, spread_of_study

    given = {"--seed-sd": seed_sd, "--prompt-sd": prompt_sd, "--residual-sd": residual_sd}
    if share is not None:
        typer.echo(plan_votes(share, chance, alpha, votes_per_cluster, correlation))
        return
    if study is not None:
        if named := [name for name, value in given.items() if value is not None]:
            raise InvdpoError(f"{named[0]} and --study both say how much differences vary; give one of them.")
        if arm is None:
            raise InvdpoError("--study needs --arm, the arm whose difference from --baseline is planned.")
        spread = spread_of_study(_start(study, 1), arm, baseline, scorer)
    elif any(given.values()):
        variances = ((seed_sd or 0) ** 2, (prompt_sd or 0) ** 2, (residual_sd or 0) ** 2)
        spread = Spread(variances, 3, 500, "given standard deviations")
    else:
        raise InvdpoError(
            "Nothing to plan with: give --share for votes, or --difference with --study and --arm, or with --prompt-sd "
            "and, as far as known, --seed-sd and --residual-sd."
        )
    typer.echo(plan_difference(spread, difference, seeds or spread.seeds, prompts or spread.prompts, chance, alpha))


@app.command()
def present(study: StudyOption, log_file: LogOption = None) -> None:
    """Write the tables and figures of the experiments on held-out pairs: root/tables/ and root/figures/."""
    config = _start(study, 1, log_file)  # small products, which threads only slow down
    from invdpo.evidence.experiments import write

    write(config)


@app.command()
def claims(study: StudyOption, log_file: LogOption = None) -> None:
    """Judge the claims: root/claims.json and claims.md."""
    config = _start(study, 1, log_file)  # small products, which threads only slow down
    from invdpo.evidence.claims import write

    write(config)


@app.command()
def report(study: StudyOption, log_file: LogOption = None) -> None:
    """Write the report, one HTML page for a browser: root/report.html."""
    config = _start(study, None, log_file)
    from invdpo.evidence.report import write

    for path in write(config):
        log.info(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@app.command()
def model_cards(study: StudyOption, log_file: LogOption = None) -> None:
    """Write a model card beside every run's weights: root/runs/ARM/seedK/README.md."""
    config = _start(study, 1, log_file)
    from invdpo.evidence.model_card import write

    write(config)


@app.command()
def mlflow(
    study: StudyOption,
    tracking_uri: Annotated[
        str | None, typer.Option(help="An MLflow server, or sqlite:///FILE. Default: root/mlflow.db.")
    ] = None,
    log_file: LogOption = None,
) -> None:
    """Bring root/mlflow.db, or another tracking store, in line with the results."""
    config = _start(study, None, log_file)
    from invdpo.tracking.mlflow_sync import sync

    log.info(str(sync(config, tracking_uri)))


@app.command()
def scene_graphs(
    images: Annotated[Path, typer.Argument(help="Folder of images, or parquet with a column `png`, `jpg` or `image`.")],
    graphs: Annotated[Path, typer.Argument(help="LAION-SG JSON; an image's name or prompt_id is its img_id.")],
    url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint: what comes before /chat/completions.")],
    model: Annotated[str, typer.Option(help="The endpoint's name of the vision-language model.")],
    out: Annotated[Path, typer.Option(help="Folder for answers.jsonl and scene_graphs.csv.")],
    temperature: Annotated[float, typer.Option(min=0)] = 0.7,
    seed: int = 1234,
    repeats: Annotated[int, typer.Option(min=1, help="Answers an image.")] = 1,
    attributes: Annotated[bool, typer.Option(help="Labels with their attributes: `brown dog`.")] = False,
    multisets: Annotated[bool, typer.Option(help="Two dogs asked for need two dogs.")] = False,
    key_variable: Annotated[str, typer.Option(help="Environment variable with the key.")] = "OPENAI_API_KEY",
    workers: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 4,
    log_file: LogOption = None,
) -> None:
    """Let a vision-language model read images as scene graphs: SG-, Entity- and Relation-IoU, a row an image."""
    _log_to(log_file)
    from invdpo.image_files import read_pictures
    from invdpo.scene_graphs import ChatModel, read_graphs, score_scene_graphs, summary

    rows = score_scene_graphs(
        read_pictures(images),
        read_graphs(graphs),
        ChatModel(url, model, temperature, seed, key_variable),
        out,
        attributes=attributes,
        duplicates="multiset" if multisets else "set",
        repeats=repeats,
        workers=workers,
    )
    log.info(summary(rows))


@app.command()
def composition(
    benchmark: Annotated[str, typer.Argument(help="geneval, compbench or dpg.")],
    results: Annotated[
        list[str], typer.Argument(help="METHOD=FILE, the benchmark's own result file; once more is another seed.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for rows.csv and composition.csv, .md and .tex.")],
    category: Annotated[str | None, typer.Option(help="compbench: the category of the files.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="compbench: the category's prompts, in their order.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="compbench: images a prompt.")] = 10,
    log_file: LogOption = None,
) -> None:
    """Turn result files of GenEval, T2I-CompBench or DPG-Bench into rows and a table with intervals."""
    _log_to(log_file)
    from invdpo.evidence.benchmarks import collect

    for path in collect(benchmark, results, out, category, prompts, samples):
        log.info(str(path))


@app.command()
def publish(study: StudyOption, log_file: LogOption = None) -> None:
    """Copy the study's tables, figures and verdicts into the committed reference results and the README."""
    config = _start(study, None, log_file)
    from invdpo.evidence.publish import publish as run

    run(config)


@app.command()
def rebuild(
    name: Annotated[str, typer.Argument(help="A published study, a folder of results/reference/.")],
    out: Annotated[Path | None, typer.Option(help="Default: results/NAME_from_reference.")] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Then publish what was made, in place of what was published.")
    ] = False,
) -> None:
    """Make every table, figure and verdict of a published study again from its published scores, and compare.

    Exit code 1 where something differs and is not published anew.
    """
    _log_to(None)
    _use_threads(1)  # small products, which threads only slow down
    from invdpo.evidence.publish import publish as put
    from invdpo.evidence.rebuild import rebuild as run

    found = run(name, out)
    typer.echo(found.text())
    if publish:
        put(found.study)
        typer.echo("published; see `git diff --stat`")
    elif not found.same:
        raise typer.Exit(1)


# A negative number is an address and no option.
@app.command(context_settings={"ignore_unknown_options": True})
def trace(
    what: Annotated[
        str,
        typer.Argument(
            help="TABLE:ROW:COLUMN, a file of results/STUDY/ or of results/reference/STUDY/ (a table's also with "
            ":ROW:COLUMN), claim:ID[:VARIANT], or a number as printed (-0.80, 18,432, '0.2 %'). Rows and columns by "
            "their name in the csv file or in print, for example table1:Diffusion-DPO:PickScore; the caption of a "
            "printed block may come first."
        ),
    ],
    study: Annotated[Path, typer.Option(help="YAML of the study.")] = Path("config/shapes.yaml"),
    reference: Annotated[bool, typer.Option("--reference", help="In the published results of that study.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Name one image: of this training seed (default: the first),")
    ] = None,
    prompt: Annotated[int | None, typer.Option(help="of this prompt, by its number.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Walk from a number to its statistic, scores, images, weights, recipe, data, code and the commands behind it."""
    _log_to(None)
    _use_threads(1)
    from invdpo.evidence import trace as tracing
    from invdpo.evidence.lineage import OneImage

    address, placed = tracing.place(what, study, reference)
    found = tracing.trace(address, placed, OneImage(seed, prompt))
    if as_json:
        typer.echo(json.dumps([one.content() for one in found], indent=2, ensure_ascii=False, default=str))
    elif len(found) > 1:
        typer.echo("\n".join(f"{one.address} = {one.value}" for one in found[:40]))
        more = f", the last {len(found) - 40} of which `--json` lists" if len(found) > 40 else ""
        typer.echo(f"{len(found)} places{more}; name one of them to walk from it, or more digits.")
    else:
        typer.echo(found[0].text())


@app.command()
def tune_arm(study: StudyOption, arm: ArmOption, threads: ThreadsOption = None, log_file: LogOption = None) -> None:
    """Run the tuning grid of one arm: root/tuning/ARM.csv."""
    config = _start(study, threads, log_file)
    device = _device(config)
    from invdpo.tuning import tune_arm as run

    log.info(f"{arm}: {run(config, arm, device)}")


@app.command()
def tune(study: StudyOption, log_file: LogOption = None) -> None:
    """Choose each method's learning rate and beta from finished grids: config/tuned/STUDY.yaml."""
    config = _start(study, None, log_file)
    from invdpo.tuning import tune as run

    for path in run(config):
        log.info(str(path))


@app.command()
def results(study: StudyOption) -> None:
    """Say where the results of a study are and how to open each."""
    config = _start(study)
    from invdpo.places import places

    typer.echo(places(config))


@app.command()
def check(study: StudyOption) -> None:
    """Look for all that a study needs, before anything is spent, and say what it holds and everything that is wrong.

    Of weights on the hub only headers are fetched. Exit code 1 where something is wrong.
    """
    config = _start(study)
    from invdpo.check import check as run

    found = run(config)
    typer.echo("\n".join(found.lines))
    if found.problems:
        count = f"{len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}"
        raise InvdpoError("\n  - ".join([f"{count} with study `{config.study}`:", *found.problems]))


@app.command()
def schema(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("config/schema.json"),
) -> None:
    """Write the JSON schema of a study's YAML, for editors."""
    from invdpo.config import json_schema
    from invdpo.files import replace_when_done

    with replace_when_done(path) as temporary:
        temporary.write_text(json_schema(), encoding="utf-8")


@app.command()
def methods(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("docs/methods.md"),
) -> None:
    """Write the page that sets every recipe of config/methods side by side, with its formulas."""
    from invdpo.files import replace_when_done
    from invdpo.objectives.page import methods_page

    with replace_when_done(path) as temporary:
        temporary.write_text(methods_page(), encoding="utf-8")


@app.command()
def deviations(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("docs/deviations.md"),
) -> None:
    """Write the page of places where the paper, its released code and this study differ."""
    from invdpo.evidence.deviations import deviations_page
    from invdpo.files import replace_when_done

    with replace_when_done(path) as temporary:
        temporary.write_text(deviations_page(), encoding="utf-8")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def world(context: typer.Context) -> None:
    """Build and inspect the shapes world (`invdpo world --help`)."""
    from invdpo.world.cli import app as world_app

    _log_to(None)
    world_app(args=context.args, prog_name="invdpo world")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def study(context: typer.Context) -> None:
    """Plan, freeze, serve and analyse the blind study with people (`invdpo study --help`)."""
    # The app is no part of the installed package: it lies in the repository, where every command runs.
    sys.path.append(os.getcwd())
    try:
        from user_study_app.cli import app as study_app
    except ModuleNotFoundError as error:
        if error.name != "user_study_app":
            raise
        raise InvdpoError("There is no user_study_app/ here. Run `invdpo study` in the repository's root.") from error
    _log_to(None)
    study_app(args=context.args, prog_name="invdpo study")


if __name__ == "__main__":
    main()
