"""The graph as its users meet it: dry runs of every study, and the smoke study run in copies of the tree."""

import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from workflow_fixture import ROOT, SNAKEMAKE, copy_tree, environment

from invdpo.config import MEASURED, load_study
from invdpo.plan import count_jobs

STUDIES = sorted(
    path.stem for path in (ROOT / "config").glob("*.yaml") if re.search("^study:", path.read_text(), re.MULTILINE)
)
# These decide no number of a stage: wording of errors, how files are written and fetched, what is noted about a run,
# the command line. A study's settings reach each rule through its key.
NEUTRAL = {"__init__", "evidence/__init__", "cli", "config", "errors", "files", "hub", "places", "provenance", "types"}
NEUTRAL |= {"tracking/live", "tracking/store"}  # training sent to a server as it goes
NEUTRAL |= {"memory", "network_size"}  # what to lower, where a GPU's memory did not do


def snakemake(folder: Path, *arguments: str, check: bool = True, variables: dict[str, str] | None = None) -> str:
    """What snakemake printed (stdout and stderr together) when called in that folder."""
    done = subprocess.run(
        [*SNAKEMAKE, *arguments],
        cwd=folder,
        env=environment(folder) | (variables or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def jobs(output: str) -> dict[str, int]:
    """Rule -> number of jobs, from the table that Snakemake prints; empty when there is nothing to do."""
    table = re.search(r"^-+ +-+\n(.*?)^total", output, re.MULTILINE | re.DOTALL)
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table[1], re.MULTILINE)} if table else {}


# What a second run makes: all that training and measuring give. Tables of the same scores are the same bytes by a test
# of their own (test_reference.py).
MADE_TWICE = [
    *(f"scores/{arm}/seed0.parquet" for arm in ("base", "diffusion_dpo", "inversion_dpo_code", "p_single")),
    *(f"experiments/inversion_error/{name}.csv" for name in ("errors", "levels")),
    *(f"experiments/precision/{name}.csv" for name in ("latents", "agreement")),
    *(f"experiments/audit/{name}.csv" for name in ("gradients", "summary", "rewards")),
    "distribution.csv",
]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two copies of the tree in which the smoke study has run from nothing, side by side: in the first to its end."""
    base = tmp_path_factory.mktemp("smoke")
    folders = (copy_tree(base / "first"), copy_tree(base / "second"))
    runs = [
        subprocess.Popen(
            [*SNAKEMAKE, *targets, "--configfile", "config/smoke.yaml", "--cores", "1"],
            cwd=folder,
            env=environment(folder),
            text=True,
            stdout=(folder / "output.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        for folder, targets in zip(folders, ([], [f"results/smoke/{name}" for name in MADE_TWICE]), strict=True)
    ]
    codes = [run.wait() for run in runs]
    assert codes == [0, 0], "\n".join((folder / "output.txt").read_text()[-6000:] for folder in folders)
    return folders


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_has_a_graph(study: str, tmp_path: Path) -> None:
    folder = copy_tree(tmp_path / "tree")
    planned = jobs(snakemake(folder, "--configfile", f"config/{study}.yaml", "--dry-run"))
    config = load_study(ROOT / "config" / f"{study}.yaml")
    assert planned["tables"] == planned["figures"] == planned["mlflow"] == 1
    trained = sum(config.arm(name).trains for name in config.arms)
    assert planned.get("train", 0) == planned.get("evaluate", 0) == trained
    assert planned.get("preferences", 0) == min(trained, 1)
    made = ("sample", "score_samples", "rank_samples")
    assert [planned.get(name, 0) for name in made] == [int(config.own_samples is not None)] * 3
    assert planned["train_nothing"] == planned["evaluate_base"] == len(config.arms) - trained >= 1
    assert {name for name in (*MEASURED, "claims") if name in planned} == {
        *config.experiments.measured,
        *(["claims"] if config.claims else []),
    }
    assert [path.name for path in (folder / "results").iterdir()] == ["reference"], "a dry run writes nothing"
    counted = count_jobs(config)
    assert counted["train"] == planned.get("train", 0) + planned["train_nothing"]
    base = planned.get("shapes_xl", 0)  # that a rule makes where it is not there yet
    assert sum(counted.values()) == planned.pop("total", sum(planned.values())) - 1 - base, "all but the rule `all`"


@pytest.mark.parametrize("study", ["shapes", "shapes_methods"])
def test_a_study_can_be_tuned_before_it_was(study: str, tmp_path: Path) -> None:
    folder = copy_tree(tmp_path / "tree")
    (folder / "config" / "tuned" / f"{study}.yaml").unlink(missing_ok=True)
    planned = jobs(snakemake(folder, "tune", "--configfile", f"config/{study}.yaml", "--dry-run"))
    tuning = load_study(ROOT / "config" / f"{study}.yaml").tuning
    assert tuning is not None
    assert planned == {"preferences": 1, "tune_arm": len(tuning.arms), "tune": 1}


def test_a_study_without_experiments_has_no_rule_for_them(tmp_path: Path) -> None:
    folder = copy_tree(tmp_path / "tree")
    config = folder / "config" / "smoke.yaml"
    text = config.read_text()
    start, end = text.index("  inversion_error:"), text.index("claims:")
    config.write_text(text[:start] + text[end:])
    planned = jobs(snakemake(folder, "--configfile", "config/smoke.yaml", "--dry-run"))
    assert planned["tables"] == planned["claims"] == 1
    assert {"inversion_error", "precision", "audit", "preference_accuracy", "present"}.isdisjoint(planned)
    text = snakemake(folder, "results/smoke/tables/audit.csv", "--configfile", "config/smoke.yaml", "-n", check=False)
    assert "MissingRuleException" in text


def test_time_limits_are_those_of_a_plan_of_the_same_arms(tmp_path: Path) -> None:
    """Twice the planned hours and one more; two days where the arm or the number of seeds was another."""
    folder, study = copy_tree(tmp_path / "tree"), load_study(ROOT / "config" / "smoke.yaml")
    first, second, third = [name for name in study.arms if study.arm(name).trains][:3]
    planned = {
        name: {"train_hours": 1.5, "devices": 1, "hash": study.arm(name).hash, "runs": len(study.seeds)}
        for name in (first, second, third)
    }
    planned[second]["hash"], planned[third]["runs"] = "0123456789abcdef", len(study.seeds) + 1
    planned["gone"] = planned[first]
    (folder / "results" / "smoke").mkdir()
    (folder / "results" / "smoke" / "plan.json").write_text(json.dumps({"arms": planned}))
    with (folder / "Snakefile").open("a") as file:
        file.write("for name in TRAINED:\n    arm = type('Wildcards', (), {'arm': name})\n")
        file.write("    print(f'limit of {name}: {train_minutes(arm)}', file=sys.stderr)\n")
    text = snakemake(folder, "--configfile", "config/smoke.yaml", "--dry-run")
    limits = dict(re.findall(r"limit of (\w+): (\d+)", text))
    assert [limits[name] for name in (first, second, third)] == ["240", "2880", "2880"]


def test_verdicts_wait_for_the_experiments_they_rest_on(tmp_path: Path) -> None:
    folder = copy_tree(tmp_path / "tree")
    planned = jobs(snakemake(folder, "results/smoke/claims.json", "--configfile", "config/smoke.yaml", "--dry-run"))
    assert {planned[name] for name in ("precision", "audit", "inversion_error", "distribution")} == {1}
    assert {"preference_accuracy", "weight_distances"}.isdisjoint(planned)


def test_default_study_is_shapes_and_small_enough(tmp_path: Path) -> None:
    folder = copy_tree(tmp_path / "tree")
    assert sum(jobs(snakemake(folder, "--dry-run", "results/shapes/tables/table1.csv")).values()) <= 60


def test_gpus_limit_and_decide(tmp_path: Path) -> None:
    """A study with `device: auto` asks for GPUs where there are any, or where a profile says that there are."""
    folder = copy_tree(tmp_path / "tree")
    show = "print('GPUS', GPUS, GPU, STAGE_THREADS)"
    (folder / "rules" / "preferences.smk").write_text((folder / "rules" / "preferences.smk").read_text() + show + "\n")
    study = ("--configfile", "config/smoke.yaml", "--dry-run")
    expected = {("a,b", ()): "GPUS 2 1 4", ("", ()): "GPUS 0 0 1", ("", ("--resources", "gpu=3")): "GPUS 3 1 4"}
    for (visible, arguments), words in expected.items():
        text = snakemake(folder, *study, *arguments, variables={"CUDA_VISIBLE_DEVICES": visible})
        assert words in text
    text = snakemake(folder, *study, "--config", "device=cpu", variables={"CUDA_VISIBLE_DEVICES": "a,b"})
    assert "GPUS 2 0 1" in text


def test_rule_graph_goes_from_preferences_to_tables() -> None:
    graph = snakemake(ROOT, "--configfile", "config/smoke.yaml", "--rulegraph", "--forceall")
    nodes = dict(re.findall(r'^\s*(\d+)\[label = "(\w+)"', graph, re.MULTILINE))
    edges = {(nodes[a], nodes[b]) for a, b in re.findall(r"^\s*(\d+) -> (\d+)", graph, re.MULTILINE)}
    chain = ["preferences", "train", "evaluate", "tables", "all"]
    assert set(itertools.pairwise(chain)) <= edges


def test_lint() -> None:
    snakemake(ROOT, "--configfile", "config/smoke.yaml", "--lint")


def test_unknown_key_stops_with_its_name(tmp_path: Path) -> None:
    folder = copy_tree(tmp_path / "tree")
    text = snakemake(folder, "--configfile", "config/smoke.yaml", "-n", "--config", "samplng=1", check=False)
    assert "samplng" in text and "sampling" in text
    assert "Traceback" not in text


def imported(module: Path, seen: set[Path]) -> set[Path]:
    """Files of the package that a file imports, at its top or inside functions, and what these import."""
    package = ROOT / "src" / "invdpo"
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("invdpo"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("invdpo")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("invdpo."):
            names = [node.value]  # import_module("invdpo.…")
        else:
            continue
        for name in names:
            place = package.joinpath(*name.split(".")[1:])
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if (
                    file.is_file()
                    and file not in seen
                    and file.relative_to(package).with_suffix("").as_posix() not in NEUTRAL
                ):
                    seen.add(file)
                    imported(file, seen)
    return seen


STAGES = {
    "sample": "samples",
    "score": "score",
    "rank": "rank",
    "preferences": "preferences/cache",
    "train": "training/loop",
    "evaluate": "evaluate",
    "distribution": "distribution",
    "tables": "evidence/tables",
    "figures": "evidence/figures",
    "claims": "evidence/claims",
    "model_cards": "evidence/model_card",
    "report": "evidence/report",
    "mlflow": "tracking/mlflow_sync",
    "tune": "tuning",
    "experiments": "experiments/stage",
    "present": "evidence/experiments",
}


def watched_modules() -> dict[str, tuple[str, ...]]:
    """The table of modules in rules/common.smk, from the first of its constants to the last."""
    text = (ROOT / "rules" / "common.smk").read_text()
    names: dict[str, dict[str, tuple[str, ...]]] = {}
    exec(text[text.index("SCORING = ") : text.index("CODE = ")], {}, names)
    return names["MODULES"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_watches_the_code_it_runs(stage: str) -> None:
    """A module that a stage imports must count into its rule's hash, or an edit would leave stale results."""
    package = ROOT / "src" / "invdpo"
    entry = package / f"{STAGES[stage]}.py"
    needed = {file.relative_to(package).as_posix() for file in imported(entry, {entry})}
    watched = watched_modules()[stage]
    assert {name for name in needed if not any(name == f"{w}.py" or name.startswith(f"{w}/") for w in watched)} == set()


def test_smoke_runs_and_says_where_the_results_are(copies: tuple[Path, Path]) -> None:
    folder = copies[0]
    output = (folder / "output.txt").read_text()
    files = ["tables/table1.csv", "figures/fig3.pdf", "claims.json", "mlflow.db", "distribution.csv", "report.html"]
    files += [f"tables/{name}.md" for name in ("inversion_error", "precision", "audit", "preference_accuracy")]
    files += [f"tables/{name}.csv" for name in ("table2", "win_rates", "over_optimisation", "to_target", "table_s4")]
    files += ["user_study/key.json", "user_study/bundle/manifest.json", "runs/diffusion_dpo/seed0/README.md"]
    files += [f"figures/{name}.png" for name in ("inversion_error", "fig_s9", "precision", "audit")]
    for name in files:
        assert (folder / "results" / "smoke" / name).stat().st_size > 0
    verdicts = json.loads((folder / "results" / "smoke" / "claims.json").read_text())["claims"]
    measured = [row for row in verdicts if row["artifacts"] and row["artifacts"][0].startswith("experiments/")]
    assert len(measured) == 9 and all(row["value"] is not None for row in measured)
    for words in (
        "results/smoke/tables:",
        "results/smoke/figures:",
        "make mlflow STUDY=smoke",
        "make report STUDY=smoke",
        "results/smoke/report.html: open it in a browser",
    ):
        assert words in output


@pytest.mark.parametrize("name", MADE_TWICE)
def test_two_runs_give_the_same(copies: tuple[Path, Path], name: str) -> None:
    first, second = (folder / "results" / "smoke" / name for folder in copies)
    if first.suffix == ".csv":
        assert first.read_bytes() == second.read_bytes()
    else:  # what else the file notes is its time and memory
        pd.testing.assert_frame_equal(pd.read_parquet(first), pd.read_parquet(second), check_exact=True)


def test_unchanged_run_does_nothing(copies: tuple[Path, Path]) -> None:
    assert "Nothing to be done" in snakemake(copies[0], "--configfile", "config/smoke.yaml")


def test_one_target_is_made_alone(copies: tuple[Path, Path]) -> None:
    table = copies[0] / "results" / "smoke" / "tables" / "table1.csv"
    before = table.read_bytes()
    table.unlink()
    output = snakemake(copies[0], "results/smoke/tables/table1.csv", "--configfile", "config/smoke.yaml")
    assert jobs(output) == {"tables": 1}
    assert table.read_bytes() == before


def test_votes_are_analysed_where_there_are_any(copies: tuple[Path, Path]) -> None:
    folder, study = copies[0], ("--study", "config/smoke.yaml")
    votes = folder / "results" / "smoke" / "user_study" / "votes.csv"
    app = [sys.executable, "-m", "invdpo.cli", "study"]
    rates = ("--win-rate", "0.8", "--win-rate", "0.5")
    subprocess.run(
        [*app, "simulate", *study, *rates, "--out", str(votes)], cwd=folder, env=environment(folder), check=True
    )
    output = snakemake(folder, "--configfile", "config/smoke.yaml")
    assert jobs(output) == {"user_study_analysis": 1, "claims": 1, "mlflow": 1, "report": 1, "all": 1}
    tables = folder / "results" / "smoke" / "tables"
    assert "Davidson" in (tables / "table_s4.md").read_text() and (tables / "user_study.csv").is_file()
    votes.write_text(votes.read_text().splitlines()[0] + "\n")
    output = snakemake(folder, "--configfile", "config/smoke.yaml")
    assert jobs(output) == {"user_study_analysis": 1, "claims": 1, "mlflow": 1, "report": 1, "all": 1}
    assert "not run: `make user-study`" in (tables / "table_s4.md").read_text(), "an export without a vote"
    assert not (tables / "user_study.csv").exists()
    votes.unlink()


def test_edits_rerun_what_they_touch_and_no_more(copies: tuple[Path, Path]) -> None:
    folder = copies[0]
    dry = ("--configfile", "config/smoke.yaml", "--dry-run")
    assert jobs(snakemake(folder, *dry)) == {}

    config = folder / "config" / "smoke.yaml"
    text = config.read_text()
    everything = jobs(snakemake(folder, *dry, "--forceall"))

    config.write_text(text.replace("seed: 2025", "seed: 7"))
    again = jobs(snakemake(folder, *dry))
    assert "train" not in again and again["evaluate"] == everything["evaluate"]
    assert again["audit"] == 1 and {"inversion_error", "precision", "preference_accuracy"}.isdisjoint(again)

    config.write_text(text.replace("latents: 4", "latents: 5"))
    assert jobs(snakemake(folder, *dry)) == {
        "inversion_error": 1,
        "claims": 1,
        "present": 1,
        "mlflow": 1,
        "report": 1,
        "all": 1,
    }

    config.write_text(text.replace("kid_subset_size: 8", "kid_subset_size: 9"))
    assert jobs(snakemake(folder, *dry)) == {
        "distribution": 1,
        "tables": 1,
        "claims": 1,
        "mlflow": 1,
        "report": 1,
        "all": 1,
    }

    config.write_text(text.replace("probes: 2", "probes: 3"))
    assert jobs(snakemake(folder, *dry)) == {
        "precision": 1,
        "claims": 1,
        "present": 1,
        "mlflow": 1,
        "report": 1,
        "all": 1,
    }
    config.write_text(text.replace("min_view_ms: 300", "min_view_ms: 301"))
    assert jobs(snakemake(folder, *dry)) == {"user_study_bundle": 1, "all": 1}

    one_arm = "\n  diffusion_dpo: {method: diffusion_dpo, training: {learning_rate: 1.23e-5}}\n"
    config.write_text(text.replace("\n  diffusion_dpo: {method: diffusion_dpo}\n", one_arm))
    again = jobs(snakemake(folder, *dry))
    assert (again["train"], again["evaluate"], again["precision"], again["audit"]) == (1, 1, 1, 1)
    assert "inversion_error" not in again
    config.write_text(text)

    code = folder / "src" / "invdpo" / "evidence" / "tables.py"
    statements = code.read_text()
    code.write_text(statements + "\n# a comment changes no number\n")
    assert jobs(snakemake(folder, *dry)) == {}
    code.write_text(statements + "\nANOTHER_STATEMENT = True\n")
    again = jobs(snakemake(folder, *dry))
    code.write_text(statements)
    assert "tables" in again and {"preferences", "train", "evaluate"}.isdisjoint(again)
