"""profiles/slurm against the rules: what a job asks for, without a Slurm."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
RULE = re.compile(r"^ *(?:use rule (?P<parent>\w+) as (?P<heir>\w+) with|rule (?P<name>\w+)):$", re.MULTILINE)
RESOURCES = re.compile(r"^ *resources:\n(?P<lines>(?:^ +\w+=.*\n)+)", re.MULTILINE)


def gpu_rules() -> set[str]:
    """Names of the rules that ask for GPUs, themselves or as the rule that they are made from."""
    asked: dict[str, bool] = {}
    for path in [ROOT / "Snakefile", *sorted((ROOT / "rules").glob("*.smk"))]:
        text = path.read_text()
        heads = list(RULE.finditer(text))
        for head, end in zip(heads, [*(head.start() for head in heads[1:]), len(text)], strict=False):
            resources = RESOURCES.search(text, head.end(), end)
            if resources:
                gpu = re.search(r"\bgpu=(\w+)", resources["lines"])
                own = gpu is not None and gpu[1] != "0"
            else:
                own = asked.get(head["parent"] or "", False)
            asked[head["name"] or head["heir"]] = own
    return {name for name, own in asked.items() if own}


def test_a_rule_that_asks_for_a_gpu_has_a_partition_with_gpus() -> None:
    """The defaults are of the small jobs: no GPU, little memory, an hour."""
    profile = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    rules, lines, default = gpu_rules(), profile["set-resources"], profile["default-resources"]
    assert {"train", "evaluate", "evaluate_base", "sample", "tune_arm"} <= rules
    assert not {"train_nothing", "rank_samples", "weight_distances", "all"} & rules
    for name in sorted(rules):
        line = lines.get(name, {})
        assert line.get("slurm_partition", default["slurm_partition"]) != default["slurm_partition"], name
        assert line["mem_mb"] > default["mem_mb"], name
        # A training's time is planned: rules/train.smk.
        assert name == "train" or line["runtime"] > default["runtime"], name
