"""envs/Dockerfile against what it builds from: no container is built here."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from invdpo import provenance
from invdpo.lease import FOLDER

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "envs" / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """What follows each of the file's instructions of that name, its lines joined."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def syncs() -> list[list[str]]:
    """The arguments of every call of `uv sync`."""
    return [shlex.split(run)[2:] for run in instructions("RUN") if run.startswith("uv sync")]


def named(arguments: list[str], option: str) -> set[str]:
    return {value for key, value in zip(arguments, arguments[1:], strict=False) if key == option}


def test_the_groups_and_extras_are_those_of_the_project_and_its_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (locked,) = (
        package
        for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]
        if package["name"] == project["project"]["name"]
    )
    first, second = syncs()
    assert [argument for argument in first if argument != "--no-install-project"] == second, "the same twice"
    assert "--frozen" in second and "--no-dev" in second
    for option, known in (
        ("--group", [project["dependency-groups"], locked["dev-dependencies"]]),
        ("--extra", [project["project"]["optional-dependencies"], locked["optional-dependencies"]]),
    ):
        wanted = named(second, option)
        assert wanted and all(wanted <= each.keys() for each in known), option
    # What a study can ask for, and how it is run on a cluster.
    assert named(second, "--extra") == project["project"]["optional-dependencies"].keys()
    assert named(second, "--group") == {"slurm"}


def test_python_is_one_that_the_project_runs_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (image,) = instructions("FROM")
    minor = re.fullmatch(r"python:3\.(\d+)-slim-\w+", image)
    least = re.fullmatch(r">=3\.(\d+)", project["requires-python"])
    assert minor and least and int(minor[1]) >= int(least[1])


def test_everything_that_is_copied_is_there() -> None:
    ignored = (ROOT / "envs" / "Dockerfile.dockerignore").read_text().split()
    for copy in instructions("COPY"):
        *sources, _ = copy.split()
        for source in sources:
            assert (ROOT / source).exists() and source not in ignored, source
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    hidden = {name for name in ignored if not name.startswith(("!", "**"))}
    lost = {path for path in tracked if path.split("/")[0] in hidden and not path.startswith("results/reference/")}
    assert lost == set(), "files of the repository that the image would lack"


def test_the_graph_s_container_is_the_image_that_is_built() -> None:
    """What `--sdm apptainer` runs the jobs in."""
    (image,) = re.findall(r'^container: "(.*)"$', (ROOT / "Snakefile").read_text(), re.MULTILINE)
    assert re.findall(r"^# +apptainer build (\S+) docker-daemon://invdpo:latest", DOCKERFILE, re.MULTILINE) == [image]
    assert "-t invdpo ." in DOCKERFILE
    for kept_out in ("envs/Dockerfile.dockerignore", ".gitignore"):
        assert f"*{Path(image).suffix}" in (ROOT / kept_out).read_text().split(), kept_out


def test_containers_of_a_machine_lease_in_one_folder() -> None:
    """Each has a /tmp of its own; Docker would make a missing folder for root alone."""
    for path in ("envs/Dockerfile", "docs/paper_scale.md"):
        text = re.sub(r"\\\n[# ]*", "", (ROOT / path).read_text())
        starts = re.findall(r"docker run .*", text)
        assert starts and all(f"-v {FOLDER}:{FOLDER} " in start for start in starts), path
        assert text.count(f"mkdir -p -m 1777 {FOLDER}\n") == len(starts), path


def test_the_image_knows_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last step, run here: without a commit the build ends, and with one a run is told it."""
    (step,) = (run for run in instructions("RUN") if "> COMMIT" in run)
    assert "COMMIT" in instructions("ARG")
    refused = subprocess.run(["sh", "-c", step], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert refused.returncode == 1 and "--build-arg COMMIT" in refused.stderr and not list(tmp_path.iterdir())
    subprocess.run(["sh", "-c", step], cwd=tmp_path, env={"COMMIT": "abc123"}, check=True)
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit.__wrapped__() == "abc123"
    (tmp_path / "COMMIT").unlink()
    assert provenance.git_commit.__wrapped__() is None
