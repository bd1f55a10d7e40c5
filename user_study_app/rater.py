"""What a participant meets: the page, and the endpoints under /api and /stim that it talks to.

Gradio carries the page: layout, theme, the consent text as Markdown, its checkbox and buttons. No Gradio event is
attached to anything. Gradio's events run through one queue whose messages name the function and every component, they
hold an open stream a browser, and its images are served under a hash of their content, so that a picture seen twice
can be recognised. Consent and votes therefore go through five small endpoints of our own (pages/study.js), images
through random tokens, and `security.Shield` closes every Gradio path that the page does not need. Without events the
page also needs no Gradio session: it goes on after a restart of the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import gradio as gr
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from user_study_app.security import RATER_COOKIE, Addresses, Limits, RateLimiter, digest
from user_study_app.stimuli import Stimuli, Texts
from user_study_app.storage import PLATFORM_FIELDS, UNKNOWN, Choice, Refused, Shown, State, Storage

PAGES = Path(__file__).parent / "pages"
DAY = 24 * 3600

INSTRUCTIONS = """
# How it works

You will see a **description** and **two images** made for it. Choose the image that **matches the description better**.

- **Left** or **Right** is better: press the button under the image, or the keys **←** and **→**.
- Both match equally well or equally badly: **Equal**, or the key **↓**.
- Something is wrong with an image, for instance it is missing or offensive: **Report a problem**, or the key **P**.

Click on an image to enlarge it. Look at both images before you choose, and do not think long about it. A choice cannot
be changed. You may stop at any time and go on later with the same link.
"""

FOOTER = """
<p id="footer-number">Participant number <span class="rater-id"></span></p>
<p id="announce" class="sr" role="status"></p>
"""

Secret = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
PlatformId = Annotated[str, Field(pattern=r"^[\w.@:+-]{1,128}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Entry(_Body):
    """The link's token, or what a crowd platform put into the address. Of a platform's fields only the one that names
    the person is used (see PLATFORM_FIELDS); none is stored as it is."""

    invite: Secret | None = None
    PROLIFIC_PID: PlatformId | None = None
    STUDY_ID: PlatformId | None = None
    SESSION_ID: PlatformId | None = None
    workerId: PlatformId | None = None
    assignmentId: PlatformId | None = None
    hitId: PlatformId | None = None
    participantId: PlatformId | None = None
    projectId: PlatformId | None = None

    def platform(self) -> tuple[str, str] | None:
        """The field that names the person, and its value."""
        named = ((name, getattr(self, name)) for name in PLATFORM_FIELDS)
        return next(((name, value) for name, value in named if value), None)


class Consent(_Body):
    """The version of the text that was accepted."""

    version: str = Field(max_length=64)


class Vote(_Body):
    """A choice on the trial that was displayed. `response_ms` counts from when both images were shown."""

    trial: Secret
    choice: Choice
    response_ms: int = Field(ge=0, le=DAY * 1000, strict=True)
    text: str | None = Field(default=None, max_length=500)

    @model_validator(mode="after")
    def _text_of_a_problem(self) -> Vote:
        if self.text is not None and self.choice != "problem":
            raise ValueError("only a problem has a text")
        return self

    def clean_text(self) -> str | None:
        """The text without what a database cannot keep: NUL and halves of characters."""
        return self.text and self.text.replace("\0", "").encode("utf-8", "ignore").decode()


def build_router(storage: Storage, stimuli: Stimuli, limits: Limits | None, addresses: Addresses) -> APIRouter:
    """The endpoints of the rater's page. `limits` None: no rate limit, for simulated raters."""
    router = APIRouter()
    per_rater = RateLimiter(limits.rater) if limits else None
    per_address = RateLimiter(limits.entry) if limits else None

    def session(request: Request) -> str:
        cookie = request.cookies.get(RATER_COOKIE)
        if not cookie:
            raise Refused(*UNKNOWN)
        _limit(per_rater, digest(cookie))
        return cookie

    def state_body(state: State) -> dict[str, Any]:
        body: dict[str, Any] = {
            "rater": state.rater,
            "consented": state.slot is not None,
            "consent_version": stimuli.texts.version,
            "answered": state.answered,
            "finished": state.finished,
            "paused": state.paused,
            "min_view_ms": stimuli.texts.min_view_ms,
        }
        if state.slot is not None:
            body |= {"of": len(stimuli.slots[state.slot]), "practice": stimuli.practice(state.slot)}
        if state.finished:
            body["code"] = stimuli.texts.completion_code
        return body

    def trial_body(state: State, shown: Shown | None) -> dict[str, Any]:
        if shown is None or state.slot is None:
            return {"finished": True, "code": stimuli.texts.completion_code}
        practice, every = stimuli.practice(state.slot), stimuli.texts.break_every
        counted = shown.position - practice
        body: dict[str, Any] = {
            "trial": shown.token,
            "index": shown.position,
            "of": len(stimuli.slots[state.slot]),
            "practice": practice,
            "prompt": stimuli.pair_of(state.slot, shown.position).prompt,
            "left": f"/stim/{shown.left}",
            "right": f"/stim/{shown.right}",
            "break": bool(every) and counted > 0 and counted % every == 0,
            "next": None,
        }
        if shown.following:
            left, right = shown.following
            body["next"] = {"left": f"/stim/{left}", "right": f"/stim/{right}"}
        return body

    @router.post("/api/enter")
    def enter(entry: Entry, request: Request) -> Response:
        _limit(per_address, addresses.key(request.scope))
        cookie = request.cookies.get(RATER_COOKIE)
        token = storage.enter(entry.invite, entry.platform(), cookie)
        response = JSONResponse(state_body(storage.state(token)))
        if token != cookie:
            response.set_cookie(
                RATER_COOKIE,
                token,
                max_age=90 * DAY,
                path=request.scope.get("root_path") or "/",
                secure=addresses.trust_proxy,
                httponly=True,
                samesite="strict",
            )
        return response

    @router.get("/api/state")
    def state(request: Request) -> Response:
        return JSONResponse(state_body(storage.state(session(request))))

    @router.post("/api/consent")
    def consent(body: Consent, request: Request) -> Response:
        return JSONResponse(state_body(storage.consent(session(request), body.version, stimuli)))

    @router.get("/api/trial")
    def trial(request: Request) -> Response:
        return JSONResponse(trial_body(*storage.current(session(request))))

    @router.post("/api/vote")
    def vote(body: Vote, request: Request) -> Response:
        cookie = session(request)
        # A problem may be that the images never came.
        if body.choice != "problem" and body.response_ms < stimuli.texts.min_view_ms:
            raise Refused("too_fast", 422, "Please look at both images before you choose.")
        return JSONResponse(
            trial_body(*storage.vote(cookie, body.trial, body.choice, body.response_ms, body.clean_text()))
        )

    @router.get("/stim/{token}")
    def stimulus(token: str, request: Request) -> Response:
        path = stimuli.file_of(*storage.stimulus(session(request), token))
        return Response(path.read_bytes(), media_type="image/png")

    return router


def _limit(limiter: RateLimiter | None, key: str) -> None:
    wait = limiter.wait(key) if limiter else 0.0
    if wait:
        raise Refused("rate", 429, "Too many requests. Please wait a moment.", retry_after=wait)


def build_page(texts: Texts) -> gr.Blocks:
    """The page: every view at once, of which pages/study.js shows one."""
    consent = [
        f"# {texts.title}",
        texts.purpose,
        f"## Your data\n\n{texts.data}",
        f"## Stopping and withdrawing\n\n{texts.withdrawal}",
        f"## Ethics\n\n{texts.ethics}",
        f"## Contact\n\n{texts.contact}",
    ]
    if texts.content_warning:
        consent.insert(2, f"## Content warning\n\n{texts.content_warning}")
    with gr.Blocks(title=texts.title, analytics_enabled=False) as page:
        with gr.Column(elem_id="view-consent", elem_classes="view"):
            gr.Markdown("\n\n".join(consent))
            gr.Checkbox(label="I have read this page and agree to take part.", elem_id="agree", container=False)
            gr.HTML('<p id="agree-error" class="error" role="alert"></p>', padding=False)
            gr.Button("Continue", variant="primary", elem_id="accept")
        with gr.Column(elem_id="view-instructions", elem_classes="view"):
            gr.Markdown(INSTRUCTIONS)
            gr.Button("Start with practice", variant="primary", elem_id="begin")
        with gr.Column(elem_id="view-trial", elem_classes="view"):
            gr.HTML((PAGES / "trial.html").read_text(encoding="utf-8"))
        with gr.Column(elem_id="view-break", elem_classes="view"):
            gr.HTML('<h1>Time for a break</h1><p id="break-text"></p>')
            gr.Button("Go on", variant="primary", elem_id="go-on")
        with gr.Column(elem_id="view-finish", elem_classes="view"):
            gr.HTML((PAGES / "finish.html").read_text(encoding="utf-8"))
        with gr.Column(elem_id="view-message", elem_classes="view"):
            gr.HTML('<h1 id="message-title"></h1><p id="message-text" role="alert"></p>')
            gr.Button("Try again", variant="primary", elem_id="again")
        gr.HTML(FOOTER)
    return page
