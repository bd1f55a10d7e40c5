"""The page that shows every recipe side by side by slot, each with the formula that its slots spell out."""

from __future__ import annotations

from invdpo.objectives.recipe import Recipe, known_methods, load_recipe

HEAD = """# Methods

<!-- Made from config/methods by `invdpo methods`; change the recipes, not this page. -->

Every method is a choice in the same slots. Where each number comes from stands beside it in
[config/methods](../config/methods).
"""

NOTATION = r"""
## Notation

$x_0$ is an image's latent of $d$ elements, $\bar\alpha_t$ the schedule, $\epsilon_\theta$ the trained network and
$\epsilon_{\mathrm{ref}}$ the frozen one; $w$ and $l$ mark the preferred and the other image of a pair. $u$ is the
surrogate of $\log p_\theta(x_0) - \log p_{\mathrm{ref}}(x_0)$ and $\ell$ the loss of a pair, averaged over pairs. A
superscript $(s)$ is classifier-free guidance of scale $s$. No gradient flows through $x_t$ or $y_t$, unless $u$ is
that log-ratio itself. On an inverted trajectory $t-1$ is the grid's point before $t$, clean where there is none.

One timestep, or $K$ of $N$, make $u$ an unbiased estimate $\hat u$ of its value at all of them. A loss $L(s)$ of
$s = \beta\,(u^w - u^l)$ is then biased, to leading order by

$$\mathbb{E}[L(\hat s)] - L(s) \approx \tfrac12 L''(s)\operatorname{Var}(\hat s), \qquad
\mathbb{E}[\nabla L(\hat s)] - \nabla L(s) \approx L''(s)\operatorname{Cov}(\hat s, \nabla\hat s) +
\tfrac12 L'''(s)\operatorname{Var}(\hat s)\,\nabla s,$$

with $\operatorname{Var}(\hat s) = \frac1K\left(1 - \frac KN\right) S^2$, $S^2$ the variance of $s$ at one timestep
(with $N - 1$ in its denominator).
"""

COLUMNS = ("recipe", "trajectory", "timesteps", "target", "log-ratio", "weight", "loss", "beta", "learning rate")


def methods_page() -> str:
    """The page docs/methods.md as Markdown with LaTeX, of every recipe that `load_recipe` knows by name.

    Raises InvdpoError for a recipe that does not load.
    """
    recipes = [load_recipe(path) for _, path in sorted(known_methods().items())]
    lines = [
        f"| {' | '.join((*COLUMNS, 'source'))} |",
        f"|{'---|' * (len(COLUMNS) + 1)}",
        *(f"| {' | '.join(_row(recipe))} |" for recipe in recipes),
    ]
    return "\n".join([HEAD, *lines, NOTATION, *(_section(recipe) for recipe in recipes)])


def _row(r: Recipe) -> list[str]:
    """The cells of one recipe, in the order of COLUMNS, then its source."""
    return [
        f"[{r.name}](#{r.name})",
        _trajectory(r),
        _timesteps(r),
        r.target,
        _log_ratio(r),
        "1" if r.log_ratio.weight == "none" else r"$1/(2\bar\alpha_t)$",
        _loss(r),
        "–" if r.loss.kind == "winner_only" else f"{r.beta:g}",
        f"{r.learning_rate:g}",
        r.source.replace("|", r"\|"),
    ]


def _trajectory(r: Recipe) -> str:
    spec = r.trajectory
    if spec.kind == "forward":
        return "forward" if r.pair_draws == "shared" else "forward, own draws for each image"
    words = [f"{spec.solver} inversion by the {spec.model}", f"N = {spec.steps}", f"label {spec.label}"]
    if spec.guidance_scale != 1:
        words.append(f"guidance {spec.guidance_scale:g}")
    if spec.steps_offset is not None:
        words.append(f"offset {spec.steps_offset}")
    return ", ".join(words)


def _timesteps(r: Recipe) -> str:
    grid = "T" if r.trajectory.steps is None else str(r.trajectory.steps)
    return {"single": f"1 of {grid}", "all": f"all {grid}", "subset": f"{r.subset_size} of {grid}"}[r.timesteps]


def _log_ratio(r: Recipe) -> str:
    spec = r.log_ratio
    words = [spec.form.replace("_", "-") + (f" {spec.sign}" if spec.sign else ""), f"{spec.reduction} over elements"]
    if r.timesteps != "single":
        words.append(f"{spec.over_timesteps} over timesteps")
    if spec.scale != 1:
        words.append(f"times {spec.scale:g}")
    if spec.at == "x_prev":
        words.append("at the step's input")
    if spec.divergence == "exact":
        words.append("exact log-determinants")
    if spec.divergence == "hutchinson":
        words.append(f"log-determinants by Hutchinson (probes {spec.probes}, order {spec.order})")
    return ", ".join(words)


def _loss(r: Recipe) -> str:
    spec = r.loss
    words = [spec.kind.replace("_", " ")]
    if spec.reversed:
        words.append("labels reversed")
    if spec.weight_by_strength:
        words.append("weighted by strength")
    if spec.label_smoothing:
        words.append(f"smoothing {spec.label_smoothing:g}")
    if spec.margin:
        words.append(f"margin {spec.margin:g}")
    if spec.positive_share is not None:
        words.append(f"positive share {spec.positive_share:g}")
    if spec.link_scale is not None:
        words.append(f"s = {spec.link_scale:g}, factor {spec.margin_scale:g}")
    return ", ".join(words)


def _section(r: Recipe) -> str:
    """The recipe's formulas, one display each, and what no formula shows."""
    parts = [f"## {r.name}\n", f"{r.source}.\n"]
    formulas = [_points_formula(r), _log_ratio_formula(r), *_loss_formulas(r)]
    parts += [f"$$\n{formula}\n$$\n" for formula in formulas]
    beside = []
    if r.loss.kind != "winner_only":
        beside.append(rf"$\beta = {r.beta:g}$")
    if r.log_ratio.divergence == "hutchinson":
        beside.append(
            f"each log-determinant and its gradient by {r.log_ratio.probes} random sign vectors a pair and step "
            f"(Hutchinson's estimator) and Krylov spaces of order {r.log_ratio.order}"
        )
    if r.reference_dtype != "float32":
        beside.append(f"the reference's weights are {r.reference_dtype}, the policy's float32")
    if r.reference_label_dtype != "float32":
        beside.append(f"the reference is told timesteps rounded to {r.reference_label_dtype}")
    if r.sampling_branch == "unconditional":
        beside.append("at sampling the trained weights are the unconditional branch of the base's guidance")
    if beside:
        sentence = "; ".join(beside)
        parts.append(f"{sentence[0].upper()}{sentence[1:]}.\n")
    return "\n".join(parts)


def _points_formula(r: Recipe) -> str:
    """Where x_t comes from, and the target y_t."""
    spec = r.trajectory
    target = {
        "noise": r"y_t = \epsilon",
        "implied": r"y_t = \frac{x_t - \sqrt{\bar\alpha_t}\,x_0}{\sqrt{1-\bar\alpha_t}}",
        "step": r"y_t = e_t",
        "reference": rf"y_t = {_eps(r, 'ref')}",
        "none": r"x_t^{\mathrm{ref}} \text{ likewise by } \epsilon_{\mathrm{ref}}",
    }[r.target]
    if spec.kind == "forward":
        shared = r.loss.kind != "winner_only" and r.pair_draws == "shared"
        drawn = r",\ \text{one } t \text{ and } \epsilon \text{ a pair}" if shared else ""
        x_t = r"x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon,\quad \epsilon \sim \mathcal N(0, I)"
        return rf"{x_t}{drawn},\qquad {target}"
    network = _network("ref" if spec.model == "reference" else "theta", spec.guidance_scale)
    arguments = "x_{t-1},\\," + ("t" if spec.label == "next" else "t-1")
    if spec.solver != "ddim":
        name = spec.solver.replace("_", r"\_")
        return rf"x_t = \operatorname{{{name}}}\big({network};\, {arguments}\big),\qquad {target}"
    step = (
        r"x_t = \sqrt{\tfrac{\bar\alpha_t}{\bar\alpha_{t-1}}}\,x_{t-1} + \Big(\sqrt{1-\bar\alpha_t} - "
        r"\sqrt{\tfrac{\bar\alpha_t(1-\bar\alpha_{t-1})}{\bar\alpha_{t-1}}}\Big)\,e_t"
    )
    return rf"e_t = {network}({arguments}),\quad {step},\qquad {target}"


def _network(which: str, guidance_scale: float) -> str:
    subscript = r"{\mathrm{ref}}" if which == "ref" else r"\theta"
    return rf"\epsilon_{subscript}" + ("" if guidance_scale == 1 else f"^{{({guidance_scale:g})}}")


def _eps(r: Recipe, which: str) -> str:
    """A compared network's prediction at point t."""
    arguments = "x_t,\\,t"
    if r.log_ratio.at == "x_prev":
        arguments = "x_{t-1},\\," + ("t" if r.trajectory.label == "next" else "t-1")
    return f"{_network(which, r.trajectory.guidance_scale if r.target == 'reference' else 1)}({arguments})"


def _squared(inside: str, reduction: str) -> str:
    return (r"\tfrac1d" if reduction == "mean" else "") + rf"\big\|{inside}\big\|^2"


def _log_ratio_formula(r: Recipe) -> str:
    spec = r.log_ratio
    if spec.form == "likelihood":
        factor = ("" if spec.scale == 1 else f"{spec.scale:g}\\,") + (r"\tfrac1d" if spec.reduction == "mean" else "")
        difference = r"\log p_\theta(x_0) - \log p_{\mathrm{ref}}(x_0)"
        steps = f"{{{r.trajectory.steps}}}"
        determinants = rf"\sum_{{t=1}}^{steps}\log\left|\det\frac{{\partial x_t}}{{\partial x_{{t-1}}}}\right|"
        ratio = rf"{factor}\big({difference}\big)" if factor else difference
        return rf"u = {ratio},\qquad \log p(x_0) = \log\mathcal N(x_{steps};\,0, I) + {determinants}"
    steps = "T" if r.trajectory.steps is None else str(r.trajectory.steps)
    sums = {
        ("single", "mean"): "",
        ("single", "sum"): steps,
        ("all", "mean"): rf"\frac1{{{steps}}}\sum_{{t=1}}^{{{steps}}}",
        ("all", "sum"): rf"\sum_{{t=1}}^{{{steps}}}",
        ("subset", "mean"): rf"\frac1{{{r.subset_size}}}\sum_{{t\in S,\,|S|={r.subset_size}}}",
        ("subset", "sum"): rf"\frac{{{steps}}}{{{r.subset_size}}}\sum_{{t\in S,\,|S|={r.subset_size}}}",
    }
    own = _squared(rf"{_eps(r, 'theta')} - y_t", spec.reduction)
    inside = own
    if spec.form == "four_term":
        other = _squared(rf"{_eps(r, 'ref')} - y_t", spec.reduction)
        inside = rf"\Big({own} - {other}\Big)"
    sign = "" if spec.sign == "+" else "-"
    factors = [
        "" if spec.scale == 1 else f"{spec.scale:g}",
        sums[r.timesteps, spec.over_timesteps],
        "" if spec.weight == "none" else r"\frac{1}{2\bar\alpha_t}",
        inside,
    ]
    product = r"\,".join(factor for factor in factors if factor)
    return f"u = {sign}{product}"


def _loss_formulas(r: Recipe) -> list[str]:
    spec = r.loss
    better, worse = ("l", "w") if spec.reversed else ("w", "l")
    difference = rf"(u^{better} - u^{worse})"
    if spec.kind == "winner_only":
        return [r"\ell = -u^w"]
    if spec.kind == "kto":
        share, rest = f"{spec.positive_share:g}", f"{1 - (spec.positive_share or 0):g}"
        return [
            rf"\ell = {share}\,\big(1 - \sigma(\beta(u^{better} - \kappa))\big) + {rest}\,\big(1 - \sigma(-\beta("
            rf"u^{worse} - \kappa))\big)",
            rf"\kappa = \max\big(0,\ {share}\,\overline{{u^{better}}} + {rest}\,\overline{{u^{worse}}}\big)\quad"
            r"\text{over the batch, without gradient}",
        ]
    if spec.kind == "mapo":
        s = f"{spec.link_scale:g}"
        return [
            rf"\ell = -u^{better} - \beta\log\sigma\big({spec.margin_scale:g}\,[\,g(-u^{better}) - g(-u^{worse})\,]"
            rf"\big),\qquad g(L) = \frac{{{s}\,L}}{{e^{{{s}\,L}} - 1}}"
        ]
    if spec.kind == "dspo":
        theta, ref = (rf"{_eps(r, which)}" for which in ("theta", "ref"))
        regression = _squared(rf"({theta} - y_t) - c\,({theta} - {ref})", r.log_ratio.reduction)
        return [rf"\ell = {regression}\ \text{{at }} x_0^{better},\qquad c = \beta\,\sigma\big(-\beta{difference}\big)"]
    strength = r"(2p-1)\," if spec.weight_by_strength else ""
    margin = f" - {spec.margin:g}" if spec.margin else ""
    s = rf"\beta\,{strength}{difference}{margin}"
    if not spec.label_smoothing:
        return [rf"\ell = -\log\sigma\big({s}\big)"]
    right, wrong = f"{1 - spec.label_smoothing:g}", f"{spec.label_smoothing:g}"
    return [rf"\ell = -{right}\log\sigma(s) - {wrong}\log\sigma(-s),\qquad s = {s}"]
