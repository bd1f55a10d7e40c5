"""The page of places where the paper, its released code and this study differ, from config/deviations.yaml."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from invdpo.errors import InvdpoError

SOURCE = Path("config/deviations.yaml")

HEAD = """# Deviations

<!-- Made from config/deviations.yaml by `invdpo deviations`; change that file, not this page. -->

Where the paper (arXiv:2507.11554), its released code (`train_ddim.py` at 3e2af58 and `sdxl.sh`, unless another file is
named) and this study say or do different things. *Expected* is no prediction: it was written down after the first
reference run. Verdicts on the claims named here are in [claims.md](../results/reference/shapes/claims.md), recipes in
[methods.md](methods.md).
"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Side(_Strict):
    """What one of the three does, and where that is to be read."""

    says: str
    where: str


class Measured(_Strict):
    """What in this repository shows the effect: arms as STUDY:ARM, claims, recipes; or nothing, and why."""

    arms: list[str] = []
    claims: list[str] = []
    recipes: list[str] = []
    nothing: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Measured:
        if bool(self.nothing) == bool(self.arms or self.claims or self.recipes):
            raise ValueError("name what measures it, or `nothing` with the reason, not both")
        return self


class Deviation(_Strict):
    """One place."""

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str
    paper: Side
    code: Side
    study: Side
    why: str
    expected: str
    measured: Measured


class _File(_Strict):
    deviations: list[Deviation]


def load_deviations(path: Path = SOURCE) -> list[Deviation]:
    """Read the entries; InvdpoError names what is wrong in the file."""
    try:
        found = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).deviations
    except OSError as error:
        raise InvdpoError(f"{path} cannot be read: {error.strerror}. Run in the repository's root.") from error
    except yaml.YAMLError as error:
        raise InvdpoError(f"{path}: not valid YAML ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InvdpoError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from error
    names = [one.id for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvdpoError(f"{path}: the id `{twice[0]}` is used twice.")
    return found


def deviations_page(path: Path = SOURCE) -> str:
    """The page docs/deviations.md as Markdown."""
    found = load_deviations(path)
    table = ["| deviation | measured by |", "|---|---|"]
    table += [f"| [{one.title}](#{one.id}) | {_measured(one.measured)} |" for one in found]
    return "\n".join([HEAD, *table, "", *(_section(one) for one in found)])


def _measured(by: Measured) -> str:
    if by.nothing:
        return f"nothing: {by.nothing}"
    parts = []
    for name, names in (("claim", by.claims), ("arm", by.arms), ("recipe", by.recipes)):
        if names:
            parts.append(f"{name}{'s' if len(names) > 1 else ''} {', '.join(f'`{one}`' for one in names)}")
    return "; ".join(parts)


def _section(one: Deviation) -> str:
    rows = {"Paper": one.paper, "Released code": one.code, "This study": one.study}
    lines = [f'<a id="{one.id}"></a>', "", f"## {one.title}", "", "| | | where |", "|---|---|---|"]
    lines += [f"| {name} | {_cell(side.says)} | {_cell(side.where)} |" for name, side in rows.items()]
    lines += [
        "",
        f"*Why:* {one.why}",
        "",
        f"*Expected:* {one.expected}",
        "",
        f"*Measured by:* {_measured(one.measured)}.",
    ]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
