"""FID, KID, precision and recall of a set of pictures against a reference set, through torch-fidelity.

Two readings of FID, which must never be mixed:

- `standard`: torch-fidelity's own preparation (for Inception TensorFlow's bilinear resize to 299 and (x - 128) / 128);
  for an open_clip tower the tower's validation transform, as its scores have it.
- `laionsg_compat`: what `mengcye/LAION-SG`, test/caculate_fid.py does. It scales pictures to [-1, 1], resizes them to
  256 bilinearly without antialiasing, and hands them to pytorch-fid's Inception, which expects [0, 1] and scales once
  more: the network reads values in [-3, 1]. If the paper's Table 2 comes from that script, as its baselines suggest,
  its FIDs compare with this column and no other. (The script's own square root of the covariance product is scipy's,
  here torch-fidelity's eigenvalues: equal up to rounding.)

KID, precision and recall are of the standard features; all of one extractor, where torch-fidelity's default for
precision and recall would be another network (VGG16). FID depends on the number of pictures (fewer read as worse), and
with n pictures the covariance of d features has at most rank n - 1: both numbers stand in every result.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.hub import download_url_to_file, get_dir
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_featuresdict_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_featuresdict_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_featuresdict_to_metric
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id
from torchvision.transforms.functional import pil_to_tensor, resize

from invdpo.errors import InvdpoError
from invdpo.files import replace_when_done
from invdpo.image_files import Picture
from invdpo.scorers.openclip import OpenClip
from invdpo.scorers.weights import loading, require_file, sha12

MODES = ("standard", "laionsg_compat")
LAIONSG_SIDE = 256
KID_SUBSETS = 100
NEIGHBOURS = 3  # of precision and recall, torch-fidelity's default (Kynkäänniemi et al. 2019)
SEED = 2020  # of KID's subsets, torch-fidelity's default
FIELD = "experiments.distribution"
STATISTICS = ("mu", "sigma")  # of the features, as torch-fidelity names them


def scaled_once(pictures: Tensor) -> Tensor:
    """uint8 (B,3,H,W) -> (B,3,256,256) in [-1,1], as LAION-SG's script passes them to a network that expects [0,1]."""
    scaled = pictures.float() / 127.5 - 1.0
    return resize(scaled, [LAIONSG_SIDE, LAIONSG_SIDE], antialias=False)


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception.

    inception_weights: its tensors by name, passed through `create_feature_extractor`.
    """

    def __init__(self, name: str, features_list: list[str], inception_weights: Mapping[str, Tensor], **_: Any):
        # torch-fidelity runs whatever code a file holds, so it is given no file but tensors written anew.
        written = io.BytesIO()
        torch.save(dict(inception_weights), written)
        written.seek(0)
        super().__init__(name, features_list, written)


class LaionSgInception(Inception):
    """The same network behind the preparation of LAION-SG's script; feature '2048' alone."""

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """uint8 (B,3,H,W) -> ((B,2048),)."""
        side = self.INPUT_IMAGE_SIZE
        x = 2 * interpolate(scaled_once(input), size=(side, side), mode="bilinear", align_corners=False) - 1
        *trunk, _ = self.children()  # in the order of their use; the last is the classifier
        for layer in trunk:
            x = layer(x)
        return (x.flatten(1),)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return ("2048",)


class OpenClipFeatures(FeatureExtractorBase):
    """The image embedding (B,D) of an open_clip tower before its L2 normalisation, as torch-fidelity's CLIPs give it.

    open_clip_tower: a loaded `OpenClip`, passed through `calculate_metrics` or `create_feature_extractor`.
    """

    def __init__(self, name: str, features_list: list[str], open_clip_tower: OpenClip, **_: Any):
        super().__init__(name, features_list)
        self.tower = open_clip_tower
        self.network = open_clip_tower.model

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """uint8 (B,3,H,W) -> ((B,D),) float32."""
        return (self.network.encode_image(self.prepare(input)).float(),)

    def prepare(self, pictures: Tensor) -> Tensor:
        """uint8 (B,3,H,W) -> what the network reads."""
        images = [Image.fromarray(pixels) for pixels in pictures.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.stack([self.tower.preprocessing.transform(image) for image in images]).to(pictures.device)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return ("image",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "image"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)


class LaionSgOpenClip(OpenClipFeatures):
    """The same mistake on an open_clip tower: pictures in [-1,1] are normalised as if they were in [0,1]."""

    def prepare(self, pictures: Tensor) -> Tensor:
        visual = self.network.visual
        size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
        x = interpolate(scaled_once(pictures), size=size, mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(visual.preprocess_cfg[key]).view(3, 1, 1).to(x) for key in ("mean", "std"))
        return (x - mean) / std


register_feature_extractor("open-clip", OpenClipFeatures)
register_feature_extractor("open-clip-laionsg", LaionSgOpenClip)
register_feature_extractor("inception", Inception)
register_feature_extractor("inception-laionsg", LaionSgInception)


@dataclass(frozen=True)
class Extractor:
    """A network of torch-fidelity's registry with its weights.

    names: mode -> its name there. layer: the feature's. version: of the network, its weights (a hash) and its
    preparation, joined by colons: what torch-fidelity's cache key lacks.
    """

    names: Mapping[str, str]
    layer: str
    version: str
    options: Mapping[str, Any] = field(default_factory=dict)


def inception(weights: Path | str | None = None) -> Extractor:
    """Inception of the original FID. weights: a local file in torch-fidelity's format; None: its own release, from
    torch's cache or the network. Raises InvdpoError where there is no such file, where it holds anything but tensors,
    and where it is not the one that was released.
    """
    place = f"{FIELD}.inception_weights"
    path = _released_inception(place) if weights is None else require_file(weights, place)
    tensors = loading(place, str(path), lambda: torch.load(path, map_location="cpu", weights_only=True))
    return Extractor(
        {"standard": "inception", "laionsg_compat": "inception-laionsg"},
        "2048",
        f"inception:{sha12([path])}:tensorflow-bilinear-299",
        {"inception_weights": tensors},
    )


def _released_inception(place: str) -> Path:
    """The file of torch-fidelity's release, whose name ends in the first digits of its sha256."""
    path = Path(get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    digits = path.stem.rsplit("-", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        loading(
            place, URL_INCEPTION_V3, lambda: download_url_to_file(URL_INCEPTION_V3, str(path), digits, progress=False)
        )
    if not (found := sha12([path])).startswith(digits):
        raise InvdpoError(
            f"{place}: {path} is not the file that torch-fidelity released (its sha256 begins with {found}, not "
            f"{digits}). Delete it, and it is fetched again."
        )
    return path


def open_clip_tower(model: str, device: torch.device, pretrained: str | None = None) -> Extractor:
    """An open_clip model's image tower; `model` and `pretrained` as in `OpenClip`."""
    tower = OpenClip(model, device, pretrained=pretrained, field=f"{FIELD}.model")
    return Extractor(
        {"standard": "open-clip", "laionsg_compat": "open-clip-laionsg"},
        "image",
        f"open-clip:{tower.hash}:{tower.preprocessing}",
        {"open_clip_tower": tower},
    )


class PictureSet(Dataset[Tensor]):
    """Pictures of one size, in the order of their contents' hashes, so that no result depends on the order given.

    side: each is squashed to a square of so many pixels first (PIL, bilinear), as LAION-SG's script does with real
    images. name: what it is called in errors. Raises InvdpoError for fewer than two pictures, unreadable ones, and
    unequal sizes.
    """

    def __init__(self, pictures: Sequence[Picture], name: str, side: int | None = None):
        if len(pictures) < 2:
            raise InvdpoError(f"{name}: {len(pictures)} images; a covariance needs two at least.")
        hashes = {id(picture): picture.sha256() for picture in pictures}
        self.pictures = sorted(pictures, key=lambda picture: hashes[id(picture)])
        self.name, self.side = name, side
        self.hash = hashlib.sha256("".join([*sorted(hashes.values()), str(side)]).encode()).hexdigest()[:16]
        sizes = {picture.name: picture.size() for picture in pictures} if side is None else {"": (side, side)}
        (first, self.size), *others = sizes.items()
        for other, size in others:
            if size != self.size:
                raise InvdpoError(
                    f"{name}: {first} has {self.size[0]}x{self.size[1]} pixels and {other} {size[0]}x{size[1]}. "
                    "Resize them, or set `side` for a reference set."
                )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        """uint8 (3,H,W)."""
        image = self.pictures[index].decode()
        if self.side is not None:
            image = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return pil_to_tensor(image)


@dataclass(frozen=True)
class Distribution:
    """One set of pictures against the reference set.

    kid_subset_sd: standard deviation over KID's subsets, which share pictures: a spread, no standard error. features:
    d of the extractor. rank, reference_rank: of the covariances, at most min(images - 1, d).
    """

    fid_standard: float
    fid_laionsg_compat: float
    kid: float
    kid_subset_sd: float
    precision: float
    recall: float
    images: int
    reference_images: int
    features: int
    rank: int
    reference_rank: int


class Reference:
    """A reference set under an extractor; its features and FID statistics are kept in `cache`.

    The files' names hold hashes of the pictures, the weights and the preparation, so that a change of any of them
    cannot meet an old file. (torch-fidelity's own cache would run whatever code a file in it holds.)
    """

    def __init__(
        self,
        pictures: PictureSet,
        extractor: Extractor,
        device: torch.device,
        cache: Path,
        batch: int = 64,
        kid_subset_size: int = 1000,
    ):
        self.pictures, self.layer = pictures, extractor.layer
        self.device, self.kid_subset_size = device, kid_subset_size
        self.shared = {
            "cuda": device.type == "cuda",
            "batch_size": batch,
            # torch-fidelity's way to say: no worker processes. On a GPU they decode while it computes.
            "save_cpu_ram": device.type != "cuda",
            "verbose": False,
            "rng_seed": SEED,
            "kid_subsets": KID_SUBSETS,
            "kid_subset_size": kid_subset_size,
            "prc_neighborhood": NEIGHBOURS,
        }
        name = f"{pictures.hash}-{extractor.version.replace(':', '-')}"
        self.too_few(pictures)
        options = {**self.shared, **extractor.options}
        with self._on_device():
            self.networks = {
                mode: loading(FIELD, extractor.version, lambda name=name: self._create(name, options))
                for mode, name in extractor.names.items()
            }
            kept = {mode: self._kept(cache / f"{name}-{mode}.safetensors", mode) for mode in self.networks}
        self.features = {mode: {self.layer: tensors["features"]} for mode, tensors in kept.items()}
        self.statistics = {mode: {part: tensors[part].numpy() for part in STATISTICS} for mode, tensors in kept.items()}
        self.rank = _rank(self.features["standard"][self.layer])

    def compare(self, generated: PictureSet) -> Distribution:
        """FID, KID, precision and recall of the generated pictures.

        Raises InvdpoError where they are too few for KID's subsets or the neighbours, or of another size than the
        reference.
        """
        self.too_few(generated)
        if generated.size != self.pictures.size:
            (w, h), (rw, rh) = generated.size, self.pictures.size
            raise InvdpoError(
                f"{generated.name}: images of {w}x{h} pixels, the reference's have {rw}x{rh}; the difference in "
                "sharpness would be measured. Set `experiments.distribution.reference.side`."
            )
        with self._on_device():
            features = {mode: self._features(network, generated) for mode, network in self.networks.items()}
            fid = {
                mode: fid_statistics_to_metric(
                    fid_featuresdict_to_statistics(features[mode], self.layer), self.statistics[mode], False
                )[KEY_METRIC_FID]
                for mode in MODES
            }
            both = features["standard"], self.features["standard"], self.layer
            kid = kid_featuresdict_to_metric(*both, **self.shared)
            shares = prc_featuresdict_to_metric(*both, **self.shared)
        return Distribution(
            fid_standard=fid["standard"],
            fid_laionsg_compat=fid["laionsg_compat"],
            kid=kid[KEY_METRIC_KID_MEAN],
            kid_subset_sd=kid[KEY_METRIC_KID_STD],
            precision=shares[KEY_METRIC_PRECISION],
            recall=shares[KEY_METRIC_RECALL],
            images=len(generated),
            reference_images=len(self.pictures),
            features=int(features["standard"][self.layer].shape[1]),
            rank=_rank(features["standard"][self.layer]),
            reference_rank=self.rank,
        )

    def too_few(self, pictures: PictureSet) -> None:
        """InvdpoError where a set has fewer pictures than a subset of KID, or than the neighbours and one more."""
        if len(pictures) < (needed := max(self.kid_subset_size, NEIGHBOURS + 1)):
            raise InvdpoError(
                f"{pictures.name}: {len(pictures)} images; KID's subsets of {self.kid_subset_size} and {NEIGHBOURS} "
                f"neighbours need {needed}. Draw more, or lower `experiments.distribution.kid_subset_size`."
            )

    def _create(self, name: str, options: Mapping[str, Any]) -> FeatureExtractorBase:
        return create_feature_extractor(name, [self.layer], **options)

    def _kept(self, path: Path, mode: str) -> dict[str, Tensor]:
        """The reference's features (n, D) and their FID statistics, from `path` or written to it."""
        if not path.is_file():
            features = self._features(self.networks[mode], self.pictures)
            statistics = fid_featuresdict_to_statistics(features, self.layer)
            tensors = {part: torch.from_numpy(statistics[part]) for part in STATISTICS}
            with replace_when_done(path) as temporary:
                save_file({"features": features[self.layer], **tensors}, temporary)
        return loading(FIELD, str(path), lambda: load_file(path))

    def _features(self, network: FeatureExtractorBase, pictures: PictureSet) -> dict[str, Tensor]:
        """Feature -> (n, D) of a set."""
        return extract_featuresdict_from_input_id(1, network, input1=pictures, **self.shared)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """torch-fidelity works on the current CUDA device, whichever that is."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                yield
        else:
            yield


def _rank(features: Tensor) -> int:
    values = features.double().numpy()
    return int(np.linalg.matrix_rank(values - values.mean(axis=0)))
