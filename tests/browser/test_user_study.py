"""The user study in a real browser: the rater's whole way, what goes wrong on the way, and the experimenter's page."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect
from user_study_fixture import CODE, PASSWORD, PROMPT, Server, write_bundle

from user_study_app.stimuli import Stimuli
from user_study_app.storage import Storage

PATIENCE = 60_000  # ms; a busy machine is slow, not wrong
MIN_VIEW_MS = 300


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("study"), size=64, min_view_ms=MIN_VIEW_MS)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    running = Server(bundle, f"sqlite:///{bundle.parent / 'votes.db'}")
    running.start()
    yield running
    running.kill()


@pytest.fixture
def db(server: Server) -> Iterator[Storage]:
    """The running server's database, emptied of raters, neither paused nor open to platforms."""
    storage = Storage(server.database)
    for row in storage.raters():
        storage.delete(row["id"], "test")
    storage.set_flag("paused", False, "test")
    storage.set_flag("crowd", False, "test")
    yield storage
    storage.close()


class Visit:
    """A browser of one person; fails the test for requests to other servers, errors of the page and of its policy."""

    def __init__(self, context: BrowserContext, server: Server) -> None:
        self.context, self.server = context, server
        self.outside: list[str] = []
        self.errors: list[str] = []
        context.set_default_timeout(PATIENCE)
        context.on("request", self._request)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        context.on("console", self._console)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.server.url, "data:", "blob:")):
            self.outside.append(request.url)

    def _console(self, message: Any) -> None:
        # The network's own errors are what some tests are about.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def open(self, link: str) -> Page:
        page = self.context.new_page()
        page.goto(link)
        return page


@pytest.fixture
def visit(chromium: Browser, server: Server) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def new(**options: Any) -> Visit:
        visits.append(
            Visit(
                chromium.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 800}), **options),
                server,
            )
        )
        return visits[-1]

    yield new
    for each in visits:
        each.context.close()
    assert [each.outside for each in visits] == [[] for _ in visits]
    assert [each.errors for each in visits] == [[] for _ in visits]


def link_of(db: Storage, server: Server) -> str:
    return f"{server.url}/#{db.invite(1, 'test')[0]}"


def view(page: Page, name: str) -> None:
    """Wait until the page shows this view."""
    expect(page.locator(f"body[data-view={name}]")).to_be_attached(timeout=PATIENCE)


def ready(page: Page) -> None:
    """Wait until a choice is taken."""
    expect(page.locator("body[data-view=trial] #choose-tie[aria-disabled=false]")).to_be_visible(timeout=PATIENCE)


def begun(page: Page) -> Page:
    """Through consent and instructions to the first pair."""
    view(page, "consent")
    page.get_by_label("I have read this page and agree to take part.").check()
    page.get_by_role("button", name="Continue").click()
    view(page, "instructions")
    page.get_by_role("button", name="Start with practice").click()
    ready(page)
    return page


def press(page: Page, key: str) -> None:
    """Answer the pair with a key and wait for the next (or for another view)."""
    ready(page)
    before = page.locator("#where").inner_text()
    page.keyboard.press(key)
    page.wait_for_function(
        "before => document.body.dataset.view !== 'trial' || document.getElementById('where').textContent !== before",
        arg=before,
    )


def choices(db: Storage) -> list[str]:
    return [vote["choice"] for vote in db.votes()]


def test_the_whole_way_by_mouse(db: Storage, server: Server, visit: Callable[..., Visit], bundle: Path) -> None:
    page = visit().open(link_of(db, server))
    view(page, "consent")
    for text in ("A study of pictures", "Content warning", "Approved as 2026-17.", "the study's team"):
        expect(page.get_by_text(text).first).to_be_visible()
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_text("Please tick the box if you agree.")).to_be_visible()
    assert db.raters()[0]["consent_at"] is None
    begun(page)
    assert db.raters()[0]["consent_at"] is not None
    who = db.raters()[0]["id"]
    expect(page.locator("#footer-number")).to_have_text(f"Participant number {who}")
    expect(page.locator("#where")).to_have_text("Practice 1 of 1")

    # enlarge, and back by click and by Escape
    page.get_by_role("button", name="Left image. Enlarge it.").click()
    expect(page.locator("#large img")).to_be_visible()
    page.keyboard.press("ArrowLeft")  # answers nothing while the image is enlarged
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Right image. Enlarge it.").click()
    page.keyboard.press("Escape")
    expect(page.locator("#large")).to_be_hidden()
    assert choices(db) == []

    stimuli, seen = Stimuli(bundle), []
    for at, name in enumerate(["Left", "Right", "Equal", "problem", "Left", "Right", "Left", "Equal", "Right"]):
        if at == 5:
            view(page, "break")
            expect(page.get_by_text("You have answered 4 of 8 pairs.")).to_be_visible()
            page.get_by_role("button", name="Go on").click()
        ready(page)
        seen.append(page.locator("#prompt").inner_text())
        expect(page.locator("#where")).to_have_text(f"Pair {at} of 8" if at else "Practice 1 of 1")
        if name == "problem":
            page.get_by_role("button", name="Report a problem").click()
            page.get_by_label("What is wrong?").fill("the left one is empty")
            page.get_by_role("button", name="Send and go on").click()
        else:
            page.get_by_role("button", name=name if name == "Equal" else f"{name} image is better").click()
        page.wait_for_function("() => document.getElementById('choose-tie').getAttribute('aria-disabled') === 'true'")
    view(page, "finish")
    expect(page.get_by_label("Completion code")).to_have_text(CODE)
    expect(page.locator("#view-finish .rater-id")).to_have_text(who)
    assert choices(db) == ["left", "right", "tie", "problem", "left", "right", "left", "tie", "right"]
    assert db.votes()[3]["problem_text"] == "the left one is empty"
    assert seen == [stimuli.pair_of(0, at).prompt for at in range(9)]
    # a prompt is text, whatever it holds
    assert PROMPT in seen and page.evaluate("window.hacked") is None
    page.reload()
    view(page, "finish")


def test_the_whole_way_by_keyboard(db: Storage, server: Server, visit: Callable[..., Visit]) -> None:
    page = visit().open(link_of(db, server))
    view(page, "consent")

    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            active = page.evaluate("() => document.activeElement.closest('label, button')?.innerText ?? ''")
            if name in active:
                return
        raise AssertionError(f"Tab does not reach {name}")

    tab_to("I have read")
    page.keyboard.press("Space")
    tab_to("Continue")
    page.keyboard.press("Enter")
    view(page, "instructions")
    page.keyboard.press("Enter")  # the button has the focus
    ready(page)
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown"):
        press(page, key)
    ready(page)
    page.keyboard.press("p")
    expect(page.locator("#problem")).to_be_visible()
    page.keyboard.type("p and ")
    page.keyboard.press("ArrowLeft")  # moves in the text
    page.keyboard.press("Escape")
    expect(page.locator("#problem")).to_be_hidden()
    assert choices(db) == ["left", "right", "tie"]
    # a key held down answers one pair
    page.keyboard.down("ArrowRight")
    for _ in range(30):
        page.keyboard.down("ArrowRight")
        page.wait_for_timeout(30)
    page.keyboard.up("ArrowRight")
    ready(page)
    assert choices(db) == ["left", "right", "tie", "right"]
    # keys with Alt, Ctrl or Shift are the browser's own
    for key in ("Shift+ArrowLeft", "Control+ArrowLeft"):
        page.keyboard.press(key)
    # by Tab and Enter too; the focus stays, and the next pair is not answered with it
    tab_to("Equal")
    page.keyboard.press("Enter")
    view(page, "break")
    page.keyboard.press("Enter")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft"):
        press(page, key)
    view(page, "finish")
    assert choices(db) == ["left", "right", "tie", "right", "tie", "tie", "tie", "tie", "left"]


def test_a_screen_reader_is_told_what_is_there(db: Storage, server: Server, visit: Callable[..., Visit]) -> None:
    page = begun(visit().open(link_of(db, server)))
    assert page.locator("html").get_attribute("lang") == "en"
    for name in (
        "Left image is better",
        "Right image is better",
        "Equal",
        "Report a problem",
        "Left image. Enlarge it.",
    ):
        expect(page.get_by_role("button", name=name)).to_have_count(1)
    expect(page.get_by_role("progressbar", name="Progress")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_text(page.locator("#prompt").inner_text())
    expect(page.get_by_role("img", name="Left image")).to_have_count(1)
    press(page, "ArrowLeft")
    ready(page)
    expect(page.locator("#announce[role=status]")).to_have_text(re.compile("^Pair 1 of 8. "))


def test_resume_after_the_server_is_killed(
    db: Storage, server: Server, visit: Callable[..., Visit], chromium: Browser
) -> None:
    link = link_of(db, server)
    page = begun(visit().open(link))
    press(page, "ArrowLeft")
    ready(page)
    where = page.locator("#where").inner_text()
    server.kill()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#notice")).to_have_text("The connection is lost. Trying again…", timeout=PATIENCE)
    server.start()
    # the page goes on by itself, and the vote is there once
    page.wait_for_function("before => document.getElementById('where').textContent !== before", arg=where)
    ready(page)
    assert choices(db) == ["left", "right"]
    where, prompt = page.locator("#where").inner_text(), page.locator("#prompt").inner_text()
    page.context.close()  # the browser too
    server.kill()
    server.start()
    again = visit().open(link)
    ready(again)  # no consent, no instructions: where it was
    assert (again.locator("#where").inner_text(), again.locator("#prompt").inner_text()) == (where, prompt)
    press(again, "ArrowDown")
    assert choices(db) == ["left", "right", "tie"]


def test_a_double_click_is_one_answer(db: Storage, server: Server, visit: Callable[..., Visit]) -> None:
    page = begun(visit().open(link_of(db, server)))
    page.locator("#choose-left").dblclick()
    page.wait_for_timeout(300)
    ready(page)
    assert choices(db) == ["left"]
    # the second click of a slow double click, which comes when the next pair already takes an answer
    page.locator("#choose-left").hover()
    page.mouse.down(click_count=2)
    page.mouse.up(click_count=2)
    page.wait_for_timeout(500)
    assert choices(db) == ["left"]
    page.locator("#choose-right").click()
    page.wait_for_timeout(300)
    ready(page)
    assert choices(db) == ["left", "right"]


def test_two_tabs_give_one_answer(db: Storage, server: Server, visit: Callable[..., Visit]) -> None:
    someone, link = visit(), link_of(db, server)
    one = begun(someone.open(link))
    two = someone.open(link)
    two.get_by_role("button", name="Start with practice").click()
    ready(two)
    one.keyboard.press("ArrowLeft")
    expect(one.locator("#where")).to_have_text("Pair 1 of 8", timeout=PATIENCE)
    two.locator("#choose-right").click()  # this tab still shows the pair before
    expect(two.locator("#where")).to_have_text("Pair 1 of 8", timeout=PATIENCE)
    expect(two.locator("#notice")).to_have_text("You have already answered this pair; your first answer was kept.")
    assert choices(db) == ["left"]
    press(two, "ArrowRight")
    press(one, "ArrowRight")  # the same answer from the tab behind is taken as that, and moves on
    assert choices(db) == ["left", "right"]
    ready(one)
    expect(one.locator("#where")).to_have_text("Pair 2 of 8")


def test_the_back_button_loses_and_repeats_nothing(db: Storage, server: Server, visit: Callable[..., Visit]) -> None:
    page = begun(visit().open(link_of(db, server)))
    press(page, "ArrowLeft")
    ready(page)
    where = page.locator("#where").inner_text()
    page.goto(f"{server.url}/admin/login")
    page.go_back()
    ready(page)
    assert page.locator("#where").inner_text() == where
    press(page, "ArrowRight")
    assert choices(db) == ["left", "right"]


def test_slow_images_are_shown_together_and_the_clock_starts_then(
    db: Storage, server: Server, visit: Callable[..., Visit]
) -> None:
    page = visit().open(link_of(db, server))
    view(page, "consent")
    slow: list[str] = []

    def delay(route: Route) -> None:
        if not slow or route.request.url in slow:  # the first image that is asked for
            slow.append(route.request.url)
            time.sleep(1.5)
        route.continue_()

    page.route("**/stim/*", delay)
    # The page is watched from inside, frame by frame, and a key is pressed in every frame until both images have been
    # there for a fifth of a second, which is less than the least time of looking.
    page.evaluate(
        """() => {
            window.frames_seen = [];
            const look = (now) => {
                const view = document.body.dataset.view;
                const images = document.querySelectorAll('.frame img').length;
                const waiting = getComputedStyle(document.getElementById('waiting')).display !== 'none';
                if (view === 'trial') window.frames_seen.push({now, images, waiting});
                const first = window.frames_seen.find(frame => frame.images === 2);
                if (first && now - first.now > 200) return;
                document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', bubbles: true}));
                requestAnimationFrame(look);
            };
            requestAnimationFrame(look);
        }"""
    )
    page.get_by_label("I have read this page and agree to take part.").check()
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("button", name="Start with practice").click()
    ready(page)
    frames = page.evaluate("window.frames_seen")
    assert {frame["images"] for frame in frames} == {0, 2}  # never one alone
    assert all(frame["waiting"] == (frame["images"] == 0) for frame in frames)
    shown = next(frame["now"] for frame in frames if frame["images"] == 2)
    assert shown - frames[0]["now"] > 1000
    assert choices(db) == []
    page.wait_for_timeout(200)
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#where")).to_have_text("Pair 1 of 8", timeout=PATIENCE)
    vote = db.votes()[0]
    whole = vote["submitted_at"] - vote["shown_at"]
    assert MIN_VIEW_MS + 200 <= vote["response_ms"] <= whole - 1000


def test_an_image_that_fails_is_fetched_again_or_reported(
    db: Storage, server: Server, visit: Callable[..., Visit]
) -> None:
    page = visit().open(link_of(db, server))
    view(page, "consent")
    page.route("**/stim/*", lambda route: route.abort())
    page.get_by_label("I have read this page and agree to take part.").check()
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("button", name="Start with practice").click()
    expect(page.get_by_text("The images cannot be loaded. Trying again…")).to_be_visible(timeout=PATIENCE)
    page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Report a problem").click()
    page.get_by_role("button", name="Send and go on").click()
    expect(page.locator("#where")).to_have_text("Pair 1 of 8", timeout=PATIENCE)
    assert choices(db) == ["problem"]
    page.unroute_all(behavior="wait")  # a request whose handler is under way would hang
    press(page, "ArrowRight")
    assert choices(db) == ["problem", "right"]


@pytest.mark.parametrize("width", [320, 360, 412])
def test_a_phone_shows_all_without_scrolling(
    db: Storage, server: Server, visit: Callable[..., Visit], width: int
) -> None:
    phone = visit(viewport={"width": width, "height": 640}, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = phone.open(link_of(db, server))
    view(page, "consent")
    wide = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) <= 0
    page.get_by_text("I have read this page and agree to take part.").tap()
    page.get_by_role("button", name="Continue").tap()
    view(page, "instructions")
    assert page.evaluate(wide) <= 0
    page.get_by_role("button", name="Start with practice").tap()
    ready(page)
    assert page.evaluate(wide) <= 0
    for name in ("choose-left", "choose-right", "choose-tie", "report"):
        box = page.locator(f"#{name}").bounding_box()
        assert box and box["height"] >= 44 and box["width"] >= 44
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 640
    left, right = (page.locator(f"#frame-{side} img").bounding_box() for side in ("left", "right"))
    assert left and right and left["width"] == right["width"] >= 0.4 * width and left["y"] == right["y"]
    page.locator("#frame-left").tap()
    expect(page.locator("#large img")).to_be_visible()
    large = page.locator("#large img").bounding_box()
    assert large and large["width"] > 1.5 * left["width"]
    page.locator("#large-close").tap()
    page.locator("#choose-right").tap()
    expect(page.locator("#where")).to_have_text("Pair 1 of 8", timeout=PATIENCE)
    assert choices(db) == ["right"]


def test_pause_and_wrong_links_are_explained(db: Storage, server: Server, visit: Callable[..., Visit]) -> None:
    someone = visit()
    page = begun(someone.open(link_of(db, server)))
    db.set_flag("paused", True, "test")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("heading", name="The study is paused")).to_be_visible(timeout=PATIENCE)
    db.set_flag("paused", False, "test")
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("button", name="Start with practice").click()
    press(page, "ArrowLeft")
    assert choices(db) == ["left"]
    nobody = visit()
    for link in (f"{server.url}/", f"{server.url}/#{'0' * 32}", f"{server.url}/?PROLIFIC_PID=abc"):
        page = nobody.open(link)
        expect(page.get_by_role("heading", name="This page cannot be opened")).to_be_visible(timeout=PATIENCE)


def test_a_crowd_platforms_link(db: Storage, server: Server, visit: Callable[..., Visit]) -> None:
    db.set_flag("crowd", True, "test")
    link = f"{server.url}/?PROLIFIC_PID=5f3c0ffee0123456789abcde&STUDY_ID=6001&SESSION_ID=7001"
    page = begun(visit().open(link))
    assert page.url == f"{server.url}/"  # the ids are gone from the address
    press(page, "ArrowLeft")
    page.reload()
    ready(page)
    expect(page.locator("#where")).to_have_text("Pair 1 of 8")
    other = visit().open(link.replace("7001", "7002"))
    ready(other)
    expect(other.locator("#where")).to_have_text("Pair 1 of 8")


def test_dark_and_light_show_images_on_the_same_ground(
    db: Storage, server: Server, visit: Callable[..., Visit]
) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = begun(visit(color_scheme=scheme).open(link_of(db, server)))
        grounds.append(page.evaluate("() => getComputedStyle(document.querySelector('.frame')).backgroundColor"))
        text, ground = page.evaluate(
            """() => [getComputedStyle(document.getElementById('prompt')).color,
                      getComputedStyle(document.body).backgroundColor]"""
        )
        assert text != ground
    assert grounds[0] == grounds[1]


def test_the_experimenters_page(
    db: Storage, server: Server, visit: Callable[..., Visit], bundle: Path, tmp_path: Path
) -> None:
    rater = begun(visit().open(link_of(db, server)))
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown"):
        press(rater, key)
    who = db.raters()[0]["id"]

    page = visit(accept_downloads=True).open(f"{server.url}/admin")
    page.get_by_label("Experimenter's password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="User study tiny")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("Running.")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text(re.compile("consented: 1 .* votes: 2 .* votes planned: 24"))).to_be_visible()
    # Gradio's tables hold a hidden copy of their rows, to measure them
    expect(page.get_by_text(who).filter(visible=True)).to_have_count(1)
    expect(page.get_by_text("3 of 9").filter(visible=True)).to_have_count(1)

    page.get_by_role("button", name="Pause the study").click()
    expect(page.get_by_role("button", name="Resume the study")).to_be_visible(timeout=PATIENCE)
    assert db.flag("paused")
    page.get_by_role("button", name="Resume the study").click()
    expect(page.get_by_role("button", name="Pause the study")).to_be_visible(timeout=PATIENCE)
    assert not db.flag("paused")

    expect(page.get_by_label("Address of the study")).to_have_value(f"{server.url}/", timeout=PATIENCE)
    page.get_by_label("How many links").fill("2")
    page.get_by_role("button", name="Make links").click()
    links = page.locator("#links textarea")
    expect(links).to_have_value(re.compile(rf"^({re.escape(server.url)}/#[0-9a-f]{{32}}\n?){{2}}$"), timeout=PATIENCE)
    invited = visit().open(links.input_value().split()[1])
    view(invited, "consent")

    page.get_by_label("Let in everybody who comes with a platform's link").check()
    page.wait_for_timeout(1500)
    assert db.flag("crowd")
    expect(page.locator("#crowd-link textarea")).to_have_value(re.compile(r"\?PROLIFIC_PID=\{\{%PROLIFIC_PID%\}\}"))

    page.locator("form[action=export] select").select_option("jsonl")
    page.locator("input[name=key]").set_input_files(bundle.parent / "key.json")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export votes").click()
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [row["choice"] for row in rows] == ["left", "right", "tie"] and all("arm_left" in row for row in rows)

    page.get_by_label("Participant number, or the id on the platform").fill("nobody")
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("Nothing was deleted.")).to_be_visible(timeout=PATIENCE)
    page.get_by_label("Participant number, or the id on the platform").fill(who)
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text(f"Participant {who} is deleted: 3 votes")).to_be_visible(timeout=PATIENCE)
    assert db.votes() == []
    rater.keyboard.press("ArrowLeft")
    expect(rater.get_by_role("heading", name="This page cannot be opened")).to_be_visible(timeout=PATIENCE)

    page.get_by_text("Audit log").click()
    expect(page.get_by_text(f"rater {who}: 3 votes").filter(visible=True)).to_have_count(1, timeout=PATIENCE)
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Experimenter's password")).to_be_visible(timeout=PATIENCE)
