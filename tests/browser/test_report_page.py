"""The report in a real browser, opened as a file: filters, curves, sorting, pictures, keyboard, and a phone's width.

Of a made-up study, and of the reference study as it is published.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from evidence_fixture import make_study, write_scores
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from invdpo.config import StudyConfig, load_study
from invdpo.evidence import claims, report, tables
from invdpo.evidence.ledger import read_verdicts
from invdpo.evidence.load import load_evidence
from invdpo.evidence.rebuild import REFERENCE

PATIENCE = 60_000  # ms; a busy machine is slow, not wrong
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
PROMPTS = 12
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / REFERENCE / "shapes"
MOST_BYTES = 15_000_000


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudyConfig]:
    """A small study with its report in results/toy of the working directory; one prompt tries to break out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("report"))
        study = make_study(prompts=PROMPTS)
        for path in (study.root / "scores").rglob("*.parquet"):
            rows = pd.read_parquet(path)
            rows.loc[rows["prompt_id"] == 3, "prompt"] = HOSTILE
            write_scores(path, rows)
        tables.write(study)
        claims.write(study)
        report.write(study)
        yield study


@pytest.fixture(scope="module")
def reference_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the README's study, made from nothing else than what is in the repository."""
    path = tmp_path_factory.mktemp("reference") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        study = load_study(PUBLISHED / "study.json").placed(PUBLISHED)
        path.write_text(report.page(study), encoding="utf-8")
    return path


@contextmanager
def visiting(chromium: Browser, file: Path) -> Iterator[Callable[..., Page]]:
    """Opens the page; fails the test for any request beyond the file itself and for any error on the console."""
    contexts, requests, errors = [], [], []
    url = file.resolve().as_uri()

    def new(**options: object) -> Page:
        context = chromium.new_context(**({"viewport": DESKTOP} | options))
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("request", lambda request: requests.append(request.url))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#plot svg")).to_be_visible(timeout=PATIENCE)
        return page

    yield new
    for context in contexts:
        context.close()
    assert [
        asked for asked in requests if asked.split("#")[0] != url and not asked.startswith(("data:", "blob:"))
    ] == []
    assert errors == []


@pytest.fixture
def visit(chromium: Browser, study: StudyConfig) -> Iterator[Callable[..., Page]]:
    with visiting(chromium, study.root / "report.html") as new:
        yield new


@pytest.fixture
def visit_reference(chromium: Browser, reference_page: Path) -> Iterator[Callable[..., Page]]:
    with visiting(chromium, reference_page) as new:
        yield new


def pictures(page: Page) -> Page:
    """Go to the image browser and wait until it is filled."""
    page.locator("#pictures").scroll_into_view_if_needed()
    expect(page.locator("#rows .row").first).to_be_visible(timeout=PATIENCE)
    return page


def gains(page: Page) -> list[float]:
    return [float(row.get_attribute("data-gain") or "nan") for row in page.locator("#rows .row").all()]


def texts(page: Page, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def no_sideways_scroll(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_verdicts_come_first_and_are_filtered(visit: Callable[..., Page]) -> None:
    page = visit()
    assert page.locator("main > section").first.get_attribute("id") == "verdicts"
    every = page.locator(".reading").count()
    button = page.get_by_role("button", name=re.compile("✗ not supported|not supported"))
    wanted = int(re.findall(r"\d+", button.inner_text())[0])
    assert 0 < wanted < every
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    shown = page.locator(".reading:visible")
    assert shown.count() == wanted
    assert set(texts(page, ".reading:visible .badge")) == {"✗ not supported"}
    assert page.locator(".claim:visible").count() < page.locator(".claim").count()
    assert f"{wanted} of {every} shown" in page.locator("#verdicts-shown").inner_text()
    button.click()
    assert page.locator(".reading:visible").count() == every


def test_the_overview_comes_before_the_list_and_leads_into_it(visit: Callable[..., Page]) -> None:
    page = visit()
    marks = page.locator(".overview .mark")
    assert marks.count() == page.locator(".reading").count() > 100
    assert len(set(texts(page, ".overview .mark"))) == 4, "a shape a verdict, not a colour alone"
    box = page.locator(".overview").bounding_box()
    assert box is not None and box["y"] < DESKTOP["height"] / 2, "on the first screen"
    page.locator('[data-filter="not run"]').click()
    mark = page.locator(".overview .mark.supported").first
    claim = page.locator(mark.get_attribute("href") or "")
    expect(claim).to_be_hidden()
    mark.click()
    expect(claim).to_be_in_viewport()
    row = page.locator(".overview tbody th a").first
    row.focus()
    page.keyboard.press("Enter")
    expect(page.locator(row.get_attribute("href") or "")).to_be_in_viewport()


def test_a_link_into_what_is_closed_opens_it(visit: Callable[..., Page]) -> None:
    page = visit()
    entry = page.locator("#deviation-sign")
    expect(entry).to_be_hidden()
    page.evaluate("location.hash = 'deviation-sign'")
    expect(entry).to_be_in_viewport()
    link = entry.get_by_role("link").first
    link.click()
    expect(page.locator(link.get_attribute("href") or "")).to_be_in_viewport()


def test_on_paper_everything_is_open_and_nothing_is_cut(visit: Callable[..., Page]) -> None:
    page = visit(color_scheme="dark")
    closed = page.locator("details.block:not([open])").count()
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert closed > 0 and page.locator("details.block:not([open])").count() == 0
    cut = "[...document.querySelectorAll('.scroll')].filter(e => getComputedStyle(e).overflowY !== 'visible').length"
    assert page.evaluate(cut) == 0
    expect(page.locator("nav")).to_be_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.block:not([open])").count() == closed


def test_a_verdict_opens_by_keyboard_to_files_and_command(visit: Callable[..., Page]) -> None:
    page = visit()
    reading = page.locator(".reading").first
    expect(reading.locator("dl")).to_be_hidden()
    reading.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(reading.locator("dl")).to_be_visible()
    behind = reading.locator("dl").inner_text()
    assert "scores/inversion_dpo_paper" in behind  # from the study's folder, where the page lies
    assert "uv run snakemake results/toy/claims.json --configfile config/toy.yaml" in behind


def test_curves_change_with_the_axis_the_score_and_the_legend(visit: Callable[..., Page]) -> None:
    page = visit()
    line = page.locator("#plot g[data-arm=diffusion_dpo] path.line")
    paths = [line.get_attribute("d")]
    for axis, words in (("unet_evals", "UNet evaluations"), ("seconds", "training seconds")):
        page.locator(f"input[name=axis][value={axis}]").check(force=True)
        expect(page.locator("#plot svg")).to_have_attribute("aria-label", re.compile(words))
        paths.append(line.get_attribute("d"))
    page.locator("#curve-score").select_option("pickscore")
    paths.append(line.get_attribute("d"))
    assert len(set(paths)) == 4
    for path in paths:
        places = [float(place.split(",")[0]) for place in re.split("[ML]", path or "")[1:]]
        assert places == sorted(set(places)), "from left to right"
    assert paths[0].count("L") == 3 and paths[1].count("L") == 2, "a log scale has no place for step 0"
    drawn = page.locator("#plot path.line").count()
    page.locator("#legend input[value=diffusion_dpo]").uncheck()
    expect(line).to_have_count(0)
    page.locator("#legend input[value=diffusion_dpo_shuffled]").check()
    assert page.locator("#plot path.line").count() == drawn
    page.locator("#bands").uncheck()
    expect(page.locator("#plot path.band")).to_have_count(0)
    page.get_by_role("button", name="none").click()
    expect(page.locator("#plot path.line")).to_have_count(0)
    page.get_by_role("button", name="all", exact=True).click()
    expect(page.locator("#plot path.line")).to_have_count(14)


def test_points_say_their_numbers(visit: Callable[..., Page], study: StudyConfig) -> None:
    page = visit()
    page.locator("#plot").scroll_into_view_if_needed()
    page.locator("#plot g[data-arm=diffusion_dpo] circle:not(.point)").last.hover()
    tip = page.locator(".tip").inner_text()
    mean = load_evidence(study).final("diffusion_dpo", "oracle_utility").mean()
    assert "Diffusion-DPO\nstep 40" in tip and f"{mean:.3f}"[:4] in tip
    page.locator("#curves details summary").click()
    assert "Diffusion-DPO" in page.locator("#curve-table tbody").inner_text()


def test_tables_sort_numbers_as_numbers_and_missing_ones_last(visit: Callable[..., Page]) -> None:
    page = visit()
    table = page.locator("#table-costs table")
    head = table.get_by_role("columnheader", name="UNet evaluations")

    def column() -> list[str]:
        return [row.split("\t")[3] for row in table.locator("tbody").inner_text().splitlines()]

    original = column()
    numbers = sorted(int(text.replace(",", "")) for text in original)
    assert max(numbers) >= 100_000, "as text, 100,000 comes before 4,000"
    cells = ["12,500", "+0.05 [-0.1, +0.2]", "-1.5e-03 [0, 1]", "− 1", "N = 10", ".232 / .207"]
    assert page.evaluate("cells => cells.map(sortValue)", cells) == [12500, 0.05, -0.0015, None, None, 0.232]
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    expect(head).to_have_attribute("aria-sort", "ascending")
    assert [int(text.replace(",", "")) for text in column()] == numbers
    head.get_by_role("button").click()
    assert [int(text.replace(",", "")) for text in column()] == numbers[::-1]
    head.get_by_role("button").click()
    assert column() == original and head.get_attribute("aria-sort") is None

    block = page.locator("#table-table1 details.block").nth(1)
    block.locator("summary").click()
    rows = block.locator("tbody tr")
    block.get_by_role("columnheader", name="PickScore").get_by_role("button").click()
    cells = texts(page, "#table-table1 details.block:nth-of-type(2) td:nth-child(3)")
    values = [float(text.split(" ")[0]) for text in cells if text != "–"]
    assert len(values) > 4 and values == sorted(values) and rows.last.inner_text().startswith("Base"), (
        "the base differs by – from itself"
    )
    block.get_by_role("columnheader", name="PickScore").get_by_role("button").click()
    assert rows.last.inner_text().startswith("Base")


def test_the_largest_win_comes_first_and_the_largest_loss_on_request(
    visit: Callable[..., Page], study: StudyConfig
) -> None:
    page = pictures(visit())
    page.locator("#first").select_option("q_single")
    page.locator("#second").select_option("p_single")
    page.locator("#picture-score").select_option("pickscore")
    win, start = load_evidence(study).paired("p_single", "q_single", "pickscore")
    gain = win - start  # (seeds, prompts by id as text)
    assert gain.min() < 0 < gain.max()
    assert gains(page)[0] == pytest.approx(gain.max(), rel=1e-3)
    assert gains(page) == sorted(gains(page), reverse=True)
    prompt = load_evidence(study).scores["q_single"].texts[int(np.unravel_index(gain.argmax(), gain.shape)[1])]
    row = page.locator("#rows .row").first
    assert prompt in row.locator("h3").inner_text()
    assert texts(page, "#rows .row:first-child .who")[:2] == ["one timestep of q", "one timestep of p"]
    page.locator("#order").select_option("loss")
    assert gains(page)[0] == pytest.approx(gain.min(), rel=1e-3)
    page.locator("#only").select_option("win")
    assert gains(page)[0] == pytest.approx(gain[gain > 0].min(), rel=1e-3) and min(gains(page)) > 0
    page.locator("#only").select_option("")
    page.locator("#order").select_option("prompt")
    page.locator("#seed").select_option("1")
    assert "seed 1" in row.inner_text() and "take 0" in row.inner_text()
    assert page.locator("#rows .row").count() == 8
    page.locator("#more").click()
    assert page.locator("#rows .row").count() == PROMPTS
    page.locator("#search").fill("take 11")
    assert page.locator("#rows .row").count() == 1
    score = texts(page, "#rows .score")[0]
    page.locator("#all-scores").check()
    assert "Aesthetic" in row.inner_text() and score in row.inner_text()


def test_tiles_show_the_pictures_of_their_prompt(visit: Callable[..., Page], study: StudyConfig) -> None:
    page = pictures(visit())
    page.locator("#order").select_option("prompt")
    page.locator("#seed").select_option("2")
    page.locator("#second").select_option("sft")
    images = pd.read_parquet(study.root / "images" / "sft" / "seed2.parquet").set_index("prompt_id")
    tile = page.locator("#rows .row").nth(5).locator(".tile[data-arm=sft] .image")
    tile.scroll_into_view_if_needed()
    assert tile.get_attribute("aria-label") == "SFT, seed 2: a red circle left of a blue square, take 5"
    page.wait_for_timeout(300)  # the sheet is decoded
    with Image.open(io.BytesIO(tile.screenshot())) as shot, Image.open(io.BytesIO(images.at[5, "png"])) as image:
        box = (4, 4, shot.width - 4, shot.height - 4)  # without the frame
        seen = np.asarray(shot.convert("RGB").crop(box).resize((48, 48))).astype(float)
        meant = np.asarray(image.convert("RGB").resize(shot.size).crop(box).resize((48, 48))).astype(float)
    assert np.abs(seen - meant).mean() < 12


def test_a_prompt_cannot_break_out(visit: Callable[..., Page]) -> None:
    page = pictures(visit())
    page.locator("#search").fill("</script>")
    row = page.locator("#rows .row").first
    assert HOSTILE in row.locator("h3").inner_text()
    assert page.title() == "toy: does Inversion-DPO hold?"
    assert page.locator("#rows img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_tables_in_their_box_and_never_the_page(visit: Callable[..., Page], scheme: str) -> None:
    page = visit(viewport=PHONE, color_scheme=scheme)
    assert no_sideways_scroll(page)
    page.evaluate("document.querySelectorAll('details').forEach(node => node.open = true)")
    pictures(page)
    page.locator("#all-scores").check()
    assert no_sideways_scroll(page)
    wide = page.locator("#table-table1 .scroll").first
    assert wide.evaluate("node => node.scrollWidth > node.clientWidth") and wide.get_attribute("tabindex") == "0"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 128) == (scheme == "dark")


def test_everything_has_a_name_and_headings_do_not_skip(visit: Callable[..., Page]) -> None:
    page = pictures(visit())
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => e.tagName)")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, select, input, summary, [role=img], img')]
        .filter(e => !(e.getAttribute('aria-label') || e.alt || e.textContent.trim() || e.labels?.length))
        .map(e => e.outerHTML)"""
    )
    assert nameless == []


COLOURS = """node => {
    const clear = (node) => /, 0\\)$|transparent/.test(getComputedStyle(node).backgroundColor);
    let behind = node;
    while (clear(behind)) behind = behind.parentElement;
    const style = getComputedStyle(node);
    return [node instanceof SVGElement ? style.fill : style.color, getComputedStyle(behind).backgroundColor];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(visit: Callable[..., Page], scheme: str) -> None:
    """WCAG AA: 4.5 to 1."""
    page = visit(color_scheme=scheme)
    kinds = [
        f".{mark}.{kind}" for mark in ("badge", "count", "mark") for kind in ("supported", "not-supported", "not-run")
    ]
    kinds += [".overview .head th", ".overview a", ".sum .supported", ".sum .not-run", ".why", ".deviation summary"]
    kinds += [".badge.inconclusive", ".count.all", ".note", "nav a", ".paper", ".source", ".hint", "#plot text"]
    for selector in [*kinds, ".reading .name", "td", "thead button", ".switch input:checked + span", ".legend label"]:
        colours = [
            "#" + "".join(f"{int(channel):02x}" for channel in re.findall(r"\d+", text)[:3])
            for text in page.locator(selector).first.evaluate(COLOURS)
        ]
        assert report.contrast(*colours) >= 4.5, (selector, colours)


def test_the_reference_study_has_a_small_page_with_every_claim(
    visit_reference: Callable[..., Page], reference_page: Path
) -> None:
    assert reference_page.stat().st_size < MOST_BYTES
    page = visit_reference()
    rows = read_verdicts(PUBLISHED / "claims.json")
    ids = page.evaluate("[...document.querySelectorAll('article.claim')].map(e => e.id)")
    assert sorted(ids) == sorted({f"claim-{row.id}" for row in rows}) and len(ids) > 40
    for name in {row.id for row in rows}:
        readings = [row for row in rows if row.id == name]
        assert page.locator(f"#claim-{name} h5").inner_text().startswith(readings[0].question)
        badges = [f"{report.MARKS[row.verdict]} {row.verdict}" for row in readings]
        assert texts(page, f"#claim-{name} .badge") == badges
    assert page.locator("main > section").first.get_attribute("id") == "verdicts"
    assert page.locator(".overview .mark").count() == len(rows)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_reference_studys_page_never_scrolls_sideways(
    visit_reference: Callable[..., Page], size: dict[str, int], scheme: str
) -> None:
    page = visit_reference(viewport=size, color_scheme=scheme)
    assert no_sideways_scroll(page)
    page.evaluate("document.querySelectorAll('details').forEach(node => node.open = true)")
    pictures(page).locator("#all-scores").check()
    assert no_sideways_scroll(page)


def test_the_reference_studys_pictures_stand_side_by_side_with_their_scores(
    visit_reference: Callable[..., Page],
) -> None:
    page = pictures(visit_reference())
    arms, scorer = ["diffusion_dpo", "inversion_dpo_implied"], "pickscore"
    page.locator("#first").select_option(arms[0])
    page.locator("#second").select_option(arms[1])
    page.locator("#picture-score").select_option(scorer)
    scores = {}
    for arm in arms:
        images = pq.read_table(PUBLISHED / "images" / arm / "seed0.parquet").to_pandas()
        rows = pd.read_parquet(PUBLISHED / "scores" / arm / "seed0.parquet")
        rows = rows[(rows["scorer"] == scorer) & rows["image_sha256"].isin(images["sha256"])]
        scores[arm] = rows.set_index("prompt")["score"]
    gain = (scores[arms[1]] - scores[arms[0]]).dropna()
    assert gain.min() < 0 < gain.max() and f"{len(gain)} of 96 prompts" in page.locator("#pictures .note").inner_text()
    page.locator("#more").click()
    for order, expected in (("win", gain.sort_values(ascending=False)), ("loss", gain.sort_values())):
        page.locator("#order").select_option(order)
        if page.locator("#more").is_visible():
            page.locator("#more").click()
        assert gains(page) == pytest.approx(expected.tolist(), abs=1e-5)
        row = page.locator("#rows .row").first
        assert str(expected.index[0]) in row.locator("h3").inner_text()
        tiles = [row.locator(f".tile.main[data-arm={arm}]") for arm in arms]
        boxes = [tile.bounding_box() for tile in tiles]
        assert boxes[0] is not None and boxes[1] is not None
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
        for tile, arm in zip(tiles, arms, strict=True):
            assert float(tile.locator(".score").inner_text()) == pytest.approx(scores[arm][expected.index[0]], rel=1e-3)
            assert "blob:" in tile.locator(".image").evaluate("node => getComputedStyle(node).backgroundImage")


def test_the_reference_studys_curves_and_tables_answer(visit_reference: Callable[..., Page]) -> None:
    page = visit_reference()
    line = page.locator("#plot g[data-arm=inversion_dpo_implied] path.line")
    seen = set()
    for axis, words in (("step", "optimizer steps"), ("unet_evals", "UNet evaluations"), ("seconds", "seconds")):
        page.locator(f"input[name=axis][value={axis}]").check(force=True)
        expect(page.locator("#plot svg")).to_have_attribute("aria-label", re.compile(words))
        seen.add(line.get_attribute("d"))
    assert len(seen) == 3
    head = page.locator("#table-costs").get_by_role("columnheader", name="Seconds")
    column = head.evaluate("node => node.cellIndex")
    for order in ("ascending", "descending"):
        head.get_by_role("button").click()
        expect(head).to_have_attribute("aria-sort", order)
        cells = texts(page, f"#table-costs tbody tr > :nth-child({column + 1})")
        values = [float(text.split(" ")[0]) for text in cells if text != "–"]
        assert len(values) > 20 and values == sorted(values, reverse=order == "descending")
