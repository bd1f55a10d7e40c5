"""The gradient audit against finite differences and formulas on linear networks, and end to end on a tiny UNet."""

import copy
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import t
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from invdpo.backbones.pipeline import load_schedule, load_unet, load_vae
from invdpo.device import DTYPES
from invdpo.errors import InvdpoError
from invdpo.experiments.audit import (
    MEASURES,
    Drawing,
    audit,
    cosine,
    decoder,
    device_precisions,
    gradient,
    perturbed,
    pickscore,
    reward_along,
    reward_gradient,
    summary,
)
from invdpo.experiments.precision import Pairs
from invdpo.objectives import load_recipe, preference_loss
from invdpo.preferences.order import generator
from invdpo.sampling import decode, prompt_generator, sample
from invdpo.schedule import NoiseSchedule
from invdpo.scorers.pickscore import PickScore
from invdpo.types import Conditioning

PICKSCORE = Path(__file__).parents[2] / "assets" / "shapes" / "scorers" / "pickscore"
CPU = torch.device("cpu")
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULE = NoiseSchedule(ABAR, 1.0, 1, 1000)
SHAPE = (3, 2, 2)
STEPS = 4


class Linear(torch.nn.Module):
    """eps = A x + b t/1000 + c mean(embeds), elementwise; it is its own eps-model."""

    def __init__(self, seed, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        size = math.prod(SHAPE)
        self.a = torch.nn.Parameter((0.6 * torch.eye(size) + 0.05 * torch.randn(size, size, generator=g)).to(dtype))
        self.b = torch.nn.Parameter((0.3 * torch.randn(size, generator=g)).to(dtype))
        self.c = torch.nn.Parameter(torch.tensor(0.4, dtype=dtype))
        self.widest = 0

    def forward(self, x, t, cond):
        self.widest = max(self.widest, len(x))
        # Not a matrix product, whose rounding would depend on a latent's place in the batch.
        out = (x.flatten(1)[:, None] * self.a).sum(-1) + self.b * (t.to(x)[:, None] / 1000)
        return (out + self.c * cond.embeds.to(x).mean(dim=(1, 2))[:, None]).view_as(x)


def itself(module, dtype):
    return module


def conditioning(rows, dtype=torch.float64):
    embeds = torch.randn(rows, 2, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    return Conditioning(embeds, uncond=Conditioning(torch.zeros_like(embeds)))


def drawing(images=5, dtype=torch.float64, decode=torch.sigmoid):
    noise = torch.stack([torch.randn(SHAPE, generator=prompt_generator(7, i)) for i in range(images)]).to(dtype)
    prompts = ["a" * (i + 1) for i in range(images)]
    return Drawing(prompts, conditioning(images, dtype), noise, SCHEDULE, STEPS, 2.0, decode)


def smooth(images, prompts):
    """A reward that depends on every pixel and on the prompt."""
    weight = torch.linspace(-1, 2, images[0].numel(), dtype=images.dtype).view(SHAPE)
    return (images * weight).flatten(1).mean(1) * torch.tensor([1 + len(p) / 5 for p in prompts]).to(images)


def pairs(count=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    win, lose = torch.randn(2, count, *SHAPE, generator=g).to(dtype)
    return Pairs(win, lose, conditioning(count, dtype))


def generators(count=6):
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def recipe(name, **changes):
    found = load_recipe(name)
    grid = {"trajectory": {"steps": 3}} if found.trajectory.kind == "inversion" else {}
    return found.with_overrides(grid | {"beta": 0.3} | changes)


def audited(recipes, policies, rewards=None, batch=3, data=None, **options):
    data = data or pairs()
    size = sum(p.numel() for p in next(iter(policies.values())).parameters())
    rewards = rewards or {name: torch.ones(size) for name in policies}
    options = {"wrap": itself} | options
    return audit(recipes, policies, Linear(1), data, batch, SCHEDULE, rewards, **options)


# --- the two gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 32])
def test_the_reward_gradient_is_the_slope_of_the_mean_reward_of_what_is_sampled(chunk):
    policy, images = Linear(2), drawing()
    before = copy.deepcopy(policy.state_dict())
    found, evals = reward_gradient(policy, images, smooth, chunk=chunk, wrap=itself)
    assert evals == 5 * STEPS * 2 * 4  # guided, forwards twice and once back
    assert policy.widest == 2 * min(chunk, 5)
    assert all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())
    weights = parameters_to_vector(policy.parameters()).detach()

    def mean_reward(at):
        """Sampling written out: x_T down the grid, each step to 250 timesteps lower and the last to the clean level."""
        moved = copy.deepcopy(policy)
        vector_to_parameters(at, moved.parameters())
        x, c = images.noise, images.cond
        for told in (751, 501, 251, 1):
            label = torch.full((5,), told)
            eps = 2 * moved(x, label, c) - moved(x, label, c.uncond)
            a, b = ABAR[told], ABAR[told - 250] if told > 250 else torch.tensor(1.0)
            x = (b / a).sqrt() * (x - (1 - a).sqrt() * eps) + (1 - b).sqrt() * eps
        return float(smooth(torch.sigmoid(x), images.prompts).mean())

    with torch.no_grad():
        shifts = 1e-5 * torch.eye(len(weights), dtype=torch.float64)[::7]
        slopes = [(mean_reward(weights + shift) - mean_reward(weights - shift)) / 2e-5 for shift in shifts]
    assert max(map(abs, slopes)) > 0.01
    torch.testing.assert_close(found[::7], torch.tensor(slopes).double(), rtol=1e-6, atol=1e-9)


def test_the_images_are_those_of_an_evaluation(tiny_base):
    policy, images = Linear(2, torch.float32), drawing(dtype=torch.float32)
    seen = []
    watched = Drawing(**{**vars(images), "decode": lambda latents: seen.append(latents) or latents})
    reward_gradient(policy, watched, lambda x, prompts: x.flatten(1).mean(1), wrap=itself)
    noises = [prompt_generator(7, i) for i in range(5)]
    assert torch.equal(seen[0], sample(policy, images.cond, SCHEDULE, STEPS, 2.0, noises, SHAPE))
    vae = load_vae(tiny_base, CPU)
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = decoder(vae)(latents)
    assert np.array_equal((found * 255).round().byte().permute(0, 2, 3, 1).numpy(), decode(vae, latents.detach()))
    assert torch.autograd.grad(found.sum(), latents)[0].any()


def test_the_differentiable_pickscore_is_the_scorers():
    scorer = PickScore(str(PICKSCORE), CPU)
    prompts = ["a red circle", "a blue square left of a red circle"]
    g = np.random.default_rng(0)
    for size, tolerance in [((64, 64), 1e-6), ((96, 96), 2e-3), ((64, 100), 1e-6)]:
        coarse = [Image.fromarray(g.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in prompts]
        pictures = [picture.resize((size[1], size[0]), Image.Resampling.BICUBIC) for picture in coarse]
        pixels = torch.stack([torch.from_numpy(np.asarray(p).copy()) for p in pictures]).permute(0, 3, 1, 2) / 255
        pixels.requires_grad_()
        found = pickscore(scorer)(pixels, prompts)
        expected = scorer.score(pictures, prompts)["pickscore"]
        assert abs(expected[0] - expected[1]) > 2 * tolerance
        assert found.detach().numpy() == pytest.approx(expected, abs=tolerance)
        slope = torch.autograd.grad(found[0], pixels)[0]
        assert slope[0].any() and not slope[1].any()


def test_a_recipes_gradient_is_its_losses_and_leaves_no_trace():
    policy, reference, data = Linear(2), Linear(1).requires_grad_(False), pairs()
    policy.a.grad = torch.full_like(policy.a, 5.0)
    draws, before = generators(), copy.deepcopy(policy.state_dict())
    for method in ("diffusion_dpo", "inversion_dpo_implied", "sft"):
        out = preference_loss(recipe(method), policy, reference, data.win, data.lose, data.cond, SCHEDULE, generators())
        expected = parameters_to_vector(torch.autograd.grad(out.loss, list(policy.parameters())))
        for chunk in (None, 4):
            found, evals = gradient(recipe(method), policy, reference, data, SCHEDULE, draws, chunk=chunk, wrap=itself)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            assert evals > out.unet_evals
    assert torch.equal(policy.a.grad, torch.full_like(policy.a, 5.0)) and policy.b.grad is None
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(draws, generators(), strict=True))


def test_fp16_gradients_survive_overflow_and_broken_weights_do_not():
    def half(module, dtype):
        return lambda x, t, cond: module(x, t, cond) if dtype == torch.float32 else module(x, t, cond).to(dtype)

    policy, reference, data = Linear(2, torch.float32), Linear(1, torch.float32), pairs(dtype=torch.float32)
    strong = recipe("diffusion_dpo", beta=5000.0)
    asked = strong, policy, reference, data, SCHEDULE, generators()
    in_fp32, in_fp16 = (gradient(*asked, precision, wrap=half)[0] for precision in ("fp32", "fp16"))
    # Times 2^16 (the loss scale at the start) the predictions' gradients leave fp16's range.
    assert in_fp32.abs().max() * 2**16 > torch.finfo(torch.float16).max
    assert 0.999 < cosine(in_fp32, in_fp16) < 1
    assert float(in_fp16.norm()) == pytest.approx(float(in_fp32.norm()), rel=0.01)
    with torch.no_grad():
        policy.c.fill_(math.inf)
    for precision in ("fp32", "fp16"):
        with pytest.raises(InvdpoError, match=f"'diffusion_dpo'.*{precision} is not finite"):
            gradient(*asked, precision, wrap=half)
    with pytest.raises(InvdpoError, match="reward gradient: not finite"):
        reward_gradient(policy, drawing(dtype=torch.float32), smooth, wrap=itself)
    with pytest.raises(InvdpoError, match="no trainable weight"):
        gradient(strong, policy.requires_grad_(False), reference, data, SCHEDULE, generators(), wrap=itself)


# --- the audit -----------------------------------------------------------------------------------------------------


def test_at_the_reference():
    recipes = [recipe(name) for name in ("diffusion_dpo", "inversion_dpo_paper", "inversion_dpo_minus")]
    code = recipe("inversion_dpo_code")
    recipes += [code, code.with_overrides({"reference_dtype": "float32", "name": "code_fp32"})]
    table = audited(recipes, {"base": Linear(1)}, noises=["none", "float16", "gaussian"])
    assert table.columns.tolist() == ["recipe", "policy", "precision", "noise", "batch", "pairs", *MEASURES]
    assert len(table) == 5 * 3 * 2 and table["pairs"].eq(3).all() and set(table["batch"]) == {0, 1}
    rows = table.set_index(["recipe", "noise"]).sort_index()
    for name in ("inversion_dpo_paper", "inversion_dpo_minus", "code_fp32"):  # equal networks: exactly no gradient
        at_reference = rows.loc[name, "none"]
        assert at_reference["gradient_norm"].eq(0.0).all() and at_reference["relative_norm"].eq(0.0).all()
        assert at_reference[[m for m in MEASURES if m.startswith("cosine")]].isna().all(axis=None)
        for noise in ("float16", "gaussian"):
            assert rows.loc[(name, noise), "gradient_norm"].gt(0).all()
    # The released code's first step comes from the rounded reference, and its labels choose the rounding's sign.
    for name in ("diffusion_dpo", "inversion_dpo_code"):
        at_reference = rows.loc[name, "none"]
        assert at_reference["gradient_norm"].gt(0).all()
        assert at_reference["cosine_with_swapped"].to_numpy() == pytest.approx(-1, abs=1e-6)
    # Diffusion-DPO's hardly changes with rounding, that of the code does.
    sizes = rows["gradient_norm"].groupby(level=[0, 1]).mean()
    assert sizes["diffusion_dpo", "float16"] == pytest.approx(sizes["diffusion_dpo", "none"], rel=1e-2)
    assert rows.loc[("diffusion_dpo", "none"), "gradient_norm"].nunique() == 2  # batches differ


def test_every_measure_of_the_second_batch():
    policy, reference, data = Linear(2), Linear(1), pairs()
    spec = recipe("diffusion_dpo")
    wanted = torch.linspace(-1, 1, sum(p.numel() for p in policy.parameters()), dtype=torch.float64)
    calls = []

    def wrap(module, dtype):
        """bf16 by rounding what goes in, so that the precisions differ."""
        calls.append(dtype)
        return lambda x, t, cond: module(x.to(dtype).to(x) if dtype == torch.bfloat16 else x, t, cond)

    table = audited([spec], {"p": policy}, {"p": wanted}, precisions=["bf16"], seed=4, wrap=wrap)
    _, row = table.to_dict("records")
    assert set(calls) == {torch.float32, torch.bfloat16}
    draws = [generator(4, 1, i, "audit") for i in range(3)]
    data = Pairs(data.win[3:], data.lose[3:], data.cond.map(lambda value: value[3:]))
    swapped = Pairs(data.lose, data.win, data.cond)
    true, fp32, other = (
        gradient(spec, policy, reference, data, SCHEDULE, draws, precision, wrap=wrap)[0]
        for data, precision in ((data, "bf16"), (data, "fp32"), (swapped, "bf16"))
    )

    def angle(a, b):
        return float((a * b).sum() / a.norm() / b.norm())

    weights = parameters_to_vector(policy.parameters()).detach()
    assert row == {
        "recipe": "diffusion_dpo",
        "policy": "p",
        "precision": "bf16",
        "noise": "none",
        "batch": 1,
        "pairs": 3,
        "gradient_norm": pytest.approx(float(true.norm())),
        "relative_norm": pytest.approx(float(true.norm() / weights.norm())),
        "cosine_with_reward": pytest.approx(-angle(true, wanted)),
        "cosine_with_swapped": pytest.approx(angle(true, other)),
        "cosine_with_fp32": pytest.approx(angle(true, fp32)),
        "unet_evals": 6 * 4,
    }
    assert row["cosine_with_fp32"] < 1 - 1e-9 and -1 < row["cosine_with_swapped"] < -0.5


def test_strengths_reach_the_recipe_pair_by_pair():
    spec, policy = recipe("smpo"), Linear(2)
    strength = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.5])
    table = audited([spec], {"p": policy}, strength=strength)
    assert table["gradient_norm"].eq(0).tolist() == [True, False]
    with pytest.raises(InvdpoError, match="strength"):
        audited([spec], {"p": policy})


def test_the_noises_are_of_rounding_size():
    policy = Linear(2, torch.float32)
    weights = parameters_to_vector(policy.parameters()).detach()
    largest = {"none": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    for noise, limit in largest.items():
        found = parameters_to_vector(perturbed(policy, noise, generators()[0]).parameters()).detach()
        relative = ((found - weights) / weights).abs()
        assert limit / 4 <= relative[weights != 0].max() <= limit
    found = parameters_to_vector(perturbed(policy, "gaussian", generators()[0]).parameters()).detach()
    relative = (found / weights - 1)[weights.abs() > 1e-3]
    assert float(relative.std()) == pytest.approx(2.0**-11, rel=0.25)
    again = parameters_to_vector(perturbed(policy, "gaussian", generators()[0]).parameters())
    assert torch.equal(found, again) and torch.equal(weights, parameters_to_vector(policy.parameters()))


def test_what_cannot_be_audited_is_said():
    policies, spec = {"p": Linear(2)}, recipe("diffusion_dpo")
    for options, match in [
        ({"batch": 4}, "6 pairs do not fill batches of 4"),
        ({"precisions": ["fp32", "fp8"]}, "'fp8'.*cpu can do .*'fp32'"),
        ({"noises": ["int8"]}, "'int8'.*gaussian"),
        ({"rewards": {"q": torch.ones(3)}}, "none for policy 'p'"),
        ({"rewards": {"p": torch.ones(3)}}, "policy 'p'.*157, got .3,"),
    ]:
        with pytest.raises(InvdpoError, match=match):
            audited([spec], policies, **options)
    with pytest.raises(InvdpoError, match="named .'diffusion_dpo'"):
        audited([spec, recipe("diffusion_dpo", beta=1.0)], policies)


def test_what_this_device_can_do():
    assert device_precisions(CPU)[0] == "fp32" and set(device_precisions(CPU)) <= set(DTYPES)


def test_the_cosine_of_a_vector_and_its_negative_is_exact():
    vector = torch.randn(1000, generator=generators()[0])
    assert cosine(vector, vector) == 1.0 and cosine(vector, -3 * vector) == pytest.approx(-1)
    assert cosine(vector, -vector) == -1.0 and cosine(1e-30 * vector, -1e-30 * vector) == -1.0
    assert math.isnan(cosine(vector, torch.zeros(1000)))


def test_the_summary_is_students():
    setting = {"recipe": "r", "policy": "p", "precision": "fp32", "noise": "none"}
    values = [0.1, 0.4, 0.25, 0.3]
    measured = {measure: [0.0] * 4 for measure in MEASURES}
    measured |= {"gradient_norm": values, "cosine_with_reward": [0.5, *[math.nan] * 3]}
    table = summary(pd.DataFrame(measured | {"cosine_with_fp32": [math.nan] * 4}).assign(**setting))
    rows = table.set_index("measure")
    low, high = t.interval(0.95, 3, np.mean(values), np.std(values, ddof=1) / 2)
    expected = dict(setting, mean=np.mean(values), low=low, high=high, batches=4)
    assert rows.loc["gradient_norm"].to_dict() == pytest.approx(expected)
    assert rows.loc["relative_norm", ["mean", "low", "high"]].eq(0).all()
    single = rows.loc["cosine_with_reward"]
    assert single["mean"] == 0.5 and math.isnan(single["low"]) and single["batches"] == 1
    assert math.isnan(rows.loc["cosine_with_fp32", "mean"]) and rows.loc["cosine_with_fp32", "batches"] == 0
    assert len(summary(pd.concat([table.iloc[:0], *[pd.DataFrame(measured).assign(**setting, batch=0)]]))) == 6


# --- the reward along a direction ------------------------------------------------------------------------------------


def test_the_reward_rises_along_its_own_gradient():
    policy, images = Linear(2), drawing(images=64)
    before = copy.deepcopy(policy.state_dict())
    uphill, _ = reward_gradient(policy, images, smooth, wrap=itself)
    other = torch.zeros_like(uphill)
    other[0] = 2.0
    seen = []

    def reward(pictures, prompts):
        seen.append(pictures)
        return smooth(torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255, prompts).numpy()

    directions = {"up": uphill, "down": -3 * uphill, "one weight": other, "none": 0 * uphill}
    table = reward_along(policy, directions, [0.05, 0.5], images, reward, chunk=10, wrap=itself)
    assert seen[0].dtype == np.uint8 and seen[0].shape == (10, 2, 2, 3)
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())
    rows = table.set_index(["direction", "length"])
    for name, direction in [("up", uphill), ("down", -uphill), ("one weight", other)]:
        expected = float(uphill @ direction / direction.norm())
        row = rows.loc[(name, 0.05)]
        assert row["slope"] == pytest.approx(expected, abs=0.03 * float(uphill.norm()))
        assert row["slope_low"] < row["slope"] < row["slope_high"]
        assert row["gain_low"] < row["gain_ahead"] < row["gain_high"]
        assert row["gain_ahead"] - row["gain_behind"] == pytest.approx(0.1 * row["slope"])
        assert row["unet_evals"] == 2 * 64 * STEPS * 2
    up, down = rows.loc[("up", 0.05)], rows.loc[("down", 0.05)]
    assert up["slope_low"] > 0 > down["slope_high"] and up["gain_low"] > 0 > down["gain_high"]
    assert up["gain_ahead"] == pytest.approx(down["gain_behind"])  # 3 * is the same direction
    assert rows.loc[("up", 0.5), "relative_length"] == pytest.approx(
        0.5 / float(parameters_to_vector(policy.parameters()).detach().norm())
    )
    assert rows.loc["none"][["slope", "gain_ahead"]].isna().all(axis=None) and table["reward"].nunique() == 1
    with pytest.raises(InvdpoError, match=r"lengths are \[0.0\]"):
        reward_along(policy, directions, [0.0], images, reward, wrap=itself)
    with pytest.raises(InvdpoError, match="direction 'short'.*157, got .3,"):
        reward_along(policy, {"short": torch.ones(3)}, [0.1], images, reward, wrap=itself)


# --- on a UNet -------------------------------------------------------------------------------------------------------


def test_on_a_unet_in_two_precisions(tiny_base):
    base, vae, schedule = load_unet(tiny_base, CPU), load_vae(tiny_base, CPU), load_schedule(tiny_base)
    g = torch.Generator().manual_seed(0)
    win, lose, noise = torch.randn(3, 4, 4, 4, 4, generator=g)
    embeds = torch.randn(4, 16, 16, generator=g)
    cond = Conditioning(embeds, uncond=Conditioning(torch.zeros_like(embeds)))
    drawn = Drawing(["red"] * 4, cond, noise, schedule, 2, 3.0, decoder(vae))

    def red(images, prompts):
        return images[:, 0].mean(dim=(1, 2))

    rewards, _ = reward_gradient(base, drawn, red)
    assert all(p.grad is None for p in [*base.parameters(), *vae.parameters()])
    along = reward_along(base, {"up": rewards}, [0.05], drawn, lambda x, prompts: x[..., 0].mean(axis=(1, 2)) / 255)
    assert along["slope"].item() == pytest.approx(float(rewards.norm()), rel=0.1)
    recipes = [recipe("diffusion_dpo", beta=500.0), recipe("inversion_dpo_paper", beta=500.0)]
    data = Pairs(win, lose, cond)
    table = audit(recipes, {"base": base}, base, data, 2, schedule, {"base": rewards}, ["fp32", "bf16"])
    assert len(table) == 8 and np.isfinite(table["gradient_norm"]).all()
    rows = table.set_index(["recipe", "precision"]).sort_index()
    assert rows.loc[("inversion_dpo_paper", "fp32"), "gradient_norm"].eq(0.0).all()
    dpo = rows.loc["diffusion_dpo"]
    assert dpo.loc["fp32", "cosine_with_fp32"].eq(1).all()
    assert dpo.loc["bf16", "cosine_with_fp32"].between(0.9, 0.99999).all()
    assert dpo.loc["fp32", "cosine_with_swapped"].to_numpy() == pytest.approx(-1, abs=1e-4)
    assert dpo["cosine_with_reward"].abs().lt(1).all()
    assert len(summary(table)) == 4 * len(MEASURES)
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
