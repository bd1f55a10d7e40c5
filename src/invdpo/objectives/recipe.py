"""A method as data: five independent slots, checked against each other."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from invdpo.errors import InvdpoError
from invdpo.inversion.trajectory import SOLVERS

Count = Annotated[int, Field(strict=True, ge=1, le=1000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Slot(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrajectorySpec(_Slot):
    """Where x_t comes from."""

    kind: Literal["forward", "inversion"] = Field(
        description="forward: q(x_t|x_0) with fresh noise; inversion: x_t on the deterministic trajectory of x_0"
    )
    steps: Count | None = Field(
        None, description="N timesteps of the grid; null (forward only): all training timesteps"
    )
    solver: Literal["ddim", "dpm_solver", "edict", "fixed_point", "renoise"] = Field(
        "ddim",
        description="ddim: one prediction a step; renoise: mean of two, the second at the estimate of x_t (SmPO); "
        "fixed_point: x_t solved for, so that DDIM sampling retraces it; dpm_solver: second-order multistep (label "
        "'previous' only); edict: a coupled pair, exactly invertible (label 'next' only)",
    )
    model: Literal["reference", "policy"] = Field(
        "reference",
        description="which network inverts, without gradient (form likelihood: the policy, with gradient, and the "
        "reference a trajectory of its own)",
    )
    guidance_scale: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="classifier-free guidance of the inversion; with target reference also of both compared networks",
    )
    label: Literal["next", "previous"] = Field("next", description="the timestep told with x_{t-1}: t or t-1")
    steps_offset: Annotated[int, Field(strict=True, ge=0)] | None = Field(
        None, description="first timestep of the grid; null: the base model's own scheduler decides"
    )


class LogRatioSpec(_Slot):
    """From predictions to the surrogate of log p_theta(x_0) - log p_ref(x_0)."""

    form: Literal["four_term", "two_term", "denoising", "likelihood"] = Field(
        description="four_term: -(|e-target|^2 - |e_ref-target|^2); two_term: sign |e-e_ref|^2; "
        "denoising: -|e-target|^2; likelihood: log p - log p_ref of the sampler itself, by the change of variables "
        "along each network's own inversion"
    )
    sign: Literal["+", "-"] | None = Field(
        None, description="two_term only: + as in Eq. 16, - as in a Gaussian log-ratio"
    )
    reduction: Literal["mean", "sum"] = Field(description="over the elements of a latent")
    over_timesteps: Literal["mean", "sum"] = Field("mean", description="over the grid; unbiased for single and subset")
    weight: Literal["none", "inverse_2alpha"] = Field("none", description="w_t: 1 or 1/(2 abar_t)")
    scale: Positive = Field(1.0, description="constant factor in front of the sum")
    at: Literal["x_t", "x_prev"] = Field(
        "x_t",
        description="where step t compares the networks: its result x_t, or its own input x_{t-1} and label",
    )
    divergence: Literal["exact", "hutchinson"] | None = Field(
        None,
        description="likelihood only: log-determinants and their gradients by the whole Jacobian, or by random probes",
    )
    probes: Count | None = Field(None, description="hutchinson only: random sign vectors a pair and step")
    order: Count | None = Field(None, description="hutchinson only: Arnoldi steps from each probe")


class LossSpec(_Slot):
    """From two log-ratios to a loss; `objectives.pair_losses` holds the formulas."""

    kind: Literal["dpo", "kto", "mapo", "dspo", "winner_only"] = "dpo"
    reversed: bool = Field(False, description="the recipe itself exchanges winner and loser, whatever the labels say")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo only: share of labels believed to be wrong")
    margin: float = Field(0.0, allow_inf_nan=False, description="dpo only: subtracted inside the sigmoid")
    weight_by_strength: bool = Field(
        False, description="dpo only: each pair's beta is multiplied by its preference strength 2p - 1 from the data"
    )
    positive_share: float | None = Field(
        None, gt=0, lt=1, description="kto only: weight of winners; losers have 1 - it"
    )
    link_scale: Positive | None = Field(None, description="mapo only: s of the bounded link g(L) = s L / (e^(s L) - 1)")
    margin_scale: Positive | None = Field(None, description="mapo only: factor of g(L_w) - g(L_l) inside the sigmoid")


class Recipe(_Slot):
    """One method. Build it with `load_recipe` or `make_recipe`, which report mistakes as InvdpoError."""

    name: str
    source: str = Field(description="paper section or code line that the recipe follows")
    trajectory: TrajectorySpec
    timesteps: Literal["single", "all", "subset"]
    subset_size: Count | None = Field(
        None, description="K timesteps a pair, drawn without replacement (subset only); see `preference_loss` on bias"
    )
    pair_draws: Literal["shared", "independent"] = Field(
        "shared", description="whether a winner and its loser share their timesteps and forward noise"
    )
    target: Literal["noise", "implied", "step", "reference", "none"] = Field(
        description="noise: the eps added; implied: the eps between x_0 and x_t; step: the eps that maps x_t back to "
        "x_{t-1}; reference: the reference's prediction at the same point; none (likelihood): predictions have none"
    )
    log_ratio: LogRatioSpec
    loss: LossSpec = Field(default_factory=lambda: LossSpec.model_validate({}))
    beta: Positive
    learning_rate: Positive = Field(description="the method's own published value, for documentation and its own arm")
    reference_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="weights of the frozen reference; the training loop applies it"
    )
    reference_label_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32",
        description="type that timestep labels pass through on their way to the reference, and to it alone; bfloat16 "
        "moves labels above 256",
    )
    sampling_branch: Literal["both", "unconditional"] = Field(
        "both",
        description="unconditional: at sampling the trained weights replace only the unconditional branch of guidance, "
        "beside the base's conditional one",
    )

    @property
    def calls_reference(self) -> bool:
        """Whether the frozen reference is ever evaluated, to compare with or to invert."""
        inverts = self.trajectory.kind == "inversion" and self.trajectory.model == "reference"
        return self.log_ratio.form != "denoising" or inverts

    @model_validator(mode="after")
    def _slots_fit(self) -> Self:
        for field, reason in _conflicts(self):
            raise InvdpoError(f"recipe {self.name!r}: {field}: {reason}")
        return self

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """A recipe with nested values replaced, e.g. {"trajectory": {"steps": 20}}; validated again."""
        return make_recipe(_merge(self.model_dump(), overrides), f"recipe {self.name!r}")


def _conflicts(r: Recipe) -> list[tuple[str, str]]:
    """(field, why it does not go with the other slots), in the order in which a reader would mend them."""
    rules = _point_rules(r) + _loss_rules(r) + _likelihood_rules(r)
    return [(field, reason) for broken, field, reason in rules if broken]


def _point_rules(r: Recipe) -> list[tuple[bool, str, str]]:
    """(broken, field, reason) of the slots that say where the networks are compared, and with what."""
    forward, steps = r.trajectory.kind == "forward", r.trajectory.steps
    two_term = r.log_ratio.form == "two_term"
    return [
        (
            not forward and steps is None,
            "trajectory.steps",
            "an inversion needs a number of steps, 1 to 1000",
        ),
        (
            r.timesteps == "all" and steps is None,
            "trajectory.steps",
            "timesteps 'all' needs a grid: give a number of steps",
        ),
        (
            forward and r.trajectory.guidance_scale != 1,
            "trajectory.guidance_scale",
            "a forward trajectory runs no network that could be guided; use 1",
        ),
        (
            r.target == "noise" and not forward,
            "target",
            "'noise' needs trajectory.kind 'forward': an inversion adds none; use 'implied', 'step' or 'reference'",
        ),
        (
            r.target == "implied" and forward,
            "target",
            "'implied' needs trajectory.kind 'inversion': on a forward trajectory it is the noise itself; use 'noise'",
        ),
        (
            r.target == "step" and forward,
            "target",
            "'step' needs trajectory.kind 'inversion': forward points are drawn one by one and no step joins them",
        ),
        (
            r.target == "reference" and forward,
            "target",
            "'reference' needs trajectory.kind 'inversion': the two-term form assumes the model's own trajectory",
        ),
        (
            r.target == "step" and SOLVERS[r.trajectory.solver].coupled,
            "target",
            f"'step' is the eps with which a DDIM step maps x_t back to x_{{t-1}}, and trajectory.solver "
            f"{r.trajectory.solver!r} has none, for it mixes two latents; use target 'implied'",
        ),
        (
            not forward and r.trajectory.label not in SOLVERS[r.trajectory.solver].labels,
            "trajectory.label",
            f"trajectory.solver {r.trajectory.solver!r} is not defined for {r.trajectory.label!r}; use "
            f"{' or '.join(map(repr, SOLVERS[r.trajectory.solver].labels))}",
        ),
        (
            forward and r.trajectory.solver != "ddim",
            "trajectory.solver",
            "a forward trajectory solves nothing; leave it out",
        ),
        (
            forward and r.trajectory.model != "reference",
            "trajectory.model",
            "a forward trajectory runs no network; leave it out",
        ),
        (
            forward and r.trajectory.label != "next",
            "trajectory.label",
            "a forward trajectory tells no network a timestep; leave it out",
        ),
        (
            steps is None and r.trajectory.steps_offset is not None,
            "trajectory.steps_offset",
            "without trajectory.steps every training timestep is drawn from and no grid could be shifted",
        ),
        (
            r.target == "reference" and not two_term,
            "log_ratio.form",
            "target 'reference' needs 'two_term': in the other forms its reference term is zero",
        ),
        (
            two_term and r.target != "reference",
            "target",
            "log_ratio.form 'two_term' needs target 'reference'",
        ),
        (
            two_term and r.log_ratio.sign is None,
            "log_ratio.sign",
            "'two_term' needs a sign, '+' (Eq. 16) or '-'",
        ),
        (
            not two_term and r.log_ratio.sign is not None,
            "log_ratio.sign",
            "only 'two_term' has a free sign; leave it out",
        ),
        (
            r.log_ratio.at == "x_prev" and r.target != "reference",
            "log_ratio.at",
            "'x_prev' needs target 'reference': x_{t-1} is the input of the step, whose noise is not this step's",
        ),
        (r.timesteps == "subset" and r.subset_size is None, "subset_size", "timesteps 'subset' needs it"),
        (
            r.timesteps != "subset" and r.subset_size is not None,
            "subset_size",
            "only timesteps 'subset' has one",
        ),
        (
            r.subset_size is not None and steps is not None and r.subset_size > steps,
            "subset_size",
            f"{r.subset_size} timesteps cannot be drawn from trajectory.steps {steps}; use at most {steps}",
        ),
        (
            r.pair_draws == "independent" and not forward and r.timesteps == "all",
            "pair_draws",
            "an inversion at timesteps 'all' draws nothing that could be independent; leave it out",
        ),
        (
            r.reference_dtype != "float32" and not r.calls_reference,
            "reference_dtype",
            "this recipe never calls the reference; leave it out",
        ),
        (
            r.reference_label_dtype != "float32" and not r.calls_reference,
            "reference_label_dtype",
            "this recipe never calls the reference; leave it out",
        ),
    ]


def _loss_rules(r: Recipe) -> list[tuple[bool, str, str]]:
    """(broken, field, reason) of the loss against the log-ratio and the draws."""
    kind, form = r.loss.kind, r.log_ratio.form
    no_reference = ("winner_only", "mapo")
    return [
        (
            kind in no_reference and form != "denoising",
            "log_ratio.form",
            f"loss.kind {kind!r} needs 'denoising': it compares with no reference",
        ),
        (
            form == "denoising" and kind not in no_reference,
            "loss.kind",
            "log_ratio.form 'denoising' needs 'winner_only' or 'mapo': without the reference it is no log-ratio",
        ),
        (
            kind == "dspo" and form != "four_term",
            "log_ratio.form",
            "loss.kind 'dspo' needs 'four_term': its coefficient is DPO's, of a difference from the reference's errors",
        ),
        (
            kind == "dspo" and r.timesteps != "single",
            "timesteps",
            "loss.kind 'dspo' needs 'single': its coefficient belongs to the prediction at one timestep, not to a sum",
        ),
        (
            kind == "dspo" and r.log_ratio.weight != "none",
            "log_ratio.weight",
            "loss.kind 'dspo' regresses the prediction itself, without a weight; use 'none'",
        ),
        (
            kind == "dspo" and r.log_ratio.over_timesteps != "mean",
            "log_ratio.over_timesteps",
            "loss.kind 'dspo' regresses the prediction at one timestep, so there is no sum; use 'mean'",
        ),
        (
            kind != "dpo" and r.loss.label_smoothing != 0,
            "loss.label_smoothing",
            f"loss.kind {kind!r} has no label to smooth; only 'dpo' does",
        ),
        (
            kind != "dpo" and r.loss.margin != 0,
            "loss.margin",
            f"loss.kind {kind!r} has no margin; only 'dpo' does",
        ),
        (
            kind != "dpo" and r.loss.weight_by_strength,
            "loss.weight_by_strength",
            f"loss.kind {kind!r} has no difference that a pair's strength could weight; only 'dpo' does",
        ),
        (
            kind == "winner_only" and r.loss.reversed,
            "loss.reversed",
            "'winner_only' sees no loser to exchange with",
        ),
        (
            kind == "winner_only" and r.pair_draws != "shared",
            "pair_draws",
            "loss.kind 'winner_only' has no pair whose draws could be independent; leave it out",
        ),
        (kind == "kto" and r.loss.positive_share is None, "loss.positive_share", "loss.kind 'kto' needs it"),
        (kind != "kto" and r.loss.positive_share is not None, "loss.positive_share", "only loss.kind 'kto' has one"),
        (kind == "mapo" and r.loss.link_scale is None, "loss.link_scale", "loss.kind 'mapo' needs it"),
        (kind != "mapo" and r.loss.link_scale is not None, "loss.link_scale", "only loss.kind 'mapo' has one"),
        (kind == "mapo" and r.loss.margin_scale is None, "loss.margin_scale", "loss.kind 'mapo' needs it"),
        (kind != "mapo" and r.loss.margin_scale is not None, "loss.margin_scale", "only loss.kind 'mapo' has one"),
    ]


def _likelihood_rules(r: Recipe) -> list[tuple[bool, str, str]]:
    """(broken, field, reason) of the sampler's own log-ratio against every slot that a surrogate has a choice in."""
    spec = r.log_ratio
    likelihood, hutchinson = spec.form == "likelihood", spec.divergence == "hutchinson"
    needs = "log_ratio.form 'likelihood' needs"
    return [
        (
            likelihood and r.trajectory.kind != "inversion",
            "trajectory.kind",
            f"{needs} 'inversion': the sampler's density is carried along its own trajectory",
        ),
        (
            likelihood and r.trajectory.solver != "ddim",
            "trajectory.solver",
            f"{needs} 'ddim': the Jacobian is that of one explicit step",
        ),
        (
            likelihood and r.trajectory.model != "policy",
            "trajectory.model",
            f"{needs} 'policy': its density moves with its own trajectory (and the reference's with the reference's)",
        ),
        (
            likelihood and r.trajectory.guidance_scale != 1,
            "trajectory.guidance_scale",
            f"{needs} 1: the trained network's own density, not that of its mixture with another",
        ),
        (
            likelihood and r.timesteps != "all",
            "timesteps",
            f"{needs} 'all': a trajectory has no determinant without each of its steps",
        ),
        (
            likelihood and r.target != "none",
            "target",
            f"{needs} 'none': it holds no prediction against anything",
        ),
        (
            r.target == "none" and not likelihood,
            "target",
            "'none' needs log_ratio.form 'likelihood': every other form compares predictions with a target",
        ),
        (
            likelihood and spec.over_timesteps != "sum",
            "log_ratio.over_timesteps",
            f"{needs} 'sum': log-determinants of a trajectory's steps add up",
        ),
        (
            likelihood and spec.weight != "none",
            "log_ratio.weight",
            f"{needs} 'none': no step of a change of variables weighs more than another",
        ),
        (
            likelihood and r.reference_dtype != "float32",
            "reference_dtype",
            f"{needs} 'float32': the Jacobian of a step in half precision is mostly rounding",
        ),
        (
            likelihood and r.loss.kind != "dpo",
            "loss.kind",
            f"{needs} 'dpo': that is the loss which asks for this log-ratio",
        ),
        (likelihood and spec.divergence is None, "log_ratio.divergence", f"{needs} 'exact' or 'hutchinson'"),
        (
            not likelihood and spec.divergence is not None,
            "log_ratio.divergence",
            "only log_ratio.form 'likelihood' has one",
        ),
        (
            hutchinson and spec.probes is None,
            "log_ratio.probes",
            "log_ratio.divergence 'hutchinson' needs a number of probes",
        ),
        (
            not hutchinson and spec.probes is not None,
            "log_ratio.probes",
            "only log_ratio.divergence 'hutchinson' draws any",
        ),
        (
            hutchinson and spec.order is None,
            "log_ratio.order",
            "log_ratio.divergence 'hutchinson' needs a number of Arnoldi steps",
        ),
        (
            not hutchinson and spec.order is not None,
            "log_ratio.order",
            "only log_ratio.divergence 'hutchinson' has one",
        ),
    ]


def make_recipe(values: Any, where: str) -> Recipe:
    """A recipe from plain values (as YAML gives them); `where` names their origin in errors (InvdpoError)."""
    if not isinstance(values, Mapping):
        raise InvdpoError(f"{where}: a recipe is a mapping of slots, got {type(values).__name__}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InvdpoError(f"{where}: {_explain(error)}") from None


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe config/methods/<name>.yaml, or any YAML file given by its path.

    Names are looked up beside the package's source, then under the working directory. Raises InvdpoError for an
    unknown name (with the nearest known one), an unreadable file, or an invalid recipe.
    """
    name = str(name_or_path)
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
    else:
        known = known_methods()
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise InvdpoError(f"unknown method {name!r}: {hint}known methods: {', '.join(sorted(known)) or 'none'}")
        path = known[name]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvdpoError(f"recipe {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvdpoError(f"recipe {path}: is not valid YAML ({' '.join(str(error).split())})") from None
    return make_recipe(values, f"recipe {path}")


def known_methods() -> dict[str, Path]:
    """Every recipe that `load_recipe` knows by name, with its file."""
    return {path.stem: path for folder in _method_folders() for path in sorted(folder.glob("*.yaml"))}


def _method_folders() -> list[Path]:
    """Least specific first: the source tree's folder wins over the working directory's."""
    return [Path.cwd() / "config" / "methods", Path(__file__).resolve().parents[3] / "config" / "methods"]


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explain(error: ValidationError) -> str:
    """Every mistake as `field.path: what is wrong`, with the nearest valid key for an unknown one."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            valid = _keys(item["loc"][:-1])
            nearest = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(valid)}"
            lines.append(f"{path}: unknown key; {hint}")
        else:
            lines.append(
                f"{path}: {item['msg']}, got {item['input']!r}" if "input" in item else f"{path}: {item['msg']}"
            )
    return "; ".join(lines)


def _keys(path: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
