"""From exported votes and the key to Table S4 (`invdpo.evidence.votes`) and to how far the votes can be trusted.

A vote scores 1 for the group's second arm, 0 for its first, one half for a tie; "problem" is no vote. Practice,
attention and repeated trials are in no win rate. Everything is computed with all raters, and again without those that
the rules frozen in the bundle exclude.
"""

# pandas annotates every cell, row and group key as whatever a frame may hold.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from invdpo.config import StudyConfig
from invdpo.errors import InvdpoError
from invdpo.evidence import votes as table_s4
from invdpo.evidence.load import RESCALED, SCORERS, arm_title, scorer_title
from invdpo.evidence.printing import Block, Table, record_of, triple, write_table
from invdpo.evidence.statistics import Interval, holm
from invdpo.evidence.votes import NONE, SETS, percent
from invdpo.files import write_json
from invdpo.provenance import stamp
from invdpo.scorers.composition import TASKS
from user_study_app.settings import Places
from user_study_app.statistics import alpha_interval, p_of_half, rater_agreement, robust_interval, share, strengths


@dataclass(frozen=True)
class Votes:
    """Joined votes. `rows`: one a vote, with rater, group, pair, prompt_id, kind, left (which image), choice, value
    (1, 0.5, 0; NaN for a problem; of attention trials 1 where right), response_ms, index, repeat_of and, for every
    score, its difference second minus first. `arms`: group -> its two arms.
    """

    rows: pd.DataFrame
    arms: dict[str, tuple[str, str]]
    scorers: list[str]

    def trials(self, group: str | None = None) -> pd.DataFrame:
        """The votes that count, of one group or of all."""
        rows = self.rows[self.rows["kind"] == "trial"]
        return rows if group is None else rows[rows["group"] == group]

    def without(self, raters: set[str]) -> Votes:
        """The same without those raters."""
        return Votes(self.rows[~self.rows["rater"].isin(raters)], self.arms, self.scorers)


def read_votes(path: Path, places: Places) -> tuple[Votes, dict[str, Any]]:
    """The export joined with the bundle and the key it was given on; and the bundle's manifest.

    Raises InvdpoError: no votes, a vote twice, votes of several bundles or of one that is not there.
    """
    if not path.is_file():
        raise InvdpoError(f"{path} is missing. `make user-study-analysis` exports the votes first.")
    rows = pd.read_csv(path, dtype={"rater": str, "pair": str, "bundle": str})
    if rows.empty:
        raise InvdpoError(f"{path} holds no vote yet.")
    if (twice := rows.duplicated(["rater", "index"])).any():
        rater, index = rows.loc[twice, ["rater", "index"]].iloc[0]
        raise InvdpoError(f"{path}: rater {rater} voted twice on trial {index}. Export again.")
    if rows["bundle"].nunique() > 1:
        raise InvdpoError(f"{path} mixes votes on {rows['bundle'].nunique()} bundles. Analyse one export at a time.")
    bundle = rows["bundle"].iloc[0]
    for key_path in (places.key, places.earlier / bundle[:12] / "key.json"):
        key = json.loads(key_path.read_text()) if key_path.is_file() else {}
        if key.get("bundle") == bundle:
            break
    else:
        raise InvdpoError(
            f"{path} holds votes on bundle {bundle[:12]}, whose key is neither {places.key} nor {key_path}."
        )
    manifest = json.loads((key_path.parent / "bundle" / "manifest.json").read_text())
    arms = {name: tuple(group["arms"]) for name, group in key["groups"].items()}
    return join(rows, manifest, key, arms), manifest


def join(rows: pd.DataFrame, manifest: dict[str, Any], key: dict[str, Any], arms: dict[str, tuple[str, str]]) -> Votes:
    """Put what the key knows to every vote."""
    images, facts = key["images"], []
    given = {name for image in images.values() for name in image["scores"]}
    scorers = {name for name in given - RESCALED if name.removeprefix("oracle_") not in TASKS}
    for pair in manifest["pairs"]:
        shown = [images[token] for token in pair["images"]]
        if pair["kind"] == "attention":
            target = pair["expected"]
        else:
            target = [image["arm"] for image in shown].index(arms[pair["group"]][1])
        second, first = shown[target], shown[1 - target]
        differences = {name: second["scores"].get(name, np.nan) - first["scores"].get(name, np.nan) for name in scorers}
        facts.append({"pair": pair["pair"], "prompt_id": second["prompt_id"], "target": target, **differences})
    joined = rows.merge(pd.DataFrame(facts), on="pair", how="left", validate="many_to_one")
    if joined["target"].isna().any():
        raise InvdpoError(f"Vote on pair {joined.loc[joined['target'].isna(), 'pair'].iloc[0]}, unknown to the bundle.")
    chosen = joined["left"].where(joined["choice"] == "left", 1 - joined["left"])
    joined["value"] = (chosen == joined["target"]).astype(float)
    joined.loc[joined["choice"] == "tie", "value"] = 0.5
    joined.loc[joined["choice"] == "problem", "value"] = np.nan
    ordered = [name for name in SCORERS if name in scorers] + sorted(scorers - set(SCORERS))
    return Votes(joined, arms, ordered)


def repeats(rows: pd.DataFrame) -> pd.DataFrame:
    """The repeated trials, with `same`: 1 where the same answer was given as the first time, NaN where either was a
    problem.
    """
    first = rows.set_index(["rater", "index"])["value"]
    again = rows[rows["kind"] == "repeat"].copy()
    before = first.reindex(pd.MultiIndex.from_frame(again[["rater", "repeat_of"]].astype({"repeat_of": int})))
    again["same"] = np.where(
        again["value"].isna() | before.isna().to_numpy(), np.nan, again["value"].to_numpy() == before.to_numpy()
    )
    return again


def rater_facts(votes: Votes, rules: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a rater: how much and how they voted, and by which of the rules they are excluded."""
    facts = []
    again = repeats(votes.rows)
    for rater, rows in votes.rows.groupby("rater", sort=True):
        trials = rows[rows["kind"] == "trial"]
        checks = rows[(rows["kind"] == "attention") & rows["value"].notna()]
        decisive = trials[trials["choice"].isin(["left", "right"])]
        left = int((decisive["choice"] == "left").sum())
        own = again.loc[again["rater"] == rater, "same"].dropna()
        counted = rows[rows["kind"] != "practice"]
        record = {
            "rater": rater,
            "votes": len(trials),
            "left_share": left / len(decisive) if len(decisive) else None,
            "left_p": float(stats.binomtest(left, len(decisive)).pvalue) if len(decisive) else None,
            "tie_share": float((trials["choice"] == "tie").mean()) if len(trials) else None,
            "attention_trials": len(checks),
            "attention_failures": int((checks["value"] < 1).sum()),
            "repeats": len(own),
            "repeat_consistency": float(own.mean()) if len(own) else None,
            "median_ms": float(counted["response_ms"].median()) if len(counted) else None,
        }
        broken = []
        if record["attention_failures"] > rules["max_attention_failures"]:
            broken.append("attention")
        if record["repeats"] and record["repeat_consistency"] < rules["min_repeat_consistency"]:
            broken.append("consistency")
        if record["median_ms"] is not None and record["median_ms"] < rules["min_median_ms"]:
            broken.append("too fast")
        facts.append(record | {"excluded": ", ".join(broken)})
    return facts


def win_rates(votes: Votes) -> list[dict[str, Any]]:
    """One record a group."""
    records = []
    for group, arms in votes.arms.items():
        rows = votes.trials(group)
        decisive = rows["value"].where(rows["value"] != 0.5)
        robust = robust_interval(rows, rows["value"])
        record = {
            "group": group,
            "baseline": arms[0],
            "arm": arms[1],
            "raters": rows["rater"].nunique(),
            "pairs": rows["pair"].nunique(),
            "votes": int(rows["value"].notna().sum()),
            "wins": int((rows["value"] == 1).sum()),
            "ties": int((rows["value"] == 0.5).sum()),
            "losses": int((rows["value"] == 0).sum()),
            "problems": int(rows["value"].isna().sum()),
            "p": p_of_half(rows, rows["value"]),
        }
        record |= record_of("win_rate", share(rows, rows["value"]))
        record |= {"win_rate_robust_low": robust[0], "win_rate_robust_high": robust[1]} if robust else {}
        records.append(record | record_of("tie_free", share(rows, decisive)))
    known = [record for record in records if record["p"] is not None]
    for record, adjusted in zip(known, holm([record["p"] for record in known]), strict=True):
        record["p_holm"] = adjusted
    return records


def measures(votes: Votes) -> list[dict[str, Any]]:
    """How far the votes can be trusted and what they agree with: records of quantity, group, value, low, high, n."""
    records: list[dict[str, Any]] = []

    def add(quantity: str, group: str, interval: Interval | None, n: int) -> dict[str, Any]:
        records.append({"quantity": quantity, "group": group, "n": n} | record_of("value", interval))
        return records[-1]

    def add_share(quantity: str, group: str, rows: pd.DataFrame, value: pd.Series) -> None:
        record = add(quantity, group, share(rows, value), int(value.notna().sum()))
        if robust := robust_interval(rows, value):
            record |= {"robust_low": robust[0], "robust_high": robust[1]}

    for group in (*votes.arms, "all"):
        rows = votes.trials(None if group == "all" else group)
        left = rows["choice"].map({"left": 1.0, "right": 0.0})
        add("alpha", group, alpha_interval(rows), int(rows["value"].notna().sum()))
        add("rater_agreement", group, rater_agreement(rows), int(rows["value"].notna().sum()))
        add_share("left_share", group, rows, left)
        add_share("tie_share", group, rows, (rows["value"] == 0.5).astype(float).where(rows["value"].notna()))
        add_share("problem_share", group, rows, rows["value"].isna().astype(float))
        record = {"quantity": "response_ms", "group": group, "n": len(rows)}
        if len(rows):
            low, middle, high = (float(value) for value in rows["response_ms"].quantile([0.25, 0.5, 0.75]))
            record |= {"value": middle, "value_low": low, "value_high": high}
        records.append(record)
        wins = rows["value"].where(rows["value"] != 0.5)
        for name in votes.scorers:
            said = np.sign(rows[name]).map({1.0: 1.0, -1.0: 0.0, 0.0: 0.5})
            agrees = (1 - (said - wins).abs()).where(said.notna() & wins.notna())
            add_share(f"agreement_{name}", group, rows, agrees)
    again = repeats(votes.rows)
    add_share("repeat_consistency", "all", again, again["same"])
    checks = votes.rows[votes.rows["kind"] == "attention"]
    add_share("attention_failures", "all", checks, (checks["value"] < 1).astype(float).where(checks["value"].notna()))
    return records


QUANTITIES = {
    "alpha": "Krippendorff's alpha (first, tie, second)",
    "rater_agreement": "Two raters agree (decisive votes)",
    "repeat_consistency": "Repeats answered as the first time",
    "attention_failures": "Attention trials failed",
    "left_share": "Left chosen (decisive votes)",
    "tie_share": "Ties",
    "problem_share": "Problems reported",
    "response_ms": "Milliseconds a trial: median [quartiles]",
}


def quality_table(
    study: StudyConfig,
    votes: Votes,
    found: dict[str, list[dict[str, Any]]],
    raters: list[dict[str, Any]],
    rules: dict[str, Any],
    shown: list[str],
) -> Table:
    """Reliability, biases, agreement with the scores, and every rater; `shown`: which sets of raters are printed."""
    names = {group: f"{arm_title(b)} / {arm_title(a)}" for group, (a, b) in votes.arms.items()} | {"all": "all trials"}
    records = [{"raters_used": used, **record} for used, rows in found.items() for record in rows]
    blocks = []
    for used in shown:
        by_place = {(row["quantity"], row["group"]): row for row in found[used]}

        def cells(quantity: str, by_place: dict[tuple[str, str], dict[str, Any]] = by_place) -> list[str]:
            records = [by_place.get((quantity, group), {}) for group in names]
            return [_plain(r) if quantity in ("alpha", "response_ms") else percent(r, "value") for r in records]

        head = ["", *names.values()]
        rows = [[text, *cells(name)] for name, text in QUANTITIES.items()]
        robust = [percent(by_place[("left_share", group)], "robust", ends_only=True) for group in names]
        rows.insert(list(QUANTITIES).index("left_share") + 1, ["… two-way robust interval", *robust])
        blocks.append(Block(f"Reliability. {SETS[used]}", head, rows))
        scores = [[scorer_title(name), *cells(f"agreement_{name}")] for name in votes.scorers]
        blocks.append(Block(f"Decisive votes that agree with a score. {SETS[used]}", head, scores))
    head = ["Rater", "Votes", "Left", "p of left (Holm)", "Ties", "Attention failures", "Repeats as before"]
    head += ["Median s", "Excluded"]
    known = [r["left_p"] for r in raters if r["left_p"] is not None]
    adjusted = iter(holm(known))
    rows = []
    for number, rater in enumerate(raters, start=1):
        p = NONE if rater["left_p"] is None else f"{next(adjusted):.2g}"
        rows.append(
            [
                str(number),
                str(rater["votes"]),
                _rate(rater["left_share"]),
                p,
                _rate(rater["tie_share"]),
                f"{rater['attention_failures']} of {rater['attention_trials']}",
                _rate(rater["repeat_consistency"]),
                NONE if rater["median_ms"] is None else f"{rater['median_ms'] / 1000:.1f}",
                rater["excluded"] or "no",
            ]
        )
    blocks.append(Block("Raters", head, rows))
    rule = (
        f"Excluded by rules frozen before the study: attention failures above {rules['max_attention_failures']}, "
        f"under {rules['min_repeat_consistency']:.0%} of repeats answered as the first time, or a median under "
        f"{rules['min_median_ms']} ms."
    )
    notes = [
        "95 % intervals: crossed bootstrap over raters and prompts; of alpha and of two raters agreeing, over prompts. "
        "A score agrees with a vote where it is higher for the chosen picture; equal scores count one half. Raters are "
        "numbered in the order of their participant numbers, which are not published.",
        rule + ("" if "kept" in shown else " They exclude nobody."),
    ]
    columns = ["raters_used", "quantity", "group", "n", *triple("value"), "robust_low", "robust_high"]
    return Table(f"User study: how far the votes can be trusted ({study.study})", notes, records, columns, blocks)


def _plain(record: dict[str, Any]) -> str:
    if record.get("value") is None:
        return NONE
    values = (record["value"], record["value_low"], record["value_high"])
    return "{:.0f} [{:.0f}, {:.0f}]".format(*values) if values[0] > 10 else "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def _rate(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f} %"


def analyse(study: StudyConfig, export: Path, folder: Path) -> list[Path]:
    """Write folder/{table_s4,user_study}.{csv,md,tex} and user_study.json from an export as csv; the paths written.

    Raises InvdpoError as `read_votes` does.
    """
    started = time.time()
    votes, manifest = read_votes(export, Places(study))
    order = list(study.arms)
    arms = dict(sorted(votes.arms.items(), key=lambda item: [order.index(arm) for arm in item[1]]))
    votes = Votes(votes.rows, arms, votes.scorers)
    rules = manifest["exclusions"]
    raters = rater_facts(votes, rules)
    sets = {"all": votes, "kept": votes.without({fact["rater"] for fact in raters if fact["excluded"]})}
    rates = {used: win_rates(kept) for used, kept in sets.items()}
    fits = {used: strengths(kept.trials(), arms) for used, kept in sets.items()}
    found = {used: measures(kept) for used, kept in sets.items()}
    shown = ["all", "kept"] if any(fact["excluded"] for fact in raters) else ["all"]
    paths = write_table(folder, "user_study", quality_table(study, votes, found, raters, rules, shown))
    content = {
        "win_rates": rates,
        "strengths": {used: fit and {arm: vars(value) for arm, value in fit.items()} for used, fit in fits.items()},
        "measures": found,
        "raters": [{name: value for name, value in rater.items() if name != "rater"} for rater in raters],
        "exclusions": rules,
        "provenance": stamp(study, config_hash=manifest["bundle"][:16], started=started),
    }
    write_json(folder / "user_study.json", content)
    return [*table_s4.write(study, folder), *paths, folder / "user_study.json"]


def without_votes(study: StudyConfig, folder: Path) -> list[Path]:
    """Write folder/table_s4.{csv,md,tex} of no vote, and delete what was counted of earlier ones; the paths written."""
    for ending in ("csv", "md", "tex", "json"):
        (folder / f"user_study.{ending}").unlink(missing_ok=True)
    return table_s4.write(study, folder)
