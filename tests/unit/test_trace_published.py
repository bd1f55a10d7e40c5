"""A way back from all that is published: every verdict, every printed cell of Table 1, every table and file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from invdpo.cli import app
from invdpo.config import load_study
from invdpo.errors import InvdpoError
from invdpo.evidence import cells, lineage, trace
from invdpo.evidence.claims import value_text
from invdpo.evidence.ledger import Verdict, read_verdicts
from invdpo.evidence.lineage import OneImage
from invdpo.evidence.load import arm_title, load_evidence
from invdpo.evidence.trace import Number, Trace

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = Path("results/reference")
PUBLISHED = REFERENCE / "shapes"
VERDICTS = read_verdicts(ROOT / PUBLISHED / "claims.json")
# How many columns of a printed table name its row; one where it is not here.
LABELS = {"table3": 2, "controls": 2, "inversion_error": 3, "precision": 4, "audit": 3, "over_optimisation": 2}


def printed(path: Path) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Caption, heads and rows of every block of a table's Markdown."""
    for block in path.read_text(encoding="utf-8").split("\n**")[1:]:
        caption, _, table = block.partition("**\n\n")
        lines = [line[2:-2].replace("\\|", "¦").split(" | ") for line in table.splitlines() if line.startswith("| ")]
        head, _, *rows = [[cell.replace("¦", "|") for cell in line] for line in lines]
        yield caption, head, rows


CELLS = [
    (caption, row[0], head, cell)
    for caption, heads, rows in printed(ROOT / PUBLISHED / "tables" / "table1.md")
    for row in rows
    for head, cell in zip(heads[1:], row[1:], strict=True)
]


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """In the repository, with all that ways share read and made once: the evidence, each table, files and hashes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        evidence = load_evidence(placed("shapes"))
        patch.setattr(trace, "load_evidence", lambda study: evidence)
        patch.setattr(trace, "TABLES", {name: once(build) for name, build in trace.TABLES.items()})
        patch.setattr(lineage, "sha256_file", cache(lineage.sha256_file))
        frames: dict[tuple[Path, str], pd.DataFrame] = {}
        read = pd.read_parquet

        def read_parquet(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
            if (key := (path, str(columns))) not in frames:
                frames[key] = read(path, columns=columns)
            return frames[key]

        patch.setattr(lineage.pd, "read_parquet", read_parquet)
        yield


def once(build: Callable[..., Any]) -> Callable[..., Any]:
    made: list[Any] = []

    def again(evidence: Any) -> Any:
        if not made:
            made.append(build(evidence))
        return made[0]

    return again


def placed(name: str) -> Any:
    return load_study(REFERENCE / name / "study.json").placed(REFERENCE / name)


def walk(what: str, one: OneImage | None = None) -> Trace:
    (found,) = trace.trace(what, placed("shapes"), one)
    return found


def facts(found: Trace, link: str) -> dict[str, Any]:
    return next(each.facts for each in found.links if each.what == link)


def files(value: Any) -> set[Path]:
    """Every existing file that is named in a link's facts."""
    if isinstance(value, dict):
        return set().union(*(files(part) for part in (*value, *value.values())))
    if isinstance(value, (list, tuple)):
        return set().union(*map(files, value))
    words = str(value).split(",")
    return {Path(word) for word in words if "/" in word and len(word) < 200 and Path(word).is_file()}


def agrees(cell: str, value: str) -> bool:
    """Whether a printed cell is that of a csv file: its number, or its words."""
    if value in ("", "–") or (cell, value) == ("–", "0"):  # a difference that never varies has no detectable size
        return cell == "–" or cell.startswith("not run: ")
    text = cell.strip("*").split(" [")[0].split(" (")[0].removesuffix(" =").removesuffix(" *")
    number = Number.read(text)
    return text == value if number is None else number.rounds(float(value))


def ident(row: Verdict) -> str:
    return f"{row.id}:{row.variant}" if row.variant else row.id


@pytest.mark.parametrize("row", VERDICTS, ids=ident)
def test_every_verdict_leads_to_what_its_test_read(row: Verdict) -> None:
    found = walk(f"claim:{ident(row)}")
    statistic = facts(found, "Statistic")
    assert statistic["from the files, now"].endswith("(the same)")
    assert row.verdict in found.value
    first = Number.read(value_text(row).split(" ")[0])
    if row.value is not None:
        assert first.rounds(float(found.value.split()[0])) if first else value_text(row).startswith("never reached")
    assert value_text(row) in (PUBLISHED / "claims.md").read_text()
    reached = [files(link.facts) for link in found.links[2:]]
    for artifact in row.artifacts:
        place = PUBLISHED / artifact
        assert any(path == place or place in path.parents for each in reached for path in each), artifact
    if not row.artifacts:
        assert found.links[2].facts["why"] == row.reason and PUBLISHED / "claims.json" in files(found.links[0].facts)
    elif row.test["kind"] != "votes":
        commits = [link.facts[name] for link in found.links for name in link.facts if name == "commit"]
        assert any(commits)


@pytest.mark.parametrize(
    ("claim", "links", "not_there"),
    [
        ("fid_below_base:inversion_dpo_code", {"Sets of images", "Images of Base"}, {"Scores of Base"}),
        ("trajectories_agree", {"Experiment inversion_error", "Runs of Base"}, {"Images of Base"}),
        (
            "surrogate_is_the_true_log_ratio:inversion_dpo_exact",
            {"Experiment precision", "Recipe inversion_dpo_exact", "Runs of Diffusion-DPO"},
            {"Images of Diffusion-DPO"},
        ),
        (
            "rounding_gives_a_gradient:inversion_dpo_code",
            {"Experiment audit", "Recipe of Inversion-DPO (released code)", "Base model"},
            {"Runs of Diffusion-DPO"},
        ),
        ("steadier_training:inversion_dpo_code", {"Runs of Diffusion-DPO"}, {"Scores of Diffusion-DPO"}),
        ("twice_as_fast_by_step:inversion_dpo_code", {"Scores of Diffusion-DPO", "Images of Diffusion-DPO"}, set()),
    ],
)
def test_a_verdict_leads_to_its_own_kind_of_data(claim: str, links: set[str], not_there: set[str]) -> None:
    names = {link.what for link in walk(f"claim:{claim}").links}
    assert links <= names and not not_there & names


def test_a_test_on_logs_names_them() -> None:
    runs = facts(walk("claim:steadier_training:inversion_dpo_code"), "Runs of Diffusion-DPO")["runs"]
    log = PUBLISHED / "runs/diffusion_dpo/seed1/train.jsonl"
    assert runs[str(log.parent)]["files"][str(log)] == f"sha256 {lineage.sha256_file(log)}"


@pytest.mark.parametrize(("caption", "row", "head", "cell"), CELLS, ids=lambda part: part[:30])
def test_every_printed_cell_of_table_1(caption: str, row: str, head: str, cell: str) -> None:
    found = walk(f"table1:{caption}:{row}:{head}")
    numbers, texts = found.value.split(" / "), cell.split(" / ")
    assert len(numbers) == len(texts) and all(map(agrees, texts, numbers))
    table, arm, column = found.address.split(":")
    assert (table, arm_title(arm)) == ("table1", row)
    if head.startswith("paper"):
        assert facts(found, "The paper's own number")
        return
    stored = next(each for each in csv.DictReader((PUBLISHED / "tables/table1.csv").open()) if each["arm"] == arm)
    assert stored[column] == (found.value if found.value != "–" else "")
    assert facts(found, "Statistic")["from the files, now"].endswith("(the same)")
    if cell.startswith("not run: "):  # a row of the paper's alone
        assert facts(found, "Statistic")["what"] == f"nothing of this study's: {cell}" and len(found.links) == 2
    else:
        assert files([link.facts for link in found.links[2:]])


@pytest.mark.parametrize(
    ("asked", "column"),
    [
        ("Win rate (Oracle utility)", "oracle_utility_win_rate"),
        ("UNet evaluations", "unet_evals"),
        ("Steps", "optimizer_steps"),
        ("Pairs", "pairs_seen"),
        ("paper PickScore", "paper PickScore"),
        ("PickScore", "pickscore"),
        ("Difference:PickScore", "pickscore"),
        ("seeds", "seeds"),
        ("prompts", "prompts"),
        ("status", "status"),
    ],
)
def test_a_heading_needs_no_caption_where_it_is_printed_once(asked: str, column: str) -> None:
    found = walk(f"table1:Diffusion-DPO:{asked}")
    assert found.address == f"table1:diffusion_dpo:{'pickscore_minus_base' if ':' in asked else column}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / REFERENCE).glob("*/tables/*.csv")), ids=lambda path: f"{path.parts[-3]}-{path.stem}"
)
def test_every_table_goes_by_the_names_of_its_csv_file(path: Path) -> None:
    records = list(csv.DictReader(path.open()))
    table = cells.CELLS[path.stem]
    for place, record in enumerate(records):
        row = cells.address(path.stem, record).removeprefix(f"{path.stem}:")
        columns = [name for name in record if name not in table.keys]
        for column in columns if place == 0 else columns[-1:]:
            found = cells.find(path.stem, records, f"{row}:{column}")
            assert (found.row, found.columns) == (place, (column,))


@pytest.mark.parametrize(
    "path", sorted((ROOT / REFERENCE).glob("*/tables/*.md")), ids=lambda path: f"{path.parts[-3]}-{path.stem}"
)
def test_every_printed_heading_finds_the_number_below_it(path: Path) -> None:
    """Of each block's first row with numbers. What no heading tells apart is asked for by its csv name: below."""
    records = list(csv.DictReader(path.with_suffix(".csv").open()))
    found = 0
    for caption, heads, rows in printed(path):
        if path.stem in ("table3", "table_s4") and (
            caption == "What the paper reports" or not records[0]["status"] == "ok"
        ):
            continue  # the paper's rows, and those without a vote, go by their csv names
        labels = LABELS.get(path.stem, 1) + ("Precision" in heads[2:3]) + (caption == "What the paper reports")
        # The steps that the last checkpoint is between are not printed.
        whole = caption == "Last checkpoint minus the base model"
        between = [f"0 to {max(int(record['to_step']) for record in records)}"] if whole else []
        labels -= len(between)
        for place, head in enumerate(heads[labels:], start=labels):
            row = next((row for row in rows if re.match(r"[*+-]*\d", row[place])), None)
            if row is None or head in ("Ratio", "Never reached"):
                continue
            asked = [caption, *row[:labels], *between, head]
            if path.stem in ("to_target", "win_rates", "controls"):  # their captions are scores
                asked = [*row[:labels], caption, head]
            cell = cells.find(path.stem, records, ":".join(asked))
            numbers = [records[cell.row][column] for column in cell.columns]
            if head == "Stored as":
                assert row[place] == f"{numbers[0]} (base {numbers[1]})"
            else:
                texts = row[place].split(" / ")
                assert len(texts) == len(numbers) and all(map(agrees, texts, numbers)), asked
            found += 1
    assert found or path.stem == "table_s4", "without a vote, no number is this study's"


def test_a_heading_that_stands_for_several_numbers_names_them() -> None:
    with pytest.raises(
        InvdpoError, match="Name one: to_target:sft:clip:step:Ratio, to_target:sft:clip:unet_evals:Ratio"
    ):
        walk("to_target:SFT:CLIP:Ratio")


@pytest.mark.parametrize(
    ("what", "links"),
    [
        ("weight_distances:SFT:Whole network:RMS of the change", {"Experiment weight_distances", "Runs of SFT"}),
        ("weight_distances:SFT:block:time", {"Experiment weight_distances", "Runs of SFT"}),
        ("speed:Diffusion-DPO step, pairs:training loop:ratio", {"Benchmark"}),
        (
            "audit:one timestep of p:Diffusion-DPO, step 8:Cosine: PickScore",
            {"Experiment audit", "Recipe of one timestep of p", "Runs of Diffusion-DPO"},
        ),
        ("inversion_error:DDIM:2:40:Round-trip error", {"Experiment inversion_error", "Runs of Base"}),
        ("preference_accuracy:PickScore:Accuracy", {"Experiment preference_accuracy", "Base model"}),
        ("precision:Diffusion-DPO:Inversion-DPO (Eq. 11):10:1:Spearman", {"Experiment precision"}),
        ("table3:one timestep of p:40:UNet evaluations", {"Runs of one timestep of p, N = 40"}),
        ("table2:SFT:KID", {"Sets of images", "Images of SFT"}),
        ("composition:SFT:GenEval:two objects (n = 62)", {"Scores of SFT", "Images of SFT"}),
        (
            "controls:Diffusion-DPO:swapped:CLIP:Minus base",
            {"Scores of Diffusion-DPO, labels swapped", "Scores of Base"},
        ),
        ("win_rates:HPS:SFT:Diffusion-DPO", {"Scores of SFT", "Scores of Diffusion-DPO"}),
        ("over_optimisation:SFT:8 to 16:Verdict", {"Scores of SFT", "Scores of Base"}),
        ("table_s5:p_single - q_single:paper CLIP (SDXL / SD1.5)", {"The paper's own number"}),
        ("table1:DDPO:paper PickScore", {"The paper's own number"}),
    ],
)
def test_every_table_leads_to_what_it_is_made_from(what: str, links: set[str]) -> None:
    found = walk(what)
    assert links <= {link.what for link in found.links}
    if "Statistic" in {link.what for link in found.links}:
        assert facts(found, "Statistic")["from the files, now"].endswith("(the same)")


def test_a_published_image_is_the_end_of_the_way() -> None:
    image = facts(walk("table1:diffusion_dpo:pickscore"), "Images of Diffusion-DPO")["one image"]
    assert image["picture"].startswith(f"{PUBLISHED}/images/diffusion_dpo/seed0.parquet, row of prompt ")
    assert image["picture"].endswith("the same pixels")
    assert image["shown in"] and all(Path(figure).is_file() for figure in image["shown in"])


@pytest.mark.parametrize(
    ("what", "one", "file"),
    [
        ("table1:q_single:pickscore", OneImage(), "q_single/seed0"),
        ("table1:Diffusion-DPO:CLIP", OneImage(seed=2), "diffusion_dpo/seed2"),
        ("table1:base:clip", OneImage(prompt=0), "base/seed0"),
    ],
)
def test_an_image_that_is_not_published_has_its_command(what: str, one: OneImage, file: str) -> None:
    found = walk(what, one)
    image = next(link.facts["one image"] for link in found.links if link.what.startswith("Images of"))
    command = f"uv run snakemake results/shapes/images/{file}.parquet --configfile config/shapes.yaml"
    assert command in image["picture"] and len(image["sha256 of the pixels"]) == 64


@pytest.mark.parametrize(
    ("file", "links", "command"),
    [
        ("figures/fig1.pdf", {"Pictures shown", "Images of Diffusion-DPO", "Scores of Base"}, "invdpo rebuild shapes"),
        ("figures/fig3.png", {"Scores of Diffusion-DPO", "Runs of Diffusion-DPO"}, "invdpo rebuild shapes"),
        ("figures/fig_s9.png", {"Experiment inversion_error", "Base model"}, "invdpo rebuild shapes"),
        (
            "scores/sft/seed1.parquet",
            {"Scores of SFT", "Runs of SFT"},
            "invdpo evaluate --study config/shapes.yaml --arm sft",
        ),
        (
            "images/sft/seed0.parquet",
            {"Images of SFT", "Runs of SFT"},
            "invdpo evaluate --study config/shapes.yaml --arm sft",
        ),
        (
            "runs/sft/seed2/run.json",
            {"Runs of SFT", "Recipe of SFT"},
            "invdpo train --study config/shapes.yaml --arm sft",
        ),
        ("experiments/inversion_error/pictures.parquet", {"Base model"}, "invdpo experiment inversion_error"),
        ("tables/speed.csv", {"Benchmark"}, "make bench"),
        ("claims.md", {"Verdicts, each with a way of its own"}, "invdpo rebuild shapes"),
    ],
)
def test_a_file_leads_to_what_it_is_made_from(file: str, links: set[str], command: str) -> None:
    found = walk(file)
    assert links <= {link.what for link in found.links} and found.links[0].command.startswith(command)
    seed = re.search(r"seed(\d)", file)
    images = [link.facts["one image"]["training seed"] for link in found.links if link.what.startswith("Images of")]
    assert seed is None or images == [int(seed[1])]


def test_every_published_file_has_a_command() -> None:
    for name in ("shapes", "shapes_methods"):
        evidence = trace.Evidence(placed(name), {}, {}) if name != "shapes" else trace.load_evidence(placed(name))
        for path in filter(Path.is_file, (REFERENCE / name).rglob("*")):
            command, _ = trace._maker(evidence, path.relative_to(REFERENCE / name))
            assert command, path


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["trace", *arguments, "--reference"])
    assert done.exit_code == 0, f"{done.output}{done.exception}"
    return done.output


@pytest.mark.parametrize(
    ("number", "addresses"),
    [
        ("-0.80", ["claim:surrogate_is_the_true_log_ratio:inversion_dpo_paper", "claim:eq16_rises_with_the_truth:"]),
        ("−0.7977", ["precision:diffusion_dpo:inversion_dpo_paper:20:1:spearman"]),
        ("0.2 %", ["claim:released_learning_rate_moves_the_weights:inversion_dpo_code"]),
        ("66.5%", ["claim:people_prefer_it_to_the_base:inversion_dpo_implied"]),
        ("18,432", ["table1:diffusion_dpo:unet_evals", "costs:diffusion_dpo_swapped:unet_evals"]),
        ("-0.319", ["claim:primary_above_diffusion_dpo:inversion_dpo_implied"]),
        ("25 times", ["claim:double_inference_costs_more:inversion_dpo_implied"]),
    ],
)
def test_a_number_as_printed_lists_its_places(number: str, addresses: list[str]) -> None:
    hits = [hit["address"] for hit in json.loads(run(number, "--json"))]
    assert all(any(hit.startswith(address) for hit in hits) for address in addresses)
    lines = run(number).splitlines()
    assert lines[0].startswith(hits[0])
    assert len(hits) == 1 or lines[-1].startswith(f"{len(hits)} places")


def test_a_number_in_one_place_is_walked_from_there() -> None:
    row = next(row for row in VERDICTS if ident(row) == "pickscore_above_diffusion_dpo:inversion_dpo_paper")
    (found,) = json.loads(run(str(row.value), "--json"))
    assert found["address"] == f"claim:{ident(row)}" and found["links"]


def test_every_number_of_the_verdicts_in_the_readme_is_found() -> None:
    block = re.split("<!-- verdicts of shapes: (?:begin|end) -->", Path("README.md").read_text())[1]
    cell = r"\*\*(?:\\\*)? \(?([^)\[(]+?)(?: [\[(]([^,]+?)(?:, | to )([^\])]+)[\])])?\)?(?:<br>| \|)"
    values = re.findall(cell, block)
    numbers = {text: number for value in values for text in value if (number := Number.read(text))}
    assert len(numbers) > 100
    study = placed("shapes")
    assert not [text for text, number in numbers.items() if not any(trace._places(study, number))]


@pytest.mark.parametrize(
    ("text", "value", "same"),
    [
        ("-0.80", -0.797681, True),
        ("-0.80", -0.794, False),
        ("+0.22", 0.217, True),
        (".232", 0.2321, True),
        ("66.5 %", 0.6653, True),
        ("66.5", 0.6653, False),
        ("2,304", 2304, True),
        ("5.7e-05", 5.68e-05, True),
        ("5.7e-05", 5.8e-05, False),
        ("4x", 4.2, True),
    ],
)
def test_a_number_is_a_value_to_the_digits_it_is_given_with(text: str, value: float, same: bool) -> None:
    number = Number.read(text)
    assert number is not None and number.rounds(value) is same


@pytest.mark.parametrize("text", ["table1", "fig3", "1.2.3", "", "nan", "2 pairs", "a 3"])
def test_what_is_no_number(text: str) -> None:
    assert Number.read(text) is None


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("table9:sft:clip", "no address.*tables: table1, win_rates.*weight_distances, speed"),
        ("table1:difusion_dpo:clip", "Did you mean `diffusion_dpo`.*go by arm: base, sft, diffusion_dpo"),
        ("table1:sft:clipp", "Did you mean `clip`.*Columns: status, seeds, prompts, .*pickscore_minus_base"),
        ("table1:sft", "names no column.*Columns: status"),
        ("table1:sft:arm", "names the row.*Its other columns: status"),
        ("win_rates:sft:clip:win_rate", "has 13 rows `sft:clip`. Name one: win_rates:base:sft:clip:win_rate"),
        ("claim:dpo_abov_base", "Did you mean `dpo_above_base`.*Claims: pickscore_above_base, "),
        ("claim:steady_rise", "several readings. Name one: claim:steady_rise:inversion_dpo_paper"),
        ("scores/sft/seed9.parquet", "no such file. `invdpo evaluate .* --arm sft`.*Did you mean `seed..parquet`"),
        ("runs/sftt/seed0/run.json", "has no arm `sftt`. Arms: base, sft"),
        ("images/q_single/seed0.parquet", "no such file. `invdpo evaluate .* --arm q_single` makes it"),
        ("notes/mine.txt", "no file of the stages.*scores, images, runs, experiments, tables, figures"),
        ("0.123456", "in no table"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(what: str, words: str) -> None:
    with pytest.raises(InvdpoError, match=words):
        walk(what)
