"""MLflow's own server: its pages show the ablations side by side, and training and imports talk to it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from evidence_fixture import GAINS, make_small_study, make_study
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from playwright.sync_api import Browser, Page, expect

from invdpo.config import StudyConfig, dump_study
from invdpo.tracking import live
from invdpo.tracking.mlflow_sync import sync
from invdpo.tracking.store import connect

VIEW = "compareRunsMode=CHART&workflowType=machine_learning"  # what *Model training* and the chart view say
PATIENCE = 60_000  # ms; a busy machine is slow, not wrong


@dataclass(frozen=True)
class Served:
    """A server's address, and a client of it."""

    url: str
    client: MlflowClient

    def experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        assert found is not None
        return found.experiment_id

    def live(self, study: str) -> list[Run]:
        """The runs that were sent while they trained."""
        found = self.client.get_experiment_by_name(f"{study}: live")
        return [] if found is None else list(self.client.search_runs([found.experiment_id]))


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, mlflow_server: Callable[[Path], str]
) -> Iterator[Served]:
    """A server on the database of a made-up study with the two ablations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("mlflow"))
        skip = tuple(arm for arm in GAINS if not arm.startswith(("q_single", "p_single")))
        study = make_study(seeds=2, prompts=6, skip=skip)
        database = Path(shutil.copy(empty_store, study.root)).absolute()
        sync(study)
        url = mlflow_server(database)
        yield Served(url, connect(url))


@pytest.fixture(scope="module")
def page(chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


@pytest.mark.parametrize(
    ("question", "metric", "arms"),
    [
        ("q_vs_p", "eval/pickscore", ["base", "q_single", "p_single"]),
        ("inversion_steps", "inversion/pickscore", ["p_single"]),
    ],
)
def test_an_ablation_is_compared_by_arm(
    page: Page, served: Served, question: str, metric: str, arms: list[str]
) -> None:
    place = f"#/experiments/{served.experiment(f'toy: {question}')}/runs"
    # *Model training*, which a click on the switch chooses, and the chart view
    page.goto(f"{served.url}/{place}?workflowType=machine_learning&compareRunsMode=CHART")
    expect(page.get_by_role("link", name="Models", exact=True)).to_be_visible(timeout=PATIENCE)
    page.get_by_role("button", name="Group by").click()
    page.get_by_role("menuitemcheckbox", name="arm", exact=True).click()
    for arm in arms:
        expect(page.get_by_text(f"Group: {arm}", exact=True)).to_be_visible(timeout=PATIENCE)
    page.get_by_placeholder("Search metric charts").fill("pickscore")
    card = page.get_by_test_id("experiment-view-compare-runs-card").filter(has=page.get_by_title(metric, exact=True))
    expect(card).to_have_count(1, timeout=PATIENCE)
    card.scroll_into_view_if_needed()
    expect(card.locator(".js-plotly-plot .xtitle")).to_have_text("Step", timeout=PATIENCE)
    for arm in arms:
        expect(card.get_by_text(f"{arm} ({metric})", exact=True)).to_be_visible(timeout=PATIENCE)
    # A line with all three checkpoints, or all three numbers of inversion steps, for every arm but the base; the other
    # traces are bands.
    lines = card.locator(".scatterlayer .trace").evaluate_all(
        "traces => traces.map(trace => trace.querySelectorAll('.point').length)"
    )
    assert lines.count(3) >= len(set(arms) - {"base"})


def test_training_that_is_stopped_is_killed_on_the_server(
    tiny_study: Callable[..., StudyConfig], tiny_cache: Path, served: Served
) -> None:
    study = tiny_study(training={"steps": 4000, "checkpoints": [1]})
    shutil.copytree(tiny_cache, study.root / "preferences")
    Path("study.json").write_text(dump_study(study))
    command = [sys.executable, "-m", "invdpo.cli", "train", "--study", "study.json", "--arm", "dpo", "--seed", "0"]
    source = str(Path(live.__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": source, "MLFLOW_TRACKING_URI": served.url}
    with open("stderr.txt", "w") as stderr:
        process = subprocess.Popen([*command, "--threads", "1"], stderr=stderr, env=environment)
        while process.poll() is None and not any(run.data.metrics for run in served.live("tiny")):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 130, Path("stderr.txt").read_text()
    (run,) = served.live("tiny")
    assert run.info.status == "KILLED"
    assert len(served.client.get_metric_history(run.info.run_id, "train/loss")) > 1
    assert "MLFLOW_TRACKING_URI" not in Path("stderr.txt").read_text()


def test_an_import_replaces_what_was_sent_while_it_trained(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", served.url)
    monkeypatch.setattr(live, "GRACE", 120.0)
    study = make_small_study("small")
    table = study.root / "tables/table_s5.csv"
    table.parent.mkdir()
    table.write_text("a,b\n")
    for arm in ("q_single", "p_single_n10"):  # the second has not been trained
        with live.live_run(study, arm, 0, [], torch.device("cpu")):
            pass
    assert len(served.live("small")) == 2

    report = sync(study, served.url)
    assert report.imported > 0 and report.deleted == 1
    assert [run.data.tags["arm"] for run in served.live("small")] == ["p_single_n10"]
    runs = served.client.search_runs([served.experiment("small: q_vs_p")])
    found = {run.info.run_name: run for run in runs}
    assert set(found) == {"base-small-s0", "q_single-small-s0", "p_single-small-s0", "summary-small"}
    artifacts = served.client.list_artifacts(found["summary-small"].info.run_id, "tables")
    assert [part.path for part in artifacts] == ["tables/table_s5.csv"]
    assert not (study.root / "mlflow.db").exists()

    table.write_text("a,c\n")
    again = sync(study, served.url)
    assert (again.imported, again.deleted) == (1, 1)
