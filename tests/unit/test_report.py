"""The report: what its embedded data holds, that no text breaks out of it, and what it says about what is missing."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evidence_fixture import make_config, make_study, write_scores
from PIL import Image

from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.evidence import claims, ledger, printing, report, tables
from invdpo.evidence.load import load_evidence
from invdpo.evidence.statistics import paired_difference
from invdpo.files import write_json

HOSTILE = "</script><script>fetch('//evil')</script> & \u2028 <img src=x onerror=alert(1)> {{ 7*7 }} <!--"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small study with everything that the page shows but experiments has run."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        study = make_study(prompts=6)
        tables.write(study)
        claims.write(study)
    return folder


@pytest.fixture(scope="module")
def parts(made: Path) -> Parts:
    """Its page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        return Parts(report.page(make_config()))


@pytest.fixture
def study(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A copy of that study in the working directory, to be changed."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return make_config()


class Parts(HTMLParser):
    """Scripts by id (the page's own is ``), text outside of them, and every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id") or ""
            assert self._script not in self.scripts
            self.scripts[self._script] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.scripts[self._script] += data

    def json(self, name: str) -> Any:
        return json.loads(self.scripts[name])

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for tag, attributes in self.tags if tag == "section"}


def sheet(picture_data: dict[str, Any], arm: str, k: int) -> np.ndarray:
    """The pixels of an embedded sheet."""
    with Image.open(io.BytesIO(base64.b64decode(picture_data["sheets"][arm][k]))) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_curves_are_the_paired_gains_at_every_checkpoint(study: StudyConfig, parts: Parts) -> None:
    chart = parts.json("data")["chart"]
    evidence = load_evidence(study)
    assert chart["primary"] == "oracle_utility" and chart["seeds"] == 3 and chart["prompts"] == 6
    assert chart["first"] == ["diffusion_dpo", "inversion_dpo_implied"], "those of the sample grid, without the base"
    assert set(chart["curves"]["clip"]) == set(study.arms) - {"base"}
    start = chart["start"]["pickscore"]
    for step, (mean, low, high) in enumerate(chart["curves"]["pickscore"]["diffusion_dpo"]):
        curve, base = evidence.paired_curves("diffusion_dpo", "base", "pickscore")
        gain = paired_difference(curve[step], base[-1])
        assert (mean - start, low - start, high - start) == pytest.approx(
            (gain.estimate, gain.low, gain.high), abs=2e-6
        )
    costs = chart["costs"]["diffusion_dpo"]
    assert costs["step"] == [10, 20, 40] and costs["unet_evals"] == [2500, 5000, 10000]
    assert costs["seconds"] == pytest.approx([0.25, 0.5, 1.0])


def test_unknown_costs_are_null_and_not_zero(study: StudyConfig) -> None:
    shutil.rmtree(study.root / "runs" / "sft")
    costs = Parts(report.page(study)).json("data")["chart"]["costs"]
    assert costs["sft"] == {"step": [10, 20, 40], "unet_evals": [None] * 3, "seconds": [None] * 3}


def test_pictures_stand_with_their_own_scores(study: StudyConfig, parts: Parts) -> None:
    data = parts.json("picture-data")
    assert (data["first"], data["base"]) == ("base", "base")
    assert data["second"] == "inversion_dpo_implied", "the fixture's largest gain"
    assert data["seeds"]["base"] == [0] and data["seeds"]["sft"] == [0, 1, 2]
    assert (data["columns"], data["rows"], data["side"], data["total"]) == (3, 2, 64, 6)
    rows = pd.read_parquet(study.root / "scores" / "sft" / "seed2.parquet")
    rows = rows[(rows["step"] == 40) & (rows["scorer"] == "clip")].sort_values("prompt_id")
    assert data["scores"]["sft"]["clip"][2] == pytest.approx(rows["score"].tolist(), rel=1e-3)
    images = pd.read_parquet(study.root / "images" / "sft" / "seed2.parquet").set_index("prompt_id")
    pixels = sheet(data, "sft", 2)
    assert pixels.shape == (128, 192, 3)
    with Image.open(io.BytesIO(images.at[4, "png"])) as image:  # pyright: ignore
        difference = np.abs(pixels[64:128, 64:128] - np.asarray(image.convert("RGB")))
    assert difference.mean() < 4 < np.abs(pixels[64:128, 64:128] - pixels[:64, :64]).mean()


def test_a_score_that_some_prompts_lack_is_null_there(study: StudyConfig) -> None:
    for path in (study.root / "scores").rglob("*.parquet"):
        rows = pd.read_parquet(path)
        write_scores(path, rows[(rows["scorer"] != "clip") | (rows["prompt_id"] % 2 == 0)])
    clip = Parts(report.page(study)).json("picture-data")["scores"]["diffusion_dpo"]["clip"][0]
    assert [value is None for value in clip] == [False, True] * 3


def test_the_budget_keeps_the_first_prompts_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = make_study(prompts=24)
    whole = Parts(report.page(study))
    prompts = whole.json("picture-data")["prompts"]
    assert [text.rsplit(" ", 1)[1] for text in prompts] == [str(k) for k in range(24)], "as in the file: 2 before 10"
    size = sum(len(text) for found in whole.json("picture-data")["sheets"].values() for text in found)
    assert "All 24 prompts are here" in whole.text
    parts = Parts(report.page(study, budget=size // 2))
    data = parts.json("picture-data")
    count = len(data["prompts"])
    assert 4 <= count < 24 and data["prompts"] == prompts[:count]
    assert sum(len(text) for found in data["sheets"].values() for text in found) <= size // 2
    assert all(len(found[0]) == count for scores in data["scores"].values() for found in scores.values())
    assert f"the first {count} of 24 prompts" in re.sub(r"\s+", " ", parts.text)
    assert "pictures" not in Parts(report.page(study, budget=100)).ids()


def test_prompts_without_pictures_are_dropped_and_the_page_says_so(study: StudyConfig) -> None:
    """As in a published study, which has the pictures of its figures alone."""
    shutil.rmtree(study.root / "images" / "q_single")
    for arm, lacking in (("sft", [1]), ("base", [1, 4])):
        path = study.root / "images" / arm / "seed0.parquet"
        rows = pd.read_parquet(path)
        rows[~rows["prompt_id"].isin(lacking)].to_parquet(path)
    parts = Parts(report.page(study))
    data = parts.json("picture-data")
    assert [text.rsplit(" ", 1)[1] for text in data["prompts"]] == ["0", "2", "3", "5"] and "q_single" not in data[
        "arms"
    ]
    rows = pd.read_parquet(study.root / "scores" / "sft" / "seed0.parquet")
    rows = rows[(rows["step"] == 40) & (rows["scorer"] == "clip")].set_index("prompt_id")
    assert data["scores"]["sft"]["clip"][0][3] == pytest.approx(rows.at[5, "score"], rel=1e-3)  # pyright: ignore
    runs = 3 * (len(study.arms) - 1) + 1
    text = re.sub(r"\s+", " ", parts.text)
    assert f"There are pictures of 4 of 6 prompts and of {runs - 3} of {runs} runs. make reproduce STUDY=toy" in text
    pd.read_parquet(study.root / "images" / "sft" / "seed0.parquet").head(0).to_parquet(
        study.root / "images" / "sft" / "seed0.parquet"
    )
    assert "pictures" not in Parts(report.page(study)).ids()


def test_large_pictures_are_scaled_down(study: StudyConfig) -> None:
    for path in (study.root / "images").rglob("*.parquet"):
        rows = pd.read_parquet(path)
        buffer = io.BytesIO()
        Image.new("RGB", (500, 500), "#336699").save(buffer, "PNG")
        rows["png"] = [buffer.getvalue()] * len(rows)
        rows.to_parquet(path)
    data = Parts(report.page(study)).json("picture-data")
    assert data["side"] == report.THUMBNAIL and sheet(data, "sft", 0).shape == (384, 576, 3)


def test_pictures_that_were_not_scored_are_refused(study: StudyConfig) -> None:
    path = study.root / "images" / "sft" / "seed1.parquet"
    rows = pd.read_parquet(path)
    rows.loc[3, "sha256"] = "another"
    rows.to_parquet(path)
    with pytest.raises(InvdpoError, match="sft/seed1.parquet: not the pictures that were scored"):
        report.page(study)


def test_text_cannot_break_out_of_the_page(study: StudyConfig) -> None:
    for path in (study.root / "scores").rglob("*.parquet"):
        rows = pd.read_parquet(path)
        rows.loc[rows["prompt_id"] == 1, "prompt"] = HOSTILE
        write_scores(path, rows)
    verdicts = json.loads((study.root / "claims.json").read_text())
    verdicts["claims"][0]["question"] = verdicts["claims"][1]["reason"] = HOSTILE
    write_json(study.root / "claims.json", verdicts)
    table = study.root / "tables" / "costs.md"
    table.write_text(
        table.read_text().replace("| Base |", f"| {HOSTILE.replace('|', '')} |").replace("4,000", "**<b>**")
    )
    page = report.page(study)
    parts = Parts(page)
    assert set(parts.scripts) == {"data", "picture-data", ""} and parts.json("picture-data")["prompts"][1] == HOSTILE
    assert parts.text.count(HOSTILE) > 2 and "{{ 7*7 }}" in parts.text
    assert "<strong>&lt;b&gt;</strong>" in page, "what a table sets in bold is bold"
    assert not [tag for tag, attributes in parts.tags if tag == "img" and "onerror" in attributes]
    data = parts.scripts["data"] + parts.scripts["picture-data"]
    assert not set("<>&\u2028") & set(data), "a comment or a script could begin or end there"


def test_the_pages_policy_allows_its_own_script_and_style_alone(study: StudyConfig) -> None:
    page = report.page(study)
    parts = Parts(page)
    policy = next(a["content"] for _, a in parts.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    for kind, texts in (("script-src", [parts.scripts[""]]), ("style-src", style)):
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert rules[kind] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data: blob:")
    assert not [a for _, a in parts.tags if (a.get("src") or a.get("href") or "data:")[:5] not in ("data:",) and not
                (a.get("href") or "").startswith("#")]  # fmt: skip
    assert not [tag for tag, a in parts.tags if "style" in a or any(name.startswith("on") for name in a)]


def test_every_verdict_is_there_with_what_lies_behind_it(study: StudyConfig, parts: Parts) -> None:
    rows = ledger.read_verdicts(study.root / "claims.json")
    shown = [a["data-verdict"] for tag, a in parts.tags if tag == "details" and "data-verdict" in a]
    assert sorted(shown) == sorted(row.verdict for row in rows) and len(set(shown)) == 4
    for row in rows:
        assert row.question in parts.text and row.command in parts.text
        assert row.value is None or claims.value_text(row) in parts.text
    loaded = [claim.id for claim in ledger.load_claims(Path(study.claims or ""))]
    anchors = [(a.get("id") or "").removeprefix("claim-") for tag, a in parts.tags if tag == "article"]
    assert sorted(anchors) == sorted(loaded), "each claim of the ledger once"


def test_the_overview_holds_every_verdict_and_sets_the_studys_questions_apart(study: StudyConfig, parts: Parts) -> None:
    rows = ledger.read_verdicts(study.root / "claims.json")
    found = report.overview(report.verdict_parts(rows, {}))
    paper, own = found["parts"]
    assert paper["claims"] == len({row.id for row in rows if row.quote}) > 20
    assert own["claims"] == len({row.id for row in rows if not row.quote}) > 10
    for part, quoted in ((paper, True), (own, False)):
        verdicts = [row.verdict for row in rows if bool(row.quote) == quoted]
        assert part["tests"] == [(name, report.MARKS[name], verdicts.count(name)) for name in report.MARKS
                                 if name in verdicts]  # fmt: skip
        marks = [mark for line in part["lines"] for cell in line["cells"] for mark in cell]
        assert sorted(mark["verdict"] for mark in marks) == sorted(verdicts)
    assert [line["title"].split(":")[0] for line in paper["lines"]][:5] == [f"Table {k}" for k in (1, 2, 3, "S4", "S5")]
    assert found["columns"][:3] == [f"Inversion-DPO ({name})" for name in ("Eq. 16", "released code", "implied noise")]
    column = [mark for part in found["parts"] for line in part["lines"] for mark in line["cells"][0]]
    assert len(column) == sum(row.variant == "inversion_dpo_paper" for row in rows)
    for name, _, n in paper["tests"]:
        assert f"{n} {name}" in parts.text


def test_a_place_or_a_test_without_a_title_has_a_group_of_its_own(study: StudyConfig) -> None:
    row = next(row for row in ledger.read_verdicts(study.root / "claims.json") if row.quote)
    odd = [replace(row, locus="appendix Z, line 3"), replace(row, id="own", quote="", test=row.test | {"kind": "cost"})]
    titles = [group["title"] for part in report.verdict_parts(odd, {}) for group in part["groups"]]
    assert titles == ["Appendix Z", "Cost"]


def test_a_verdict_names_its_interval_and_the_deviations_that_apply(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ledger.read_verdicts(study.root / "claims.json")
    first = next(row for row in rows if row.low is not None and row.p_holm is not None)
    noted = replace(first, deviations=["sign", "not_in_the_list"], interval="range of 3 seeds")
    monkeypatch.setattr(report, "read_verdicts", lambda path: [noted])
    page = report.page(study)
    parts = Parts(page)
    reading = page[page.index('<details class="reading"') : page.index("</details>")]
    assert "<dt>Interval</dt><dd>range of 3 seeds</dd>" in reading
    assert f"<dt>p, Holm over all claims</dt><dd>{noted.p_holm:.2g}</dd>" in reading
    assert '<a href="#deviation-sign">Sign of the log-ratio</a>; <code>not_in_the_list</code>' in reading
    assert "deviation-sign" in {a.get("id") for _, a in parts.tags}
    sign = page[page.index('id="deviation-sign"') :]
    assert "Plus in the two recipes that follow the paper" in sign[: sign.index("</dl>")]
    plainer = replace(first, deviations=[], interval="")
    monkeypatch.setattr(report, "read_verdicts", lambda path: [plainer])
    plain = report.page(study)
    assert "<dt>Interval</dt>" not in plain and "Deviations that apply" not in plain


def test_links_lead_to_what_is_on_the_page(parts: Parts) -> None:
    ids = [a["id"] for _, a in parts.tags if "id" in a]
    links = {(a.get("href") or "")[1:] for tag, a in parts.tags if tag == "a"}
    assert len(ids) == len(set(ids)) and len(links) > 60 and links <= set(ids)


def test_code_between_backticks_is_code_and_nothing_else_is_markup() -> None:
    assert report.ticked("run `make <x>`, then & `b`") == "run <code>make &lt;x&gt;</code>, then &amp; <code>b</code>"
    assert report.ticked("one ` alone <b>") == "one ` alone &lt;b&gt;"


def test_marks_of_a_claims_readings_share_a_scale(study: StudyConfig) -> None:
    row = next(row for row in ledger.read_verdicts(study.root / "claims.json") if row.value is not None)
    wide = replace(row, value=0.0, low=-1.0, high=3.0)
    open_ended = replace(row, value=1.0, low=0.5, high=None)
    (part,) = report.verdict_parts([wide, open_ended], {})
    first, second = (reading["plot"] for reading in part["groups"][0]["claims"][0]["readings"])
    assert first["low"] < first["threshold"] == first["value"] < first["high"]
    assert first["value"] < second["low"] < second["value"] < first["high"] < second["high"] == 100


def test_tables_read_back_as_they_were_written(study: StudyConfig) -> None:
    table = tables.table1(load_evidence(study))
    title, notes, blocks = report.read_markdown(printing.to_markdown(table))
    assert (title, notes) == (table.title, list(table.notes))
    assert [(b.caption, list(b.head), [list(row) for row in b.rows]) for b in blocks] == [
        (b.caption, list(b.head), [list(row) for row in b.rows]) for b in table.blocks
    ]
    odd = replace(table, blocks=[tables.Block("|x|", ["a|b", "c"], [["1|", ""], ["–", "|"]])])
    assert report.read_markdown(printing.to_markdown(odd))[2][0].rows == [["1|", ""], ["–", "|"]]


def test_a_csv_without_md_joins_values_with_their_intervals(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    path.write_text("arm,rate,rate_low,rate_high,note\nsft,2,1,3,\nbase,5,,,x\n")
    block = report.read_csv_block(path)
    assert (block.head, block.rows) == (["Arm", "Rate", "Note"], [["SFT", "2 [1, 3]", "–"], ["Base", "5", "x"]])


def test_the_cost_table_has_seconds_and_memory_where_they_were_noted(study: StudyConfig) -> None:
    path = study.root / "costs.json"
    spent = json.loads(path.read_text())
    for seed, seconds in enumerate((9.0, 10.0, 14.0)):
        spent["arms"]["diffusion_dpo"][f"seed{seed}"] |= {"seconds": seconds, "peak_memory_bytes": (1 + seed) * 2**29}
    del spent["arms"]["sft"]
    write_json(path, spent)
    table = report.load_tables(study)["costs"]
    rows = {row[0]: row for row in table.blocks[0].rows}
    assert table.blocks[0].head[-2:] == ["Seconds", "Peak memory, GiB"]
    assert rows["Diffusion-DPO"][-3:] == ["10,000", "11.0 (9.0 to 14.0)", "1.50"]
    assert rows["Base"][-2:] == rows["SFT"][-2:] == ["–", "–"], "one spent nothing, the other is not known"
    assert ", on cpu, where other jobs" in table.notes[-1]
    path.unlink()
    assert report.load_tables(study)["costs"].blocks[0].head[-1] == "UNet evaluations"


def test_the_controls_are_those_of_the_table(study: StudyConfig, parts: Parts) -> None:
    found = parts.json("data")["controls"]
    rows = list(csv.DictReader((study.root / "tables" / "controls.csv").open()))
    assert len(found) == len(rows) > 0
    assert found[5]["gain"][0] == float(rows[5]["minus_base"]) and found[5]["labels"] == rows[5]["labels"]


def test_missing_parts_are_named_with_the_command_that_makes_them(study: StudyConfig) -> None:
    for folder in ("images/p_single", "images/sft", "scores/sft", "runs/sft"):
        shutil.rmtree(study.root / folder)
    (study.root / "scores" / "q_single" / "seed2.parquet").unlink()
    (study.root / "claims.json").unlink()
    parts = Parts(report.page(study))
    assert "verdicts" not in parts.ids() and {"curves", "tables", "pictures", "missing"} <= parts.ids()
    made = {part.what: part.command for part in report.missing_parts(load_evidence(study), report.load_tables(study))}
    at_config = "--configfile config/toy.yaml"
    assert made == {
        "the verdicts have not been judged": f"uv run snakemake results/toy/claims.json {at_config}",
        "SFT, seeds 0, 1, 2: no scores": "uv run snakemake results/toy/scores/sft/seed0.parquet "
        f"results/toy/scores/sft/seed1.parquet results/toy/scores/sft/seed2.parquet {at_config}",
        "SFT, seeds 0, 1, 2: no images": "uv run snakemake results/toy/images/sft/seed0.parquet "
        f"results/toy/images/sft/seed1.parquet results/toy/images/sft/seed2.parquet {at_config}",
        "one timestep of q, seed 2: no scores": "uv run snakemake results/toy/scores/q_single/seed2.parquet "
        + at_config,
        "one timestep of p, seeds 0, 1, 2: no images": "uv run snakemake results/toy/images/p_single/seed0.parquet "
        f"results/toy/images/p_single/seed1.parquet results/toy/images/p_single/seed2.parquet {at_config}",
    }
    assert all(what in parts.text for what in made)
    data = parts.json("picture-data")
    assert not {"p_single", "q_single"} & set(data["arms"]), "neither has all its seeds' images and scores"


def test_a_study_without_claims_images_or_a_base_has_a_page(study: StudyConfig) -> None:
    study = study.model_copy(update={"claims": None})
    for folder in ("images", "tables"):
        shutil.rmtree(study.root / folder)
    parts = Parts(report.page(study))
    assert parts.ids() == {"curves", "missing", "environment", "commands"} and "picture-data" not in parts.scripts
    arms = {name: arm for name, arm in study.arms.items() if name != "base"}
    alone = study.model_copy(update={"arms": arms, "experiments": type(study.experiments)()})
    chart = Parts(report.page(alone)).json("data")["chart"]
    assert chart["base"] is None and chart["start"] == {} and chart["first"] == chart["arms"] == list(arms)


def test_nothing_to_report_is_an_error_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvdpoError, match="neither scores nor verdicts.*make reproduce STUDY=toy"):
        report.page(make_config())


def test_the_environment_names_what_differs_between_runs(study: StudyConfig) -> None:
    path = study.root / "runs" / "sft" / "seed1" / "run.json"
    record = json.loads(path.read_text()) | {"git_commit": "def", "git_dirty": True, "versions": {"torch": "9"}}
    write_json(path, record)
    rows = dict(report.environment(study, report.records(study)))
    runs = 3 * (len(study.arms) - 1)
    assert sorted(rows["Commit"]) == [
        f"abc ({runs + 1} evaluations, {runs - 1} trainings)",
        "def with local changes (1 training)",
    ]
    assert rows["Libraries"] == ["torch 9"] and rows["Lock (sha256 of uv.lock)"] == ["l"]
    assert rows[f"{runs} trainings"][0].startswith(f"{sum(report_evals(study)):,} UNet evaluations, ")


def report_evals(study: StudyConfig) -> list[int]:
    paths = (study.root / "runs").glob("*/seed*/run.json")
    return [json.loads(path.read_text())["unet_evals"] for path in paths if path.parent.parent.name != "base"]


def test_same_inputs_give_the_same_bytes(study: StudyConfig) -> None:
    (path,) = report.write(study)
    first = path.read_bytes()
    report.write(study)
    assert path == study.root / "report.html" and path.read_bytes() == first


def test_colours_keep_apart_from_a_dark_page() -> None:
    study = make_config()
    looks = report.styles(study)
    assert looks["diffusion_dpo"]["light"] == "#000000" and looks["diffusion_dpo"]["dark"] == "#ffffff"
    assert report.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert all(report.contrast(look["dark"], report.DARK_BACKGROUND) >= 4 for look in looks.values())
    assert looks["inversion_dpo_implied"]["light"] == looks["inversion_dpo_implied_shuffled"]["light"]
    assert looks["inversion_dpo_code"]["dash"] != looks["inversion_dpo_code_published"]["dash"]
    css = Path(report.__file__).with_name("report_page").joinpath("page.css").read_text()
    dark = css[css.index("prefers-color-scheme") :]
    assert f"--card: {report.DARK_BACKGROUND};" in dark[: dark.index("}")]
