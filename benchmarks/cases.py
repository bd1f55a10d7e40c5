"""What is measured: each case is one task and the competitors that do it, on models that no other case has touched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from loops import clip_and_step, plain_training_step, plain_unet, reference_loop, stock_pipeline
from measure import Work
from models import Models
from PIL import Image
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from invdpo import cost, objectives
from invdpo.backbones.pipeline import encode_images
from invdpo.backbones.text import encode_prompts
from invdpo.config import StudyConfig, parse_study
from invdpo.device import autocast
from invdpo.errors import InvdpoError
from invdpo.preferences.cache import PreferenceCache, Rows
from invdpo.sampling import decode, prompt_generator, sample, unet_evaluations
from invdpo.training.loop import Run, Stepper, frozen_reference
from invdpo.training.optim import build_optimizer
from invdpo.training.ranks import Ranks
from invdpo.training.state import Progress

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

METHODS = ("inversion_dpo_code", "inversion_dpo_implied")
REFERENCE_LOOP, ONE, SEVERAL = "reference loop", "streamed, one pair", "streamed, several pairs"
PLAIN, LOOP = "plain diffusers loop", "training loop"
STOCK, OURS = "stock pipeline", "our sampler"
ENCODING, CACHED = "encoding in each step", "cached"
LAYOUTS, COMPILED = ("contiguous", "channels last"), ("eager", "compiled")
SAMPLING_STEPS, GUIDANCE_SCALE = 20, 5.0  # config/sdxl.yaml's
LEARNING_RATE = 1e-9  # the rate changes no time: what is measured stays as it was


@dataclass(frozen=True)
class Scale:
    """How much each competitor is given: latents of a forward pass, images, pairs of a training step, pairs of an
    all-timestep step; the chunk (latents with their graph alive) and gradient checkpointing of our own code. No round
    of a case begins after so many seconds. paper: whether optimizer and frozen reference are those of config/sdxl.yaml,
    so that the memory is its trainings'; else AdamW, and the base itself."""

    latents: int
    images: int
    batch: int
    pairs: int
    chunk: int
    checkpointing: bool
    seconds: float
    paper: bool = False


# Three guided pairs are one call of 12. A larger chunk is faster and takes more memory; this shows both gains at once.
SMALL = Scale(latents=64, images=64, batch=32, pairs=3, chunk=12, checkpointing=False, seconds=60)
# One guided pair is a call of 4, which is as much as a GPU can use.
LARGE = Scale(latents=8, images=2, batch=2, pairs=1, chunk=4, checkpointing=True, seconds=20)
XL = replace(LARGE, paper=True)


def scale_of(models: Models) -> Scale:
    """LARGE from Stable Diffusion 1.5's 64x64 latents on, XL from SDXL's 128x128."""
    side = models.shape[-1]
    return XL if side >= 128 else LARGE if side >= 64 else SMALL


@dataclass(frozen=True)
class Competitor:
    """work: one turn. amount: the latents, pairs or images of a turn. needed: UNet evaluations (a forward pass of one
    latent; its backward pass counts two) that the method asks for in a turn, None where they are not all of the work.
    executed: those that are made; repeated: forward passes that gradient checkpointing makes again beside them. held:
    bytes of networks that only this one keeps."""

    work: Work
    amount: int
    needed: float | None = None
    executed: float = 0
    repeated: float = 0
    held: int = 0


@dataclass(frozen=True)
class Case:
    """title: what is measured, and in what. build: the competitors by name, the one that the others are compared with
    first. memory: whether its memory is a result."""

    title: str
    build: Callable[[Models], dict[str, Competitor]]
    memory: bool = False
    steps: int | None = None


def all_cases(steps: Sequence[int]) -> dict[str, Case]:
    """Every case but `scaling`, by name, in the order that they are run in: what is quick and what matters most first.

    steps: inversion steps N of the all-timestep objectives.
    """
    inversion = {
        f"{method}_n{n}": Case(
            f"{method} step, pairs", lambda models, m=method, n=n: all_timesteps(models, m, n), memory=True, steps=n
        )
        for n, method in product(steps, METHODS)
    }
    return {
        "forward": Case("forward pass, latents", forward),
        "training": Case("Diffusion-DPO step, pairs", training, memory=True),
        "caching": Case("Diffusion-DPO step with or without cache, pairs", caching, memory=True),
        "sampling": Case("sampling, latents", lambda models: sampling(models, decoded=False)),
        "sampling_decoded": Case("sampling and decoding, images", lambda models: sampling(models, decoded=True)),
        **inversion,
        "layouts": Case("Diffusion-DPO gradient by layout, pairs", layouts),
        "compiled": Case("Diffusion-DPO gradient, compiled or not, pairs", compiled),
    }


def forward(models: Models) -> dict[str, Competitor]:
    """UNet forward passes without gradient."""
    n = scale_of(models).latents
    x, cond, model = models.latents(n, 1), models.prompts(n, 2).without_uncond(), models.eps(models.reference)
    t = torch.arange(n, device=models.device)

    @torch.no_grad()
    def plain(size: int) -> None:
        with autocast(models.device, models.dtype):
            for i in range(0, n, size):
                rows = slice(i, i + size)
                plain_unet(models.reference, x[rows], t[rows], cond.map(lambda value, rows=rows: value[rows]))

    @torch.no_grad()
    def ours() -> Tensor:
        return model(x, t, cond)

    works = {"plain, one latent a call": lambda: plain(1), "plain, batched": lambda: plain(n), "eps-model": ours}
    return {name: Competitor(work, n, n, n) for name, work in works.items()}


def sampling(models: Models, decoded: bool) -> dict[str, Competitor]:
    """Guided DDIM sampling from the same noise, with or without the codec."""
    n, codec = scale_of(models).images, models.codec()
    cond, eps_model, draw = models.prompts(n, 1), models.eps(models.reference), stock_pipeline(models, codec)

    def ours() -> object:
        generators = [prompt_generator(0, number) for number in range(n)]
        latents = sample(eps_model, cond, models.schedule, SAMPLING_STEPS, GUIDANCE_SCALE, generators, models.shape)
        return [Image.fromarray(pixels) for pixels in decode(codec, latents)] if decoded else latents

    def stock() -> object:
        return draw(cond, SAMPLING_STEPS, GUIDANCE_SCALE, "pil" if decoded else "latent")

    spent = unet_evaluations(n, SAMPLING_STEPS, GUIDANCE_SCALE)
    evals = () if decoded else (spent, spent)
    return {name: Competitor(work, n, *evals) for name, work in ((STOCK, stock), (OURS, ours))}


def training(models: Models) -> dict[str, Competitor]:
    """Optimizer steps of Diffusion-DPO; ours with everything it does beside: seeded draws, checks, logged numbers."""
    n = scale_of(models).batch
    study = study_of(models, "diffusion_dpo", n)
    stepper = stepper_of(models, study, random_cache(models, n))
    win, lose, cond = models.latents(n, 1), models.latents(n, 2), models.prompts(n, 3)
    beta, evals = stepper.arm.recipe.beta, evaluations(study)

    def plain() -> float:
        return plain_training_step(models, stepper.optimizer, win, lose, cond, beta)

    return {PLAIN: Competitor(plain, n, *evals), LOOP: Competitor(lambda: one_step(stepper), n, *evals)}


def caching(models: Models) -> dict[str, Competitor]:
    """The same steps on images and captions: encoded in each step, as the official scripts do, or once, as ours are.
    Decoding image files is in neither."""
    n, codec, text = scale_of(models).batch, models.codec(), models.text()
    for encoder in text.encoders:
        encoder.network.to(models.dtype)
    side = models.shape[-1] * 2 ** (len(codec.config["block_out_channels"]) - 1)
    pixels = torch.rand(2, n, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    captions = [f"a photograph of {number} things" for number in range(n)]
    rest = random_cache(models, n)
    stepper = stepper_of(models, study_of(models, "diffusion_dpo", n), rest)

    def encoded() -> dict[str, Tensor]:
        found = {}
        for who, images in zip(("win", "lose"), pixels, strict=True):
            found[f"{who}_mean"], found[f"{who}_std"] = encode_images(codec, images.to(models.device))
        prompts = encode_prompts(text, captions)
        found["embeds"] = prompts.embeds.float()
        return found if prompts.pooled is None else found | {"pooled": prompts.pooled.float()}

    def encoding() -> dict[str, Any]:
        stepper.cache = replace(rest, **encoded())
        return one_step(stepper)

    stored: Any = {name: Rows([value.cpu()], models.device) for name, value in encoded().items()}
    cache = replace(rest, **stored)

    def cached() -> dict[str, Any]:
        stepper.cache = cache
        return one_step(stepper)

    networks: list[Any] = [codec, *(encoder.network for encoder in text.encoders)]
    held = sum(value.nbytes for network in networks for value in network.parameters())
    return {ENCODING: Competitor(encoding, n, held=held), CACHED: Competitor(cached, n)}


def all_timesteps(models: Models, method: str, steps: int) -> dict[str, Competitor]:
    """Optimizer steps of an all-timestep method at N = steps. The reference loop, like the released script, can take
    but one pair, and needs gradient checkpointing."""
    scale = scale_of(models)
    sizes = {ONE: 1, SEVERAL: scale.pairs} if scale.pairs > 1 else {ONE: 1}
    policy, found = models.policy, {}
    optimizer = optimizer_of(models)
    win, lose, cond = models.latents(1, 1), models.latents(1, 2), models.prompts(1, 3)
    alone = study_of(models, method, 1, steps, checkpointing=True)
    recipe = alone.arm(method).recipe
    if scale.paper:
        frozen = frozen_reference(models.reference, recipe.reference_dtype, models.device)
    else:
        frozen = models.reference
    compared_with = replace(models, reference=frozen)

    def reference() -> None:
        checkpoint(policy, True)
        reference_loop(recipe, compared_with, win, lose, cond)
        clip_and_step(models, optimizer)

    def streamed(stepper: Stepper) -> dict[str, Any]:
        checkpoint(policy, scale.checkpointing)
        return one_step(stepper)

    found[REFERENCE_LOOP] = Competitor(reference, 1, *evaluations(alone))
    for name, pairs in sizes.items():
        study = study_of(models, method, pairs, steps)
        stepper = stepper_of(models, study, random_cache(models, pairs), optimizer, reference=frozen)
        found[name] = Competitor(lambda stepper=stepper: streamed(stepper), pairs, *evaluations(study))
    return found


def layouts(models: Models) -> dict[str, Competitor]:
    """Gradients of Diffusion-DPO by memory format of the weights (`training.channels_last`)."""
    own = gradient(models, models.policy, models.reference)
    # Copies of the policy with its gradient checkpointing.
    last = [copy.deepcopy(unet).to(memory_format=torch.channels_last) for unet in (models.policy, models.reference)]  # pyright: ignore
    return dict(zip(LAYOUTS, (own, gradient(models, *last)), strict=True))


def compiled(models: Models) -> dict[str, Competitor]:
    """The same with `training.compile`, compiled beforehand; it chooses its memory formats itself.

    Raises InvdpoError where nothing can be compiled.
    """
    fast = gradient(models, torch.compile(models.policy), torch.compile(models.reference))
    try:
        fast.work()
    except TorchDynamoException as error:
        raise InvdpoError(f"torch.compile: {' '.join(str(error).split())[:300]}") from error
    return dict(zip(COMPILED, (gradient(models, models.policy, models.reference), fast), strict=True))


def gradient(models: Models, policy: Any, reference: Any) -> Competitor:
    """Gradients of Diffusion-DPO, without the optimizer's step, by the models' own networks or by others like them."""
    n = scale_of(models).batch
    study = study_of(models, "diffusion_dpo", n)
    arm = study.arm("diffusion_dpo")
    checkpoint(models.policy, arm.training.gradient_checkpointing)
    win, lose, cond = models.latents(n, 1), models.latents(n, 2), models.prompts(n, 3)
    eps_models, chunk = (models.eps(policy), models.eps(reference)), arm.training.chunk

    def work() -> objectives.LossOutput:
        draws = torch.Generator().manual_seed(0)
        found = objectives.backward(arm.recipe, *eps_models, win, lose, cond, models.schedule, draws, chunk=chunk)
        policy.zero_grad(set_to_none=True)
        return found

    return Competitor(work, n, *evaluations(study))


def checkpoint(policy: Any, on: bool) -> None:
    """Switch a UNet's gradient checkpointing."""
    if on:
        policy.enable_gradient_checkpointing()
    else:
        policy.disable_gradient_checkpointing()


def study_of(
    models: Models, method: str, pairs: int, steps: int | None = None, checkpointing: bool | None = None
) -> StudyConfig:
    """A study of one arm, named as its method, of which one optimizer step is measured; none of its files is read.

    checkpointing: None: as the scale has it.
    """
    scale = scale_of(models)
    training: dict[str, Any] = {
        "steps": 1,
        "batch": pairs,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": scale.checkpointing if checkpointing is None else checkpointing,
        "optimizer": "adafactor" if scale.paper else "adamw",
    }
    arm: dict[str, Any] = {"method": method}
    if steps is not None:
        arm["recipe"] = {"trajectory": {"steps": steps}}
        # beta 1: a saturated sigmoid would fill the gradient with denormals, which are slow.
        training |= {"chunk": scale.chunk, "beta": 1.0}
    study = {
        "study": "benchmark",
        "base": "none",
        "preferences": "random latents",
        "prompts": "none",
        "scorers": {},
        "device": models.device.type,
        "seeds": [0],
        "training": training,
        "sampling": {},
        "arms": {method: arm},
    }
    return parse_study(study, "benchmark")


def evaluations(study: StudyConfig) -> tuple[float, float, float]:
    """`needed`, `executed` and `repeated` (as `Competitor` has them) of a step of the study's arm."""
    (arm,) = map(study.arm, study.arms)
    spent, pairs = cost.training(arm, seed=0), arm.training.batch
    alone = arm.model_copy(update={"training": arm.training.model_copy(update={"batch": 1})})
    return cost.training(alone, seed=0).evaluations * pairs, spent.evaluations, spent.repeated


def random_cache(models: Models, pairs: int) -> PreferenceCache:
    """Random latents and embeddings of so many pairs, with sizes where the UNet is told any."""
    win, lose, cond = models.latents(pairs, 1), models.latents(pairs, 2), models.prompts(pairs, 3)
    empty = cond.uncond
    assert empty is not None
    still, rows = torch.zeros_like(win), torch.arange(pairs, device=models.device)
    return PreferenceCache(
        win,
        still,
        lose,
        still,
        cond.embeds,
        empty.embeds[:1],
        rows,
        "random latents",
        pooled=cond.pooled,
        uncond_pooled=None if empty.pooled is None else empty.pooled[:1],
        win_time_ids=cond.time_ids,
        lose_time_ids=cond.time_ids,
    )


def optimizer_of(models: Models) -> torch.optim.Optimizer:
    """The scale's optimizer with its states in place, and all that the first use of a network brings in (code pages,
    kernels)."""
    study = study_of(models, "diffusion_dpo", 1)
    optimizer = build_optimizer(models.policy.parameters(), study.training, LEARNING_RATE)
    checkpoint(models.policy, study.training.gradient_checkpointing)
    x, t = models.latents(1, 0), torch.zeros(1, dtype=torch.int64, device=models.device)
    models.eps(models.policy)(x, t, models.prompts(1, 0)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def stepper_of(
    models: Models,
    study: StudyConfig,
    cache: PreferenceCache,
    optimizer: torch.optim.Optimizer | None = None,
    ranks: Ranks | None = None,
    reference: UNet2DConditionModel | None = None,
) -> Stepper:
    """Steps of the study's arm, all processes together taking its batch; gradient checkpointing as the arm has it.

    reference: None: the base.
    """
    (arm,) = map(study.arm, study.arms)
    run, base = Run(study, arm, 0, models.device, ranks), models.reference
    optimizer = optimizer or optimizer_of(models)
    checkpoint(models.policy, arm.training.gradient_checkpointing)
    frozen = base if reference is None else reference
    return Stepper(run, models.policy, frozen, base, optimizer, models.schedule, cache, models.dtype, Progress())


def one_step(stepper: Stepper) -> dict[str, Any]:
    """An optimizer step that leaves no gradient behind, which the next competitor would be charged for."""
    row = stepper.step()
    stepper.optimizer.zero_grad(set_to_none=True)
    return row
