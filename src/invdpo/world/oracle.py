"""What the world itself thinks of a picture: scene-graph agreement and the hidden utility behind every vote."""

from __future__ import annotations

import numpy as np
from PIL import Image

from invdpo.scorers.scene_graph import SceneGraph, agreement
from invdpo.world.benchmarks import tasks
from invdpo.world.parser import Reading, Seen, read_picture
from invdpo.world.render import relation_between
from invdpo.world.scenes import Scene, Thing, read_caption

# Utility is in units of the annotators' Gumbel noise: a flawless picture beats an empty, dirty one almost always, a
# swapped attribute or a dirty background loses about three votes in four.
FAITHFULNESS_WEIGHT = 6.0
AESTHETICS_WEIGHT = 3.0
# A component that looks like no shape (mask IoU below this) is a blob, not an object.
RECOGNISABLE = 0.6


def _agreement(thing: Thing, seen: Seen) -> float:
    """How far an object is the one asked for: colour and shape count 0.4 each, size 0.2 where it is asked for."""
    if seen.match < RECOGNISABLE:
        return 0.2 * (seen.colour == thing.colour)
    score = 0.4 * (seen.colour == thing.colour) + 0.4 * (seen.shape == thing.shape)
    return score + (0.2 if thing.size in (None, seen.size) else 0.0)


def _assign(scene: Scene, seen: tuple[Seen, ...]) -> list[Seen | None]:
    """The found object that stands for each thing of the scene, best agreement first; each object serves once."""
    scores = np.array([[_agreement(thing, item) for item in seen] for thing in scene.things])
    assigned: list[Seen | None] = [None] * len(scene.things)
    while scores.size and scores.max() > 0.4:
        row, column = np.unravel_index(scores.argmax(), scores.shape)
        assigned[int(row)] = seen[int(column)]
        scores[row, :] = -1.0
        scores[:, column] = -1.0
    return assigned


def faithfulness(scene: Scene, reading: Reading) -> float:
    """0..1: the mean over what the caption asks for (each thing, and the relation), less 0.15 an object too many."""
    assigned = _assign(scene, reading.seen)
    marks = [
        0.0 if item is None else _agreement(thing, item) for thing, item in zip(scene.things, assigned, strict=True)
    ]
    if scene.relation is not None:
        marks.append(float(_relation(assigned) == scene.relation))
    extra = max(0, len(reading.seen) - len(scene.things))
    return max(0.0, float(np.mean(marks)) - 0.15 * extra)


def _relation(assigned: list[Seen | None]) -> str | None:
    first, second = assigned[0], assigned[1]
    if first is None or second is None:
        return None
    return relation_between(first.x, first.y, second.x, second.y)


def aesthetics(reading: Reading) -> float:
    """0..1: clean background, sharp outlines, pure colours."""
    return (2 * reading.clean + reading.sharp + reading.pure) / 4


def _graph(things: list[tuple[str, str, str | None]], relation: str | None) -> SceneGraph:
    """Colour and size are in an entity's label, as in LAION-SG's loader, and also triples of their own ("circle is
    red"), which LAION-SG has not: without them a caption of one thing would have no triple.
    """
    labels = [" ".join(filter(None, (size, colour, shape))) for colour, shape, size in things]
    triples = [(shape, "is", word) for colour, shape, size in things for word in (colour, size) if word]
    if relation is not None:
        triples.append((labels[0], relation, labels[1]))
    return SceneGraph(tuple(triples), tuple(labels), () if relation is None else (relation,))


def _graphs(scene: Scene, reading: Reading) -> tuple[SceneGraph, SceneGraph]:
    """The caption's graph and the picture's. Sizes count only for things whose size the caption states."""
    wanted = _graph([(thing.colour, thing.shape, thing.size) for thing in scene.things], scene.relation)
    assigned = _assign(scene, reading.seen)
    found: list[tuple[str, str, str | None]] = []
    for thing, item in zip(scene.things, assigned, strict=True):
        if item is not None and item.match >= RECOGNISABLE:
            found.append((item.colour, item.shape, item.size if thing.size else None))
    taken = {id(item) for item in assigned}
    found += [
        (item.colour, item.shape, None) for item in reading.seen if id(item) not in taken and item.match >= RECOGNISABLE
    ]
    both = scene.relation is not None and all(item is not None and item.match >= RECOGNISABLE for item in assigned[:2])
    return wanted, _graph(found, _relation(assigned) if both else None)


def utility(scene: Scene, reading: Reading) -> float:
    """The hidden utility by which the simulated annotators vote."""
    return float(FAITHFULNESS_WEIGHT * faithfulness(scene, reading) + AESTHETICS_WEIGHT * aesthetics(reading))


def score(image: Image.Image | np.ndarray, prompt: str) -> dict[str, float]:
    """utility, sg_iou, entity_iou, relation_iou and the benchmarks' tasks of one picture for one caption.

    Raises ValueError where the prompt is not a caption of this world or the picture is not 64x64 RGB. relation_iou
    is NaN for captions without a relation: the metric does not exist there (LAION-SG's script would say 0). A task
    that the caption does not ask for has no entry.
    """
    scene = read_caption(prompt)
    if scene is None:
        raise ValueError(f"{prompt!r} is not a caption of the shapes world, so its oracle cannot judge it")
    reading = read_picture(np.asarray(image))
    marks = agreement(*_graphs(scene, reading))
    if scene.relation is None:
        marks["relation_iou"] = float("nan")
    recognised = [item for item in reading.seen if item.match >= RECOGNISABLE]
    return {"utility": utility(scene, reading), **marks, **tasks(scene, recognised)}
