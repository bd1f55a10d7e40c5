"""Scene graphs: their agreement, LAION-SG's JSON, and a vision-language model behind a stub of a chat endpoint."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from invdpo import cli, scene_graphs
from invdpo.errors import InvdpoError
from invdpo.image_files import Picture, read_pictures
from invdpo.scene_graphs import (
    Answers,
    ChatModel,
    UnreadableAnswer,
    build_prompt,
    parse_answer,
    read_graphs,
    score_scene_graphs,
    summary,
)
from invdpo.scorers.scene_graph import SceneGraph, agreement, from_laion_sg, iou

ENTRY = {
    "img_id": "7",
    "name": "7.jpg",
    "items": [
        {"item_id": 0, "label": "dog", "attributes": ["brown", "wet"]},
        {"item_id": 1, "label": "dog", "attributes": []},
        {"item_id": 2, "label": "bench", "attributes": ["old"]},
    ],
    "relations": [
        {"triple_id": 0, "item1": 0, "relation": "on", "item2": 2},
        {"triple_id": 1, "item1": 1, "relation": "on", "item2": 2},
    ],
}
SEEN = {"object_list": ["dog", "bench"], "predicate_list": ["on"], "scene_graph": [["dog", "on", "bench"]]}


def test_iou_by_hand() -> None:
    assert iou([], []) == iou([], [], "multiset") == 0.0
    assert iou("aab", "ab") == 1.0
    assert iou("aab", "ab", "multiset") == pytest.approx(2 / 3)
    assert iou("ab", "bc") == pytest.approx(1 / 3)
    # Three a against one, one b against two: 1 + 1 of 3 + 2.
    assert iou("aaab", "abb", "multiset") == pytest.approx(2 / 5)
    assert iou(["dog"], ["Dog"]) == 0.0, "strings are compared exactly, as LAION-SG's script does"


def test_laion_sg_entry_with_and_without_attributes() -> None:
    bare, full = from_laion_sg(ENTRY), from_laion_sg(ENTRY, attributes=True)
    assert bare == SceneGraph((("dog", "on", "bench"),) * 2, ("dog", "dog", "bench"), ("on", "on"))
    assert full.entities == ("brown wet dog", "dog", "old bench")
    assert full.triples == (("brown wet dog", "on", "old bench"), ("dog", "on", "old bench"))


def test_the_two_options_change_what_one_dog_is_worth() -> None:
    one = SceneGraph((("dog", "on", "bench"),), ("dog", "bench"), ("on",))
    assert agreement(from_laion_sg(ENTRY), one) == {"sg_iou": 1.0, "entity_iou": 1.0, "relation_iou": 1.0}
    assert agreement(from_laion_sg(ENTRY), one, "multiset") == {
        "sg_iou": 0.5,
        "entity_iou": pytest.approx(2 / 3),
        "relation_iou": 0.5,
    }
    assert agreement(from_laion_sg(ENTRY, attributes=True), one)["entity_iou"] == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"items": None}, "not in LAION-SG's layout"),
        ({"items": [{"item_id": 0}]}, "'label'"),
        ({"relations": [{"item1": 0, "relation": "on", "item2": 9}]}, "no 9"),
    ],
)
def test_other_layouts_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvdpoError, match=f"scene graph 7: .*{words}"):
        from_laion_sg(ENTRY | change)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I see a dog.", "no JSON object"),
        ('{"object_list": [', "no JSON object"),
        ('{"object_list": [}', "broken JSON"),
        (json.dumps({**SEEN, "predicate_list": None}), "no list `predicate_list`"),
        (json.dumps({**SEEN, "scene_graph": [["dog", "on"]]}), "no .object, relation, object."),
        (json.dumps({**SEEN, "object_list": [1]}), "`object_list` holds something else"),
    ],
)
def test_unreadable_answers_say_why(text: str, words: str) -> None:
    with pytest.raises(UnreadableAnswer, match=words):
        parse_answer(text)


def test_answers_are_found_in_fences_and_between_words() -> None:
    fenced = f"Here it is:\n```json\n{json.dumps(SEEN, indent=1)}\n```\nDone."
    assert parse_answer(fenced) == parse_answer(json.dumps(SEEN))


def test_prompt_gives_away_neither_numbers_nor_order() -> None:
    prompt = build_prompt(from_laion_sg(ENTRY))
    assert '["bench", "dog"]' in prompt and '["on"]' in prompt


# A stub of the endpoint -------------------------------------------------------------------------------------------


class Stub:
    """Answers with what `reply(body) -> (status, content)` gives, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.reply: Callable[[dict[str, Any]], tuple[int, Any]] = lambda body: (200, completion(json.dumps(SEEN)))
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append(({**self.headers, "path": self.path}, body))
                status, content = stub.reply(body)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", f"{stub.url}/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def completion(text: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"model": "stub-2026-01-01", "choices": [{"message": message, "finish_reason": "stop"}]}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("STUB_KEY", "secret-of-the-test")
    monkeypatch.setattr(scene_graphs.time, "sleep", lambda seconds: None)
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


def picture(name: str, shade: int, form: str = "PNG") -> Picture:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, form)
    return Picture(name, stream.getvalue())


def model(stub: Stub, **settings: Any) -> ChatModel:
    return ChatModel(stub.url, "stub", key_variable="STUB_KEY", **settings)


PICTURES = [picture("7.png", 10), picture("8.jpg", 20, "JPEG")]
GRAPHS = {"7": ENTRY, "8": {**ENTRY, "img_id": "8"}}


def test_model_is_shown_the_picture_and_asked_once(stub: Stub, tmp_path: Path) -> None:
    table = score_scene_graphs(PICTURES, GRAPHS, model(stub), tmp_path, workers=1)
    assert table[["image", "sg_iou", "entity_iou", "relation_iou", "error"]].to_numpy().tolist() == [
        ["7.png", 1.0, 1.0, 1.0, ""],
        ["8.jpg", 1.0, 1.0, 1.0, ""],
    ]
    headers, body = stub.asked[0]
    assert headers["path"] == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-of-the-test"
    assert (body["model"], body["temperature"], body["seed"]) == ("stub", 0.7, 1234)
    text, image = body["messages"][0]["content"]
    assert text["text"] == build_prompt(from_laion_sg(ENTRY))
    kind, _, data = image["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/png" and base64.b64decode(data) == PICTURES[0].encoded()
    assert stub.asked[1][1]["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;")

    again = score_scene_graphs(PICTURES[::-1], GRAPHS, model(stub), tmp_path, duplicates="multiset")
    assert len(stub.asked) == 2 and again["sg_iou"].tolist() == [0.5, 0.5]
    row = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])
    assert row["answer"] == json.dumps(SEEN) and row["served_by"] == "stub-2026-01-01"
    assert "secret-of-the-test" not in (tmp_path / "answers.jsonl").read_text()


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.0}, {"seed": 1}])
def test_another_model_is_asked_anew(stub: Stub, tmp_path: Path, change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"url": stub.url, "model": "stub", "key_variable": "STUB_KEY"}
    for chosen in (settings, settings | change):
        score_scene_graphs(PICTURES, GRAPHS, ChatModel(**chosen), tmp_path)
    assert len(stub.asked) == 4


def test_another_picture_or_vocabulary_is_asked_anew(stub: Stub, tmp_path: Path) -> None:
    score_scene_graphs(PICTURES[:1], {"7": ENTRY}, model(stub), tmp_path)
    score_scene_graphs([picture("7.png", 11)], {"7": ENTRY}, model(stub), tmp_path)
    score_scene_graphs(PICTURES[:1], {"7": ENTRY}, model(stub), tmp_path, attributes=True)
    assert len(stub.asked) == 3


def test_repeats_have_seeds_of_their_own_and_are_averaged_by_image(stub: Stub, tmp_path: Path) -> None:
    nothing = json.dumps(dict.fromkeys(SEEN, []))
    stub.reply = lambda body: (200, completion(json.dumps(SEEN) if body["seed"] == 1234 else nothing))
    table = score_scene_graphs(PICTURES, GRAPHS, model(stub), tmp_path, repeats=2)
    assert table["repeat"].tolist() == [0, 1, 0, 1] and table["sg_iou"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert "sg_iou 0.5000" in summary(table) and "mean of 2 of 2 images; 0 of 4" in summary(table)


def test_unreadable_answers_are_kept_and_counted(stub: Stub, tmp_path: Path) -> None:
    texts = iter(["I cannot see it.", None, json.dumps(SEEN)])
    stub.reply = lambda body: (200, completion(next(texts)))
    pictures, graphs = [*PICTURES, picture("9.png", 30)], {**GRAPHS, "9": {**ENTRY, "img_id": "9"}}
    table = score_scene_graphs(pictures, graphs, model(stub), tmp_path, workers=1)
    assert table["error"].tolist() == ["no JSON object in the answer"] * 2 + [""]
    assert table["sg_iou"].isna().tolist() == [True, True, False]
    assert "mean of 1 of 3 images; 2 of 3 answers could not be read" in summary(table)
    written = pd.read_csv(tmp_path / "scene_graphs.csv")
    assert written["error"].fillna("").tolist() == table["error"].tolist()
    score_scene_graphs(pictures, graphs, model(stub), tmp_path)
    assert len(stub.asked) == 3, "what could not be read is not asked again"


def test_a_stopped_run_goes_on(stub: Stub, tmp_path: Path) -> None:
    stub.reply = lambda body: (200, completion(json.dumps(SEEN))) if len(stub.asked) == 1 else (401, {"error": "no"})
    with pytest.raises(InvdpoError, match="401 .*STUB_KEY.*goes on") as caught:
        score_scene_graphs(PICTURES, GRAPHS, model(stub), tmp_path, workers=1)
    assert "secret-of-the-test" not in str(caught.value) and not (tmp_path / "scene_graphs.csv").exists()
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    stub.reply = lambda body: (200, completion(json.dumps(SEEN)))
    before = len(stub.asked)
    score_scene_graphs(PICTURES, GRAPHS, model(stub), tmp_path)
    assert len(stub.asked) == before + 1
    assert len(Answers(tmp_path / "answers.jsonl").rows) == 2


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"key": "a", "answer": ""}\nnonsense\n')
    with pytest.raises(InvdpoError, match="answers.jsonl, line 2"):
        Answers(tmp_path / "answers.jsonl")


def test_what_may_pass_is_tried_again(stub: Stub) -> None:
    stub.reply = lambda body: (429, b"slow down") if len(stub.asked) < 3 else (200, completion("{}"))
    assert model(stub).ask("?", PICTURES[0])["answer"] == "{}"
    assert len(stub.asked) == 3
    stub.reply = lambda body: (503, b"away")
    with pytest.raises(InvdpoError, match="503 away"):
        model(stub).ask("?", PICTURES[0])
    assert len(stub.asked) == 3 + scene_graphs.ATTEMPTS


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, b"<html>"), "not JSON"),
        ((200, {"choices": []}), "not a chat completion"),
        ((302, b""), "302"),
        ((400, b"no such model"), "400 no such model"),
    ],
)
def test_other_servers_are_named_and_get_no_second_try(stub: Stub, reply: tuple[int, Any], words: str) -> None:
    stub.reply = lambda body: reply
    with pytest.raises(InvdpoError, match=words):
        model(stub).ask("?", PICTURES[0])
    assert [headers["path"] for headers, _ in stub.asked] == ["/v1/chat/completions"]


def test_unreachable_and_foreign_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_graphs.time, "sleep", lambda seconds: None)
    with pytest.raises(InvdpoError, match="127.0.0.1:9/v1/chat/completions gave no answer"):
        ChatModel("http://127.0.0.1:9/v1", "m").ask("?", PICTURES[0])
    with pytest.raises(InvdpoError, match="no http address"):
        ChatModel("file:///etc", "m").ask("?", PICTURES[0])


def test_images_and_graphs_must_match(stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match="graphs without an image: 8"):
        score_scene_graphs(PICTURES[:1], GRAPHS, model(stub), tmp_path)
    with pytest.raises(InvdpoError, match="images without a graph.*: 8"):
        score_scene_graphs(PICTURES, {"7": ENTRY}, model(stub), tmp_path)
    with pytest.raises(InvdpoError, match="name of another"):
        score_scene_graphs([PICTURES[0], picture("7.jpg", 3)], {"7": ENTRY}, model(stub), tmp_path)
    with pytest.raises(InvdpoError, match="7.png is not a readable image"):
        score_scene_graphs([Picture("7.png", b"no image")], {"7": ENTRY}, model(stub), tmp_path)
    assert stub.asked == []


def test_graph_files_of_another_layout(tmp_path: Path) -> None:
    path = tmp_path / "graphs.json"
    for content, words in (("[", "as JSON"), ("{}", "img_id"), (json.dumps([ENTRY, ENTRY]), "img_id of another")):
        path.write_text(content)
        with pytest.raises(InvdpoError, match=words):
            read_graphs(path)


def test_command_reads_a_folder_and_a_parquet_file(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for item in PICTURES:
        (tmp_path / "images" / item.name).write_bytes(item.encoded())
    (tmp_path / "images" / "notes.txt").write_text("no image")
    frame = pd.DataFrame({"prompt_id": [7, 8], "png": [item.encoded() for item in PICTURES]})
    frame.to_parquet(tmp_path / "images.parquet")
    (tmp_path / "graphs.json").write_text(json.dumps(list(GRAPHS.values())))
    for source in ("images", "images.parquet"):
        command = ["scene-graphs", str(tmp_path / source), str(tmp_path / "graphs.json"), "--url", stub.url]
        command += ["--model", "stub", "--out", str(tmp_path / "out"), "--key-variable", "STUB_KEY"]
        monkeypatch.setattr(sys, "argv", ["invdpo", *command])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 0 and "sg_iou 1.0000" in capsys.readouterr().err
    assert len(stub.asked) == 2, "the same images and prompts, from another place"


def test_places_without_images(tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match="neither a folder"):
        read_pictures(tmp_path / "nowhere")
    with pytest.raises(InvdpoError, match="holds 0 images"):
        read_pictures(tmp_path)
    pd.DataFrame({"jpeg": [b""]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InvdpoError, match="none of the columns png, jpg, image"):
        read_pictures(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(InvdpoError, match="not a readable parquet"):
        read_pictures(tmp_path / "b.parquet")
