"""What a recipe's gradient is worth before any training: is there one, does it raise the reward, do labels steer it.

Eq. 16 of Inversion-DPO is even in the difference of the two networks, so its gradient at the reference is zero, and the
released code's first step comes from the rounding of its half-precision reference. Here both are measured, beside every
other recipe: each gradient against the gradient of a reward through the sampler, against the same recipe's on swapped
labels, and against itself in another precision or from weights that differ by the size of a rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student_t
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import conv2d, interpolate
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from invdpo.backbones.pipeline import UNetEps
from invdpo.device import DTYPES, autocast
from invdpo.errors import InvdpoError
from invdpo.evidence.statistics import LEVEL, mean_interval
from invdpo.experiments.precision import Pairs
from invdpo.objectives import Recipe, backward
from invdpo.preferences.order import generator
from invdpo.sampling import denoise, unet_evaluations
from invdpo.schedule import NoiseSchedule
from invdpo.training.loop import FP16_LOSS_SCALE, frozen_reference, initial_policy
from invdpo.types import Conditioning, EpsModel, select

if TYPE_CHECKING:
    from invdpo.scorers.pickscore import PickScore

# module, precision of its passes -> eps-model
Wrap = Callable[[Any, torch.dtype], EpsModel]
# images (n,3,H,W) in [0, 1] and their prompts -> rewards (n,), differentiable in the images
SmoothReward = Callable[[Tensor, Sequence[str]], Tensor]
# images uint8 (n,H,W,3) and their prompts -> rewards (n,)
Reward = Callable[[np.ndarray, Sequence[str]], np.ndarray]

Noise = Literal["none", "float16", "bfloat16", "gaussian"]
GAUSSIAN_NOISE = 2.0**-11  # the largest relative error of rounding to fp16

SETTING = ["recipe", "policy", "precision", "noise"]
ALONG = [
    *("direction", "length", "relative_length", "images", "reward", "gain_ahead", "gain_low", "gain_high"),
    *("gain_behind", "slope", "slope_low", "slope_high", "unet_evals"),
]
MEASURES = [
    *("gradient_norm", "relative_norm", "cosine_with_reward", "cosine_with_swapped", "cosine_with_fp32", "unet_evals")
]


@dataclass(frozen=True)
class Drawing:
    """How n fixed images are drawn: a policy's latents follow from the noise x_T (n,C,h,w) by DDIM sampling.

    cond has n rows, with `uncond` where guidance_scale differs from 1. decode: latents, scaled as the UNet sees them ->
    images (n,3,H,W) in [0, 1], differentiable (`decoder`).
    """

    prompts: Sequence[str]
    cond: Conditioning | None
    noise: Tensor
    schedule: NoiseSchedule
    steps: int
    guidance_scale: float
    decode: Callable[[Tensor], Tensor]

    def parts(self, size: int) -> list[Drawing]:
        """The images in runs of at most `size`."""
        rows = torch.arange(len(self.noise)).split(size)
        return [
            replace(
                self,
                prompts=[self.prompts[i] for i in part.tolist()],
                cond=select(self.cond, part),
                noise=self.noise[part.to(self.noise.device)],
            )
            for part in rows
        ]

    def images(self, eps_model: EpsModel) -> Tensor:
        """(n,3,H,W) in [0, 1], differentiable in the eps-model."""
        latents = denoise(eps_model, self.noise, self.cond, self.schedule, self.steps, self.guidance_scale)
        return self.decode(latents)


def decoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """A frozen diffusers VAE as `Drawing.decode`: `sampling.decode` without the rounding to eight bits."""

    def decode(latents: Tensor) -> Tensor:
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        return (pixels / 2 + 0.5).clamp(0, 1)

    return decode


def pickscore(scorer: PickScore) -> SmoothReward:
    """PickScore, in fp32 on every device, of images that were never rounded to eight bits.

    Resized where need be by torch's antialiased bicubic filter, which is PIL's but for that rounding.
    """
    from invdpo.scorers.pickscore import unit_features

    processor = scorer.processor.image_processor
    size, crop = int(processor.size["shortest_edge"]), int(processor.crop_size["height"])
    mean, std = (
        torch.tensor(values, device=scorer.device).view(3, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) != size:
            resized = [side * size // min(height, width) for side in (height, width)]
            images = interpolate(images, resized, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - crop) // 2 for side in images.shape[-2:])
        pixels = (images[..., top : top + crop, left : left + crop] - mean) / std
        tokens = scorer.processor(
            text=list(prompts), padding="max_length", truncation=True, max_length=scorer.length, return_tensors="pt"
        ).to(scorer.device)
        image = unit_features(scorer.model.get_image_features(pixel_values=pixels))
        return (image * unit_features(scorer.model.get_text_features(**tokens))).sum(-1)

    return reward


def gradient(
    recipe: Recipe,
    policy: Module,
    reference: Module,
    pairs: Pairs,
    schedule: NoiseSchedule,
    generators: Sequence[torch.Generator],
    precision: str = "fp32",
    strength: Tensor | None = None,
    chunk: int | None = 256,
    wrap: Wrap = UNetEps,
) -> tuple[Tensor, int]:
    """The gradient (P,) of the recipe's loss on the pairs in the policy's P trainable weights; UNet evaluations.

    As training computes it: both networks' passes in `precision`, and fp16 with a loss scale, halved until nothing
    overflows and divided out again (the evaluations are those of the last attempt). generators: one a pair; they, the
    weights and every `.grad` are left as they were.

    Raises InvdpoError as `backward` does, and for a gradient that is not finite.
    """
    dtype, parameters = DTYPES[precision], _trainable(policy)
    earlier = [parameter.grad for parameter in parameters]
    scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
    try:
        while True:
            for parameter in parameters:
                parameter.grad = None
            out = backward(
                recipe,
                wrap(policy, dtype),
                wrap(reference, dtype),
                pairs.win,
                pairs.lose,
                pairs.cond,
                schedule,
                [generator.clone_state() for generator in generators],
                strength,
                loss_scale=scale,
                chunk=chunk,
                cond_lose=pairs.cond_lose,
            )
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = parameters_to_vector(found) / scale
            if torch.isfinite(flat).all():
                return flat, out.unet_evals
            if scale <= 1:
                raise InvdpoError(
                    f"recipe {recipe.name!r}: its gradient in {precision} is not finite (loss {float(out.loss):g}); "
                    "look at the policy's weights, or leave this precision out"
                )
            scale /= 2
    finally:
        for parameter, before in zip(parameters, earlier, strict=True):
            parameter.grad = before


def reward_gradient(
    policy: Module, drawing: Drawing, reward: SmoothReward, chunk: int = 32, wrap: Wrap = UNetEps
) -> tuple[Tensor, int]:
    """The gradient (P,) of the mean reward of the drawn images in the policy's P trainable weights; UNet evaluations.

    In fp32, through every sampling step with its guidance and through `drawing.decode`, `chunk` images at a time. Every
    network pass is computed again on the way back, so that memory holds the graph of one, and a few latents a step.
    Weights and `.grad` are left as they were.

    Raises InvdpoError for an impossible number of steps, guidance without `cond.uncond`, or a gradient that is not
    finite.
    """
    parameters, n = _trainable(policy), len(drawing.noise)
    total = torch.zeros_like(parameters_to_vector(parameters)).detach()
    eps_model = _checkpointed(wrap(policy, torch.float32))
    for part in drawing.parts(chunk):
        mean = reward(part.images(eps_model), part.prompts).sum() / n
        total += parameters_to_vector(torch.autograd.grad(mean, parameters, materialize_grads=True))
    if not torch.isfinite(total).all():
        raise InvdpoError("reward gradient: not finite; look at the policy's weights and at the reward of its images")
    # Forward twice, and a backward counts two.
    return total, 4 * unet_evaluations(n, drawing.steps, drawing.guidance_scale)


@torch.no_grad()
def reward_along(
    policy: Module,
    directions: Mapping[str, Tensor],
    lengths: Sequence[float],
    drawing: Drawing,
    reward: Reward,
    chunk: int = 128,
    wrap: Wrap = UNetEps,
) -> pd.DataFrame:
    """How the mean reward changes when the policy's trainable weights move by `length` (L2) along a direction (P,).

    A recipe's descent direction is minus its `gradient`. Directions are normalised here. The images are those that an
    evaluation sees, rounded to eight bits, so any reward will do; a length must be large enough for that rounding not
    to hide the change. One row a direction and length: direction, length, relative_length (of the weights' norm),
    images, reward (the mean at the weights themselves), gain_ahead and gain_behind (the mean change at + and - length),
    slope = (reward ahead - reward behind) / (2 length), the latter with the 95 % percentile interval slope_low,
    slope_high and gain_ahead with gain_low, gain_high of a bootstrap over the images, paired by their noise; and
    unet_evals. All are nan along a direction of length zero, which is none.

    Raises InvdpoError for a length that is not positive or a direction of another size than the weights.
    """
    if not lengths or min(lengths) <= 0:
        raise InvdpoError(f"reward_along: lengths are {list(lengths)}; give at least one, each above 0")
    policy = copy.deepcopy(policy)
    weights = parameters_to_vector(_trainable(policy))
    for name, direction in directions.items():
        _same_size(f"direction {name!r}", direction, weights)

    def rewards(at: Tensor) -> np.ndarray:
        vector_to_parameters(at, _trainable(policy))
        eps_model = wrap(policy, torch.float32)
        parts = []
        for part in drawing.parts(chunk):
            images = part.images(eps_model).mul(255).round().to(torch.uint8).cpu()
            parts.append(reward(images.permute(0, 2, 3, 1).contiguous().numpy(), part.prompts))
        return np.concatenate(parts).astype(np.float64)

    here, norm, rows = rewards(weights), _norm(weights), []
    for name, direction in directions.items():
        size = _norm(direction)
        for length in lengths:
            row = {"direction": name, "length": length, "relative_length": length / norm, "images": len(here)}
            results = {"reward": here.mean(), "unet_evals": 0}
            if size > 0:
                step = direction.to(weights) * (length / size)
                ahead, behind = rewards(weights + step), rewards(weights - step)
                gain = mean_interval((ahead - here)[None])
                slope = mean_interval((ahead - behind)[None] / (2 * length))
                results |= {
                    "gain_ahead": gain.estimate,
                    "gain_low": gain.low,
                    "gain_high": gain.high,
                    "gain_behind": (behind - here).mean(),
                    "slope": slope.estimate,
                    "slope_low": slope.low,
                    "slope_high": slope.high,
                    "unet_evals": 2 * unet_evaluations(len(here), drawing.steps, drawing.guidance_scale),
                }
            rows.append(row | results)
    return pd.DataFrame(rows).reindex(columns=ALONG)


def audit(
    recipes: Sequence[Recipe],
    policies: Mapping[str, Module],
    reference: Module,
    pairs: Pairs,
    batch: int,
    schedule: NoiseSchedule,
    reward_gradients: Mapping[str, Tensor],
    precisions: Sequence[str] = ("fp32",),
    noises: Sequence[Noise] = ("none",),
    strength: Tensor | None = None,
    seed: int = 0,
    chunk: int | None = 256,
    wrap: Wrap = UNetEps,
) -> pd.DataFrame:
    """Every recipe's gradient at every policy, precision and noise, on disjoint batches of `batch` pairs: a row each.

    policies: name -> network; the initial one is the reference itself. reference: as in training, rounded where a
    recipe's `reference_dtype` says so, and on a CPU rounded in its weights alone. reward_gradients: for each policy the
    `reward_gradient` at its own weights, without noise. precisions: of both networks' passes, among
    `device_precisions`; fp32 is the device's own (on CUDA with TF32 products, as in training).
    noises: of the policy's weights: none, rounded to a half-precision type, or multiplied by 1 + 2^-11 z, z standard
    normal, one draw a (seed, policy). strength (P,): of the pairs' preferences, for recipes that weight by it. Draws
    are functions of (seed, batch, pair), the same for all rows of a batch.

    Columns: recipe, policy, precision, noise, batch, pairs, gradient_norm, relative_norm (over the norm of the
    policy's weights), cosine_with_reward (of minus the gradient with the reward's: positive where descent raises it),
    cosine_with_swapped (of the gradients on true and on swapped labels: -1 where labels decide the sign and nothing
    else, as in any DPO loss of a single pair, 1 where they do not matter), cosine_with_fp32 (the same setting in fp32),
    unet_evals (of the one gradient). A cosine with a zero gradient is nan. The fewer its pairs, the noisier a gradient
    and the smaller its cosines: compare recipes at one batch size.

    Raises InvdpoError as `gradient` does, and for recipes of one name, pairs that do not fill the batches, a precision
    that the device lacks, an unknown noise, or a policy without a reward gradient of its size.
    """
    device = pairs.win.device
    _check(recipes, policies, pairs, batch, reward_gradients, precisions, noises, device)
    frozen = {
        kind: frozen_reference(copy.deepcopy(reference), kind, device)  # pyright: ignore[reportArgumentType]
        for kind in dict.fromkeys(recipe.reference_dtype for recipe in recipes)
    }
    batches = torch.arange(len(pairs.win)).split(batch)

    def found(policy: Module, recipe: Recipe, precision: str, index: int, swap: bool) -> tuple[Tensor, int]:
        rows = batches[index]
        return gradient(
            recipe,
            policy,
            frozen[recipe.reference_dtype],
            _labelled(pairs, rows, swap),
            schedule,
            [generator(seed, index, row, "audit") for row in range(batch)],
            precision,
            None if strength is None else strength[rows.to(strength.device)],
            chunk,
            wrap,
        )

    rows = []
    for (name, original), noise in product(policies.items(), noises):
        policy = perturbed(original, noise, generator(seed, name, "gaussian"))
        weight_norm = _norm(parameters_to_vector(_trainable(policy)))
        for recipe, index in product(recipes, range(len(batches))):
            in_fp32 = found(policy, recipe, "fp32", index, swap=False)
            for precision in precisions:
                true, evals = in_fp32 if precision == "fp32" else found(policy, recipe, precision, index, swap=False)
                swapped, _ = found(policy, recipe, precision, index, swap=True)
                norm = _norm(true)
                measures = {
                    "gradient_norm": norm,
                    "relative_norm": norm / weight_norm,
                    "cosine_with_reward": cosine(-true, reward_gradients[name]),
                    "cosine_with_swapped": cosine(true, swapped),
                    "cosine_with_fp32": cosine(true, in_fp32[0]),
                    "unet_evals": evals,
                }
                setting = dict(zip(SETTING, (recipe.name, name, precision, noise), strict=True))
                rows.append(setting | {"batch": index, "pairs": batch} | measures)
    return pd.DataFrame(rows, columns=[*SETTING, "batch", "pairs", *MEASURES])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """The mean of every measure of `audit`'s table over the batches, with its 95 % interval (Student's t), a row each.

    Columns: recipe, policy, precision, noise, measure, mean, low, high, batches (those where the measure is defined;
    with fewer than two there is no interval, with none no mean: nan). Student's t and not the study's bootstrap: a
    handful of batches, all from one seed, have too few distinct resamples.
    """
    results = []
    for _, group in rows.groupby(SETTING, sort=False):
        setting = group[SETTING].iloc[0].to_dict()
        for measure in MEASURES:
            values = group[measure].dropna().to_numpy(np.float64)
            n = len(values)
            mean = values.mean() if n else float("nan")
            margin = student_t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / n**0.5 if n > 1 else float("nan")
            interval = {"mean": mean, "low": mean - margin, "high": mean + margin, "batches": n}
            results.append(setting | {"measure": measure} | interval)
    return pd.DataFrame(results)


def perturbed(policy: Module, noise: Noise, generator: torch.Generator) -> Module:
    """A trainable copy of the policy, its weights off by a rounding's size: see `audit`. generator: for `gaussian`."""
    rounding = noise if noise in ("float16", "bfloat16") else None
    copied = initial_policy(policy, rounding)  # pyright: ignore[reportArgumentType]
    if noise == "gaussian":
        with torch.no_grad():
            for parameter in copied.parameters():
                z = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + GAUSSIAN_NOISE * z.to(parameter))
    return copied


def cosine(first: Tensor, second: Tensor) -> float:
    """The cosine of two vectors (P,), nan where one of them is zero. Exactly -1 for a vector and its negative."""
    first, second = first.double(), second.to(first.device).double()
    lengths = float(first @ first) * float(second @ second)
    return float(first @ second) / lengths**0.5 if lengths > 0 else float("nan")


def device_precisions(device: torch.device) -> list[str]:
    """Those of fp32, bf16 and fp16 in which the device can run a convolution forwards and backwards."""
    return [name for name, dtype in DTYPES.items() if _convolves(device, dtype)]


def _convolves(device: torch.device, dtype: torch.dtype) -> bool:
    image = torch.ones(1, 1, 3, 3, device=device)
    kernel = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
    try:
        with autocast(device, dtype):
            result = conv2d(image, kernel)
        result.sum().backward()
    except RuntimeError:
        return False
    return result.dtype == dtype  # where autocast lacks a type, it may warn and go on without


def _checkpointed(eps_model: EpsModel) -> EpsModel:
    """The same predictions, computed again on the way back, so that no pass keeps its graph."""

    def model(x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        eps = checkpoint(eps_model, x, t, cond, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(eps, Tensor)  # checkpoint is untyped
        return eps

    return model


def _labelled(pairs: Pairs, rows: Tensor, swap: bool) -> Pairs:
    """The given pairs, with winner and loser exchanged where asked."""
    win, lose = (side[rows.to(side.device)] for side in (pairs.win, pairs.lose))
    cond, cond_lose = select(pairs.cond, rows), select(pairs.cond_lose, rows)
    if not swap:
        return Pairs(win, lose, cond, cond_lose)
    return Pairs(lose, win, cond if cond_lose is None else cond_lose, cond)


def _trainable(policy: Module) -> list[torch.nn.Parameter]:
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not parameters:
        raise InvdpoError("gradient audit: the policy has no trainable weight; call its requires_grad_(True) first")
    return parameters


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector.detach(), dtype=torch.float64))


def _same_size(what: str, vector: Tensor, weights: Tensor) -> None:
    if vector.shape != weights.shape:
        raise InvdpoError(f"{what}: expected one number a trainable weight, {len(weights)}, got {tuple(vector.shape)}")


def _check(
    recipes: Sequence[Recipe],
    policies: Mapping[str, Module],
    pairs: Pairs,
    batch: int,
    reward_gradients: Mapping[str, Tensor],
    precisions: Sequence[str],
    noises: Sequence[str],
    device: torch.device,
) -> None:
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvdpoError(f"audit: several recipes are named {twice}; rename them with with_overrides({{'name': ...}})")
    if batch < 1 or len(pairs.win) == 0 or len(pairs.win) % batch:
        raise InvdpoError(
            f"audit: {len(pairs.win)} pairs do not fill batches of {batch}; give a multiple of the batch size"
        )
    possible = device_precisions(device)
    if not set(precisions) <= set(possible):
        raise InvdpoError(f"audit: precisions are {list(precisions)}, but {device} can do {possible}; leave out others")
    if unknown := set(noises) - set(get_args(Noise)):
        raise InvdpoError(f"audit: noises {sorted(unknown)} are unknown; choose from {list(get_args(Noise))}")
    for name, policy in policies.items():
        if name not in reward_gradients:
            raise InvdpoError(f"audit: reward_gradients has none for policy {name!r}; give its `reward_gradient`")
        size = torch.empty(sum(parameter.numel() for parameter in policy.parameters()), device="meta")
        _same_size(f"audit: the reward gradient of policy {name!r}", reward_gradients[name], size)
