"""log p_theta(x_0) - log p_ref(x_0) of the deterministic sampler itself, and its gradient with one step's graph alive.

`invdpo.likelihood` says which density p is: that of N explicit inversion steps F_t from x_{t-1} to x_t with Jacobians
J_t, log p(x_0) = log N(x_T; 0, I) + sum_t log |det J_t|. Each network inverts along its own trajectory. The other
objectives put a surrogate in the place of this log-ratio, which costs them no determinant; this one is what they are
measured by.

**Gradient.** d log |det J| = tr(J^-1 dJ), the mean over probes v of random signs of u' dJ v with u = J^-T v (Hutchinson
1989), and u' J v is the product of v with one vector-Jacobian product, J' u. So a forward sweep keeps the latents and
solves for every u, steps beside each other; then one adjoint, -x_T at the end, is carried back step by step through
F_t(x_{t-1}) and u' J_t v together, u and v held fixed. It is exact for the probes given, not a derivative of the
value's own quadrature: both are unbiased, but for the truncation of a Krylov space.

**Folds.** Where a step folds space p is no density (`invdpo.likelihood`). At N = 20 that is common (1 of 16 latents of
the shapes world under its base, 4 of them after Diffusion-DPO), and a training step must not fail by one latent of
many: log |det J| is taken as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from invdpo.errors import InvdpoError
from invdpo.inversion import invert
from invdpo.inversion.trajectory import plan
from invdpo.likelihood import Linearised, arnoldi, first_log, inversion_step, log_normal, random_signs
from invdpo.objectives.recipe import Recipe
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel, select

# UNet evaluations of a step and probe: a pass backwards counts two of what it goes through. The forward pass is one and
# J' u two; the way back through both is six.
TRACE_EVALS, TRACE_AND_BACK_EVALS = 3, 9


@dataclass(frozen=True)
class _Path:
    """One network's inversions of R latents by N steps, levels (N,3), and the determinants on the way.

    latents (N+1,R,C,H,W). probes, solved (P,N,R,D): v and J_t^-T v, where d log |det J_t| is the sum over P, times
    share, of solved' dJ_t probes. log_prob (R,): in nats, float64.
    """

    eps_model: EpsModel
    cond: Conditioning | None
    schedule: NoiseSchedule
    levels: Tensor
    latents: Tensor
    probes: Tensor
    solved: Tensor
    share: float
    log_prob: Tensor
    unet_evals: int

    def step(self, i: int, rows: Tensor, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Step i (from 0) from x (n,C,H,W), of the latents `rows`: x_t, and share times the sum of u' J v over the
        probes `chosen`, (n,) float64; both differentiable in x and in the network, u and v constants."""
        copies = x.repeat(len(chosen), *[1] * (x.ndim - 1))
        cond = select(self.cond, rows.repeat(len(chosen)))
        output, _ = inversion_step(self.eps_model, self.schedule, self.levels[i : i + 1], copies, cond)
        u, v = (vectors[chosen, i][:, rows].reshape(output.shape).to(x) for vectors in (self.solved, self.probes))
        (product,) = torch.autograd.grad(output, copies, u, create_graph=True)
        trace = (product * v).flatten(1).double().sum(dim=1).view(len(chosen), -1).sum(dim=0)
        return output[: len(x)], self.share * trace


@dataclass(frozen=True)
class LogRatios:
    """The log-ratios of R latents. values (R,): in nats, or nats an element where the recipe averages over elements,
    times its scale; float64, detached. unet_evals: what they took."""

    values: Tensor
    unet_evals: int
    _policy: _Path
    _factor: float
    _chunk: int | None

    @property
    def _size(self) -> tuple[int, int, int]:
        """P, N, R."""
        probes, steps, rows, _ = self._policy.probes.shape
        return probes, steps, rows

    def with_graph(self) -> tuple[Tensor, int]:
        """The values with the gradient that `backward` streams, by the graph of all steps at once, and the UNet
        evaluations of its forward passes and products; under `torch.no_grad` the values as they are."""
        if not torch.is_grad_enabled():
            return self.values, 0
        path, (probes, steps, rows) = self._policy, self._size
        x, surrogate = path.latents[0].detach().requires_grad_(), torch.zeros_like(self.values)
        with sdpa_kernel(SDPBackend.MATH):
            for i in range(steps):
                x, trace = path.step(i, torch.arange(rows, device=x.device), x, torch.arange(probes, device=x.device))
                surrogate = surrogate + trace
        surrogate = self._factor * (surrogate + log_normal(x))
        return self.values + (surrogate - surrogate.detach()), TRACE_EVALS * probes * steps * rows

    def backward(self, slopes: Tensor) -> int:
        """Add the gradient of the sum of slopes (R,) times the values to `.grad`; the UNet evaluations it took."""
        path, (probes, steps, rows) = self._policy, self._size
        slopes = slopes * self._factor
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for block in torch.arange(rows, device=slopes.device).split(self._chunk or rows):
                last = path.latents[-1, block]
                adjoint = -slopes[block].to(last).view(-1, *[1] * (last.ndim - 1)) * last
                for i in reversed(range(steps)):
                    adjoint = self._back(i, block, slopes[block], adjoint)
        return TRACE_AND_BACK_EVALS * probes * steps * rows

    def _back(self, i: int, rows: Tensor, slopes: Tensor, adjoint: Tensor) -> Tensor:
        """From the adjoint of step i's output to that of its input, both (n,C,H,W), with the share of the weights."""
        path, (probes, _, _) = self._policy, self._size
        at_once = max(1, (self._chunk or probes * len(rows)) // len(rows))
        earlier = torch.zeros_like(adjoint)
        for number, chosen in enumerate(torch.arange(probes, device=rows.device).split(at_once)):
            x = path.latents[i, rows].detach().requires_grad_()
            output, trace = path.step(i, rows, x, chosen)
            total = (slopes * trace).sum()
            if number == 0:
                total = total + (adjoint * output).sum()
            total.backward()
            assert x.grad is not None
            earlier = earlier + x.grad
        return earlier


def log_ratios(
    recipe: Recipe,
    policy: EpsModel,
    reference: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    generators: list[torch.Generator],
    chunk: int | None,
) -> LogRatios:
    """The log-ratios of x0 (R,C,H,W), winners, then losers, of as many pairs as generators, D = C*H*W; cond has R rows.

    A pair's generator draws P probes a step, and nothing else: results do not depend on micro-batching. Its winner and
    loser share them, as pairs share their noise everywhere: the noise of their difference is then less than that of
    either, and labels that are swapped change its sign alone. So do policy and reference, whose difference is zero
    where they are equal.

    A latent takes N inversion steps of either network and, of either, N P products with J_t for each of `order` Arnoldi
    steps, which give the quadrature of log |det J_t| and, by projection, J_t^-T v. Divergence `exact` takes all D rows
    of every Jacobian, and N D evaluations of the double-backward kind for the gradient: for toys and checks. chunk:
    latents in a network call at most (None: all of a call's). What is kept from step to step are latents and probes,
    never a graph.

    Raises InvdpoError for a non-finite prediction, one without a gradient in x, a singular Jacobian, and a chunk below
    1.
    """
    if chunk is not None and chunk < 1:
        raise InvdpoError(f"chunk is {chunk}: a network call needs at least 1 latent")
    signs = _signs(recipe, x0, generators)
    ours, theirs = (_path(recipe, network, x0, cond, schedule, signs, chunk) for network in (policy, reference))
    factor = recipe.log_ratio.scale
    if recipe.log_ratio.reduction == "mean":
        factor = factor / x0[0].numel()
    values = factor * (ours.log_prob - theirs.log_prob)
    return LogRatios(values, ours.unet_evals + theirs.unet_evals, ours, factor, chunk)


def _signs(recipe: Recipe, x0: Tensor, generators: list[torch.Generator]) -> Tensor | None:
    """(P,N,R,D); None where the recipe needs none."""
    if recipe.log_ratio.divergence == "exact":
        return None
    probes, steps = recipe.log_ratio.probes, recipe.trajectory.steps
    assert probes is not None and steps is not None  # the recipe is valid
    drawn = torch.stack([random_signs((probes, steps, x0[0].numel()), g, x0) for g in generators], dim=2)
    return torch.cat([drawn] * (len(x0) // len(generators)), dim=2)


@sdpa_kernel(SDPBackend.MATH)  # as in the way back: the fused kernels have no second derivative
def _path(
    recipe: Recipe,
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    signs: Tensor | None,
    chunk: int | None,
) -> _Path:
    """The inversions by one network, with log p and all that its gradient needs."""
    spec, rows, size = recipe.trajectory, len(x0), x0[0].numel()
    steps = spec.steps
    assert steps is not None  # the recipe is valid
    inversions = [
        invert(eps_model, x0[block], select(cond, block), schedule, steps, label=spec.label)
        for block in torch.arange(rows, device=x0.device).split(chunk or rows)
    ]
    latents = torch.cat([inversion.latents for inversion in inversions], dim=1)
    evals = sum(inversion.unet_evals for inversion in inversions)
    levels = torch.tensor(plan(schedule, steps, spec.label), device=x0.device)
    starts, parts = latents[:-1].flatten(0, 1), []
    for points in torch.arange(steps * rows, device=x0.device).split(chunk or steps * rows):
        wanted = size if signs is None else len(signs)
        copies = min(wanted, max(1, (chunk or 0) // len(points)))
        step = partial(inversion_step, eps_model, schedule, levels[points // rows])
        linear = Linearised(step, starts[points], select(cond, points % rows), copies, f"one of {steps} steps")
        if signs is None:
            parts.append(_inverted(linear))
        else:
            order = recipe.log_ratio.order
            assert order is not None
            parts.append(_projected(linear, signs.flatten(1, 2)[:, points], min(order, size)))
        evals += linear.evaluations
    log_det = torch.cat([part[0] for part in parts]).view(steps, rows)
    solved = torch.cat([part[1] for part in parts], dim=1).unflatten(1, (steps, rows))
    finite = torch.isfinite(log_det).all(dim=1)
    if not bool(finite.all()):
        i = int((~finite).nonzero()[0])
        raise InvdpoError(
            f"log-ratio: the Jacobian of inversion step {i + 1} of {steps} (from timestep {int(levels[i, 0])} to "
            f"{int(levels[i, 1])}) is singular or not finite, so its log-determinant is not finite; use more "
            "trajectory.steps, or check the network's weights"
        )
    if signs is None:
        eye = torch.eye(size, dtype=x0.dtype, device=x0.device)
        probes, share = eye[:, None, None].expand(-1, steps, rows, -1), 1.0
    else:
        probes, share = signs, 1 / len(signs)
    # A row of latents at a time: a sum over the other dimension rounds by column, and swapped labels must swap exactly.
    log_prob = log_normal(latents[-1]) + log_det.T.contiguous().sum(dim=1)
    return _Path(eps_model, cond, schedule, levels, latents, probes, solved, share, log_prob, evals)


def _inverted(linear: Linearised) -> tuple[Tensor, Tensor]:
    """log |det J| (n,), and J^-T e_k for every unit vector, (D,n,D): row k of J^-1."""
    jacobian = linear.jacobian()
    return torch.linalg.slogdet(jacobian).logabsdet, torch.linalg.inv_ex(jacobian).inverse.transpose(0, 1)


def _projected(linear: Linearised, signs: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """log |det J| (n,) by quadrature and J^-T v (P,n,D) by projection on one Krylov space, for v = signs (P,n,D)."""
    hessenberg, basis = arnoldi(linear, signs, order)
    logarithm, _ = first_log(hessenberg)
    size = signs.shape[-1]
    first = torch.zeros_like(hessenberg[..., 0])
    first[..., 0] = size**0.5  # the length of v
    coordinates, _ = torch.linalg.solve_ex(hessenberg, first)
    solved = (coordinates.movedim(-1, 0)[..., None] * basis).sum(dim=0)
    return size * logarithm.mean(dim=0), solved
