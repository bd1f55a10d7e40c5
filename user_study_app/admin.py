"""The experimenter's page, behind a password: Gradio for what is looked at and pressed, plain forms for the login and
for exports, so that neither a key file nor exported votes ever lie in Gradio's folder of temporary files.

The key is never opened by the server: the experimenter uploads it with an export that is to name methods, and it is
forgotten with the answer.
"""

from __future__ import annotations

import html
from typing import Annotated, Any

import gradio as gr
from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from invdpo.errors import InvdpoError
from user_study_app import overview
from user_study_app.offline import MEDIA_TYPES, encode, export_rows, parse_key
from user_study_app.rater import PAGES
from user_study_app.security import ADMIN_COOKIE, Addresses, AdminAccess, Limits, RateLimiter
from user_study_app.stimuli import Stimuli
from user_study_app.storage import Storage

ACTOR = "admin page"
CROWD = "?PROLIFIC_PID={{%PROLIFIC_PID%}}&STUDY_ID={{%STUDY_ID%}}&SESSION_ID={{%SESSION_ID%}}"
# The address people open, seen from the experimenter's browser: the server behind a proxy does not know it.
ADDRESS_JS = "() => location.origin + location.pathname.replace(/admin\\/?$/, '')"


def build_router(
    storage: Storage, stimuli: Stimuli, access: AdminAccess, limits: Limits | None, addresses: Addresses
) -> APIRouter:
    """Login, logout and export. `security.Shield` has let only logged-in requests through to all but the login."""
    router = APIRouter()
    logins = RateLimiter(limits.login) if limits else None

    def login_page(error: str, status: int) -> Response:
        page = (PAGES / "login.html").read_text(encoding="utf-8")
        return HTMLResponse(page.replace("<!--error-->", html.escape(error)), status)

    @router.get("/admin/login")
    def login_form() -> Response:
        return login_page("", 200)

    @router.post("/admin/login")
    def login(request: Request, password: Annotated[str, Form()]) -> Response:
        if logins and logins.wait(addresses.key(request.scope)):
            return login_page("Too many attempts. Please wait a minute.", 429)
        token = access.login(password)
        storage.note(ACTOR, "login" if token else "login refused")
        if token is None:
            return login_page("This is not the password.", 401)
        response = RedirectResponse("./", 303)
        path = f"{request.scope.get('root_path', '')}/admin"
        response.set_cookie(
            ADMIN_COOKIE, token, path=path, secure=addresses.trust_proxy, httponly=True, samesite="strict"
        )
        return response

    @router.post("/admin/logout")
    def logout(request: Request) -> Response:
        access.logout(request.cookies.get(ADMIN_COOKIE))
        return RedirectResponse("login", 303)

    @router.post("/admin/export")
    def export(
        format: Annotated[str, Form()],
        key: Annotated[UploadFile | None, File()] = None,
    ) -> Response:
        try:
            names = parse_key(key.file.read(), stimuli) if key is not None and key.size else None
            content = encode(export_rows(storage, stimuli, names), format, with_key=names is not None)
        except InvdpoError as error:
            return PlainTextResponse(f"{error}\n", 400)
        storage.note(ACTOR, "export", f"{format}, {'with' if names else 'without'} key")
        disposition = f'attachment; filename="votes.{format}"'
        return Response(content, media_type=MEDIA_TYPES[format], headers={"Content-Disposition": disposition})

    return router


def build_page(storage: Storage, stimuli: Stimuli) -> gr.Blocks:
    """The page under /admin/."""

    def table(rows: list[dict[str, Any]], columns: list[str]) -> list[list[Any]]:
        return [[row[column] for column in columns] for row in rows]

    group_columns = ["group", "pairs", "pairs with votes", "votes", "ties", "problems", "agreement"]
    people_columns = [
        "participant", "slot", "came by", "answered", "attention failed", "repeats as before", "median s",
        "last vote (UTC)",
    ]  # fmt: skip
    audit_columns = ["at", "actor", "action", "detail"]

    def refresh() -> tuple[Any, ...]:
        raters, votes = storage.raters(), storage.votes()
        paused = storage.flag("paused")
        counts = "  ·  ".join(
            f"{name}: **{value:,}**" for name, value in overview.totals(stimuli, raters, votes).items()
        )
        log = [{**row, "at": overview.readable(row["at"])} for row in storage.audit_log()]
        return (
            f"{'**Paused.** Nobody can vote.' if paused else '**Running.**'}\n\n{counts}",
            table(overview.groups(stimuli, votes), group_columns),
            table(overview.people(stimuli, raters, votes), people_columns),
            table(log, audit_columns),
            gr.Button("Resume the study" if paused else "Pause the study"),
            storage.flag("crowd"),
        )

    def toggle_pause() -> None:
        storage.set_flag("paused", not storage.flag("paused"), ACTOR)

    def open_to_crowd(on: bool) -> None:
        storage.set_flag("crowd", on, ACTOR)

    def invite(count: float, address: str) -> str:
        if not 1 <= count <= 1000:
            raise gr.Error("Ask for 1 to 1,000 links.")
        return "\n".join(f"{address.rstrip('/')}/#{token}" for token in storage.invite(int(count), ACTOR))

    def remove(who: str) -> tuple[str, str]:
        found = storage.find(who)
        if found is None:
            return "Nobody is known by this number or platform id. Nothing was deleted.", who
        counts = storage.delete(found, ACTOR)
        return f"Participant {found} is deleted: {counts['votes']} votes, and the link no longer works.", ""

    def crowd_link(address: str) -> str:
        return f"{address.rstrip('/')}/{CROWD}"

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="User study: experimenter", analytics_enabled=False) as page:
        with gr.Row():
            gr.Markdown(f"# User study `{stimuli.manifest.study}`\n\nBundle `{stimuli.bundle[:16]}`")
            pause = gr.Button("Pause the study", scale=0, min_width=200)
        counts = gr.Markdown()
        gr.Markdown("## Groups\n\nWhich methods a group compares is in the key file only.")
        group_table = gr.Dataframe(headers=group_columns, interactive=False, show_label=False)
        gr.Markdown("## Participants")
        people_table = gr.Dataframe(headers=people_columns, interactive=False, show_label=False)
        with gr.Row():
            with gr.Column():
                gr.Markdown("## Invite\n\nA link is shown once and stored as a hash; it also resumes.")
                address = gr.Textbox(label="Address of the study", info="what participants open")
                count = gr.Number(5, label="How many links", precision=0, minimum=1, maximum=1000)
                make = gr.Button("Make links")
                links = gr.Textbox(
                    label="Links", lines=4, max_lines=12, buttons=["copy"], interactive=False, elem_id="links"
                )
            with gr.Column():
                gr.Markdown("## Crowd platform\n\nIds of the platform are stored as keyed hashes only.")
                crowd = gr.Checkbox(label="Let in everybody who comes with a platform's link")
                platform_link = gr.Textbox(
                    label="Link for Prolific", buttons=["copy"], interactive=False, elem_id="crowd-link"
                )
                gr.Markdown("## Delete a participant's data\n\nThis cannot be undone.")
                who = gr.Textbox(label="Participant number, or the id on the platform")
                erase = gr.Button("Delete", variant="stop")
                erased = gr.Markdown()
        gr.Markdown("## Export")
        gr.HTML((PAGES / "export.html").read_text(encoding="utf-8"))
        with gr.Accordion("Audit log", open=False):
            audit_table = gr.Dataframe(headers=audit_columns, interactive=False, show_label=False)

        shown = [counts, group_table, people_table, audit_table, pause, crowd]
        page.load(refresh, None, shown, **private)
        page.load(crowd_link, address, platform_link, js=ADDRESS_JS, **private)
        page.load(None, None, address, js=ADDRESS_JS)
        gr.Timer(10).tick(refresh, None, shown, **private)
        pause.click(toggle_pause, None, None, **private).then(refresh, None, shown, **private)
        # `input`, not `change`: a refresh sets the box too, and must not write it back.
        crowd.input(open_to_crowd, crowd, None, **private).then(refresh, None, shown, **private)
        make.click(invite, [count, address], links, **private).then(refresh, None, shown, **private)
        erase.click(remove, who, [erased, who], **private).then(refresh, None, shown, **private)
    return page
