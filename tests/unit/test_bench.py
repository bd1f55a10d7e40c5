"""The benchmark's reference loop follows the released algorithm: the streamed gradient must be its gradient."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from invdpo.objectives import backward, load_recipe

LOOPS = Path(__file__).parents[2] / "benchmarks" / "loops.py"


@pytest.fixture(scope="module")
def loops():
    spec = importlib.util.spec_from_file_location("loops", LOOPS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loops"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["loops"]


def gradient(unet):
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


@pytest.mark.parametrize("method", ["inversion_dpo_code", "inversion_dpo_implied"])
def test_streamed_gradient_is_the_reference_loops(loops, tiny_base, method):
    models = loops.load(str(tiny_base), torch.device("cpu"))
    models.policy.double()
    models.reference.double()
    recipe = load_recipe(method).with_overrides({"beta": 20.0, "trajectory": {"steps": 5}})
    win, lose = models.latents(2, 1).double(), models.latents(2, 2).double()
    cond = models.prompts(2, 3).map(torch.Tensor.double)

    losses = []
    models.policy.enable_gradient_checkpointing()
    for i in range(2):
        pair = cond.map(lambda value, i=i: value[i : i + 1])
        losses.append(loops.reference_loop(recipe, models, win[i : i + 1], lose[i : i + 1], pair))
    wanted = gradient(models.policy) / 2
    models.policy.disable_gradient_checkpointing()
    models.policy.zero_grad()
    out = backward(
        recipe,
        models.eps(models.policy),
        models.eps(models.reference),
        win,
        lose,
        cond,
        models.schedule,
        torch.Generator(),
        chunk=3,
    )
    assert wanted.norm() > 1e-6
    assert torch.dist(gradient(models.policy), wanted) <= 1e-8 * wanted.norm()
    torch.testing.assert_close(out.loss, torch.stack(losses).mean(), rtol=1e-10, atol=0)


def test_the_reference_loop_is_guided(loops, tiny_base):
    """Guidance 1 instead of the script's 2 would show in the parity above."""
    models = loops.load(str(tiny_base), torch.device("cpu"))
    guided = load_recipe("inversion_dpo_code").with_overrides({"beta": 1.0, "trajectory": {"steps": 3}})
    plain = guided.with_overrides({"trajectory": {"guidance_scale": 1.0}})
    win, lose, cond = models.latents(1, 1), models.latents(1, 2), models.prompts(1, 3)
    gradients = []
    for recipe in (guided, plain):
        models.policy.zero_grad()
        loops.reference_loop(recipe, models, win, lose, cond)
        gradients.append(gradient(models.policy))
    assert torch.dist(*gradients) > 0.1 * gradients[0].norm()
