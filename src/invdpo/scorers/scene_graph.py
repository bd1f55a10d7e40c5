"""Agreement of two scene graphs: SG-IoU, Entity-IoU and Relation-IoU (Inversion-DPO, Table 2).

The paper gives no formula. The only public definition is LAION-SG's script, `mengcye/LAION-SG`, test/test_iou.py: with
the triples T, entities E and relations R of the true graph and those of the graph read from the picture, each IoU is
|A and B| / |A or B| of two *sets* of strings, compared exactly, 0 where both are empty; per image, then averaged.

Three things about it decide its values, and each is an option or stated where it is used:

- A set has no duplicates: of two dogs asked for, one dog is enough. `duplicates="multiset"` counts them.
- The script's example has bare labels ("dog"), LAION-SG's loader labels with their attributes ("brown dog"):
  `from_laion_sg(attributes=...)`.
- The reader is told the true vocabulary and may use no other word, so what it finds lies inside what is true, and
  Entity- and Relation-IoU are in effect recall. An open reading, as the shapes world's parser gives, can also be wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from invdpo.errors import InvdpoError

Duplicates = Literal["set", "multiset"]
METRICS = ("sg_iou", "entity_iou", "relation_iou")


@dataclass(frozen=True)
class SceneGraph:
    """triples: (subject, relation, object). entities: labels of all objects. relations: predicates of all triples."""

    triples: tuple[tuple[str, str, str], ...]
    entities: tuple[str, ...]
    relations: tuple[str, ...]


def iou(first: Iterable[Hashable], second: Iterable[Hashable], duplicates: Duplicates = "set") -> float:
    """|A and B| / |A or B|, 0 where both are empty.

    set: each element once. multiset: an element counts as often as it is there, the smaller count in the intersection
    and the larger in the union.
    """
    a, b = Counter(first), Counter(second)
    if duplicates == "set":
        a, b = Counter(set(a)), Counter(set(b))
    union = (a | b).total()
    return (a & b).total() / union if union else 0.0


def agreement(truth: SceneGraph, found: SceneGraph, duplicates: Duplicates = "set") -> dict[str, float]:
    """sg_iou, entity_iou and relation_iou of a graph that was found in a picture with the true one."""
    return {
        "sg_iou": iou(truth.triples, found.triples, duplicates),
        "entity_iou": iou(truth.entities, found.entities, duplicates),
        "relation_iou": iou(truth.relations, found.relations, duplicates),
    }


def from_laion_sg(entry: Mapping[str, Any], attributes: bool = False) -> SceneGraph:
    """The graph of an entry of LAION-SG's JSON: `items` [{item_id, label, attributes}], `relations` [{item1, relation,
    item2}], where item1 and item2 are item_ids.

    attributes: whether a label is preceded by its attributes, as in the loader's triples. Raises InvdpoError naming
    the entry and what it lacks.
    """
    place = f"scene graph {entry.get('img_id', entry.get('name', '?'))}"
    try:
        labels = {
            item["item_id"]: " ".join([*(item.get("attributes") or [] if attributes else []), item["label"]])
            for item in entry["items"]
        }
        triples = tuple(
            (labels[row["item1"]], str(row["relation"]), labels[row["item2"]]) for row in entry["relations"]
        )
    except KeyError as error:
        raise InvdpoError(
            f"{place}: there is no {error}. An entry needs `items` with `item_id` and `label`, and `relations` whose "
            "`item1` and `item2` are item_ids."
        ) from error
    except TypeError as error:
        raise InvdpoError(f"{place}: not in LAION-SG's layout ({error}).") from error
    return SceneGraph(triples, tuple(labels.values()), tuple(relation for _, relation, _ in triples))
