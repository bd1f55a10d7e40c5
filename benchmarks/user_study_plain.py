"""The user study as a plain Gradio application, for `user_study_load.py` to compare with: a button calls an event
handler, which stores the vote and returns the next prompt and images. It shows what the queue and the files cost, and
is not fit for a study: its images are served under hashes of their content.

`python -m benchmarks.user_study_plain BUNDLE DATABASE --port PORT`
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import typer

from user_study_app.stimuli import Stimuli
from user_study_app.storage import Choice, Shown, State, Storage


def main(bundle: Path, database: str, port: int = 7861) -> None:
    """Serve until stopped."""
    stimuli, storage = Stimuli(bundle), Storage(database)
    cookies: dict[str, str] = {}

    def outputs(state: State, shown: Shown | None) -> tuple[str, str | None, str | None]:
        if shown is None or state.slot is None:
            return "Thank you.", None, None
        left, right = (str(stimuli.file_of(state.slot, shown.position, side)) for side in (0, 1))
        return stimuli.pair_of(state.slot, shown.position).prompt, left, right

    def enter(link: str) -> tuple[str, str | None, str | None]:
        cookies[link] = storage.enter(link, None, None)
        storage.consent(cookies[link], stimuli.texts.version, stimuli)
        return outputs(*storage.current(cookies[link]))

    def vote(link: str, choice: Choice) -> tuple[str, str | None, str | None]:
        _, shown = storage.current(cookies[link])
        return outputs(*storage.vote(cookies[link], shown.token if shown else "", choice, 1000, None))

    with gr.Blocks(analytics_enabled=False) as page:
        link, choice = gr.Textbox(label="Link"), gr.Radio(["left", "right", "tie"], label="Choice")
        prompt, left, right = gr.Markdown(), gr.Image(), gr.Image()
        gr.Button("Enter").click(enter, link, [prompt, left, right])
        gr.Button("Vote").click(vote, [link, choice], [prompt, left, right])
    page.launch(
        server_name="127.0.0.1", server_port=port, allowed_paths=[str(bundle.resolve())], quiet=True, run_history=False
    )


if __name__ == "__main__":
    typer.run(main)
