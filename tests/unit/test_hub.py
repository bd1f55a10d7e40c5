"""One voice for what can go wrong with the hub, whoever reads from it, and a study that is made of its ids alone."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pandas as pd
import pytest
import torch
from conftest import Brightness
from hub_stub import Hub, point_to
from huggingface_hub import errors, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import load_file, save_file

from invdpo import evaluate as evaluation
from invdpo import hub as module
from invdpo.backbones.files import check_fits
from invdpo.backbones.pipeline import load_schedule, load_unet
from invdpo.backbones.released import find_weights
from invdpo.backbones.text import load_text
from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.evaluate import evaluate
from invdpo.hub import explain, split_id, told
from invdpo.preferences.cache import prepare
from invdpo.preferences.shards import Shard, fetch, list_shards, opened
from invdpo.prompts import HPD_STYLES, read_prompts
from invdpo.scorers.aesthetic import AestheticHead
from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.pickscore import PickScore
from invdpo.training.loop import train

CPU = torch.device("cpu")
MakeStudy = Callable[..., StudyConfig]
SHARD = Shard("owner/pairs/data/train-0.parquet", 1000, repo="owner/pairs", commit="a" * 40, sha256="0" * 64)


def first_columns() -> None:
    with opened(SHARD):
        pass


# What reads -> what it asks for, as its message begins.
READERS: dict[str, tuple[Callable[[], object], str]] = {
    "configuration": (lambda: check_fits("owner/base", "owner/base"), "`base: owner/base`"),
    "networks": (lambda: load_unet("owner/base", CPU, base="owner/base"), "`base: owner/base`"),
    "text": (lambda: load_text("owner/base", CPU), "`base: owner/base`"),
    "schedule": (lambda: load_schedule("owner/base"), "`base: owner/base`"),
    "weights": (lambda: find_weights("owner/release"), "`weights: owner/release`"),
    "one file": (lambda: find_weights("owner/release/a.safetensors"), "`weights: owner/release`"),
    "listing": (lambda: list_shards("owner/pairs"), "`preferences: owner/pairs`"),
    "shard": (lambda: fetch(SHARD), SHARD.name),
    "labels": (first_columns, SHARD.name),
    "prompts": (lambda: read_prompts("partiprompts"), "`prompts: partiprompts`"),
    "pickscore": (lambda: PickScore("owner/pickscore", CPU), "`scorers.pickscore.model: owner/pickscore`"),
    "open_clip": (lambda: OpenClip("hf-hub:owner/clip", CPU), "scorers.clip.model"),
    "head": (lambda: AestheticHead("owner/head/a.pth", CPU), "`scorers.aesthetic.model: owner/head/a.pth`"),
}


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Iterator[Callable[[type[httpx2.TransportError]], None]]:
    """Makes every request of the hub's client fail so, at once."""
    monkeypatch.setattr("time.sleep", lambda _: None)

    def fail_with(kind: type[httpx2.TransportError]) -> None:
        class Failing(httpx2.BaseTransport):
            def handle_request(self, request: httpx2.Request) -> httpx2.Response:
                raise kind("as on a bad line", request=request)

        set_client_factory(lambda: httpx2.Client(transport=Failing()))

    yield fail_with
    set_client_factory(default_client_factory)  # a client that knows when it is offline


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "kind",
    [
        httpx2.ConnectError,
        httpx2.ConnectTimeout,
        httpx2.ReadTimeout,
        httpx2.ReadError,
        httpx2.RemoteProtocolError,
        httpx2.ProxyError,
    ],
)
def test_a_bad_line_is_told_alike_by_all_that_read(
    reader: str, kind: type[httpx2.TransportError], transport: Callable[[type[httpx2.TransportError]], None]
) -> None:
    transport(kind)
    read, wanted = READERS[reader]
    with pytest.raises(InvdpoError) as caught:
        read()
    text = str(caught.value)
    assert text.startswith(f"{wanted}: "), text
    assert f"the hub cannot be reached ({kind.__name__}: as on a bad line)" in text, text
    assert ". Try again later, or " in text


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, "RepoNotFound"), "or hides it from this account"),
        ((403, "GatedRepo"), "of the hub is gated. Accept its terms"),
        ((403, ""), "the hub answered 403. Log in"),
        ((500, ""), "the hub answered 500. Try again later"),
    ],
)
def test_what_the_hub_answers_is_told_alike_by_all_that_read(
    reader: str, answer: tuple[int, str], words: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    named = ("base", "release", "pairs", "pickscore", "clip", "head")
    hub.refused = dict.fromkeys([*(f"owner/{name}" for name in named), "nateraw/parti-prompts"], answer)
    read, wanted = READERS[reader]
    with pytest.raises(InvdpoError) as caught:
        read()
    assert str(caught.value).startswith(f"{wanted}: ") and words in str(caught.value), caught.value


def raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            errors.RevisionResolutionError("no answer"),
            "`: there is no owner/name here, and the hub cannot be reached (Rev",
        ),
        (raised(OSError("x"), errors.RevisionResolutionError("no answer")), "the hub cannot be reached (RevisionReso"),
        (errors.LocalEntryNotFoundError("nothing"), "and its cache has no part"),
        (TimeoutError("slow"), "the hub cannot be reached (TimeoutError: slow)"),
        (RuntimeError("xet stumbled"), "cannot load part of owner/name (RuntimeError: xet stumbled). Fetch it again"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full, and part could not be written"),
        (KeyError(), "cannot load part of owner/name (KeyError)"),
        (errors.HFValidationError("bad"), "owner/name is no file or folder here, nor a hub id (owner/name). Check"),
    ],
)
def test_every_error_has_words(error: Exception, words: str) -> None:
    text = str(explain(error, "owner/name", "`base: owner/name`", "go without", part="part"))
    assert words in text and text.endswith(", or go without."), text


def test_what_is_wrong_with_a_folder_is_not_blamed_on_the_hub(tmp_path: Path) -> None:
    broken = raised(ValueError("no tokenizer"), errors.HFValidationError("what the library tried next"))
    text = str(explain(broken, str(tmp_path), "`base: x`", "go without", part="tokenizer"))
    assert text.startswith(f"`base: x`: cannot load tokenizer of {tmp_path} (ValueError: no tokenizer)")


def test_messages_of_this_project_pass_unchanged() -> None:
    with pytest.raises(InvdpoError, match="^as it is$"), told("owner/name", "a", "b"):
        raise InvdpoError("as it is")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("owner/name", ("owner/name", "")),
        ("owner/name/", ("owner/name", "")),
        ("owner/name/folder/a.pth", ("owner/name", "folder/a.pth")),
        ("name", None),
        ("./owner/name", None),
        ("../owner/name", None),
        ("/owner/name", None),
        ("~/name", None),
        ("owner/", None),
    ],
)
def test_ids_and_paths(text: str, found: tuple[str, str] | None) -> None:
    assert split_id(text) == found


def test_a_listing_without_the_hub_is_the_cache_s(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["owner/name"] = {"a.json": b"{}", "folder/b.json": b"{ }"}
    assert module.list_files("owner/name", "a", "b") == {"a.json": 2, "folder/b.json": 3}
    assert not hub.sent()
    module.fetch_file("owner/name", "folder/b.json", "a", "b")
    point_to("http://127.0.0.1:9", monkeypatch)
    assert module.list_files("owner/name", "a", "b") == {"folder/b.json": 3}
    with pytest.raises(InvdpoError, match="a: the hub cannot be reached .*, and its cache has no owner/other"):
        module.list_files("owner/other", "a", "b")


def test_a_look_says_what_a_download_would_do(hub: Hub) -> None:
    hub.repos["owner/name"] = {"a.bin": b"12345"}
    found = module.look("owner/name", "a.bin", "a", "b")
    assert (found.size, found.path) == (5, None) and not hub.sent()
    path = module.fetch_file("owner/name", "a.bin", "a", "b")
    found = module.look("owner/name", "a.bin", "a", "b")
    assert found.size == 5 and found.path is not None and found.path.read_bytes() == path.read_bytes()
    hub.gated.add("owner/name")
    hub.repos["owner/name"]["other.bin"] = b"1"
    assert set(module.list_files("owner/name", "a", "b")) == {"a.bin", "other.bin"}, "for everybody"
    with pytest.raises(InvdpoError, match="a: the model owner/name of the hub is gated"):
        module.look("owner/name", "other.bin", "a", "b")


def test_a_study_of_ids_alone_runs_to_its_scores(
    hub: Hub,
    tiny_study: MakeStudy,
    tiny_base: Path,
    tiny_sdxl: Path,
    tiny_pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A base of SDXL's layout, a codec of its own, published weights, pairs and prompts, none of which is here."""
    monkeypatch.setattr(evaluation, "build_scorers", lambda scorers, device: [Brightness()])
    hub.add_folder("stability/tiny-xl", tiny_sdxl)
    hub.add_folder("maker/codec", tiny_base / "vae")
    (tmp_path / "release").mkdir()
    weights = {name: value + 2.0**-5 for name, value in load_file(next((tiny_sdxl / "unet").glob("*.s*"))).items()}
    save_file(weights, tmp_path / "release" / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    (tmp_path / "release" / "config.json").write_bytes((tiny_sdxl / "unet" / "config.json").read_bytes())
    hub.add_folder("maker/release", tmp_path / "release")
    hub.repos["maker/pairs"] = {"data/train-00000-of-00001.parquet": tiny_pairs.read_bytes()}
    prompts = [f"a red circle {number}" for number in range(800)]
    hub.repos["zhwang/HPDv2"] = {f"benchmark/{style}.json": json.dumps(prompts).encode() for style in HPD_STYLES}
    study = tiny_study(
        base="stability/tiny-xl",
        vae="maker/codec",
        preferences="maker/pairs",
        prompts="hpdv2_photo",
        seeds=[0],
        training={"steps": 2, "checkpoints": []},
        sampling={"steps": 2, "guidance_scale": 3.0, "batch": 2, "prompts": 3},
        arms={"released": {"method": "no_training", "weights": "maker/release"}},
    )
    assert prepare(study, CPU)["pairs"] > 0
    shas = {}
    for arm in study.arms:
        train(study, arm, [0], CPU)
        (scores,) = evaluate(study, arm, [0], CPU)
        assert len(pd.read_parquet(scores)) > 0
        shas[arm] = pd.read_parquet(study.root / "images" / arm / "seed0.parquet")["sha256"].tolist()
    assert len({tuple(column) for column in shas.values()}) == 3 and all(len(set(c)) == 3 for c in shas.values())

    # The same of local copies, to the last bit.
    local = tiny_study(
        study="local",
        base=str(tiny_sdxl),
        vae=str(tiny_base / "vae"),
        preferences=str(tiny_pairs),
        data={"shards": "auto"},
        prompts="hpdv2_photo",
        seeds=[0],
        training={"steps": 2, "checkpoints": []},
        sampling={"steps": 2, "guidance_scale": 3.0, "batch": 2, "prompts": 3},
        arms={"released": {"method": "no_training", "weights": str(tmp_path / "release")}},
    )
    report: dict[str, Any] = prepare(local, CPU)
    for arm in local.arms:
        train(local, arm, [0], CPU)
        evaluate(local, arm, [0], CPU)
        found = pd.read_parquet(local.root / "images" / arm / "seed0.parquet")["sha256"].tolist()
        assert found == shas[arm], arm
    assert (
        report["content"]["encoders"]
        == json.loads((study.root / "preferences" / "report.json").read_text())["content"]["encoders"]
    )
