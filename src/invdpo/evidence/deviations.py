"""The page of places where the paper, its released code and this study differ, from config/deviations.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from invdpo.errors import InvdpoError
from invdpo.provenance import REPOSITORY

SOURCE = REPOSITORY / "config" / "deviations.yaml"
CLAIMS = REPOSITORY / "config" / "claims.yaml"

HEAD = """# Deviations

<!-- Made from config/deviations.yaml by `invdpo deviations`; change that file, not this page. -->

Where the paper (arXiv:2507.11554), its released code (`train_ddim.py` at 3e2af58 and `sdxl.sh`, unless another file is
named) and this study say or do different things. *Expected* is no prediction: it was written down after the first
reference run. Verdicts on the claims named here are in [claims.md](../results/reference/shapes/claims.md), recipes in
[methods.md](methods.md). A deviation *applies to* a claim whose test would be another one, or rest on other runs, had
this study done as the paper or the script does; [which apply to which claim](#by_claim) ends the page.
"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Side(_Strict):
    """What one of the three does, and where that is to be read."""

    says: str
    where: str


class Measured(_Strict):
    """What in this repository shows the effect: arms as STUDY:ARM, claims; or nothing, and why.

    leaves_open: the part of the effect that these do not show.
    """

    arms: list[str] = []
    claims: list[str] = []
    leaves_open: str = ""
    nothing: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Measured:
        if bool(self.nothing) == bool(self.arms or self.claims):
            raise ValueError("name what measures it, or `nothing` with the reason, not both")
        if self.nothing and self.leaves_open:
            raise ValueError("`leaves_open` is said of what measures it, and here nothing does")
        return self


class Group(_Strict):
    """Claims that are tested alike."""

    title: str
    claims: list[str]


class Deviation(_Strict):
    """One place. applies: claims and groups of them, beside those of `measured`."""

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str
    paper: Side
    code: Side
    study: Side
    why: str
    expected: str
    measured: Measured
    applies: list[str] | Literal["all"] = []


class Deviations(_Strict):
    """The file."""

    groups: dict[str, Group] = {}
    deviations: list[Deviation]


def load_deviations(path: Path = SOURCE, claims: Path = CLAIMS) -> Deviations:
    """Read the entries; InvdpoError names what is wrong in the file, or no claim of the file `claims`."""
    try:
        found = Deviations.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvdpoError(f"{path} cannot be read: {error.strerror}. Run in the repository's root.") from error
    except yaml.YAMLError as error:
        raise InvdpoError(f"{path}: not valid YAML ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InvdpoError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from error
    names = [one.id for one in found.deviations]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvdpoError(f"{path}: the id `{twice[0]}` is used twice.")
    _check_claims(found, path, _claim_ids(claims), claims)
    return found


def deviations_by_claim(path: Path = SOURCE, claims: Path = CLAIMS) -> dict[str, list[str]]:
    """Id of every claim -> ids of the deviations that apply to it, both in the order of their files."""
    found, known = load_deviations(path, claims), _claim_ids(claims)
    concerned = {one.id: _concerned(one, found.groups, known) for one in found.deviations}
    return {claim: [name for name, claims in concerned.items() if claim in claims] for claim in known}


def deviations_page(path: Path = SOURCE, claims: Path = CLAIMS) -> str:
    """The page docs/deviations.md as Markdown."""
    found = load_deviations(path, claims)
    table = ["| deviation | measured by |", "|---|---|"]
    table += [f"| [{one.title}](#{one.id}) | {_measured(one.measured)} |" for one in found.deviations]
    sections = (_section(one, found.groups) for one in found.deviations)
    return "\n".join([HEAD, *table, "", *sections, _by_claim(deviations_by_claim(path, claims))])


def _claim_ids(claims: Path) -> list[str]:
    from invdpo.evidence.ledger import load_claims  # here, as verdicts name the deviations that apply

    return [claim.id for claim in load_claims(claims)]


def _check_claims(found: Deviations, path: Path, known: list[str], claims: Path) -> None:
    for name, group in found.groups.items():
        if name in known:
            raise InvdpoError(f"{path}: the group `{name}` has the id of a claim of {claims}. Call it something else.")
        if wrong := [one for one in group.claims if one not in known]:
            raise InvdpoError(f"{path}: the group `{name}` holds `{wrong[0]}`, which is no claim of {claims}.")
    for one in found.deviations:
        named = [*one.measured.claims, *([] if one.applies == "all" else one.applies)]
        if wrong := [name for name in named if name not in (*known, *found.groups)]:
            raise InvdpoError(f"{path}: `{one.id}` names `{wrong[0]}`, which is no claim of {claims} and no group.")


def _concerned(one: Deviation, groups: dict[str, Group], known: list[str]) -> set[str]:
    """The claims that a deviation applies to."""
    if one.applies == "all":
        return set(known)
    return {
        claim
        for name in (*one.measured.claims, *one.applies)
        for claim in (groups[name].claims if name in groups else [name])
    }


def _measured(by: Measured) -> str:
    if by.nothing:
        return f"nothing: {by.nothing}"
    parts = [
        f"{name}{'s' if len(names) > 1 else ''} {', '.join(f'`{one}`' for one in names)}"
        for name, names in (("claim", by.claims), ("arm", by.arms))
        if names
    ]
    return "; ".join([*parts, *([f"left open: {by.leaves_open}"] if by.leaves_open else [])])


def _applies(one: Deviation, groups: dict[str, Group]) -> str:
    if one.applies == "all":
        return "all claims"
    names = [name for name in one.applies if name in groups]
    single = [name for name in dict.fromkeys((*one.measured.claims, *one.applies)) if name not in names]
    single = [name for name in single if not any(name in groups[group].claims for group in names)]
    parts = [*(groups[name].title for name in names), *(f"`{name}`" for name in single)]
    return "; ".join(parts) or "no claim"


def _by_claim(found: dict[str, list[str]]) -> str:
    lines = ['<a id="by_claim"></a>', "", "## What applies to which claim", "", "| claim | deviations |", "|---|---|"]
    lines += [f"| `{claim}` | {', '.join(f'[{one}](#{one})' for one in ids)} |" for claim, ids in found.items()]
    return "\n".join([*lines, ""])


def _section(one: Deviation, groups: dict[str, Group]) -> str:
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
        "",
        f"*Applies to:* {_applies(one, groups)}.",
    ]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
