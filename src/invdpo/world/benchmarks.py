"""The tasks of GenEval, T2I-CompBench and DPG-Bench for captions of the shapes world, with its parser as the looker.

A caption of this world asks for more than a prompt of GenEval does (every object has a colour, every two a relation),
so one picture can be scored for several tasks; which, the caption decides. What no caption asks for has no score:
of GenEval all six tasks occur; of T2I-CompBench shape (shapes are the nouns here), texture, 3D spatial and non-spatial
do not. Objects are what the parser recognises, with confidence 1; "left of" and its like are the world's own relation
(the axis that dominates), where GenEval and UniDet have rules for boxes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations

from invdpo.scorers.composition import (
    compbench_attributes,
    compbench_complex,
    compbench_numeracy,
    compbench_spatial,
    dpg_image,
)
from invdpo.world.parser import Seen
from invdpo.world.render import relation_between
from invdpo.world.scenes import Scene, Thing


def tasks(scene: Scene, seen: Sequence[Seen]) -> dict[str, float]:
    """`<benchmark>_<task>` -> score in 0..1 of a picture, for every task that the scene's caption asks for.

    seen: the objects that were recognised in it.
    """
    things = scene.things
    wanted, found = Counter(thing.shape for thing in things), Counter(item.shape for item in seen)
    repeated = {shape: count for shape, count in wanted.items() if count > 1}
    all_there = all(found[shape] >= count for shape, count in wanted.items())
    coloured = [_there(thing, seen) for thing in things]
    marks = {"dpg_score": _dpg(scene, seen)}
    if repeated:
        # GenEval asks for at least that many and rules out one more.
        marks["geneval_counting"] = float(all(found[shape] == count for shape, count in repeated.items()))
        marks["compbench_numeracy"] = compbench_numeracy(repeated, found)
    if len(things) == 1:
        marks |= {"geneval_single_object": float(all_there), "geneval_colors": float(coloured[0])}
    if len(things) == 2:
        marks |= {"geneval_two_object": float(all_there), "geneval_color_attr": float(all(coloured))}
    if len(things) < 3:
        marks["compbench_color"] = compbench_attributes(map(float, coloured))
    if len(things) > 1:
        holds = _relation_holds(scene, seen)
        marks["geneval_position"] = float(holds)
        first, second = (float(found[thing.shape] > 0) for thing in things[:2])
        spatial = compbench_spatial(first, second, float(holds))
        if len(things) == 2:
            marks["compbench_spatial"] = spatial
        else:
            marks["compbench_complex"] = compbench_complex(compbench_attributes(map(float, coloured)), spatial)
    return marks


def _there(thing: Thing, seen: Sequence[Seen]) -> bool:
    """Whether an object of that shape and colour was recognised; sizes are asked for by DPG-Bench's questions alone."""
    return any((item.shape, item.colour) == (thing.shape, thing.colour) for item in seen)


def _relation_holds(scene: Scene, seen: Sequence[Seen]) -> bool:
    """Whether some object of the first thing's shape stands in the relation to one of the second's, whatever their
    colours; of two things of one shape, colours tell which is which.
    """
    first, second = scene.things[:2]
    told_by_colour = first.shape == second.shape

    def stands_for(item: Seen, thing: Thing) -> bool:
        return item.shape == thing.shape and (not told_by_colour or item.colour == thing.colour)

    return any(
        stands_for(a, first) and stands_for(b, second) and relation_between(a.x, a.y, b.x, b.y) == scene.relation
        for a, b in permutations(seen, 2)
    )


def _dpg(scene: Scene, seen: Sequence[Seen]) -> float:
    """Is there a circle? Is it red? Is it large? Is it left of the square? An attribute's parent is its object."""
    answers: dict[int, bool] = {}
    parents: dict[int, list[int]] = {}

    def ask(answer: bool, *depends_on: int) -> int:
        question = len(answers) + 1
        answers[question], parents[question] = answer, list(depends_on)
        return question

    objects = []
    for thing in scene.things:
        same = [item for item in seen if item.shape == thing.shape]
        objects.append(ask(bool(same)))
        ask(any(item.colour == thing.colour for item in same), objects[-1])
        if thing.size:
            ask(any(item.size == thing.size for item in same), objects[-1])
    if scene.relation is not None:
        ask(_relation_holds(scene, seen), *objects[:2])
    return dpg_image(answers, parents)
