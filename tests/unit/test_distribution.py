"""FID, KID, precision and recall: against formulas written out here and torch-fidelity's one call, and as a stage."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch import Tensor
from torch.nn.functional import interpolate
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor
from torchvision.transforms.functional import normalize, resize, to_tensor

from invdpo import distribution as stage
from invdpo.config import DistributionConfig, ReferenceConfig, StudyConfig
from invdpo.errors import InvdpoError
from invdpo.image_files import Picture
from invdpo.scorers import distribution
from invdpo.scorers.distribution import (
    Extractor,
    LaionSgInception,
    OpenClipFeatures,
    PictureSet,
    Reference,
    inception,
    open_clip_tower,
)
from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.weights import sha12
from invdpo.world.reference import reference_pictures

CPU = torch.device("cpu")
TOWER = Path("assets/shapes/scorers/clip").resolve()
SUBSET = 16


def shapes(count: int, seed: int) -> list[Picture]:
    return [Picture(f"{seed}-{k}", png) for k, png in enumerate(reference_pictures(count, seed))]


def noisy(pictures: list[Picture], seed: int) -> list[Picture]:
    rng = np.random.default_rng(seed)
    found = []
    for picture in pictures:
        pixels = np.asarray(picture.decode()).astype(float) + rng.normal(scale=20, size=(64, 64, 3))
        found.append(encoded(np.clip(pixels, 0, 255).astype(np.uint8), picture.name))
    return found


def encoded(pixels: np.ndarray, name: str = "x", mode: str | None = None) -> Picture:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, "PNG")
    return Picture(name, stream.getvalue())


@pytest.fixture(scope="module")
def tower() -> Extractor:
    return open_clip_tower(f"local-dir:{TOWER}", CPU)


@pytest.fixture(scope="module")
def sets() -> tuple[list[Picture], list[Picture]]:
    """90 reference pictures and 80 generated ones: more than the tower's 64 features, so both covariances have full
    rank."""
    return shapes(90, 1), noisy(shapes(80, 2), 3)


def reference(pictures: list[Picture], extractor: Extractor, cache: Path, **settings: int) -> Reference:
    return Reference(
        PictureSet(pictures, "reference"), extractor, CPU, cache, **({"kid_subset_size": SUBSET} | settings)
    )


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """FID as its paper has it, with scipy's square root."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(first + second - 2 * np.real(sqrtm(first @ second))))


def compat_features(pictures: list[Picture], extractor: Extractor) -> np.ndarray:
    """What LAION-SG's script would see, picture by picture, with the tower in Inception's place."""
    clip: OpenClip = extractor.options["open_clip_tower"]
    found = []
    for picture in pictures:
        scaled = to_tensor(picture.decode()) * 2 - 1
        small = interpolate(resize(scaled, [256, 256], antialias=False)[None], 64, mode="bilinear")
        with torch.no_grad():
            found.append(clip.model.encode_image(normalize(small, [0.5] * 3, [0.5] * 3)))
    return torch.cat(found).double().numpy()


def standard_features(pictures: list[Picture], extractor: Extractor) -> np.ndarray:
    clip: OpenClip = extractor.options["open_clip_tower"]
    with torch.no_grad():
        pixels = torch.stack([clip.preprocessing.transform(picture.decode()) for picture in pictures])
        return clip.model.encode_image(pixels).double().numpy()


Features = Callable[[list[Picture], Extractor], np.ndarray]


@pytest.mark.parametrize(("field", "features"), [("standard", standard_features), ("laionsg_compat", compat_features)])
def test_fid_is_the_formula_on_these_features(
    field: str, features: Features, tower: Extractor, sets: tuple[list[Picture], list[Picture]], tmp_path: Path
) -> None:
    found = asdict(reference(sets[0], tower, tmp_path).compare(PictureSet(sets[1], "generated")))
    assert found[f"fid_{field}"] == pytest.approx(frechet(*(features(part, tower) for part in sets)), rel=1e-4)
    assert (found["images"], found["reference_images"], found["features"]) == (80, 90, 64)
    assert found["rank"] == found["reference_rank"] == 64


def test_the_two_readings_of_fid_differ(
    tower: Extractor, sets: tuple[list[Picture], list[Picture]], tmp_path: Path
) -> None:
    found = reference(sets[0], tower, tmp_path).compare(PictureSet(sets[1], "generated"))
    assert abs(found.fid_standard / found.fid_laionsg_compat - 1) > 0.1


def test_kid_of_whole_sets_is_the_unbiased_formula(tower: Extractor, tmp_path: Path) -> None:
    """With subsets as large as the sets, all 100 are the same."""
    first, second = shapes(30, 4), noisy(shapes(30, 5), 6)
    found = reference(first, tower, tmp_path, kid_subset_size=30).compare(PictureSet(second, "generated"))
    x, y = standard_features(first, tower), standard_features(second, tower)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = sum((kernel(z, z).sum() - np.trace(kernel(z, z))) / (30 * 29) for z in (x, y))
    assert found.kid == pytest.approx(within - 2 * kernel(x, y).mean(), rel=1e-3)
    assert found.kid_subset_sd < 1e-4 * abs(found.kid)


def test_a_set_against_itself(tower: Extractor, tmp_path: Path) -> None:
    pictures = shapes(80, 7)
    found = reference(pictures, tower, tmp_path).compare(PictureSet(pictures, "the same"))
    assert found.fid_standard == pytest.approx(0, abs=1e-3) and found.fid_laionsg_compat == pytest.approx(0, abs=1e-3)
    assert found.precision == found.recall == 1.0


def test_one_call_of_torch_fidelity_says_the_same(
    tower: Extractor, sets: tuple[list[Picture], list[Picture]], tmp_path: Path
) -> None:
    theirs = calculate_metrics(
        input1=PictureSet(sets[1], "generated"),
        input2=PictureSet(sets[0], "reference"),
        fid=True,
        kid=True,
        prc=True,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
        cache=False,
        kid_subset_size=SUBSET,
        feature_extractor="open-clip",
        **tower.options,
    )
    ours = reference(sets[0], tower, tmp_path).compare(PictureSet(sets[1], "generated"))
    assert ours.fid_standard == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert ours.kid_subset_sd == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)
    assert (ours.precision, ours.recall) == (theirs["precision"], theirs["recall"])


def test_order_changes_nothing_and_batches_only_rounding(
    tower: Extractor, sets: tuple[list[Picture], list[Picture]], tmp_path: Path
) -> None:
    first = reference(sets[0], tower, tmp_path / "a").compare(PictureSet(sets[1], "generated"))
    turned = reference(sets[0][::-1], tower, tmp_path / "b").compare(PictureSet(sets[1][::-1], "generated"))
    assert turned == first
    small = asdict(reference(sets[0], tower, tmp_path / "c", batch=7).compare(PictureSet(sets[1], "generated")))
    assert small == pytest.approx(asdict(first), rel=1e-4)


def test_few_pictures_are_stated_by_their_rank(tower: Extractor, tmp_path: Path) -> None:
    first = shapes(40, 8)
    found = reference(first, tower, tmp_path).compare(PictureSet(shapes(20, 9), "generated"))
    assert (found.images, found.rank) == (20, 19) and (found.reference_images, found.reference_rank) == (40, 39)


# Inception ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks() -> tuple[FeatureExtractorInceptionV3, LaionSgInception]:
    """torch-fidelity's Inception and ours with the same random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *args, **kwargs: {}
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    return theirs, LaionSgInception("inception-laionsg", ["2048"], theirs.state_dict())


Networks = tuple[FeatureExtractorInceptionV3, LaionSgInception]


def test_compat_inception_is_the_same_network(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given pictures that both prepare alike, pictures of the network's own size, features are the same."""
    theirs, ours = networks
    pictures = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(distribution, "scaled_once", lambda x: ((x.float() - 128) / 128 + 1) / 2)
    with torch.no_grad():
        assert torch.allclose(theirs(pictures)[0], ours(pictures)[0], atol=1e-5)
    assert ours(pictures)[0].shape == (2, 2048)


def test_compat_inception_reads_values_from_minus_three_to_one(networks: Networks) -> None:
    read: list[Tensor] = []
    hook = networks[1].Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))
    # Larger than 256, where antialiasing would show.
    noise = torch.randint(0, 256, (1, 3, 320, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for picture in (torch.zeros_like(noise), torch.full_like(noise, 255), noise):
            networks[1](picture)
    hook.remove()
    black, white = (torch.full_like(read[0], value) for value in (-3.0, 1.0))
    assert torch.allclose(read[0], black, atol=1e-5) and torch.allclose(read[1], white, atol=1e-5)
    once = resize(noise.float() / 255 * 2 - 1, [256, 256], antialias=False)
    twice = 2 * interpolate(once, size=(299, 299), mode="bilinear", align_corners=False) - 1
    assert torch.allclose(read[2], twice, atol=1e-5)


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvdpoError, match="experiments.distribution.inception_weights: there is no file"):
        inception(tmp_path / "weights.pth")
    with pytest.raises(InvdpoError, match="experiments.distribution.model"):
        open_clip_tower(f"local-dir:{tmp_path}", CPU)

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(distribution, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(distribution, "download_url_to_file", no_network)
    with pytest.raises(InvdpoError, match="inception_weights: cannot load .*no network"):
        inception()
    (tmp_path / "weights.pth").write_bytes(b"none")
    with pytest.raises(InvdpoError, match="inception_weights: cannot load .*weights.pth: it is damaged, or holds more"):
        inception(tmp_path / "weights.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(InvdpoError, match="experiments.distribution: cannot load inception:.*Missing key"):
        reference(shapes(20, 1), inception(tmp_path / "weights.pth"), tmp_path)


class Unsafe:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_weights_of_inception_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoints" / "weights-6726825d.pth"
    path.parent.mkdir()
    torch.save({"Conv2d_1a_3x3.conv.weight": Unsafe(tmp_path / "ran")}, path)
    with pytest.raises(InvdpoError, match="could run any code"):
        reference(shapes(20, 1), inception(path), tmp_path)
    monkeypatch.setattr(distribution, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(distribution, "URL_INCEPTION_V3", "https://of.torch/weights-6726825d.pth")
    monkeypatch.setattr(distribution, "sha12", lambda paths: "6726825d0af5")
    with pytest.raises(InvdpoError, match="could run any code"):
        reference(shapes(20, 1), inception(), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_standard_inception_is_torch_fidelitys(networks: Networks, tmp_path: Path) -> None:
    theirs, _ = networks
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    found = inception(tmp_path / "weights.pth")
    ours = create_feature_extractor(found.names["standard"], ["2048"], cuda=False, **found.options)
    pictures = torch.randint(0, 256, (2, 3, 80, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(pictures)[0], theirs(pictures)[0])
    assert found.version == f"inception:{sha12([tmp_path / 'weights.pth'])}:tensorflow-bilinear-299"


def test_the_release_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights")
    right, wrong = (tmp_path / f"weights-{digits}.pth" for digits in (sha12([tmp_path / "weights"])[:8], "00000000"))
    for path in (right, wrong):
        shutil.copy(tmp_path / "weights", path)
    kept = tmp_path / "cache" / "checkpoints"
    monkeypatch.setattr(distribution, "get_dir", lambda: str(kept.parent))

    monkeypatch.setattr(distribution, "URL_INCEPTION_V3", right.as_uri())
    assert set(inception().options["inception_weights"]) == {"weight"} and (kept / right.name).is_file()
    (kept / right.name).write_bytes(b"another")
    with pytest.raises(InvdpoError, match=f"{right.name} is not the file that torch-fidelity released.*Delete it"):
        inception()

    monkeypatch.setattr(distribution, "URL_INCEPTION_V3", wrong.as_uri())
    with pytest.raises(InvdpoError, match="inception_weights: .*invalid hash value"):
        inception()
    assert not (kept / wrong.name).exists()


# The cache ----------------------------------------------------------------------------------------------------------


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures of every pass of an open_clip tower from here on."""
    seen: list[int] = []
    forward = OpenClipFeatures.forward

    def counted(self: OpenClipFeatures, input: Tensor) -> tuple[Tensor]:
        seen.append(len(input))
        return forward(self, input)

    monkeypatch.setattr(OpenClipFeatures, "forward", counted)
    return seen


def test_reference_is_read_once_for_the_same_pictures_and_weights(
    tower: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, generated = shapes(20, 1), PictureSet(shapes(20, 2), "generated")
    seen = passes(monkeypatch)
    first = reference(pictures, tower, tmp_path).compare(generated)
    assert sum(seen) == 2 * 20 + 2 * 20
    assert reference(pictures[::-1], tower, tmp_path).compare(generated) == first
    assert sum(seen) == 2 * 20 + 2 * 20 + 2 * 20, "the second time only the generated ones are looked at"
    reference([*pictures[1:], *shapes(1, 99)], tower, tmp_path)
    assert sum(seen) == 6 * 20 + 2 * 20, "another picture is another set"


def test_kept_statistics_run_no_code(tower: Extractor, tmp_path: Path) -> None:
    reference(shapes(20, 1), tower, tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        torch.save(Unsafe(tmp_path / "ran"), path)
    with pytest.raises(InvdpoError, match="experiments.distribution: cannot load .*cache/"):
        reference(shapes(20, 1), tower, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_other_weights_do_not_meet_an_old_file(tower: Extractor, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(TOWER, folder)
    weights = next(folder.glob("*.safetensors"))
    state = load_file(weights)
    save_file({name: value * 1.05 if "visual" in name else value for name, value in state.items()}, weights)
    pictures, generated = shapes(20, 1), PictureSet(shapes(20, 2), "generated")
    changed = open_clip_tower(f"local-dir:{folder}", CPU)
    before = reference(pictures, tower, tmp_path / "cache").compare(generated)
    after = reference(pictures, changed, tmp_path / "cache").compare(generated)
    assert after == reference(pictures, changed, tmp_path / "another").compare(generated)
    assert after.fid_standard != pytest.approx(before.fid_standard, rel=1e-3)


# Bad input ----------------------------------------------------------------------------------------------------------


def test_sizes_must_be_equal_within_a_set_and_between_sets(tower: Extractor, tmp_path: Path) -> None:
    wide = encoded(np.zeros((64, 80, 3), np.uint8), "wide")
    with pytest.raises(InvdpoError, match="generated: 1-0 has 64x64 pixels and wide 80x64"):
        PictureSet([*shapes(3, 1), wide], "generated")
    squashed = PictureSet([*shapes(3, 1), wide], "reference", side=64)
    assert {tuple(squashed[k].shape) for k in range(4)} == {(3, 64, 64)}
    assert squashed.hash != PictureSet([*shapes(3, 1), wide], "reference", side=32).hash
    large = [encoded(np.full((128, 128, 3), k, np.uint8)) for k in range(20)]
    with pytest.raises(InvdpoError, match="128x128 pixels, the reference's have 64x64.*reference.side"):
        reference(shapes(20, 1), tower, tmp_path).compare(PictureSet(large, "generated"))


def test_too_few_pictures(tower: Extractor, tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match="generated: 1 images"):
        PictureSet(shapes(1, 1), "generated")
    with pytest.raises(InvdpoError, match="reference: 20 images; KID's subsets of 1000.*kid_subset_size"):
        reference(shapes(20, 1), tower, tmp_path, kid_subset_size=1000)
    with pytest.raises(InvdpoError, match="generated: 3 images.* 3 neighbours need 4"):
        reference(shapes(20, 1), tower, tmp_path, kid_subset_size=2).compare(PictureSet(shapes(3, 2), "generated"))


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvdpoError, match="broken is not a readable image"):
        PictureSet([*shapes(2, 1), Picture("broken", b"none")], "generated")
    half = shapes(1, 2)[0].encoded()[:200]
    part = PictureSet([*shapes(2, 1), Picture("half", half)], "generated")
    with pytest.raises(InvdpoError, match="half is not a readable image"):
        [part[k] for k in range(3)]
    with pytest.raises(InvdpoError, match="gone.png cannot be read"):
        PictureSet([*shapes(2, 1), Picture("gone.png", tmp_path / "gone.png")], "generated")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_modes_become_rgb(mode: str) -> None:
    grey = np.full((8, 8, 3), 255, np.uint8)
    part = PictureSet([encoded(grey, "a", mode), encoded(grey // 2, "b")], "generated")
    assert all(part[k].shape == (3, 8, 8) and part[k].dtype == torch.uint8 for k in range(2))


# The stage ----------------------------------------------------------------------------------------------------------


def make_study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A study of three arms, of which two have their pictures measured."""
    monkeypatch.chdir(folder)
    Path("prompts.txt").write_text("".join(f"a red circle {k}\n" for k in range(20)))
    study = StudyConfig.model_validate(
        {
            "study": "sets",
            "base": "base",
            "preferences": "pairs.parquet",
            "prompts": "prompts.txt",
            "scorers": {},
            "seeds": [0, 1],
            "training": {},
            "sampling": {"prompts": 18},
            "arms": {"base": {"method": "no_training"}, "sft": {"method": "sft"}, "other": {"method": "sft"}},
            "experiments": {
                "distribution": {
                    "arms": ["base", "sft"],
                    "reference": {"world": "shapes", "images": 24, "seed": 5},
                    "model": f"local-dir:{TOWER}",
                    "kid_subset_size": 8,
                }
            },
        }
    )
    for number, (arm, seed) in enumerate([("base", 0), ("sft", 0), ("sft", 1)]):
        rows = [{"prompt_id": k, "png": picture.encoded()} for k, picture in enumerate(shapes(18, 10 + number))]
        path = study.root / "images" / arm / f"seed{seed}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(path)
    return study


def test_stage_measures_every_seed_and_says_where_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, monkeypatch)
    path = stage.measure(study, CPU)
    rows = list(csv.DictReader(path.open()))
    assert [(row["method"], row["seed"]) for row in rows] == [("base", "0"), ("sft", "0"), ("sft", "1")]
    assert {(row["images"], row["reference_images"], row["rank"]) for row in rows} == {("18", "24", "17")}
    direct = reference(
        [Picture("", png) for png in reference_pictures(24, 5)],
        open_clip_tower(f"local-dir:{TOWER}", CPU),
        tmp_path / "another",
        kid_subset_size=8,
    ).compare(PictureSet(shapes(18, 11), "sft"))
    assert float(rows[1]["fid_standard"]) == pytest.approx(direct.fid_standard, rel=1e-5)
    assert float(rows[1]["kid"]) == pytest.approx(direct.kid, rel=1e-5)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["extractor"].startswith("open-clip:") and len(facts["reference"]) == 16
    before = path.read_bytes()
    shutil.rmtree(study.root / "reference_statistics")
    assert stage.measure(study, CPU).read_bytes() == before


def test_stage_lists_every_missing_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, monkeypatch)
    (study.root / "images/base/seed0.parquet").unlink()
    path = study.root / "images/sft/seed1.parquet"
    pd.read_parquet(path).iloc[:-2].to_parquet(path)
    with pytest.raises(InvdpoError, match=r"base/seed0.parquet: missing\n.*16 images for 18 .*without image: .16, 17."):
        stage.measure(study, CPU)


def test_stage_reads_a_reference_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_study(tmp_path, monkeypatch)
    folder = tmp_path / "photos"
    folder.mkdir()
    for picture in shapes(5, 1):
        (folder / f"{picture.name}.png").write_bytes(picture.encoded())
    found = stage.reference_set(ReferenceConfig(path=str(folder), images=4))
    assert [picture.name for picture in found] == [f"1-{k}.png" for k in range(4)]
    with pytest.raises(InvdpoError, match="holds 5 images; 6 were asked for"):
        stage.reference_set(ReferenceConfig(path=str(folder), images=6))


def test_study_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, monkeypatch)
    bare = study.model_copy(update={"experiments": study.experiments.model_copy(update={"distribution": None})})
    with pytest.raises(InvdpoError, match="has no `experiments.distribution`"):
        stage.measure(bare, CPU)


@pytest.mark.parametrize("settings", [{}, {"path": "a", "world": "shapes", "images": 3}, {"world": "shapes"}])
def test_a_reference_has_one_source(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="reference pictures|as many pictures"):
        DistributionConfig.model_validate({"arms": ["base"], "reference": settings})


def test_the_worlds_reference_is_clean_and_repeatable() -> None:
    assert reference_pictures(5, 1) == reference_pictures(5, 1) != reference_pictures(5, 2)
    corner = [np.asarray(Image.open(io.BytesIO(png)))[0, 0].tolist() for png in reference_pictures(50, 1)]
    assert corner == [[246, 245, 240]] * 50, "no tinted background"
