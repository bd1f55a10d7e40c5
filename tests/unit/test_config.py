"""Studies: what is accepted, what is refused and how, and what the resolved arms are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from invdpo.config import dump_study, json_schema, load_scorers, load_study, parse_study
from invdpo.errors import InvdpoError
from invdpo.hub import split_id


def minimal(**changes: Any) -> dict[str, Any]:
    study: dict[str, Any] = {
        "study": "tiny",
        "base": "base",
        "preferences": "train.parquet",
        "prompts": "test.txt",
        "scorers": {"clip": {"model": "ViT-B-32"}},
        "seeds": [0, 1],
        "training": {"steps": 4, "batch": 4, "learning_rate": 1.0e-4},
        "sampling": {},
        "arms": {"base": {"method": "no_training"}, "dpo": {"method": "diffusion_dpo"}},
    }
    return study | changes


def refusal(data: Any) -> str:
    with pytest.raises(InvdpoError) as caught:
        parse_study(data, "study.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "place", "nearest"),
    [
        ({"traning": {}}, "`traning`", "`training`"),
        ({"training": {"stpes": 4}}, "`training.stpes`", "`steps`"),
        ({"scorers": {"clip": {"model": "x", "pretraned": "y"}}}, "`scorers.clip.pretraned`", "`pretrained`"),
        ({"arms": {"dpo": {"method": "diffusion_dpo", "lables": "true"}}}, "`arms.dpo.lables`", "`labels`"),
        (
            {"arms": {"dpo": {"method": "diffusion_dpo", "training": {"btch": 2}}}},
            "`arms.dpo.training.btch`",
            "`batch`",
        ),
        ({"experiments": {"grid": {}}}, "`experiments.grid`", "`grids`"),
        ({"tuned": {"diffusion_dpo": {"betta": 1.0}}}, "`tuned.diffusion_dpo.betta`", "`beta`"),
    ],
)
def test_unknown_key_names_its_place_and_the_nearest_valid_one(
    changes: dict[str, Any], place: str, nearest: str
) -> None:
    message = refusal(minimal(**changes))
    assert f"unknown key {place}. Did you mean {nearest}?" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": "0"}, "`seeds`: Input should be a valid list"),
        ({"training": {"steps": 2.5}}, "`training.steps`"),
        ({"training": {"steps": 0}}, "greater than 0"),
        ({"training": {"batch": 8, "micro_batch": 3}}, "micro_batch 3 does not divide batch 8"),
        ({"device": "gpu"}, "`device`"),
        ({"arms": {"dpo": {"method": "diffusion_dpo", "labels": False}}}, "`arms.dpo.labels`"),
        ({"arms": {"dpo": {"method": "difusion_dpo"}}}, "Did you mean `diffusion_dpo`?"),
        (
            {"experiments": {"comparison": {"arms": ["base", "dop"]}}},
            "comparison.arms[1]` names the arm `dop`",
        ),
        (
            {"arms": {"dpo": {"method": "diffusion_dpo", "training": {"resolution": 32}}}},
            "share one preparation",
        ),
    ],
)
def test_wrong_value_is_refused_with_its_place(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(minimal(**changes))


def test_missing_key_is_named() -> None:
    study = minimal()
    del study["prompts"]
    assert "`prompts` is missing" in refusal(study)


@pytest.mark.parametrize(("written", "advice"), [("1e-5", "write 1.0e-5"), ("'0.1'", "write 0.1 without quotes")])
def test_number_that_yaml_reads_as_text_is_refused_with_advice(tmp_path: Path, written: str, advice: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(minimal()).replace("learning_rate: 0.0001", f"learning_rate: {written}"))
    with pytest.raises(InvdpoError, match="training.learning_rate") as caught:
        load_study(path)
    assert advice in str(caught.value)


def test_unreadable_study_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match="absent.yaml cannot be read"):
        load_study(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(InvdpoError, match="not valid YAML"):
        load_study(tmp_path / "broken.yaml")


def test_precedence_is_study_then_tuned_then_arm(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text("diffusion_dpo: {learning_rate: 2.0e-4, beta: 7.0}\n")
    study = parse_study(
        minimal(
            tuned=str(tuned),
            arms={
                "plain": {"method": "sft"},
                "tuned": {"method": "diffusion_dpo"},
                "own": {"method": "diffusion_dpo", "training": {"beta": 9.0, "steps": 2}},
                "published": {"method": "diffusion_dpo", "tuned": False},
            },
        ),
        "study",
    )
    assert study.arm("plain").learning_rate == 1.0e-4
    assert (study.arm("tuned").learning_rate, study.arm("tuned").training.beta) == (2.0e-4, 7.0)
    assert study.arm("tuned").recipe.beta == 7.0
    own = study.arm("own")
    assert (own.learning_rate, own.training.beta, own.training.steps) == (2.0e-4, 9.0, 2)
    assert study.arm("published").learning_rate == 1.0e-4
    assert study.arm("published").recipe.beta == 5000.0


def test_tuned_values_may_come_from_several_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("diffusion_dpo: {beta: 7.0}\n")
    second.write_text("sft: {learning_rate: 2.0e-4}\n")
    data = minimal(tuned=[str(first), str(second)], arms={"a": {"method": "diffusion_dpo"}, "b": {"method": "sft"}})
    study = parse_study(data, "study")
    assert (study.arm("a").recipe.beta, study.arm("b").learning_rate) == (7.0, 2.0e-4)
    second.write_text("diffusion_dpo: {learning_rate: 2.0e-4}\n")
    assert f"{first} and {second} both hold values of `diffusion_dpo`" in refusal(data)
    second.write_text("[diffusion_dpo]\n")
    assert f"{second} holds no mapping of methods to values" in refusal(data)
    assert "`tuned`: Value error, a list here names YAML files" in refusal(minimal(tuned=[{"sft": {}}]))


TUNING = {
    "arms": ["dpo"],
    "learning_rate": [1.0e-4],
    "beta": [5.0],
    "seeds": [1000],
    "prompts": "tuning.txt",
}


def test_only_the_file_that_the_studys_own_grid_makes_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = "config/tuned/tiny.yaml"
    study = parse_study(minimal(tuned=own, tuning=TUNING), "study")
    assert study.awaits_tuning("dpo") and not study.awaits_tuning("base")
    assert "config/tuned/tiny.yaml cannot be read" in refusal(minimal(tuned=own))
    assert "config/tuned/other.yaml cannot be read" in refusal(
        minimal(tuned=["config/tuned/other.yaml", own], tuning=TUNING)
    )


@pytest.mark.parametrize(
    ("changes", "awaited"),
    [
        ({}, True),
        ({"tuned": {"diffusion_dpo": {"beta": 7.0}}}, False),
        ({"arms": {"dpo": {"method": "diffusion_dpo", "tuned": False}}}, False),
    ],
)
def test_an_arm_awaits_its_grid_until_there_are_values_or_it_wants_none(changes: dict[str, Any], awaited: bool) -> None:
    assert parse_study(minimal(tuning=TUNING, **changes), "study").awaits_tuning("dpo") == awaited


def test_recipe_gives_what_the_study_leaves_open() -> None:
    study = parse_study(minimal(training={"steps": 1}), "study")
    arm = study.arm("dpo")
    assert arm.learning_rate == arm.recipe.learning_rate


def test_recipe_overrides_reach_the_recipe() -> None:
    arms = {"p": {"method": "p_single", "recipe": {"trajectory": {"steps": 10}}}}
    assert parse_study(minimal(arms=arms), "study").arm("p").recipe.trajectory.steps == 10


def test_dumped_study_reads_back_equal_and_with_the_same_hashes(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text("diffusion_dpo: {learning_rate: 2.0e-4}\n")
    experiments = {"inversion_steps": {"family": {10: "dpo"}}, "controls": {"dpo": {"shuffled": "base"}}}
    study = parse_study(minimal(tuned=str(tuned), experiments=experiments), "study")
    (tmp_path / "study.json").write_text(dump_study(study))
    tuned.unlink()
    again = load_study(tmp_path / "study.json")
    assert again == study and list(again.arms) == list(study.arms)
    assert again.arm("dpo").hash == study.arm("dpo").hash
    assert again.experiments.inversion_steps == {"family": {10: "dpo"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"base": "other"},
        {"preferences": "other.parquet"},
        {"precision": "bf16"},
        {"training": {"steps": 5, "batch": 4, "learning_rate": 1.0e-4}},
        {"tuned": {"diffusion_dpo": {"beta": 3.0}}},
        {"arms": {"dpo": {"method": "diffusion_dpo", "labels": "shuffled"}}},
        {"arms": {"dpo": {"method": "diffusion_dpo", "initial_rounding": "float16"}}},
        {"arms": {"dpo": {"method": "diffusion_dpo", "recipe": {"beta": 3.0}}}},
    ],
)
def test_hash_changes_with_whatever_decides_the_weights(changes: dict[str, Any]) -> None:
    before = parse_study(minimal(), "study").arm("dpo").hash
    assert len(before) == 16
    assert parse_study(minimal(**changes), "study").arm("dpo").hash != before


def test_hash_ignores_what_does_not_touch_the_weights() -> None:
    before = parse_study(minimal(), "study").arm("dpo").hash
    after = parse_study(minimal(prompts="other.txt", sampling={"steps": 3}, seeds=[4]), "study").arm("dpo").hash
    assert before == after


def test_hash_follows_the_checksums_of_base_and_pairs_only(tmp_path: Path) -> None:
    def arm_hash(base: str, scorer: str) -> str:
        listing = tmp_path / "SHA256SUMS"
        listing.write_text(f"{base * 64}  base/unet.safetensors\n{scorer * 64}  scorers/clip.safetensors\n")
        data = minimal(base=str(tmp_path / "base"), checksums=str(listing))
        return parse_study(data, "study").arm("dpo").hash

    assert arm_hash("a", "b") == arm_hash("a", "c")
    assert arm_hash("a", "b") != arm_hash("c", "b")


def test_true_labels_may_be_written_as_yaml_writes_them() -> None:
    for written in (True, "true"):
        arms = {"dpo": {"method": "diffusion_dpo", "labels": written}}
        assert parse_study(minimal(arms=arms), "study").arm("dpo").labels == "true"


def test_grid_is_ascending_and_ends_with_the_last_step() -> None:
    training = {"steps": 20, "checkpoints": [40, 10, 5]}
    assert parse_study(minimal(training=training), "study").training.grid == [5, 10, 20]


def test_unknown_arm_names_the_nearest() -> None:
    with pytest.raises(InvdpoError, match="no arm `dop`. Did you mean `dpo`?"):
        parse_study(minimal(), "study").arm("dop")


def test_schema_describes_every_key() -> None:
    schema = json.loads(json_schema())
    assert set(minimal()) <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_committed_schema_is_current() -> None:
    assert Path("config/schema.json").read_text() == json_schema(), "run `invdpo schema`"


def test_reading_a_study_does_not_import_torch() -> None:
    program = (
        "import sys; from invdpo.config import parse_study; import json;"
        "study = parse_study(json.loads(sys.stdin.read()), 'stdin'); study.arm('dpo').hash;"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], input=json.dumps(minimal()), text=True, check=True)


@pytest.mark.parametrize("path", sorted(Path("config").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_studies_are_valid(path: Path) -> None:
    if "arms" not in (yaml.safe_load(path.read_text()) or {}):
        pytest.skip("not a study")
    study = load_study(path)
    assert all(len(study.arm(name).hash) == 16 for name in study.arms)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_published_batch_is_a_study_of_its_own(name: str) -> None:
    """The main study draws pairs of ten files of Pick-a-Pic v2; what both do not differ in on purpose, they share."""
    main, published = (load_study(f"config/{study}.yaml") for study in (name, f"{name}_published"))
    assert sum(main.draws.values()) == 12_000 and sum(published.draws.values()) > 12_000_000
    apart = {"study", "training", "arms", "experiments", "claims"}
    assert main.model_dump(exclude=apart) == published.model_dump(exclude=apart)
    differing = {
        key for key, value in main.training.model_dump().items() if value != published.training.model_dump()[key]
    }
    assert differing == {"batch", "processes", "warmup_steps", "learning_rate", "beta", "caption_dropout"}
    assert main.data.flip == "independent" and main.data.storage == "float16" and main.data.workers == 8


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl_released", "scorers/paper"])
def test_paper_scale_needs_no_file_that_is_fetched_by_hand(name: str) -> None:
    scorers = load_scorers(Path(f"config/{name}.yaml"))
    assert scorers.aesthetic is not None and scorers.hps is not None
    for place in (scorers.aesthetic.model, scorers.hps.checkpoint):
        assert place is not None and split_id(place) is not None and not place.startswith("weights/")
