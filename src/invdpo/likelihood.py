"""log p(x_0) of a deterministic sampler, by the change of variables along its trajectory.

A deterministic sampler carries x_T ~ N(0, I) to x_0 by an invertible map, so with F its inverse
log p(x_0) = log N(F(x_0); 0, I) + log |det dF/dx_0|, and the determinant of N composed steps is the product of theirs
(Chen et al. 2018, arXiv:1806.07366, for the continuous limit; Song et al. 2021, arXiv:2011.13456, Sec. 4.3).

**Which map.** F is DDIM inversion as `invdpo.inversion.invert` computes it: explicit steps x_{t-1} -> x_t, whose
Jacobians are exact for that map. p is thus the density of the sampler that undoes this inversion, normalised at any N
at which every step is invertible. Plain DDIM sampling evaluates the network at x_t instead of x_{t-1}: its inverse is a
fixed point with no closed form, and its density differs from p by O(1/N), as both differ from the probability-flow
ODE's. F is the choice because the objectives under study compare networks on exactly these points, with this label.

**Which label.** Both are of first order, with very different constants. Across narrow data, a step from noise level
s = sqrt(1 - abar) to s' must stretch by s'/s: told the level of its input ("previous") it does exactly that, told the
next one it stretches by less than 2 whatever s'/s is. So "next", the default as in `invert`, has a much wider density
at the N in use: one image of the shapes world has 560, 573, 581 nats at N = 10, 20, 40 by "previous", and 184, 308,
402 by "next". Where the sampler's own log p is meant, and not that of one inversion, use "previous".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from invdpo.errors import InvdpoError
from invdpo.inversion import Label, guided
from invdpo.inversion.guidance import evaluations
from invdpo.inversion.trajectory import plan
from invdpo.schedule import NoiseSchedule
from invdpo.types import Conditioning, EpsModel, select

Divergence = Literal["exact", "hutchinson"]
# What becomes of a latent at which a step folds space: an error, or a value of nan.
Folded = Literal["raise", "nan"]


@dataclass(frozen=True)
class Estimate:
    """value (B,): log p(x_0) in nats. standard_error (B,): of the probes alone, zero when exact; both float64.

    unet_evals: a forward pass of one latent counts 1, its backward pass 2 more.
    """

    value: Tensor
    standard_error: Tensor
    unet_evals: int


def log_prob(
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    steps: int,
    divergence: Divergence = "exact",
    guidance_scale: float = 1.0,
    label: Label = "next",
    probes: int = 8,
    order: int = 6,
    generator: torch.Generator | None = None,
    chunk: int = 256,
    folded: Folded = "raise",
) -> Tensor:
    """The `value` (B,) of `log_prob_estimate`, to which the arguments go."""
    return log_prob_estimate(
        eps_model, x0, cond, schedule, steps, divergence, guidance_scale, label, probes, order, generator, chunk, folded
    ).value


def log_prob_estimate(
    eps_model: EpsModel,
    x0: Tensor,
    cond: Conditioning | None,
    schedule: NoiseSchedule,
    steps: int,
    divergence: Divergence = "exact",
    guidance_scale: float = 1.0,
    label: Label = "next",
    probes: int = 8,
    order: int = 6,
    generator: torch.Generator | None = None,
    chunk: int = 256,
    folded: Folded = "raise",
) -> Estimate:
    """log p(x_0) of x0 (B,C,H,W), D = C*H*W, in nats; no gradient. The grid, label and guidance are those of `invert`.

    exact: the D x D Jacobian of every step, D backward passes a latent and step.

    hutchinson: log det M = tr log M, and the trace is the mean of v' log(M) v over random signs v (Hutchinson 1989).
    Each is a Krylov quadrature: `order` Arnoldi steps on M' from v give a Hessenberg H, and v' log(M) v is
    D [log H]_11, exact for the polynomials of degree `order` and, unlike the power series of log(I + A), convergent
    without any bound on A = M - I (stochastic Lanczos quadrature, Ubaru et al. 2017, for matrices that need not be
    symmetric). It takes probes * order backward passes a latent and step. `standard_error` comes from the spread of the
    probes; the truncation at `order` is not in it (`order` = D leaves none). `generator` draws the probes,
    independently for every step and latent; None is a fresh one of seed 0, so two models called alike
    share their probes and their difference is less noisy than either.

    eps_model: differentiable in x, each row independent of the others, in eval mode. It runs in x0's type; in half
    precision the Jacobians would be mostly rounding. chunk: latents in a network call at most; latents
    (and rows of the Jacobian, or probes) are put side by side up to it. The result does not depend on it but
    for rounding.

    folded: a step that folds space (its determinant is not positive; for hutchinson a Ritz value is real and not
    positive, which a step far from symmetric can have too) has no inverse, and p is no density there. Long steps do so
    where the image is being decided; more steps mend it. "raise" refuses, "nan" marks the latents. Two folds at
    once cancel in a determinant's sign and go unseen.

    Raises InvdpoError for an unknown divergence or folded, probes, order or chunk out of range, what `invert` refuses,
    a prediction that is non-finite or has no gradient, and folds as said.
    """
    _check(divergence, probes, order, chunk, folded)
    model, calls = guided(eps_model, guidance_scale), evaluations(guidance_scale)
    schedule = schedule.to(x0.device)
    if guidance_scale == 1 and cond is not None:
        cond = cond.without_uncond()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    at_once = max(1, chunk // calls)
    size = x0[0].numel()
    x, evals = x0.detach(), 0
    log_det, variance = torch.zeros(2, len(x0), dtype=torch.float64, device=x0.device)
    for i, (t_prev, t, told) in enumerate(plan(schedule, steps, label), start=1):
        step = partial(inversion_step, model, schedule, torch.tensor([[t_prev, t, told]], device=x0.device))
        where = f"step {i} of {steps} (from timestep {t_prev} to {t})"
        signs = random_signs((probes, len(x0), size), generator, x) if divergence == "hutchinson" else None
        parts = []
        for rows in torch.arange(len(x0), device=x0.device).split(at_once):
            wanted = size if signs is None else probes
            copies = min(wanted, max(1, at_once // len(rows)))
            linear = Linearised(step, x[rows], select(cond, rows), copies, where)
            if signs is None:
                parts.append((linear.output, *_exact(linear)))
            else:
                parts.append((linear.output, *_hutchinson(linear, signs[:, rows], order)))
            evals += linear.evaluations * calls
        x, step_log_det, step_variance = (torch.cat(part) for part in zip(*parts, strict=True))
        if folded == "raise" and bool(step_log_det.isnan().any()):
            raise InvdpoError(
                f"log_prob: {where} folds space at {int(step_log_det.isnan().sum())} of {len(x0)} latents, which "
                "have no density then; use more steps, or folded 'nan' to mark such latents"
            )
        log_det, variance = log_det + step_log_det, variance + step_variance
    return Estimate(log_normal(x) + log_det, variance.sqrt(), evals)


def log_normal(x: Tensor) -> Tensor:
    """log N(x; 0, I) of each latent, (B,) float64."""
    return -0.5 * (x.flatten(1).double().square() + math.log(2 * math.pi)).sum(dim=1)


def inversion_step(
    eps_model: EpsModel, schedule: NoiseSchedule, levels: Tensor, x: Tensor, cond: Conditioning | None
) -> tuple[Tensor, Tensor]:
    """The inversion step of `invert`, x (k*n,C,H,W) -> (x_t, the eps used), for n latents k times over.

    levels (n,3) or (1,3): t_prev, t and the timestep told, as `invdpo.inversion.trajectory.plan` gives them.
    """
    t_prev, t, told = levels.repeat(len(x) // len(levels), 1).unbind(dim=1)
    eps = eps_model(x, told, cond).to(x.dtype)
    return schedule.ddim_inverse_step(x, eps, t_prev, t), eps


class Linearised:
    """One step at x (B,C,H,W): its `output`, and products with its Jacobian (B,D,D) from the left.

    The batch holds `copies` of every latent, each of which back-propagates another vector: the rows of a batch are
    independent, so one backward pass gives `copies` products for each latent, whatever the eps-model is made of.
    `evaluations` counts the network evaluations so far, without guidance; `where` names the step in errors.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Conditioning | None], tuple[Tensor, Tensor]],
        x: Tensor,
        cond: Conditioning | None,
        copies: int,
        where: str,
    ) -> None:
        self._rows, self._copies, self.where = len(x), copies, where
        with torch.enable_grad():
            self._input = x.repeat(copies, *[1] * (x.ndim - 1)).requires_grad_()
            self._output, eps = step(self._input, select(cond, torch.arange(copies * len(x)) % len(x)))
        if not bool(torch.isfinite(eps).all()):
            raise InvdpoError(
                f"log_prob: the eps-model predicted a non-finite noise in {where}; check its weights, "
                "or use float32 or float64"
            )
        if not eps.requires_grad:
            raise InvdpoError(
                f"log_prob: the eps-model's prediction in {where} has no gradient in x; give one that does not run "
                "under torch.no_grad"
            )
        self.output = self._output.detach()[: len(x)]
        self.evaluations = copies * len(x)

    def pull(self, vectors: Tensor) -> Tensor:
        """vectors (K,B,D) -> vectors' J (K,B,D), float64."""
        products = []
        for group in vectors.split(self._copies):
            full = self._input.new_zeros(self._copies, *vectors.shape[1:])
            full[: len(group)] = group
            (product,) = torch.autograd.grad(self._output, self._input, full.view_as(self._output), retain_graph=True)
            products.append(product.view_as(full)[: len(group)].double())
            self.evaluations += 2 * self._copies * self._rows
        return torch.cat(products)

    def jacobian(self) -> Tensor:
        """(B,D,D), float64."""
        size = self.output[0].numel()
        identity = torch.eye(size, device=self.output.device)[:, None].expand(-1, self._rows, -1)
        return self.pull(identity).transpose(0, 1)


def _exact(linear: Linearised) -> tuple[Tensor, Tensor]:
    """log det of the step's Jacobian (B,), nan where it folds space, and its variance (B,), zero."""
    sign, log_det = torch.linalg.slogdet(linear.jacobian())
    return log_det.where(sign > 0, math.nan), torch.zeros_like(log_det)


def _hutchinson(linear: Linearised, signs: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Estimate of log det (B,), nan where a Ritz value shows a fold, from the probes `signs` (P,B,D), and the
    estimate's variance (B,)."""
    hessenberg, _ = arnoldi(linear, signs, min(order, signs.shape[-1]))
    logarithm, folds = first_log(hessenberg)
    values = (signs.shape[-1] * logarithm).masked_fill(folds, math.nan)
    return values.mean(dim=0), values.var(dim=0) / len(values)


def first_log(hessenberg: Tensor) -> tuple[Tensor, Tensor]:
    """[log |H|]_11 of each matrix (…,K,K), and whether an eigenvalue is real and not positive, where log H itself is
    not defined; both (…)."""
    ritz, vectors = torch.linalg.eig(hessenberg)
    first = torch.zeros_like(ritz)
    first[..., 0] = 1
    logarithm = (vectors[..., 0, :] * ritz.log() * torch.linalg.solve(vectors, first)).sum(dim=-1).real
    return logarithm, ((ritz.imag == 0) & (ritz.real <= 0)).any(dim=-1)


def arnoldi(linear: Linearised, start: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """`order` Arnoldi steps on the transposed Jacobian from start (P,B,D): the Hessenberg matrices (P,B,order,order)
    and the orthonormal vectors that they are of (order,P,B,D), in float64. Where a Krylov space is complete, vectors of
    zeros and a block of the identity follow. Raises InvdpoError for products that are not finite."""
    hessenberg = torch.zeros(*start.shape[:2], order, order, dtype=torch.float64, device=start.device)
    basis = [start.double() / start.double().norm(dim=-1, keepdim=True)]
    growing = torch.ones(start.shape[:2], dtype=torch.bool, device=start.device)
    for j in range(order):
        image = linear.pull(basis[j])
        length = image.norm(dim=-1)
        # Gram-Schmidt twice: a step is near the identity, so nearly all of `image` cancels and takes its digits along.
        for i, vector in [*enumerate(basis)] * 2:
            share = (image * vector).sum(dim=-1)
            hessenberg[..., i, j] += share
            image = image - share[..., None] * vector
        # The identity: its logarithm is zero.
        hessenberg[..., j, j] += (~growing).double()
        norm = image.norm(dim=-1)
        growing = growing & (norm > 1e-12 * length)
        if j + 1 < order:
            hessenberg[..., j + 1, j] = norm.where(growing, 0)
            basis.append((image / norm[..., None]).where(growing[..., None], 0))
    if not bool(torch.isfinite(hessenberg).all()):
        raise InvdpoError(
            f"log_prob: the eps-model's derivative in {linear.where} is not finite; check its weights, or use float32 "
            "or float64"
        )
    return hessenberg, torch.stack(basis)


def random_signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Random signs on the device and in the type of `like`."""
    return torch.randint(2, shape, generator=generator, device=generator.device).mul_(2).sub_(1).to(like)


def _check(divergence: str, probes: int, order: int, chunk: int, folded: str) -> None:
    if divergence not in get_args(Divergence):
        raise InvdpoError(f"log_prob: divergence is {divergence!r}; choose 'exact' or 'hutchinson'")
    if folded not in get_args(Folded):
        raise InvdpoError(f"log_prob: folded is {folded!r}; choose 'raise' or 'nan'")
    if probes < 2:
        raise InvdpoError(f"log_prob: probes is {probes}; a standard error needs at least 2")
    if order < 1:
        raise InvdpoError(f"log_prob: order is {order}; the quadrature needs at least 1 Arnoldi step")
    if chunk < 1:
        raise InvdpoError(f"log_prob: chunk is {chunk}; a network call needs at least 1 latent")
