"""Scene graphs that a vision-language model reads from pictures, and their agreement with the true ones.

The protocol is LAION-SG's (test/test_iou.py): the model is shown the picture and told which objects and relations the
true graph has, and asked which of them it sees, as JSON; there with gpt-4o at temperature 0.7 and seed 1234. Any
server with OpenAI's chat interface will do. Every raw answer is kept, so nothing is asked twice and a run that was
stopped goes on; above temperature 0 answers differ, so ask `repeats` times and report how far they spread.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done
from invdpo.image_files import Picture
from invdpo.scorers.scene_graph import METRICS, Duplicates, SceneGraph, agreement, from_laion_sg

TRY_AGAIN = {408, 429, 500, 502, 503, 504}
ATTEMPTS = 5
TIMEOUT = 120.0  # seconds an answer
LISTS = ("scene_graph", "object_list", "predicate_list")


class UnreadableAnswer(ValueError):
    """A model's answer that is no scene graph; its text says why."""


def build_prompt(truth: SceneGraph) -> str:
    """What the model is asked: which objects and relations of the true graph, in alphabetical order, it sees."""
    objects, relations = (json.dumps(sorted(set(words))) for words in (truth.entities, truth.relations))
    return (
        "Describe this image as a scene graph, using only words of two lists.\n"
        f"Objects: {objects}\n"
        f"Relations: {relations}\n"
        "Use a word only where the image shows what it stands for, and copy it letter for letter; leave out the "
        "others.\n"
        "Reply with a single JSON object that has three keys: `object_list`, the objects you see; `predicate_list`, "
        "the relations you see; `scene_graph`, a list of [object, relation, object] with every relation you see "
        "between two of these objects. Write nothing but the JSON."
    )


def parse_answer(text: str) -> SceneGraph:
    """The graph in a model's answer, which may stand in a code fence or between other words.

    Raises UnreadableAnswer where there is no JSON object, or a list in it is missing or holds something else.
    """
    found = re.search(r"\{.*\}", text, re.DOTALL)
    if found is None:
        raise UnreadableAnswer("no JSON object in the answer")
    try:
        content = json.loads(found[0])
    except json.JSONDecodeError as error:
        raise UnreadableAnswer(f"broken JSON: {error}") from error
    for key in LISTS:
        if not isinstance(content.get(key), list):
            raise UnreadableAnswer(f"no list `{key}`")
    for triple in content["scene_graph"]:
        if not (isinstance(triple, list) and len(triple) == 3 and all(isinstance(word, str) for word in triple)):
            raise UnreadableAnswer(f"`scene_graph` holds {json.dumps(triple)}, no [object, relation, object]")
    for key in LISTS[1:]:
        if not all(isinstance(word, str) for word in content[key]):
            raise UnreadableAnswer(f"`{key}` holds something else than words")
    triples = tuple((first, relation, second) for first, relation, second in content["scene_graph"])
    return SceneGraph(triples, tuple(content["object_list"]), tuple(content["predicate_list"]))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the named server and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class ChatModel:
    """A vision-language model behind an OpenAI-compatible endpoint.

    url: what comes before /chat/completions. model: the server's name of it; name a dated snapshot, since an alias
    moves. key_variable: the environment variable that holds the key; unset, none is sent.
    """

    url: str
    model: str
    temperature: float = 0.7
    seed: int = 1234
    key_variable: str = "OPENAI_API_KEY"

    def ask(self, prompt: str, picture: Picture, repeat: int = 0) -> dict[str, Any]:
        """The server's answer to a prompt with a picture: {answer, served_by, fingerprint, finish_reason}.

        Repeat k is asked with seed + k. Raises InvdpoError where the server cannot be reached, refuses, or answers in
        another layout; what may pass (too many requests, a server's own failure) is tried again for half a minute.
        """
        encoded = picture.encoded()
        picture.decode()  # a broken image would only be refused by the server, in other words
        kind = Image.open(io.BytesIO(encoded)).get_format_mimetype()
        url = f"data:{kind};base64,{base64.b64encode(encoded).decode()}"
        body = {
            "model": self.model,
            "temperature": self.temperature,
            "seed": self.seed + repeat,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": url}}],
                }
            ],
        }
        reply = self._post(json.dumps(body).encode())
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise InvdpoError(f"{self.url}: not a chat completion: {str(reply)[:300]}") from error
        return {
            "answer": text or "",  # null where a filter stopped it
            "served_by": reply.get("model"),
            "fingerprint": reply.get("system_fingerprint"),
            "finish_reason": choice.get("finish_reason"),
        }

    def _post(self, body: bytes) -> Any:
        place = f"{self.url.rstrip('/')}/chat/completions"
        if not place.startswith(("http://", "https://")):
            raise InvdpoError(f"--url {self.url} is no http address; give what comes before /chat/completions.")
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        opener = urllib.request.build_opener(_NoRedirect)
        failure = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(2**attempt)
            try:
                with opener.open(urllib.request.Request(place, body, headers), timeout=TIMEOUT) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                failure = f"{error.code} {error.read()[:300].decode(errors='replace')}"
                if error.code not in TRY_AGAIN:
                    break
            except (OSError, http.client.HTTPException) as error:
                failure = str(error)
            except ValueError as error:
                failure = f"not JSON ({error})"
                break
        hint = f"check the address, the model's name and the key in {self.key_variable}"
        raise InvdpoError(
            f"{place} gave no answer: {failure}; {hint}. Answers so far are kept: the same command goes on."
        )


class Answers:
    """Raw answers in a JSONL file, by picture, prompt, model, temperature, seed and repeat."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.rows: dict[str, dict[str, Any]] = {}
        if not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # a run was stopped while it wrote
            path.write_bytes(b"".join(lines := lines[:-1]))
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise InvdpoError(
                    f"{path}, line {number} is no answer ({error}). Delete that line; it will be asked again."
                ) from error

    def get(self, model: ChatModel, prompt: str, picture: Picture, repeat: int) -> str:
        """The model's answer, asked for where it is not there yet."""
        asked = {
            "image_sha256": picture.sha256(),
            "prompt": prompt,
            "model": model.model,
            "temperature": model.temperature,
            "seed": model.seed + repeat,
            "repeat": repeat,
        }
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        if key not in self.rows:
            row = {"key": key, "image": picture.name, **asked, **model.ask(prompt, picture, repeat)}
            with self.lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.rows[key] = row
        return self.rows[key]["answer"]


def read_graphs(path: Path | str) -> dict[str, dict[str, Any]]:
    """The entries of a LAION-SG JSON file by img_id; InvdpoError for another layout or an id that is there twice."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvdpoError(f"{path} cannot be read as JSON: {error}. Check the path.") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "img_id" in entry for entry in entries):
        raise InvdpoError(f"{path} is no list of entries with `img_id`, as LAION-SG's files are.")
    found = {str(entry["img_id"]): entry for entry in entries}
    if len(found) < len(entries):
        raise InvdpoError(f"{path}: {len(entries) - len(found)} entries have the img_id of another. Keep one of each.")
    return found


def score_scene_graphs(
    pictures: Sequence[Picture],
    graphs: Mapping[str, Mapping[str, Any]],
    model: ChatModel,
    folder: Path,
    *,
    attributes: bool = False,
    duplicates: Duplicates = "set",
    repeats: int = 1,
    workers: int = 4,
) -> pd.DataFrame:
    """Ask for every picture's graph and write folder/scene_graphs.csv, a row a picture and repeat: image, repeat,
    sg_iou, entity_iou, relation_iou, error; raw answers go to folder/answers.jsonl as they come.

    A picture belongs to the entry whose img_id is its name without ending. An answer that cannot be read has its error
    and no scores. Raises InvdpoError naming pictures without an entry and entries without a picture, and as
    `ChatModel.ask` does.
    """
    named = {Path(picture.name).stem: picture for picture in pictures}
    if len(named) < len(pictures):
        raise InvdpoError(f"{len(pictures) - len(named)} images have the name of another but for its ending. Rename.")
    if wrong := sorted(named.keys() ^ graphs.keys()):
        raise InvdpoError(
            f"images without a graph, or graphs without an image: {', '.join(wrong[:8])}"
            f"{f' and {len(wrong) - 8} more' if len(wrong) > 8 else ''}. Every image needs the entry of its img_id."
        )
    answers = Answers(folder / "answers.jsonl")
    truths = {name: from_laion_sg(graphs[name], attributes) for name in named}

    def score(task: tuple[str, int]) -> dict[str, Any]:
        name, repeat = task
        text = answers.get(model, build_prompt(truths[name]), named[name], repeat)
        row: dict[str, Any] = {"image": named[name].name, "repeat": repeat}
        try:
            return row | agreement(truths[name], parse_answer(text), duplicates) | {"error": ""}
        except UnreadableAnswer as error:
            return row | dict.fromkeys(METRICS) | {"error": str(error)}

    with ThreadPoolExecutor(workers) as pool:
        try:
            rows = list(pool.map(score, [(name, repeat) for name in named for repeat in range(repeats)]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    table = pd.DataFrame(rows, columns=["image", "repeat", *METRICS, "error"])
    with replace_when_done(folder / "scene_graphs.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return table


def summary(table: pd.DataFrame) -> str:
    """Means over images, of each image's mean over its readable answers, and what could not be read."""
    by_image: dict[str, list[list[float]]] = {str(name): [] for name in table["image"]}
    for row in table.to_dict("records"):
        if not row["error"]:
            by_image[str(row["image"])].append([float(row[name]) for name in METRICS])
    means = [np.mean(rows, axis=0) for rows in by_image.values() if rows]
    marks = np.mean(means, axis=0) if means else [float("nan")] * len(METRICS)
    words = ", ".join(f"{name} {mark:.4f}" for name, mark in zip(METRICS, marks, strict=True))
    unread = len(table) - sum(map(len, by_image.values()))
    return (
        f"{words} (mean of {len(means)} of {len(by_image)} images; {unread} of {len(table)} answers could not be read)"
    )
