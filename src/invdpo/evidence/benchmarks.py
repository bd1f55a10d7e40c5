"""Result files of the compositional benchmarks, run elsewhere, as rows and a table like the study's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from invdpo.errors import InvdpoError
from invdpo.evidence.compositional import benchmark_table
from invdpo.evidence.printing import write_table
from invdpo.files import replace_when_done
from invdpo.prompts import read_prompts
from invdpo.scorers.composition import TITLES, Row, prompt_scores, read_compbench, read_dpg, read_geneval


def collect(
    benchmark: str,
    results: Sequence[str],
    folder: Path,
    category: str | None = None,
    prompts: Path | None = None,
    samples: int = 10,
) -> list[Path]:
    """Read METHOD=FILE results of one benchmark; write folder/rows.csv, a row an image, and folder/composition.{csv,
    md,tex}; the paths written. The files of one method are its seeds 0, 1, … in their order.

    Raises InvdpoError for an unknown benchmark, an argument that is not METHOD=FILE, and as the readers do.
    """
    if benchmark not in TITLES:
        raise InvdpoError(f"There is no benchmark `{benchmark}`; those are {', '.join(TITLES)}.")
    if benchmark == "compbench" and (category is None or prompts is None):
        raise InvdpoError("T2I-CompBench's files name neither category nor prompts: give --category and --prompts.")
    rows: list[Row] = []
    seeds: Counter[str] = Counter()
    for result in results:
        method, equals, path = result.partition("=")
        if not (method and equals and path):
            raise InvdpoError(f"`{result}` is not METHOD=FILE.")
        seed = seeds[method]
        seeds[method] += 1
        if benchmark == "geneval":
            rows += read_geneval(path, method, seed)
        elif benchmark == "dpg":
            rows += read_dpg(path, method, seed)
        else:
            assert category is not None and prompts is not None  # checked above
            rows += read_compbench(path, method, category, read_prompts(prompts), seed, samples)
    with replace_when_done(folder / "rows.csv") as temporary:
        pd.DataFrame(map(asdict, rows)).to_csv(temporary, index=False, lineterminator="\n")
    table = benchmark_table(prompt_scores(rows), list(seeds))
    return [folder / "rows.csv", *write_table(folder, "composition", table)]
