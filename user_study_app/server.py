"""The study's web server: one FastAPI application with the rater's page at / and the experimenter's at /admin."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

import gradio as gr
import gradio.themes
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from invdpo.errors import InvdpoError
from user_study_app import admin, rater
from user_study_app.security import Addresses, AdminAccess, Limits, Shield
from user_study_app.stimuli import Stimuli
from user_study_app.storage import Refused, Storage

# Fonts of the reader's own system: there is nothing to load, and no one to ask for it.
THEME = gradio.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)


def create_app(
    bundle: Path,
    database: str,
    *,
    admin_password: str,
    trust_proxy: bool = False,
    limits: Limits | None = Limits(),  # noqa: B008  (frozen)
) -> FastAPI:
    """The application that serves `bundle` (a folder) and keeps votes in `database` (a URL, see `storage`).

    `trust_proxy`: a proxy that speaks HTTPS stands in front, sets X-Forwarded-For and -Host itself, and cookies are
    marked Secure. `limits` None takes every request, for simulated raters. Raises InvdpoError for a damaged bundle and
    for a database that cannot be used or belongs to another bundle.
    """
    stimuli = Stimuli(bundle)
    storage = Storage(database)
    storage.bind(stimuli)
    addresses = Addresses(trust_proxy)
    access = AdminAccess(admin_password)
    # No description of the endpoints is published, and an error says nothing of the program.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.storage = storage
    app.add_middleware(Shield, admin=access, trust_proxy=trust_proxy)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(Exception, _failed)
    app.include_router(rater.build_router(storage, stimuli, limits, addresses))
    app.include_router(admin.build_router(storage, stimuli, access, limits, addresses))
    app.mount("/pages", StaticFiles(directory=rater.PAGES))
    _mount(app, admin.build_page(storage, stimuli), "/admin", rater.PAGES / "admin.css", "")
    script = '<script type="module" src="pages/study.js"></script>'
    _mount(app, rater.build_page(stimuli.texts), "/", rater.PAGES / "study.css", script)
    return app


def _mount(app: FastAPI, page: gr.Blocks, path: str, style: Path, head: str) -> None:
    gr.mount_gradio_app(
        app,
        page,
        path=path,
        theme=THEME,
        css_paths=[style],
        head=head,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
        show_error=path != "/",
    )


def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"Retry-After": str(int(error.retry_after) + 1)} if error.retry_after else None
    return JSONResponse({"error": error.code, "message": str(error)}, error.status, headers)


def _malformed(_request: Request, _error: Exception) -> Response:
    # FastAPI's own answer repeats what was sent and names the fields.
    return JSONResponse({"error": "malformed", "message": "This request cannot be read."}, 422)


def _unknown(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    if status == 400:
        return _malformed(_request, error)
    return JSONResponse({"error": "not_found", "message": "There is nothing here."}, status)


def _failed(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "server", "message": "The server made a mistake. Please try again."}, 500)


def serve(
    bundle: Path,
    database: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    admin_password_file: Path | None = None,
    root_path: str = "",
    trust_proxy: bool = False,
) -> None:
    """Run the study until stopped; prints a link to take part with and where the experimenter's page is.

    The password is the file's first line, else INVDPO_ADMIN_PASSWORD, else a random one that is printed. `root_path`
    is the path under which a proxy that strips it publishes the study, such as /study. Raises InvdpoError.
    """
    password, made = _password(admin_password_file)
    listener = _listen(host, port)
    app = create_app(bundle, database, admin_password=password, trust_proxy=trust_proxy)
    root_path = "/" + root_path.strip("/") if root_path.strip("/") else ""
    where = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
    storage: Storage = app.state.storage
    link = storage.invite(1, "server")[0]
    print(f"Take part:      {where}/#{link}")
    print(f"Experimenter:   {where}/admin/" + (f"   password: {password}" if made else ""))
    if trust_proxy:
        print(f"Behind a proxy: use its address, with {root_path or '/'} instead of {where}/.")
    print(f"Votes go to     {storage.name}   (stop with Ctrl-C; the same command goes on)", flush=True)
    # No access log: it would hold addresses. One process: Gradio's page of the experimenter keeps its queue in memory.
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        root_path=root_path,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listener])
    storage.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket of the address, taken before anything else is done."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InvdpoError(
            f"The server cannot listen on {host}:{port}: {error.strerror}. Give another --port, or stop what uses it."
        ) from error


def _password(file: Path | None) -> tuple[str, bool]:
    """The experimenter's password, and whether it was made up here."""
    if file is None:
        given = os.environ.get("INVDPO_ADMIN_PASSWORD", "")
        return (given, False) if given else (secrets.token_urlsafe(12), True)
    try:
        password = file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except OSError as error:
        raise InvdpoError(f"The password file {file} cannot be read: {error.strerror}.") from error
    if not password:
        raise InvdpoError(f"The password file {file} is empty. Write the password into its first line.")
    return password, False
