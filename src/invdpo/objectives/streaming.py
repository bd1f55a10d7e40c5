"""The exact gradient of an objective with one network call's graph alive at a time.

The loss is a function L of a few numbers m a latent, each a sum over its points of w_t d_t, so dL/dtheta is the sum of
dL/dm * w_t dd_t/dtheta: a step needs the scalars dL/dm and the points' graphs one after another, never together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion import invert
from invdpo.inversion.cache import Inverter
from invdpo.objectives.loss import (
    Batch,
    Compared,
    LossOutput,
    full_graph,
    measure,
    output,
    prepare,
    prepare_likelihood,
    terms,
)
from invdpo.objectives.recipe import Recipe
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel


def backward(
    recipe: Recipe,
    policy: EpsModel,
    reference: EpsModel,
    x0_win: Tensor,
    x0_lose: Tensor | None,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    generator: torch.Generator | Sequence[torch.Generator],
    strength: Tensor | None = None,
    loss_scale: float = 1.0,
    chunk: int | None = 256,
    inverter: Inverter = invert,
    cond_lose: Conditioning | None = None,
    reference_first: bool = False,
    final_at_once: bool = False,
) -> LossOutput:
    """Accumulate the gradient of loss_scale times `preference_loss` into `.grad`, equal to it up to float rounding.

    chunk: latents in a network call, and with their graph alive, at most (None: no limit); memory is then flat in the
    number of timesteps. Where everything fits, one forward and one backward pass suffice. The output's loss is unscaled
    and everything in it detached. Gradients are final only on return: act on them after it, not in hooks (as
    distributed training does), or set final_at_once, with which what a backward pass adds is final when the pass ends:
    one pair whose points are more than a chunk then takes a forward pass more. inverter: what computes whole
    trajectories of the reference, for example a `TrajectoryCache` of it. reference_first: the reference predicts at all
    points before the policy is compared at the first, so that one that is not always on the GPU comes there once; its
    predictions are kept, a latent a point.
    Raises InvdpoError as `preference_loss` does, and for a chunk below 1.
    """
    arguments = (recipe, policy, reference, x0_win, x0_lose, cond, schedule, generator, chunk, strength, cond_lose)
    if recipe.log_ratio.form == "likelihood":
        compared, ratios = prepare_likelihood(*arguments)
        measured = ratios.values[None]
        evals = ratios.backward(_slopes(compared, measured)[0] * loss_scale)
        return output(compared, measured, ratios.unet_evals + evals)
    batch = prepare(*arguments, inverter, reference_first)
    forwards = 1
    if chunk is None or batch.policy_evals() <= chunk:
        out = full_graph(batch)
        (out.loss * loss_scale).backward()
        lose = None if out.logratio_lose is None else out.logratio_lose.detach()
        evals = out.unet_evals + 2 * batch.policy_evals()
        return LossOutput(out.loss.detach(), out.logratio_win.detach(), lose, evals)
    if recipe.loss.kind == "winner_only":
        measured = _stream(batch, torch.full((1, batch.rows), -loss_scale / batch.rows, dtype=torch.float64))
    elif batch.pairs == 1 and recipe.loss.kind == "dpo" and not final_at_once:
        measured = _one_pair(batch, loss_scale)
    else:
        forwards = 2
        with torch.no_grad():
            measured = measure(batch, torch.cat([terms(batch, call) for call in batch.points.calls], dim=1))
        _stream(batch, _slopes(batch, measured) * loss_scale, with_reference=False)
    evals = batch.points.unet_evals + batch.reference_evals() + (forwards + 2) * batch.policy_evals()
    return output(batch, measured, evals)


def _slopes(batch: Compared, measured: Tensor) -> Tensor:
    """d loss / d measured, (S,R)."""
    leaf = measured.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(output(batch, leaf, 0).loss, leaf)
    return slopes


def _stream(
    batch: Batch, slopes: Tensor, with_reference: bool = True, stash: dict[Tensor, Tensor | None] | None = None
) -> Tensor:
    """Back-propagate slopes (S,R) times what `measure` gives, call by call; returns the latter, (S,R), detached.

    stash, when given, receives the earlier `.grad` of every parameter met, which is then cleared.
    """
    collected = []
    weight = batch.points.weight.flatten()
    for call in batch.points.calls:
        point_terms = terms(batch, call, with_reference)
        row = torch.arange(call.start, call.stop, device=weight.device) % batch.rows
        factor = slopes.to(weight)[:, row] * weight[call]
        if stash is not None:
            _set_aside(point_terms, stash)
        (factor.to(point_terms.dtype) * point_terms).sum().backward()
        collected.append(point_terms.detach())
    return measure(batch, torch.cat(collected, dim=1))


def _one_pair(batch: Batch, loss_scale: float) -> Tensor:
    """One pair has one scalar L'(s), s the difference of its log-ratios, which can be applied after the gradient of s
    is complete: no first pass.

    Gradients that were there before are set aside meanwhile, so from the second micro-batch of a step on, a second set
    of them is in memory: 10.3 GB for SDXL in fp32. L'(s) is known only when all is summed, and two different ones can
    share no sum.
    """
    stash: dict[Tensor, Tensor | None] = {}
    # beta goes in first: with it, loss_scale keeps half-precision gradients in range as in one backward pass.
    beta = batch.recipe.beta
    signs = torch.tensor([[loss_scale * beta, -loss_scale * beta]], dtype=torch.float64)
    measured = _stream(batch, signs, stash=stash)
    slope = _slopes(batch, measured)[0, 0]
    for parameter, earlier in stash.items():
        if parameter.grad is not None:
            parameter.grad.mul_((slope / beta).to(parameter.grad))
            if earlier is not None:
                parameter.grad.add_(earlier)
        else:
            parameter.grad = earlier
    return measured


def _set_aside(result: Tensor, stash: dict[Tensor, Tensor | None]) -> None:
    """Move the `.grad` of every leaf that `result` depends on into `stash`, once a leaf."""
    seen, todo = set(), [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in type(node).__name__:
            raise InvdpoError("gradient checkpointing: the policy must use it with use_reentrant=False")
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf not in stash:
            stash[leaf], leaf.grad = leaf.grad, None
        todo.extend(parent for parent, _ in node.next_functions)
