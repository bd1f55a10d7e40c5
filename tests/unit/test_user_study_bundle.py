"""What is frozen: nothing in it tells methods apart, and everything in it can be found again with the key."""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from judged_study import ARMS, fix_salt, make_study, prompt_of, settings, write_results
from PIL import Image

from invdpo.config import StudyConfig, load_study, parse_study
from invdpo.errors import InvdpoError
from user_study_app.bundle import build, content_hash
from user_study_app.settings import Places, read_settings
from user_study_app.stimuli import Stimuli
from user_study_app.storage import Storage

TWICE = [{"arms": list(order), "pairs": 2} for order in (("marmot_dpo", "walrus_base"), ("walrus_base", "marmot_dpo"))]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A study with results in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INVDPO_USER_STUDY_DB", raising=False)
    return make_study()


def parts(study: StudyConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Manifest, schedule, consent, key."""
    places = Places(study)
    paths = [*(places.bundle / f"{name}.json" for name in ("manifest", "schedule", "consent")), places.key]
    return tuple(json.loads(path.read_text()) for path in paths)  # pyright: ignore


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nothing_in_the_bundle_names_a_method(study: StudyConfig) -> None:
    folder = build(study)
    content = files(folder)
    secrets = [*ARMS, *ARMS.values(), "judged/images", "seed", "step", "prompt_id", *parts(study)[3]["salt"].split()]
    secrets += [image["sha256"] for image in parts(study)[3]["images"].values()]
    for name, data in content.items():
        for secret in secrets:
            assert secret.encode() not in data and secret not in name, (name, secret)
    assert {name.split("/")[0] for name in content} == {"manifest.json", "schedule.json", "consent.json", "images"}
    assert all(re.fullmatch(r"[0-9a-f]{32}\.png", name.split("/")[1]) for name in content if name.startswith("images/"))


def test_images_differ_in_nothing_but_their_pixels(study: StudyConfig) -> None:
    folder = build(study)
    manifest, _, _, key = parts(study)
    paths = sorted((folder / "images").iterdir())
    assert {path.stem for path in paths} == set(manifest["files"]) == set(key["images"])
    assert len({path.stat().st_size for path in paths}) == 1 and {path.stat().st_mtime for path in paths} == {946684800}
    data = [path.read_bytes() for path in paths]
    assert len({hashlib.sha256(content).hexdigest() for content in data}) == len(data), "two files share a hash"
    for path, content in zip(paths, data, strict=True):
        assert hashlib.sha256(content).hexdigest() == manifest["files"][path.stem]
        picture = Image.open(io.BytesIO(content))
        picture.load()
        assert picture.info == {} and picture.mode == "RGB"
        assert re.findall(rb"(?:tEXt|zTXt|iTXt|eXIf|tIME|pHYs)", content[: content.index(b"IEND")]) == []
        assert hashlib.sha256(picture.tobytes()).hexdigest() == key["images"][path.stem]["sha256"]
        assert len(content) - content.index(b"IEND") > 32, "no padding"


def test_an_image_of_several_pairs_has_a_file_of_its_own_in_each(study: StudyConfig) -> None:
    """The base model has one image a prompt: equal files would link its pairs."""
    build(study)
    manifest, _, _, key = parts(study)
    sources = Counter(image["sha256"] for image in key["images"].values())
    assert max(sources.values()) > 1, "this study shows no image twice"
    assert len(set(manifest["files"].values())) == len(key["images"])


def test_key_finds_every_image_again(study: StudyConfig) -> None:
    build(study)
    manifest, _, _, key = parts(study)
    assert key["bundle"] == manifest["bundle"] and set(key["groups"]) == set(manifest["groups"]) == {"A", "B"}
    compared = {frozenset(group["arms"]) for group in key["groups"].values()}
    assert compared == {frozenset(group.arms) for group in read_settings(study).groups}
    for pair in manifest["pairs"]:
        shown = [key["images"][token] for token in pair["images"]]
        for image in shown:
            rows = pd.read_parquet(study.root / "images" / image["arm"] / f"seed{image['seed']}.parquet")
            row = rows[rows["prompt_id"] == image["prompt_id"]].iloc[0]
            assert (row["sha256"], row["step"], row["prompt"]) == (image["sha256"], image["step"], image["prompt"])
            scores = pd.read_parquet(study.root / "scores" / image["arm"] / f"seed{image['seed']}.parquet")
            last = scores[(scores["prompt_id"] == image["prompt_id"]) & (scores["step"] == image["step"])]
            assert image["scores"] == dict(zip(last["scorer"], last["score"], strict=True))
        if pair["kind"] == "attention":
            assert shown[pair["expected"]]["prompt"] == pair["prompt"] != shown[1 - pair["expected"]]["prompt"]
        else:
            assert pair["expected"] is None
            assert {image["arm"] for image in shown} == set(key["groups"][pair["group"]]["arms"])
            assert {image["prompt"] for image in shown} == {pair["prompt"]}
            trained = [image["seed"] for image in shown if image["arm"] != "walrus_base"]
            assert len(set(trained)) == 1, "two training seeds in one pair"


def test_numbers_and_prompts_are_as_configured(study: StudyConfig) -> None:
    build(study)
    manifest, _, _, key = parts(study)
    kinds = Counter((pair["kind"], pair["group"]) for pair in manifest["pairs"])
    assert (kinds["trial", "A"], kinds["trial", "B"]) == (24, 24)
    assert Counter(pair["kind"] for pair in manifest["pairs"]) == {"trial": 48, "attention": 2, "practice": 2}
    used: dict[int, set[str]] = defaultdict(set)
    for pair in manifest["pairs"]:
        for token in pair["images"]:
            used[key["images"][token]["prompt_id"]].add(pair["group"] if pair["kind"] == "trial" else pair["kind"])
    assert [names for names in used.values() if len(names) > 1] == [], "a prompt has two uses"
    of_prompt = Counter(pair["prompt"] for pair in manifest["pairs"] if pair["kind"] == "trial")
    assert set(of_prompt.values()) == {1, 2} and len(of_prompt) == 34, "not all prompts are used, or some more often"


def test_attention_pairs_are_obvious(study: StudyConfig) -> None:
    """Right: the best picture there is of the prompt, by CLIP. Wrong: of a prompt that shares few of its words."""
    scores: dict[int, list[float]] = defaultdict(list)
    for path in (study.root / "scores").glob("*/*.parquet"):
        rows = pd.read_parquet(path).query("scorer == 'clip' and (step == 4 or method == 'walrus_base')")
        for prompt_id, score in zip(rows["prompt_id"], rows["score"], strict=True):
            scores[prompt_id].append(score)
    shared = []
    for number in range(6):
        fix_salt(study, number)
        build(study)
        manifest, _, _, key = parts(study)
        for pair in [pair for pair in manifest["pairs"] if pair["kind"] == "attention"]:
            right, wrong = (key["images"][pair["images"][side]] for side in (pair["expected"], 1 - pair["expected"]))
            assert right["scores"]["clip"] == max(scores[right["prompt_id"]]) and len(scores[right["prompt_id"]]) == 5
            shared.append(len(set(right["prompt"].split()) & set(wrong["prompt"].split())))
    assert len(shared) == 12 and shared.count(0) >= 9, "two prompts drawn at random share no word three times in eight"


def test_same_inputs_same_bytes_and_another_salt_another_bundle(study: StudyConfig) -> None:
    folder = build(study)
    first, key = files(folder), Places(study).key.read_bytes()
    build(study)
    assert files(folder) == first and Places(study).key.read_bytes() == key
    assert not Places(study).earlier.exists()
    Places(study).key.unlink()
    build(study)
    assert set(files(folder)) & set(first) == {"manifest.json", "schedule.json", "consent.json"}, "names repeat"


def test_without_the_salt_nothing_can_be_worked_out(study: StudyConfig) -> None:
    """Everything but the salt is public, so order of images and groups must depend on it."""
    seen = set()
    for _ in range(12):
        Places(study).key.unlink(missing_ok=True)
        build(study)
        manifest, _, _, key = parts(study)
        arms = tuple(group["arms"][0] for _, group in sorted(key["groups"].items()))
        first = min((p for p in manifest["pairs"] if p["kind"] == "trial"), key=lambda p: (p["prompt"], p["pair"]))
        seen.add((arms, key["images"][first["images"][0]]["arm"] == "gecko_inverted"))
    assert len(seen) > 2


def test_key_is_the_owners_alone_and_outside_the_bundle(study: StudyConfig) -> None:
    folder = build(study)
    places = Places(study)
    assert stat.S_IMODE(places.key.stat().st_mode) == 0o600
    assert not places.key.is_relative_to(folder)


def test_bundle_hash_covers_everything(study: StudyConfig) -> None:
    build(study)
    manifest, schedule, consent, _ = parts(study)
    known = manifest["bundle"]
    assert content_hash(manifest, schedule, consent) == known
    manifest["exclusions"]["min_median_ms"] += 1
    assert content_hash(manifest, schedule, consent) != known
    manifest["exclusions"]["min_median_ms"] -= 1
    schedule["slots"][0]["trials"][0]["left"] ^= 1
    assert content_hash(manifest, schedule, consent) != known
    schedule["slots"][0]["trials"][0]["left"] ^= 1
    assert content_hash(manifest, schedule, consent | {"version": "8"}) != known


def test_server_reads_it(study: StudyConfig) -> None:
    stimuli = Stimuli(build(study))
    assert len(stimuli.slots) == 8 and stimuli.practice(0) == 2 and stimuli.texts.completion_code == "DONE"


def test_changed_bundle_keeps_the_old_one_with_its_key(study: StudyConfig) -> None:
    build(study)
    places, old, key = Places(study), files(Places(study).bundle), Places(study).key.read_bytes()
    changed = study.model_copy(update={"user_study": settings(seed=6)})
    build(changed)
    kept = places.earlier / json.loads(old["manifest.json"])["bundle"][:12]
    assert files(kept / "bundle") == old and (kept / "key.json").read_bytes() == key
    new = parts(study)
    assert new[0]["bundle"] != json.loads(old["manifest.json"])["bundle"] == json.loads(key)["bundle"]
    assert new[3]["salt"] == json.loads(key)["salt"] and new[3]["bundle"] == new[0]["bundle"]


def test_bundle_with_votes_is_never_replaced(study: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    build(study)
    places = Places(study)
    storage = Storage(f"sqlite:///{places.root / 'votes.db'}")
    stimuli = Stimuli(places.bundle)
    storage.bind(stimuli)
    cookie = storage.enter(storage.invite(1, "test")[0], None, None)
    storage.consent(cookie, "7", stimuli)
    shown = storage.current(cookie)[1]
    assert shown is not None
    changed = study.model_copy(update={"user_study": settings(seed=6)})
    before = files(places.bundle), places.key.read_bytes()
    storage.vote(cookie, shown.token, "left", 900, None)
    storage.close()
    build(changed)
    assert (files(places.bundle), places.key.read_bytes()) == before and not places.earlier.exists()
    assert "votes were given on it (1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"raters": 2, "per_pair": 3}, "per_pair 3 is more than the 2 raters"),
        ({"rater": 2}, "unknown key `user_study.rater`. Did you mean `raters`?"),
        ({"exclusions": {"max_attention_failures": 1}}, "`user_study.exclusions.min_repeat_consistency` is missing"),
        (
            {"groups": [{"arms": ["walrus_base", "gecko_invert"], "pairs": 2}]},
            "names `gecko_invert`, which is not in `arms`. Did you mean `gecko_inverted`?",
        ),
        ({"groups": [{"arms": ["marmot_dpo", "marmot_dpo"], "pairs": 2}]}, "names `marmot_dpo` twice"),
        ({"groups": TWICE}, "compare the same arms"),
    ],
)
def test_wrong_settings_are_named(study: StudyConfig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvdpoError) as caught:
        build(study.model_copy(update={"user_study": settings(**changes)}))
    assert words in str(caught.value)
    assert not Places(study).root.exists()


def test_what_is_missing_or_does_not_fit_is_named(study: StudyConfig) -> None:
    def refusal(changed: StudyConfig = study) -> str:
        with pytest.raises(InvdpoError) as caught:
            build(changed)
        assert not Places(study).bundle.exists()
        return str(caught.value)

    assert "has no `user_study:` section" in refusal(study.model_copy(update={"user_study": None}))
    many = [{"arms": ["walrus_base", "gecko_inverted"], "pairs": 90}]
    message = refusal(study.model_copy(update={"user_study": settings(groups=many)}))
    assert "is to have 90 pairs" in message and "34 of the 48 prompts" in message and "gives 68" in message
    without = study.model_copy(update={"scorers": study.scorers.model_copy(update={"clip": None})})
    assert "`attention` needs `scorers.clip`" in refusal(without)
    path = study.root / "images" / "marmot_dpo" / "seed1.parquet"
    rows = pd.read_parquet(path)
    write_results(study, "marmot_dpo", 1, 48, size=24)
    assert "24 x 24 (marmot_dpo)" in refusal()
    write_results(study, "marmot_dpo", 1, 48)
    rows.assign(png=[*rows["png"][1:], rows["png"][0]]).to_parquet(path)
    assert "is damaged. Evaluate `marmot_dpo` again" in refusal()
    rows.assign(sha256="0" * 64).to_parquet(path)
    assert "scores other images than images/marmot_dpo" in refusal()
    path.unlink()
    assert f"{path} is missing. Run `make reproduce STUDY=judged`" in refusal()


@pytest.mark.parametrize("name", ["shapes", "smoke"])
def test_committed_studies_have_a_valid_section(name: str) -> None:
    path = Path(__file__).resolve().parents[2] / "config" / f"{name}.yaml"
    settings_of = read_settings(load_study(path))
    assert [len(group.arms) for group in settings_of.groups] == [2, 2]
    assert settings_of.exclusions.max_attention_failures < settings_of.attention or name == "smoke"


def test_section_survives_the_resolved_study(study: StudyConfig) -> None:
    again = parse_study(json.loads(study.model_dump_json()), "study.json")
    assert read_settings(again) == read_settings(study)


def test_prompts_of_the_fixture_are_distinct() -> None:
    assert len({prompt_of(n) for n in range(64)}) == 64
