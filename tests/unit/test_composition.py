"""The rules of GenEval, T2I-CompBench and DPG-Bench by hand, their result files, and the shapes world's tasks."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from invdpo import cli
from invdpo.errors import InvdpoError
from invdpo.evidence.benchmarks import collect
from invdpo.evidence.compositional import benchmark_table, mean_of_means
from invdpo.evidence.statistics import mean_interval
from invdpo.scorers.composition import (
    TASKS,
    Row,
    compbench_attributes,
    compbench_complex,
    compbench_numeracy,
    compbench_spatial,
    dpg_image,
    geneval_overall,
    prompt_scores,
    read_compbench,
    read_dpg,
    read_geneval,
)
from invdpo.world import oracle
from invdpo.world.benchmarks import tasks
from invdpo.world.parser import Seen
from invdpo.world.render import render
from invdpo.world.scenes import Scene, Thing, caption, read_caption, sample_scene


def test_geneval_is_the_mean_of_tasks_not_of_images() -> None:
    assert geneval_overall({"single_object": 1.0, "counting": 0.5, "position": 0.0}) == 0.5


def test_compbench_rules_by_hand() -> None:
    assert compbench_attributes([0.9, 0.5]) == pytest.approx(0.45)
    assert compbench_attributes([]) == 1.0
    assert compbench_spatial(1, 1, 1) == 1.0 and compbench_spatial(0.8, 0.6, 1) == pytest.approx(0.85)
    assert compbench_spatial(1, 1, 0) == 0.5 and compbench_spatial(0.9, 1, 0) == 0.0, "below one half is nothing"
    assert compbench_spatial(1, 0, 1) == 0.0, "no position without both objects"
    # Two of two dogs: 1; one of three cats: there, but not three: 1/2; no bird: 0.
    assert compbench_numeracy({"dog": 2, "cat": 3, "bird": 1}, {"dog": 2, "cat": 1}) == pytest.approx(0.5)
    assert compbench_complex(0.4, spatial=0.8) == pytest.approx(0.6)
    assert compbench_complex(0.4, action=0.2) == pytest.approx(0.3)
    assert compbench_complex(0.3, 0.6, 0.9) == pytest.approx(0.6)


def test_dpg_zeroes_the_children_of_a_no() -> None:
    parents = {1: [0], 2: [1], 3: [2], 4: [0]}
    assert dpg_image(dict.fromkeys(range(1, 5), True), parents) == 1.0
    # 1 is answered no: 2 falls, and 3 with it; 4 stands.
    assert dpg_image({1: False, 2: True, 3: True, 4: True}, parents) == 0.25
    assert dpg_image({1: True, 2: False, 3: True, 4: True}, parents) == 0.5
    # One parent of two is enough, also one that is asked later.
    assert dpg_image({1: True, 2: True, 3: True, 4: False}, {2: [1, 4]}) == 0.5


# The shapes world -------------------------------------------------------------------------------------------------


def seen(*objects: tuple[str, str, float, float]) -> list[Seen]:
    """Large objects (colour, shape, x, y)."""
    return [Seen(colour, shape, "large", x, y, 1.0) for colour, shape, x, y in objects]


def marks(text: str, *objects: tuple[str, str, float, float]) -> dict[str, float]:
    scene = read_caption(text)
    assert scene is not None
    return tasks(scene, seen(*objects))


CIRCLE, SQUARE = ("red", "circle", 10.0, 30.0), ("blue", "square", 50.0, 30.0)


def test_one_thing() -> None:
    text = "a small red circle"
    right = {"geneval_single_object": 1.0, "geneval_colors": 1.0, "compbench_color": 1.0}
    # Is there a circle? Is it red? Is it small? It is large.
    assert marks(text, CIRCLE) == {**right, "dpg_score": pytest.approx(2 / 3)}
    other = {"geneval_single_object": 1.0, "geneval_colors": 0.0, "compbench_color": 0.0}
    assert marks(text, ("blue", "circle", 10, 30)) == {**other, "dpg_score": pytest.approx(1 / 3)}
    assert set(marks(text, SQUARE).values()) == {0.0}, "no circle, so no red and no size either"


def test_two_things() -> None:
    text = "a red circle left of a blue square"
    assert set(marks(text, CIRCLE, SQUARE).values()) == {1.0}
    assert set(marks(text, CIRCLE, SQUARE)) == {
        "geneval_two_object",
        "geneval_color_attr",
        "geneval_position",
        "compbench_color",
        "compbench_spatial",
        "dpg_score",
    }
    swapped = marks(text, ("blue", "circle", 10, 30), ("red", "square", 50, 30))
    assert (swapped["geneval_two_object"], swapped["geneval_color_attr"]) == (1.0, 0.0)
    assert (swapped["geneval_position"], swapped["compbench_spatial"]) == (1.0, 1.0), "which ask for no colour"
    assert swapped["dpg_score"] == pytest.approx(3 / 5)
    turned = marks(text, ("red", "circle", 50, 30), ("blue", "square", 10, 30))
    assert (turned["geneval_position"], turned["compbench_spatial"], turned["compbench_color"]) == (0.0, 0.5, 1.0)
    assert turned["dpg_score"] == pytest.approx(4 / 5)
    alone = marks(text, CIRCLE)
    assert alone["dpg_score"] == pytest.approx(2 / 5) and sum(alone.values()) == alone["dpg_score"]


def test_things_of_one_shape_are_counted_and_told_by_colour() -> None:
    text = "a red circle left of a blue circle"
    right = marks(text, CIRCLE, ("blue", "circle", 50, 30))
    assert set(right.values()) == {1.0} and {"geneval_counting", "compbench_numeracy"} <= set(right)
    turned = marks(text, ("red", "circle", 50, 30), ("blue", "circle", 10, 30))
    assert turned["geneval_position"] == 0.0, "some circle is left of a circle, but not the red one of the blue"
    three = marks(text, CIRCLE, ("blue", "circle", 50, 30), ("green", "circle", 30, 50))
    assert (three["geneval_counting"], three["compbench_numeracy"], three["geneval_two_object"]) == (0.0, 0.5, 1.0)


def test_three_things_are_complex() -> None:
    text = "a red circle left of a blue square and a green cross"
    found = marks(text, CIRCLE, SQUARE)
    assert set(found) == {"geneval_position", "compbench_complex", "dpg_score"}
    assert found["compbench_complex"] == 0.5, "the cross is missing: attributes 0, relation 1"
    assert found["dpg_score"] == pytest.approx(5 / 7)


def test_flawless_pictures_pass_every_task_and_captions_reach_all_of_geneval() -> None:
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for _ in range(150):
        scene = sample_scene(rng)
        judged = oracle.score(render(scene, rng), caption(scene))
        for name in judged.keys() & TASKS.keys():
            found.setdefault(name, []).append(judged[name])
    assert {task for benchmark, task in map(TASKS.__getitem__, found) if benchmark == "geneval"} == {
        task for benchmark, task in TASKS.values() if benchmark == "geneval"
    }
    assert {name: np.mean(values) > 0.98 for name, values in found.items()} == dict.fromkeys(found, True)


def test_unrecognised_blobs_are_no_objects() -> None:
    scene = Scene((Thing("red", "cross"),))
    picture = render(scene, np.random.default_rng(0))
    picture[::2] = 255  # stripes: red enough to be seen, shaped like nothing
    assert oracle.score(picture, "a red cross")["geneval_single_object"] == 0.0


# Result files -----------------------------------------------------------------------------------------------------


def geneval_line(prompt: int, image: int, tag: str, correct: Any, **change: Any) -> str:
    row = {
        "filename": f"out/{prompt:05}/samples/{image:04}.png",
        "tag": tag,
        "prompt": f"a photo of prompt {prompt}",
        "correct": correct,
        "reason": "" if correct else "expected bench>=1, found 0",
        "metadata": "{}",
        "details": "{}",
    }
    return json.dumps({**row, **change}) + "\n"


def write_geneval(path: Path, wrong: set[tuple[int, int]] = frozenset()) -> Path:  # pyright: ignore
    """Prompts 0 and 1 count, prompt 2 is of colours; two images each."""
    tags = ["counting", "counting", "colors"]
    cells = [(prompt, image) for prompt in range(3) for image in range(2)]
    path.write_text("".join(geneval_line(p, k, tags[p], (p, k) not in wrong) for p, k in cells))
    return path


def test_geneval_file(tmp_path: Path) -> None:
    rows = read_geneval(write_geneval(tmp_path / "results.jsonl", wrong={(1, 0)}), "ours", seed=3)
    assert len(rows) == 6
    assert rows[2] == Row(
        "ours", 3, "00001", 0, "a photo of prompt 1", "geneval_counting", 0.0, "expected bench>=1, found 0"
    )
    scores = prompt_scores(rows)["ours"]
    assert scores["geneval_counting"].tolist()[0][:2] == [1.0, 0.5] and np.isnan(scores["geneval_counting"][0, 2])
    assert np.isnan(scores["geneval_colors"][0, :2]).all() and scores["geneval_colors"][0, 2] == 1.0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 is not JSON"),
        ("{}", "line 1: there is no `tag`"),
        (geneval_line(0, 0, "colours", True), "`colours` is no task of GenEval"),
        (geneval_line(0, 0, "colors", "yes"), "`correct` is 'yes'"),
        (geneval_line(0, 0, "colors", True, filename="a.png"), "not of the form"),
        (geneval_line(0, 0, "colors", True) * 2, "image 0 of prompt 00000 .* twice"),
        ("\n", "no result"),
    ],
)
def test_other_geneval_files_are_named(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(line)
    with pytest.raises(InvdpoError, match=words):
        read_geneval(tmp_path / "r.jsonl", "ours")


def test_a_prompt_with_fewer_images_is_named(tmp_path: Path) -> None:
    path = write_geneval(tmp_path / "results.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3] + [geneval_line(2, 0, "colors", True)]))
    with pytest.raises(InvdpoError, match=r"ours, geneval_counting: every prompt needs 2 images.* 00001 .seed 0: 1"):
        prompt_scores(read_geneval(path, "ours"))


def test_compbench_file(tmp_path: Path) -> None:
    path = tmp_path / "vqa_result.json"
    answers = [{"question_id": k, "answer": f"{k / 10:.4f}"} for k in (3, 0, 1, 2)]  # UniDet's order, BLIP's text
    path.write_text(json.dumps(answers))
    rows = read_compbench(path, "ours", "color", ["a red book", "a blue cup"], samples=2)
    assert [(row.prompt_id, row.image, row.prompt, row.score) for row in rows] == [
        ("0", 0, "a red book", 0.0),
        ("0", 1, "a red book", 0.1),
        ("1", 0, "a blue cup", 0.2),
        ("1", 1, "a blue cup", 0.3),
    ]
    assert prompt_scores(rows)["ours"]["compbench_color"].tolist() == [[pytest.approx(0.05), pytest.approx(0.25)]]
    with pytest.raises(InvdpoError, match="2 prompts with 10 images .* missing or too many: 4, 5, 6"):
        read_compbench(path, "ours", "color", ["a", "b"])
    with pytest.raises(InvdpoError, match="no category `colour`"):
        read_compbench(path, "ours", "colour", ["a"])
    for wrong, words in ((answers + answers[:1], "no other entry"), ([{"question_id": 0, "answer": "1.2"}], "0 to 1")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InvdpoError, match=words):
            read_compbench(path, "ours", "color", ["a", "b"], samples=2)


DPG = """out/COCOval2014000000008698.png, 1.0, 0.5, 0.75
out/a, b/midjourney3.png, 0.25, 0.25, 0.25
Model: out
DPG-Bench score: 50.0
"""


def test_dpg_file(tmp_path: Path) -> None:
    path = tmp_path / "dpg-bench_results.txt"
    path.write_text(DPG)
    rows = read_dpg(path, "ours")
    assert [(row.prompt_id, row.image, row.score) for row in rows] == [
        ("COCOval2014000000008698", 0, 1.0),
        ("COCOval2014000000008698", 1, 0.5),
        ("midjourney3", 0, 0.25),
        ("midjourney3", 1, 0.25),
    ]
    assert prompt_scores(rows)["ours"]["dpg_score"].mean() == 0.5
    path.write_text(DPG.replace("0.75", "0.7"))
    with pytest.raises(InvdpoError, match="line 1: 0.7 is not the mean"):
        read_dpg(path, "ours")
    path.write_text("Model: out\n")
    with pytest.raises(InvdpoError, match="holds no result"):
        read_dpg(path, "ours")


# The table --------------------------------------------------------------------------------------------------------


def test_mean_of_means_weighs_tasks_alike_and_resamples_prompts_whole() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((3, 40))
    few = np.where(np.arange(40) < 10, values, np.nan)
    both = mean_of_means([values, few])
    assert both.estimate == pytest.approx((values.mean() + values[:, :10].mean()) / 2)
    alone, same = mean_interval(values), mean_of_means([values])
    assert (same.estimate, same.low, same.high) == pytest.approx((alone.estimate, alone.low, alone.high))
    # A task counted twice tells nothing new: as independent tasks it would look narrower by the root of two.
    twice = mean_of_means([values, values])
    assert twice.high - twice.low == pytest.approx(alone.high - alone.low)


def test_table_has_overall_scale_and_what_is_absent() -> None:
    half = np.array([[1.0, 0.0, np.nan, np.nan]])
    full = np.array([[np.nan, np.nan, 1.0, 1.0]])
    scores = {"base": {"geneval_colors": half, "geneval_position": full, "dpg_score": np.array([[0.2, 0.4, 0.6, 0.8]])}}
    table = benchmark_table(scores, ["base"])
    found = {(row["benchmark"], row["task"]): (row["score"], row["prompts"]) for row in table.records}
    assert found == {
        ("geneval", "colors"): (0.5, 2),
        ("geneval", "position"): (1.0, 2),
        ("geneval", "overall"): (0.75, 4),
        ("dpg", "score"): (pytest.approx(50.0), 4),
    }
    assert [block.caption for block in table.blocks] == ["GenEval", "DPG-Bench"]
    assert table.blocks[0].head == ["Method", "colors (n = 2)", "position (n = 2)", "overall"]
    assert any("GenEval counting" in note and "T2I-CompBench color" in note for note in table.notes)


def test_command_makes_rows_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_geneval(tmp_path / f"{k}.jsonl", wrong={(1, 0)} if k else set()) for k in range(2)]
    command = ["composition", "geneval", f"ours={files[0]}", f"ours={files[1]}", f"base={files[1]}"]
    monkeypatch.setattr(sys, "argv", ["invdpo", *command, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    rows = list(csv.DictReader((tmp_path / "out/rows.csv").open()))
    assert [(row["method"], row["seed"]) for row in rows[::6]] == [("ours", "0"), ("ours", "1"), ("base", "0")]
    table = {(r["arm"], r["task"]): r for r in csv.DictReader((tmp_path / "out/composition.csv").open())}
    assert float(table["ours", "counting"]["score"]) == pytest.approx(7 / 8)
    assert float(table["base", "overall"]["score"]) == pytest.approx((3 / 4 + 1) / 2)
    assert float(table["ours", "counting"]["score_low"]) < 7 / 8


@pytest.mark.parametrize(
    ("benchmark", "results", "words"),
    [
        ("genval", ["a=b"], "no benchmark `genval`"),
        ("geneval", ["a.jsonl"], "not METHOD=FILE"),
        ("geneval", ["a=nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        ("compbench", ["a=b.json"], "--category and --prompts"),
    ],
)
def test_wrong_arguments_are_named(benchmark: str, results: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match=words):
        collect(benchmark, results, tmp_path)
