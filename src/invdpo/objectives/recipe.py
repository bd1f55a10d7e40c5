"""A method as data: five independent slots, checked against each other."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from invdpo.errors import InvdpoError

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
    solver: Literal["ddim"] = "ddim"
    model: Literal["reference", "policy"] = Field("reference", description="which network inverts (without gradient)")
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

    form: Literal["four_term", "two_term", "denoising"] = Field(
        description="four_term: -(|e-target|^2 - |e_ref-target|^2); two_term: sign |e-e_ref|^2; "
        "denoising: -|e-target|^2"
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


class LossSpec(_Slot):
    """From two log-ratios to a loss."""

    kind: Literal["dpo", "winner_only"] = "dpo"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels believed to be wrong")
    margin: float = Field(0.0, allow_inf_nan=False, description="subtracted inside the sigmoid")


class Recipe(_Slot):
    """One method. Build it with `load_recipe` or `make_recipe`, which report mistakes as InvdpoError."""

    name: str
    source: str = Field(description="paper section or code line that the recipe follows")
    trajectory: TrajectorySpec
    timesteps: Literal["single", "all", "subset"]
    subset_size: Count | None = Field(None, description="K timesteps a pair, drawn without replacement (subset only)")
    target: Literal["noise", "implied", "step", "reference"] = Field(
        description="noise: the eps added; implied: the eps between x_0 and x_t; step: the eps that maps x_t back to "
        "x_{t-1}; reference: the reference's prediction at the same point"
    )
    log_ratio: LogRatioSpec
    loss: LossSpec = Field(default_factory=lambda: LossSpec.model_validate({}))
    beta: Positive
    learning_rate: Positive = Field(description="the method's own published value, for documentation and its own arm")
    reference_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="weights of the frozen reference; the training loop applies it"
    )

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
    forward, steps = r.trajectory.kind == "forward", r.trajectory.steps
    two_term, winner_only = r.log_ratio.form == "two_term", r.loss.kind == "winner_only"
    rules = [
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
        (
            winner_only and r.log_ratio.form != "denoising",
            "log_ratio.form",
            "loss.kind 'winner_only' needs 'denoising': there is no pair to compare",
        ),
        (
            r.log_ratio.form == "denoising" and not winner_only,
            "loss.kind",
            "log_ratio.form 'denoising' needs 'winner_only': without the reference it is no log-ratio",
        ),
        (
            winner_only and (r.loss.label_smoothing != 0 or r.loss.margin != 0),
            "loss",
            "'winner_only' compares no pair, so label_smoothing and margin must be 0",
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
    ]
    return [(field, reason) for broken, field, reason in rules if broken]


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
        known = {path.stem: path for folder in _method_folders() for path in sorted(folder.glob("*.yaml"))}
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
