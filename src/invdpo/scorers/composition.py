"""How GenEval, T2I-CompBench and DPG-Bench turn what was seen in pictures into scores; readers of their result files.

The three benchmarks differ in who looks (a detector, a VQA model, a CLIP) and agree in that each picture gets a number
in 0..1 for the task of its prompt. The rules that follow the looking are here, as functions of plain values, so that
the shapes world's parser can be put in the looker's place (`invdpo.world.benchmarks`) and the benchmarks' own result
files read into the same rows. Sources are their scripts: `djghosh13/geneval` evaluation/, `Karine-Huang/T2I-CompBench`
BLIPvqa_eval/, UniDet_eval/ and 3_in_1_eval/, `TencentQQGYLab/ELLA` dpg_bench/.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from invdpo.errors import InvdpoError

# benchmark -> task -> its name in print. GenEval's six tasks, the categories of T2I-CompBench and its successor, and
# DPG-Bench's one score.
BENCHMARKS = {
    "geneval": {
        "single_object": "single object",
        "two_object": "two objects",
        "counting": "counting",
        "colors": "colors",
        "position": "position",
        "color_attr": "color attribution",
    },
    "compbench": {
        "color": "color",
        "shape": "shape",
        "texture": "texture",
        "spatial": "2D spatial",
        "3d_spatial": "3D spatial",
        "non_spatial": "non-spatial",
        "numeracy": "numeracy",
        "complex": "complex",
    },
    "dpg": {"score": "score"},
}
TITLES = {"geneval": "GenEval", "compbench": "T2I-CompBench", "dpg": "DPG-Bench"}
# The score `dpg_score` of a picture belongs to the task `score` of `dpg`.
TASKS = {f"{benchmark}_{task}": (benchmark, task) for benchmark, tasks in BENCHMARKS.items() for task in tasks}
SAMPLES_PER_PROMPT = 10  # of T2I-CompBench, hard-coded in its 3_in_1.py
COMPBENCH_FLOOR = 0.5  # 2D_spatial_eval.py


@dataclass(frozen=True)
class Row:
    """One picture's score in 0..1 for one task. image: its number among the pictures of the prompt. reason: why it
    failed, where the benchmark says so."""

    method: str
    seed: int
    prompt_id: str
    image: int
    prompt: str
    task: str
    score: float
    reason: str = ""


def geneval_overall(accuracies: Mapping[str, float]) -> float:
    """The mean of the tasks' accuracies, each task counting once however many prompts it has (summary_scores.py)."""
    return float(np.mean(list(accuracies.values())))


def compbench_attributes(probabilities: Iterable[float]) -> float:
    """BLIP-VQA: the product over the prompt's noun phrases of the probability that the phrase is in the picture."""
    return math.prod(probabilities)


def compbench_spatial(first: float, second: float, position: float) -> float:
    """UniDet: a quarter of each object's confidence and half the position's score; what stays below 0.5 counts as 0.

    An object that was not found has confidence 0, and then the position none either.
    """
    found = first > 0 and second > 0
    score = 0.25 * first + 0.25 * second + (0.5 * position if found else 0.0)
    return score if score >= COMPBENCH_FLOOR else 0.0


def compbench_numeracy(wanted: Mapping[str, int], found: Mapping[str, int]) -> float:
    """The mean over the objects of the prompt: half for being there at all, half for being there in that number."""
    marks = [0.5 * (found.get(name, 0) > 0) + 0.5 * (found.get(name, 0) == count) for name, count in wanted.items()]
    return float(np.mean(marks))


def compbench_complex(attributes: float, spatial: float | None = None, action: float | None = None) -> float:
    """3-in-1: the mean of the attribute score and of what the prompt has beside it, a spatial relation or an action."""
    return float(np.mean([mark for mark in (attributes, spatial, action) if mark is not None]))


def dpg_image(answers: Mapping[int, bool], parents: Mapping[int, Sequence[int]]) -> float:
    """The share of questions answered yes, where no question counts whose parent does not; 0 as a parent is none.

    Questions are taken in the order of `answers`, so that a parent that fell by its own parent takes its children
    along, as compute_dpg_bench.py does. Its quirks are left out: it drops the first row of its question file, and its
    scores by category use the answers without this rule, of the last crop alone.
    """
    scores = {question: float(yes) for question, yes in answers.items()}
    for question in scores:
        if any(parent and not scores[parent] for parent in parents.get(question, ())):
            scores[question] = 0.0
    return sum(scores.values()) / len(scores)


def prompt_scores(rows: Iterable[Row]) -> dict[str, dict[str, np.ndarray]]:
    """Method -> task -> (seeds, prompts): each prompt's mean over its pictures; all prompts of a method in the order of
    their ids, nan where one does not ask for the task.

    The mean over prompts then is that over pictures, as all three benchmarks have it: InvdpoError is raised where a
    prompt has fewer pictures than another, in any seed.
    """
    cells: dict[str, dict[str, dict[tuple[int, str], list[float]]]] = {}
    for row in rows:
        tasks = cells.setdefault(row.method, {})
        tasks.setdefault(row.task, {}).setdefault((row.seed, row.prompt_id), []).append(row.score)
    return {method: _tables(method, tasks) for method, tasks in cells.items()}


def _tables(method: str, tasks: Mapping[str, Mapping[tuple[int, str], list[float]]]) -> dict[str, np.ndarray]:
    seeds = sorted({seed for marks in tasks.values() for seed, _ in marks})
    prompts = sorted({prompt for marks in tasks.values() for _, prompt in marks}, key=_numerically)
    found = {}
    for task, marks in tasks.items():
        most = max(map(len, marks.values()))
        asking = {prompt for _, prompt in marks}
        counts = {(seed, prompt): len(marks.get((seed, prompt), [])) for seed in seeds for prompt in prompts}
        lacking = [f"{p} (seed {s}: {n})" for (s, p), n in counts.items() if p in asking and n < most]
        if lacking:
            raise InvdpoError(
                f"{method}, {task}: every prompt needs {most} images; fewer have {_some(lacking)}. Evaluate the rest."
            )
        means = [[float(np.mean(marks[s, p])) if p in asking else math.nan for p in prompts] for s in seeds]
        found[task] = np.array(means)
    return found


def read_geneval(path: Path | str, method: str, seed: int = 0) -> list[Row]:
    """Rows of GenEval's results.jsonl: a line an image with `filename`, `tag`, `prompt`, `correct` and `reason`.

    The prompt's id and the image's number are those of the file's place, .../<prompt>/samples/<image>.png. Raises
    InvdpoError naming the line.
    """
    rows = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        entry = _json(line, place)
        tag, filename, correct = (_field(entry, key, place) for key in ("tag", "filename", "correct"))
        if tag not in BENCHMARKS["geneval"]:
            raise InvdpoError(f"{place}: `{tag}` is no task of GenEval; those are {', '.join(BENCHMARKS['geneval'])}.")
        if not isinstance(correct, bool):
            raise InvdpoError(f"{place}: `correct` is {correct!r}; it must be true or false.")
        where = re.search(r"(\d+)[/\\]samples[/\\](\d+)\.\w+$", str(filename))
        if where is None:
            raise InvdpoError(f"{place}: `filename` {filename!r} is not of the form <prompt>/samples/<image>.png.")
        reason = str(entry.get("reason") or "")
        prompt = str(_field(entry, "prompt", place))
        rows.append(Row(method, seed, where[1], int(where[2]), prompt, f"geneval_{tag}", float(correct), reason))
    return _some_rows(rows, path)


def read_compbench(
    path: Path | str,
    method: str,
    category: str,
    prompts: Sequence[str],
    seed: int = 0,
    samples: int = SAMPLES_PER_PROMPT,
) -> list[Row]:
    """Rows of a vqa_result.json of T2I-CompBench: [{question_id, answer}], one an image, for the prompts of a category.

    The file names no prompt: image k belongs to prompt k // samples, so there must be exactly len(prompts) * samples
    of them, each once. Raises InvdpoError where there are not, or an answer is no number in 0..1.
    """
    if category not in BENCHMARKS["compbench"]:
        raise InvdpoError(f"T2I-CompBench has no category `{category}`; it has {', '.join(BENCHMARKS['compbench'])}.")
    entries = _json(_text(path), str(path))
    if not isinstance(entries, list):
        raise InvdpoError(f"{path} holds no list of answers. Name the vqa_result.json of the category.")
    answers: dict[int, float] = {}
    for entry in entries:
        question = _field(entry, "question_id", str(path))
        place = f"{path}, question_id {question}"
        if not isinstance(question, int) or question in answers:
            raise InvdpoError(f"{place}: must be a number that no other entry has.")
        answers[question] = _share(_field(entry, "answer", place), place)
    expected = range(len(prompts) * samples)
    if wrong := sorted(set(expected) ^ set(answers)):
        raise InvdpoError(
            f"{path}: {len(prompts)} prompts with {samples} images each have question_ids 0 to {len(expected) - 1}; "
            f"missing or too many: {_some(wrong)}. Give the prompts of this category and their number of images."
        )
    return [
        Row(method, seed, str(k // samples), k % samples, prompts[k // samples], f"compbench_{category}", answers[k])
        for k in expected
    ]


def read_dpg(path: Path | str, method: str, seed: int = 0) -> list[Row]:
    """Rows of DPG-Bench's results txt: `image path, a score a crop, their mean`, then a summary, which is passed over.

    A row is a crop, since each crop of the grid is a sample of its own. The prompts' texts are in files of their own
    and stay empty here. Raises InvdpoError where there is no such line, or a mean is not that of its crops.
    """
    rows = []
    pattern = re.compile(r"(?P<image>.+?\.\w{3,4})(?P<scores>(?:, *[0-9.eE+-]+){2,})")
    for number, line in enumerate(_text(path).splitlines(), start=1):
        match = pattern.fullmatch(line.strip())
        if match is None:
            continue
        place = f"{path}, line {number}"
        *crops, mean = (_share(text, place) for text in match["scores"].split(",")[1:])
        if not math.isclose(float(np.mean(crops)), mean, abs_tol=1e-6):
            raise InvdpoError(f"{place}: {mean} is not the mean of {crops}. Evaluate the image again.")
        name = re.split(r"[/\\]", match["image"])[-1].split(".")[0]
        rows += [Row(method, seed, name, crop, "", "dpg_score", score) for crop, score in enumerate(crops)]
    return _some_rows(rows, path)


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvdpoError(f"{path} cannot be read as text: {error}. Check the path.") from error


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvdpoError(f"{place} is not JSON: {error}") from error


def _field(entry: Any, key: str, place: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise InvdpoError(f"{place}: there is no `{key}`.")
    return entry[key]


def _share(value: Any, place: str) -> float:
    """T2I-CompBench writes some answers as text, "0.8312"."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share <= 1:
        raise InvdpoError(f"{place}: {value!r} is no number from 0 to 1.")
    return share


def _some_rows(rows: list[Row], path: Path | str) -> list[Row]:
    if not rows:
        raise InvdpoError(f"{path} holds no result of an image.")
    twice = [key for key, n in Counter((row.prompt_id, row.image, row.task) for row in rows).items() if n > 1]
    if twice:
        prompt, image, task = twice[0]
        raise InvdpoError(f"{path}: image {image} of prompt {prompt} ({task}) is there twice. Leave one out.")
    return rows


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")


def _numerically(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (-1, name)
