"""Tables and figures of the experiments on held-out pairs, from the csv files that their stages left."""

# pandas annotates every cell, row and group key as whatever a frame may hold.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

from __future__ import annotations

import io
import math
import textwrap
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from invdpo.errors import InvdpoError
from invdpo.evidence.comparisons import LEADERS_NOTE, marked, ranked
from invdpo.evidence.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    colour_of,
    method_colour,
    new_figure,
    save,
    whisker,
)
from invdpo.evidence.load import RESCALED, SCORERS, arm_title, scorer_title
from invdpo.evidence.printing import Block, Table, format_interval, record_of, triple, write_table
from invdpo.evidence.statistics import Interval, mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from invdpo.config import StudyConfig

SOLVERS = {
    "ddim": ("DDIM", BLACK),
    "dpm_solver": ("DPM-Solver", GREEN),
    "edict": ("EDICT", PURPLE),
    "fixed_point": ("fixed point", BLUE),
    "renoise": ("ReNoise", ORANGE),
}
STYLES = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1))]
MARKERS = ["o", "s", "^", "D", "v"]
ARM_COLOURS = [BLUE, ORANGE, GREEN, PURPLE, BLACK, GREY]  # in the order of a study's arms
NONE = "–"
LATENTS_NOTE = "95 % intervals: bootstrap over latents (9,999 draws)."


def write(study: StudyConfig) -> list[Path]:
    """Write root/tables/NAME.{csv,md,tex} and root/figures/ of every experiment that the study has; the paths written.

    Raises InvdpoError where one has not run.
    """
    paths = []
    for name in study.experiments.measured:
        build, figures = EVIDENCE[name]
        paths += write_table(study.root / "tables", name, build(study))
        for figure, draw in figures.items():
            paths += save(draw(study), study, figure)
    return paths


def _read(study: StudyConfig, experiment: str, file: str) -> pd.DataFrame:
    path = study.root / "experiments" / experiment / file
    if not path.is_file():
        raise InvdpoError(f"{path} is missing. Run `invdpo experiment {experiment} --study …` first.")
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def _over(values: pd.Series) -> Interval | None:
    """The mean over latents with its interval; None where no latent has a value."""
    known = values.dropna().to_numpy(np.float64)
    return mean_interval(known[None]) if len(known) else None


def _known(mean: float, low: float, high: float) -> Interval | None:
    """An interval read back from a csv file; None where there is no mean, no width where there was no interval."""
    if math.isnan(mean):
        return None
    low, high = (mean if math.isnan(end) else end for end in (low, high))
    return Interval(mean, low, high, math.nan, 0, 0)


def _text(interval: Interval | None, sign: bool = False) -> str:
    return NONE if interval is None else format_interval(interval, sign)


def _small(interval: Interval | None) -> str:
    """An interval of a positive number of any size, two digits each."""
    return NONE if interval is None else "{:.2g} [{:.2g}, {:.2g}]".format(*_ends(interval))


def _cosine(interval: Interval | None) -> str:
    return NONE if interval is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*_ends(interval))


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.estimate, interval.low, interval.high


def _changes(errors: pd.DataFrame) -> list[str]:
    """The scores whose change was measured, in the order of all tables."""
    found = {column.removesuffix("_change") for column in errors.columns if column.endswith("_change")} - RESCALED
    return [name for name in SCORERS if name in found] + sorted(found - set(SCORERS))


def inversion_error_table(study: StudyConfig) -> Table:
    """Round-trip error, distribution of x_T and change of the scores, of every solver, guidance scale and N."""
    errors = _read(study, "inversion_error", "errors.csv")
    scorers = _changes(errors)
    measures = ["rms_error", "terminal_second_moment", "terminal_norm_z", *(f"{name}_change" for name in scorers)]
    columns = ["solver", "label", "guidance_scale", "steps", "latents", "unet_evals"]
    columns += [column for measure in measures for column in triple(measure)]
    records, trips, changes = [], [], []
    keys = ["solver", "label", "guidance_scale", "steps"]
    for _, group in errors.groupby(keys, sort=False):
        record: dict[str, Any] = group[[*keys, "unet_evals"]].iloc[0].to_dict() | {"latents": len(group)}
        found = {measure: _over(group[measure]) for measure in measures}
        for measure, interval in found.items():
            record |= record_of(measure, interval)
        records.append(record)
        head = [SOLVERS[record["solver"]][0], f"{record['guidance_scale']:g}", str(record["steps"])]
        cells = [_small(found["rms_error"]), _text(found["terminal_second_moment"]), _text(found["terminal_norm_z"])]
        trips.append([*head, f"{record['unet_evals']:,}", *cells])
        changes.append([*head, *(_text(found[f"{name}_change"], sign=True) for name in scorers)])
    head = ["Solver", "Guidance", "N"]
    blocks = [
        Block(
            "Inversion and sampling back",
            [*head, "UNet evaluations", "Round-trip error", "Second moment of x_T", "z of |x_T|²"],
            trips,
        )
    ]
    if scorers:
        titles = [scorer_title(name) for name in scorers]
        blocks.append(
            Block("Score of the picture returned minus that of the picture inverted", [*head, *titles], changes)
        )
    notes = [
        f"Base model, {records[0]['latents']} winners of held-out pairs. {LATENTS_NOTE} UNet evaluations: of the "
        "inversion of one latent, a pass with guidance counts two.",
        "Round-trip error: root mean square over a latent's elements, which themselves have one near 1. A standard "
        "normal x_T has second moment 1 and z = (|x_T|² - d) / √(2d) between -2 and 2.",
    ]
    return Table("Inversion error", notes, records, columns, blocks)


def precision_table(study: StudyConfig) -> Table:
    """How each recipe's surrogate log-ratio agrees with the true one, a row a policy's arm and setting."""
    columns = ["arm", "recipe", "steps", "draws", "seeds", "pairs", "unet_evals_per_latent"]
    measures = ["spearman", "pair_accuracy", "true_pair_accuracy", "sign_agreement"]
    columns += [column for measure in measures for column in triple(measure)]
    records, rows = [], []
    for record, found in _agreements(study):
        for measure, interval in found.items():
            record = record | record_of(measure, interval)
        records.append(record)
        rows.append(
            [
                arm_title(record["arm"]),
                arm_title(record["recipe"]),
                str(record["steps"]),
                str(record["draws"]),
                f"{record['unet_evals_per_latent']:,.4g}",
                *(_text(found[measure], sign=measure == "spearman") for measure in measures),
            ]
        )
    head = ["Policy", "Recipe", "N", "Draws", "UNet evaluations a latent", "Spearman"]
    head += ["Pair accuracy", "Pair accuracy of the truth", "Same order as the truth"]
    settings = study.experiments.precision
    assert settings is not None  # the study has the experiment
    kept = min(record["pairs"] for record in records)
    lost = f" (of {settings.pairs}: the rest has no density there)" if kept < settings.pairs else ""
    how = {"exact": "exact log-determinants", "hutchinson": f"log-determinants by {settings.probes} probes each"}
    notes = [
        f"Surrogate against true log p_θ(x₀) - log p_ref(x₀) of both latents of {kept} held-out pairs{lost}; truth: "
        f"the sampler of {settings.truth_steps} steps, {how[settings.truth]}. Means over training seeds (n = "
        f"{records[0]['seeds']}).",
        "Intervals: Spearman from the lowest to the highest end of the seeds' own 95 % intervals (bootstrap over "
        "pairs); shares of pairs, where a tie counts one half, 95 % (crossed bootstrap over seeds and pairs).",
    ]
    return Table(
        "Precision of the surrogates", notes, records, columns, [Block("Agreement with the truth", head, rows)]
    )


def _agreements(study: StudyConfig) -> list[tuple[dict[str, Any], dict[str, Interval | None]]]:
    """A setting's record and its measures, over seeds: see the notes of `precision_table`."""
    agreement, latents = (_read(study, "precision", file) for file in ("agreement.csv", "latents.csv"))
    keys, found = ["arm", "recipe", "steps", "draws"], []
    rows = dict(list(latents.groupby(keys, sort=False)))
    for key, group in agreement.groupby(keys, sort=False):
        seeds = sorted(group["seed"].tolist())
        if seeds != sorted(study.seeds):
            raise InvdpoError(
                f"{study.root / 'experiments' / 'precision'}: seeds {seeds} of {group['recipe'].iloc[0]}, and the "
                f"study has {study.seeds}. Run `invdpo experiment precision --study …` again."
            )
        order, true_order = (_orders(rows[key], column) for column in ("surrogate", "truth"))
        known = ~np.isnan(true_order).any(axis=0)
        order, true_order = order[:, known], true_order[:, known]
        record = dict(zip(keys, key, strict=True)) | {"seeds": len(group), "pairs": int(known.sum())}
        record["unet_evals_per_latent"] = float(group["unet_evals_per_latent"].mean())
        shares = {"pair_accuracy": order, "true_pair_accuracy": true_order, "sign_agreement": order * true_order}
        measures = {"spearman": _known(group["spearman"].mean(), group["low"].min(), group["high"].max())}
        found.append((record, measures | {name: mean_interval((1 + signs) / 2) for name, signs in shares.items()}))
    return found


def _orders(latents: pd.DataFrame, column: str) -> np.ndarray:
    """(seeds,pairs): 1 where the winner has the larger log-ratio, -1 where the loser, 0 for a tie, nan if unknown."""
    wide = latents.pivot(index="seed", columns=["side", "pair"], values=column)
    return np.sign(wide["win"].to_numpy() - wide["lose"].to_numpy())


def audit_table(study: StudyConfig) -> Table:
    """Every recipe's gradient at every policy, precision and noise: how long it is and where it points."""
    summary = _read(study, "audit", "summary.csv")
    keys = ["recipe", "policy", "precision", "noise"]
    measures = list(dict.fromkeys(summary["measure"]))
    columns = [*keys, "pairs", "batches", *(column for measure in measures for column in triple(measure))]
    settings = study.experiments.audit
    assert settings is not None  # the study has the experiment
    several = len(settings.precisions) > 1
    compared = ["reward", "swapped", *(["fp32"] if several else [])]
    records, rows = [], []
    for _, group in summary.groupby(keys, sort=False):
        found = {row["measure"]: _known(row["mean"], row["low"], row["high"]) for row in group.to_dict("records")}
        record = group[keys].iloc[0].to_dict() | {"pairs": settings.pairs, "batches": settings.batches}
        for measure in measures:
            record |= record_of(measure, found[measure])
        records.append(record)
        spent = found["unet_evals"]
        rows.append(
            [
                arm_title(record["recipe"]),
                policy_title(record["policy"]),
                *([record["precision"]] if several else []),
                record["noise"],
                _small(found["relative_norm"]),
                *(_cosine(found[f"cosine_with_{other}"]) for other in compared),
                NONE if spent is None else f"{spent.estimate:,.0f}",
            ]
        )
    head = ["Recipe", "Policy", *(["Precision"] if several else []), "Rounding", "Norm / weights"]
    titles = {"reward": "PickScore", "swapped": "swapped labels", "fp32": "fp32"}
    head += [*(f"Cosine: {titles[other]}" for other in compared), "UNet evaluations"]
    halves = [
        f"{row['cosine_of_halves']:+.2f} ({policy_title(row['policy'])})"
        for row in _read(study, "audit", "rewards.csv").to_dict("records")
    ]
    notes = [
        f"Gradients of {settings.batches} batches of {settings.pairs} held-out pairs, mean and 95 % interval over "
        f"batches (Student's t). A dash: the gradient is zero. Checkpoints are those of seed {study.seeds[0]}.",
        f"Cosine with PickScore: of minus the gradient with that of the mean PickScore of {settings.images} images, "
        "through the sampler; above 0, a step of descent raises it. Swapped labels: -1 where labels decide the sign, 1 "
        "where they do not matter.",
        "A cosine with PickScore is held down by the noise of both gradients, so compare rows rather than read it as a "
        f"share. Those of PickScore on the two halves of the images have cosine {', '.join(halves)} with each other.",
        "A rounding (of the base's weights, or of the released code's reference) is one realisation: the intervals are "
        "over pairs alone.",
    ]
    return Table("Gradient audit", notes, records, columns, [Block("Gradients", head, rows)])


def preference_accuracy_table(study: StudyConfig) -> Table:
    """How often each score agrees with held-out votes."""
    return accuracy_table(
        _read(study, "preference_accuracy", "accuracy.csv"), _read(study, "preference_accuracy", "votes.csv")
    )


def accuracy_table(accuracy: pd.DataFrame, votes: pd.DataFrame) -> Table:
    """The table of `accuracy.csv` and `votes.csv`, a row a score."""
    found = {row["scorer"]: row for row in accuracy.to_dict("records")}
    names = [name for name in SCORERS if name in found] + sorted(set(found) - set(SCORERS))
    place = ranked({"accuracy": {name: found[name]["accuracy"] for name in names}}, _agreement_gaps(votes, names))
    columns = ["scorer", *triple("accuracy"), "standing", *triple("decided"), "threshold", "scale"]
    columns += ["votes", "ties", "predicted_ties", "prompts", "validation_votes"]
    records, rows = [], []
    for name in names:
        row, standing = found[name], place.get(("accuracy", name), "")
        whole = _known(row["accuracy"], row["low"], row["high"])
        decided = _known(*(row.get(key, math.nan) for key in ("decided", "decided_low", "decided_high")))
        record = {key: row[key] for key in ("scorer", *columns[8:])} | {"standing": standing}
        records.append(record | record_of("accuracy", whole) | record_of("decided", decided))
        cells = [marked(_text(whole), standing), _text(decided), f"{row['threshold']:g}", f"{row['scale']:.3g}"]
        counts = [f"{row['votes']:,}", f"{row['ties']:,}", f"{row['predicted_ties']:,}"]
        rows.append([scorer_title(name), *cells, *counts])
    notes = [
        "95 % intervals: BCa over prompts (9,999 draws), each with all its votes.",
        "A score predicts the image with the higher probability, or a tie where the two differ by at most the "
        "threshold (0, 0.1, …, 1: the best on the validation votes, whose prompts are others). Agreement with the vote "
        "counts 1, a tie on exactly one side one half. Probability: softmax of scale times the score; the scale is "
        "given, or fitted to the validation votes. Decided: share of votes with a winner whose winner scores higher.",
        LEADERS_NOTE,
    ]
    head = ["Score", "Accuracy", "Decided pairs", "Threshold", "Scale", "Votes", "Ties", "Ties predicted"]
    blocks = [Block("Agreement with held-out votes", head, rows)]
    return Table("Preference accuracy", notes, records, columns, blocks)


def _agreement_gaps(votes: pd.DataFrame, names: list[str]) -> dict[tuple[str, frozenset[str]], np.ndarray]:
    """(1, prompts) differences between every two scores' agreement, on the votes that both judge."""
    test = votes.loc[votes["split"] == "test"]
    gaps = {}
    for pair in combinations(names, 2):
        gap = test[f"{pair[0]}_agrees"] - test[f"{pair[1]}_agrees"]
        by_prompt = gap.groupby(test["prompt"]).mean().dropna()
        gaps["accuracy", frozenset(pair)] = by_prompt.to_numpy(np.float64)[None]
    return gaps


def weight_distances_table(study: StudyConfig) -> Table:
    """How far each arm's weights lie from its base's: over the whole network, by block, and by kind of layer."""
    settings, found = study.experiments.weight_distances, _read(study, "weight_distances", "summary.csv")
    assert settings is not None  # the study has the experiment
    measures = ["rms", "rounded_rms", "least_rms", "relative_l2", "rounded_relative_l2", "changed", "rounded_changed"]
    measures += ["max", "in_fp16"]
    columns = ["arm", "base", "weights", "grouping", "group", "seeds", "elements", "dtype", "base_dtype", "rounded_to"]
    columns += [*(column for measure in measures for column in triple(measure)), "bound", "above_bound"]
    narrow = bool((found["rounded_to"] != "float32").any())
    records, totals = [], []
    spread: dict[str, dict[str, dict[str, Interval | None]]] = {"block": {}, "kind": {}}
    for (arm, grouping, group), rows in found.groupby(["arm", "grouping", "group"], sort=False):
        values = {measure: _over_runs(rows[measure]) for measure in measures}
        record = {"arm": arm, "base": study.with_base_of(arm).base, "weights": study.arms[arm].weights}
        record |= rows.iloc[0][["grouping", "group", "elements", "dtype", "base_dtype", "rounded_to"]].to_dict()
        record["seeds"] = len(rows)
        for measure, value in values.items():
            record |= record_of(measure, value)
        if grouping == "total":
            bound, least = settings.bounds.get(arm), values["least_rms"]
            if bound is not None and least is not None:
                record |= {"bound": bound.rms, "above_bound": least.low > bound.rms}
            totals.append(_distance_cells(record, values, narrow, bool(settings.bounds)))
        if grouping in spread:
            spread[grouping].setdefault(arm, {})[group] = values["relative_l2"]
        records.append(record)
    moved = ["Stored as", "RMS of the change", *(["both rounded", "at least"] if narrow else [])]
    moved += ["Norm / base's norm", "Changed", *(["both rounded"] if narrow else []), "Largest"]
    head = ["Arm", *moved, *(["Recipe's bound"] if settings.bounds else [])]
    blocks = [Block("Whole network", head, totals)]
    titles = {"block": "Norm of the change over the base's, by block", "kind": "The same by kind of layer"}
    for grouping, arms in spread.items():
        groups = list(dict.fromkeys(found.loc[found["grouping"] == grouping, "group"]))
        rows = [[arm_title(arm), *(_two_digits(part.get(group)) for group in groups)] for arm, part in arms.items()]
        blocks.append(Block(titles[grouping], ["Arm", *groups], rows))
    if settings.against:
        blocks.append(_held_against(study, measures, moved, narrow))
    notes = [
        "Weights of the UNet minus those of its base. Trained arms: last checkpoint, mean over training seeds [lowest, "
        "highest]. Time: embeddings of the timestep and of sizes. Attention: whole transformer blocks."
    ]
    if narrow:
        notes += [
            "A file in half precision differs from a base in fp32 by rounding alone. Both rounded: after rounding both "
            "to the narrower of their types. At least: each difference less half a spacing of the stored number, so "
            "the least that the weights can have moved before they were stored, from this base in its own precision.",
        ]
    for arm, bound in settings.bounds.items():
        notes.append(f"Bound of {arm_title(arm)}: {bound.rms:g}, {bound.source}. *: at least that far is above it.")
    origins = study.root / "experiments" / "weight_distances" / "made_from.csv"
    for row in pd.read_csv(origins).to_dict("records") if origins.is_file() else []:
        notes.append(f"{arm_title(row['arm'])} was published as loaded from {row['made_from']}, by its config.json.")
    return Table("Distance of the weights from their base's", notes, records, columns, blocks)


def _held_against(study: StudyConfig, measures: list[str], head: list[str], narrow: bool) -> Block:
    """The arms that are held against another model than their base, over the whole network."""
    found, rows = _read(study, "weight_distances", "against.csv"), []
    whole = found.loc[found["grouping"] == "total"]
    for (arm, other), runs in whole.groupby(["arm", "against"], sort=False):
        record = {"arm": arm, "seeds": len(runs)} | runs.iloc[0][["dtype", "base_dtype"]].to_dict()
        values = {measure: _over_runs(runs[measure]) for measure in measures}
        title, *cells = _distance_cells(record, values, narrow, False)
        rows.append([title, other, *cells])
    return Block("Held against another model, in place of the base", ["Arm", "Model", *head], rows)


def _over_runs(values: pd.Series) -> Interval | None:
    """The mean over training seeds, from the lowest to the highest."""
    return None if values.isna().any() else _known(values.mean(), values.min(), values.max())


def _distance_cells(
    record: dict[str, Any], values: dict[str, Interval | None], narrow: bool, bounded: bool
) -> list[str]:
    texts = {name: (_small if record["seeds"] > 1 else _two_digits)(value) for name, value in values.items()}
    moved = [texts[name] for name in ("rms", *(["rounded_rms", "least_rms"] if narrow else []), "relative_l2")]
    counted = [values[name] for name in ("changed", *(["rounded_changed"] if narrow else []))]
    shares = [NONE if share is None else f"{share.estimate:.1%}" for share in counted]
    bound = f"{record['bound']:.2g}" + (" *" if record["above_bound"] else "") if "bound" in record else NONE
    head = [arm_title(record["arm"]), f"{record['dtype']} (base {record['base_dtype']})"]
    return [*head, *moved, *shares, texts["max"], *([bound] if bounded else [])]


def _two_digits(interval: Interval | None) -> str:
    return NONE if interval is None else f"{interval.estimate:.2g}"


def policy_title(policy: str) -> str:
    """`diffusion_dpo/step24` -> `Diffusion-DPO, step 24`."""
    arm, _, step = policy.partition("/step")
    return f"{arm_title(arm)}, step {step}" if step else "Base" if arm == "initial" else arm


def _lighten(panel: Any) -> None:
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)


def _legend(figure: Figure, handles: list[Any], inches: float) -> None:
    """Entries at the top of the figure, in as many columns of that width as there is room for."""
    columns = min(len(handles), max(1, int(figure.get_figwidth() / inches)))
    figure.legend(
        handles=handles, loc="upper left", ncols=columns, frameon=False, bbox_to_anchor=(0.01, 1.0), fontsize=7.5
    )


def _solver_handles(errors: pd.DataFrame) -> list[Any]:
    """Legend entries: a colour a solver, a line style a guidance scale."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=SOLVERS[name][1], marker=MARKERS[rank], markersize=4, label=SOLVERS[name][0])
        for rank, name in enumerate(dict.fromkeys(errors["solver"]))
    ]
    scales = list(dict.fromkeys(errors["guidance_scale"]))
    handles += [
        Line2D([], [], color=GREY, linestyle=STYLES[rank % 4], label=f"guidance {scale:g}")
        for rank, scale in enumerate(scales)
    ]
    return handles


def inversion_error_figure(study: StudyConfig) -> Figure:
    """Round-trip error against N and UNet evaluations, and the change of the deciding score against N."""
    errors = _read(study, "inversion_error", "errors.csv")
    changes = _changes(errors)
    shown = [name for name in ("oracle_utility", "pickscore") if name in changes]
    figure, axes = new_figure(5.8 + 2.9 * len(shown), 3.2, 1, 2 + len(shown))
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.15, top=0.83, wspace=0.26)
    solvers, scales = (list(dict.fromkeys(errors[column])) for column in ("solver", "guidance_scale"))
    counts = sorted(set(errors["steps"]))
    panels = [("rms_error", "steps"), ("rms_error", "unet_evals"), *((f"{name}_change", "steps") for name in shown)]
    for panel, (measure, against) in zip(axes[0], panels, strict=True):
        for (solver, scale), group in errors.groupby(["solver", "guidance_scale"], sort=False):
            style = {"color": SOLVERS[str(solver)][1], "linestyle": STYLES[scales.index(scale) % 4]}
            # Lines stand a little beside each other, so that their intervals can be told apart.
            aside = 1.012 ** (solvers.index(solver) * len(scales) + scales.index(scale))
            by_steps = [(rows[against].iloc[0] * aside, _over(rows[measure])) for _, rows in group.groupby("steps")]
            points = [(float(x), interval) for x, interval in by_steps if interval is not None]
            heights = [interval.estimate for _, interval in points]
            marker = MARKERS[solvers.index(solver)]
            panel.plot([x for x, _ in points], heights, marker=marker, markersize=3.5, linewidth=1.2, zorder=3, **style)
            for x, interval in points:
                whisker(panel, x, interval, style["color"])
        panel.set_xscale("log")
        if against == "steps":
            panel.set_xticks(counts, [str(n) for n in counts])
            panel.minorticks_off()
            panel.set_xlabel("inversion steps N")
        else:
            panel.set_xlabel("UNet evaluations of an inversion")
        if measure == "rms_error":
            panel.set_yscale("log")
            panel.set_title("round-trip error (rms of a latent)", loc="left", fontsize=8)
        else:
            panel.axhline(0, color=GREY, linestyle=(0, (2, 2)), linewidth=1, zorder=1)
            title = f"{scorer_title(measure.removesuffix('_change'))}, returned minus inverted"
            panel.set_title(title, loc="left", fontsize=8)
        _lighten(panel)
    _legend(figure, _solver_handles(errors), 1.2)
    return figure


def inversion_levels_figure(study: StudyConfig) -> Figure:
    """How far the inversion's latents are from the sampling's at every noise level, a panel an N."""
    levels = _read(study, "inversion_error", "levels.csv")
    solvers, scales = (list(dict.fromkeys(levels[column])) for column in ("solver", "guidance_scale"))
    counts = sorted(set(levels["steps"]))
    figure, axes = new_figure(1.2 + 2.4 * len(counts), 3.2, 1, len(counts), sharex=True, sharey=True)
    figure.subplots_adjust(left=0.9 / figure.get_figwidth(), right=0.985, bottom=0.15, top=0.78, wspace=0.10)
    for panel, steps in zip(axes[0], counts, strict=True):
        runs = levels[levels["steps"] == steps].groupby(["solver", "guidance_scale"], sort=False)
        for (solver, scale), group in runs:
            known = group[group["rms_difference"] > 0]
            panel.plot(
                known["timestep"].clip(lower=0), known["rms_difference"], color=SOLVERS[str(solver)][1],
                linestyle=STYLES[scales.index(scale) % 4], marker=MARKERS[solvers.index(solver)], markersize=2.5,
                linewidth=1.1,
            )  # fmt: skip
        panel.set_yscale("log")
        panel.set_title(f"N = {steps}", loc="left")
        panel.set_xlabel("timestep (0: the picture)")
        _lighten(panel)
    axes[0, 0].set_ylabel("rms difference, inversion to sampling")
    _legend(figure, _solver_handles(levels), 1.2)
    return figure


def inversion_pictures_figure(study: StudyConfig) -> Figure:
    """Pictures on the way to noise and back, decoded: the first solver at the fewest and the most steps."""
    from PIL import Image

    rows = _read(study, "inversion_error", "pictures.parquet")
    counts, pictures = sorted(set(rows["steps"])), sorted(set(rows["picture"]))
    columns = {steps: sorted(set(rows.loc[rows["steps"] == steps, "level"])) for steps in counts}
    size, text, head, gap = 0.78, 1.55, 0.48, 0.25
    width = text + sum(size * len(levels) for levels in columns.values()) + gap * (len(counts) - 1) + 0.05
    height = head + len(pictures) * (2 * size + gap)
    figure, axes = new_figure(width, height, 2 * len(pictures), sum(map(len, columns.values())))
    place = rows.set_index(["steps", "picture", "way", "level"]).sort_index()
    captions = rows.drop_duplicates("picture").set_index("picture")["caption"]
    for number, picture in enumerate(pictures):
        top = head + number * (2 * size + gap)
        for below, way in enumerate(("inversion", "sampling")):
            column, left = 0, text
            for steps in counts:
                for level in columns[steps]:
                    panel = axes[2 * number + below, column]
                    panel.set_position(
                        (
                            left / width,
                            1 - (top + (below + 1) * size - 0.02) / height,
                            (size - 0.04) / width,
                            (size - 0.04) / height,
                        )
                    )
                    panel.axis("off")
                    found = place.loc[(steps, picture, way, level)]
                    with Image.open(io.BytesIO(found["png"])) as image:
                        panel.imshow(np.asarray(image.convert("RGB")), interpolation="nearest", aspect="equal")
                    if number == below == 0:
                        timestep = int(found["timestep"])
                        panel.set_title("picture" if timestep < 0 else f"t = {timestep}", fontsize=7, pad=2)
                    left, column = left + size, column + 1
                left += gap
            middle = 1 - (top + (below + 0.5) * size) / height
            figure.text(
                (text - 0.08) / width, middle, way, ha="right", va="center", fontsize=6.5, color=GREY, rotation=90
            )
        caption = textwrap.fill(textwrap.shorten(str(captions[picture]), 90, placeholder="…"), 21)
        figure.text(0.05 / width, 1 - (top + size) / height, caption, ha="left", va="center", fontsize=7)
    left = text
    for steps in counts:
        solver = study.experiments.inversion_error.solvers[0]  # pyright: ignore[reportOptionalMemberAccess]
        title = f"{SOLVERS[solver][0]}, N = {steps}"
        figure.text(left / width, 1 - 0.06 / height, title, ha="left", va="top", fontsize=9)
        left += size * len(columns[steps]) + gap
    return figure


def precision_figure(study: StudyConfig) -> Figure:
    """Agreement with the truth against UNet evaluations, a row a policy's arm: rank correlation and pair accuracy."""
    from matplotlib.ticker import LogLocator, NullFormatter

    settings = study.experiments.precision
    assert settings is not None  # the study has the experiment
    found = _agreements(study)
    methods = {label: entry.method or label for label, entry in settings.recipes.items()}
    height = 0.95 + 2.4 * len(settings.arms)
    figure, axes = new_figure(8.4, height, len(settings.arms), 2, sharex=True)
    figure.subplots_adjust(left=0.08, right=0.985, bottom=0.42 / height, top=1 - 0.7 / height, wspace=0.2, hspace=0.25)
    handles = {}
    for row, arm in zip(axes, settings.arms, strict=True):
        lines = {
            label: sorted(
                ((record, measures) for record, measures in found if (record["arm"], record["recipe"]) == (arm, label)),
                key=lambda point: point[0]["unet_evals_per_latent"],
            )
            for label in methods
        }
        for panel, measure in zip(row, ("spearman", "pair_accuracy"), strict=True):
            for rank, (label, method) in enumerate(methods.items()):
                same = [other for other in methods if methods[other] == method]
                style = {"color": colour_of(method, list(methods.values())), "marker": MARKERS[rank % 5]}
                style["linestyle"] = STYLES[same.index(label) % 4]
                known = [(record, measures[measure]) for record, measures in lines[label] if measures[measure]]
                x = [record["unet_evals_per_latent"] for record, _ in known]
                (handles[label],) = panel.plot(
                    x, [interval.estimate for _, interval in known], linewidth=1.2, markersize=4, zorder=3,
                    label=_recipe_title(label, [record for record, _ in lines[label]]), **style,
                )  # fmt: skip
                for place, (_, interval) in zip(x, known, strict=True):
                    whisker(panel, place, interval, style["color"])
            truths = [measures["true_pair_accuracy"] for record, measures in found if record["arm"] == arm]
            if measure == "pair_accuracy" and truths and truths[0] is not None:
                panel.axhline(truths[0].estimate, color=GREY, linestyle=(0, (2, 2)), linewidth=1, zorder=1)
                panel.annotate("truth", (1, truths[0].estimate), xycoords=panel.get_yaxis_transform(), ha="right",
                               va="bottom", fontsize=6.5, color=GREY)  # fmt: skip
            panel.axhline({"spearman": 0.0, "pair_accuracy": 0.5}[measure], color="#bbbbbb", linewidth=0.7, zorder=1)
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_ylabel({"spearman": "Spearman with the truth", "pair_accuracy": "pair accuracy"}[measure])
            _lighten(panel)
        row[0].set_title(f"Policy: {arm_title(arm)}", loc="left")
    for panel in axes[-1]:
        panel.set_xlabel("UNet evaluations of a latent (log scale)")
    _legend(figure, list(handles.values()), 2.7)
    return figure


def _recipe_title(label: str, records: list[dict[str, Any]]) -> str:
    """`Inversion-DPO (implied noise), N = 10, 20`, or `Diffusion-DPO, 1, 8 draws`: what the points of its line are."""
    if not records:
        return arm_title(label)
    steps, draws = (sorted({record[key] for record in records}) for key in ("steps", "draws"))
    parts = [arm_title(label)]
    if len(draws) == 1 or len(steps) > 1:
        parts.append("N = " + ", ".join(map(str, steps)))
    if len(draws) > 1:
        parts.append(", ".join(map(str, draws)) + " draws")
    return ", ".join(parts)


def audit_figure(study: StudyConfig) -> Figure:
    """Where the gradients point at every policy in fp32: cosines with the reward and with swapped labels, and norms."""
    summary = _read(study, "audit", "summary.csv")
    summary = summary[summary["precision"] == "fp32"]
    recipes, policies, noises = (list(dict.fromkeys(summary[column])) for column in ("recipe", "policy", "noise"))
    panels = {
        "cosine_with_reward": "cosine of descent with PickScore's gradient",
        "cosine_with_swapped": "cosine with swapped labels",
        "relative_norm": "norm over that of the weights",
    }
    figure, axes = new_figure(11, 3.7, 1, 3)
    figure.subplots_adjust(left=0.045, right=0.99, bottom=0.15, top=0.76, wspace=0.2)
    dodge = 0.7 / (len(recipes) * len(noises))
    handles = []
    for panel, (measure, title) in zip(axes[0], panels.items(), strict=True):
        rows = summary[summary["measure"] == measure].set_index(["recipe", "policy", "noise"])
        for place, (recipe, noise) in enumerate((r, n) for r in recipes for n in noises):
            colour = method_colour(study, recipe)
            face = colour if noise == noises[0] else "white"
            for x, policy in enumerate(policies, start=0):
                if (recipe, policy, noise) not in rows.index:
                    continue
                row = rows.loc[(recipe, policy, noise)]
                interval = _known(row["mean"], row["low"], row["high"])
                if interval is None or (measure == "relative_norm" and interval.estimate == 0):
                    continue
                at = x - 0.35 + dodge * (place + 0.5)
                whisker(panel, at, interval, colour)
                marker = MARKERS[noises.index(noise) % 5]
                panel.plot([at], [interval.estimate], marker=marker, markersize=4, color=colour, markerfacecolor=face,
                           linestyle="", zorder=5)  # fmt: skip
        if measure == "relative_norm":
            panel.set_yscale("log")
        else:
            panel.axhline(0, color=GREY, linestyle=(0, (2, 2)), linewidth=1, zorder=1)
            panel.set_ylim(-1.08, 1.08)  # an interval by Student's t may leave the range of a cosine
        panel.set_xticks(range(len(policies)), [policy_title(policy).replace(", ", "\n") for policy in policies])
        panel.tick_params(axis="x", length=0, labelsize=7)
        panel.set_xlim(-0.5, len(policies) - 0.5)
        for edge in range(1, len(policies)):
            panel.axvline(edge - 0.5, color="#e6e6e6", linewidth=0.6)
        panel.set_title(title, loc="left")
        _lighten(panel)
    from matplotlib.lines import Line2D

    for recipe in recipes:
        colour = method_colour(study, recipe)
        handles.append(Line2D([], [], color=colour, marker="o", markersize=4, linestyle="", label=arm_title(recipe)))
    for rank, noise in enumerate(noises):
        handles.append(
            Line2D([], [], color=GREY, marker=MARKERS[rank % 5], markersize=4, linestyle="",
                   markerfacecolor=GREY if rank == 0 else "white", label=_noise_title(noise))
        )  # fmt: skip
    _legend(figure, handles, 2.6)
    figure.text(0.99, 0.97, "no marker: the gradient is zero", ha="right", va="top", fontsize=6.5, color=GREY)
    return figure


def _noise_title(noise: str) -> str:
    return {"none": "weights as they are", "gaussian": "weights times 1 + 2⁻¹¹ z"}.get(
        noise, f"weights rounded to {noise}"
    )


def weight_distances_figure(study: StudyConfig) -> Figure:
    """RMS of the change by block in the order of a forward pass, and the change over the base's norm by kind."""
    found = _read(study, "weight_distances", "summary.csv")
    settings = study.experiments.weight_distances
    assert settings is not None  # the study has the experiment
    figure, axes = new_figure(9.6, 3.6, 1, 2, width_ratios=[3, 1])
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.08, top=0.73, wspace=0.2)
    handles = {}
    for panel, (grouping, measure) in zip(axes[0], (("block", "rms"), ("kind", "relative_l2")), strict=True):
        rows = found.loc[found["grouping"] == grouping]
        groups = list(dict.fromkeys(rows["group"]))
        for rank, arm in enumerate(settings.arms):
            means = rows.loc[rows["arm"] == arm].groupby("group")[measure].mean()
            # A logarithmic axis has no place for weights that did not move.
            places = [place for place, group in enumerate(groups) if means.get(group, 0) > 0]
            colour = ARM_COLOURS[rank % len(ARM_COLOURS)]
            style = {"color": colour, "marker": MARKERS[rank % 5], "linestyle": STYLES[rank // len(ARM_COLOURS) % 4]}
            heights = [means[groups[place]] for place in places]
            (handles[arm],) = panel.plot(places, heights, markersize=4, linewidth=1.1, label=arm_title(arm), **style)
            if grouping == "block" and arm in settings.bounds:
                panel.axhline(settings.bounds[arm].rms, color=colour, linestyle=(0, (2, 2)), linewidth=1, zorder=1)
                panel.annotate(
                    f"bound of {arm_title(arm)}", (1, settings.bounds[arm].rms), ha="right", va="bottom", fontsize=6.5,
                    xycoords=panel.get_yaxis_transform(), color=GREY,
                )  # fmt: skip
        panel.set_yscale("log")
        panel.set_xticks(range(len(groups)), groups)
        panel.set_xlim(-0.4, len(groups) - 0.6)
        panel.tick_params(axis="x", labelsize=7)
        _lighten(panel)
    axes[0, 0].set_title("RMS of the change of the weights, by block", loc="left")
    axes[0, 1].set_title("over the base's norm, by kind", loc="left")
    _legend(figure, list(handles.values()), 2.4)
    return figure


# experiment -> its table, and its figures by name
EVIDENCE = {
    "inversion_error": (
        inversion_error_table,
        {
            "inversion_error": inversion_error_figure,
            "inversion_levels": inversion_levels_figure,
            "fig_s9": inversion_pictures_figure,
        },
    ),
    "precision": (precision_table, {"precision": precision_figure}),
    "audit": (audit_table, {"audit": audit_figure}),
    "preference_accuracy": (preference_accuracy_table, {}),
    "weight_distances": (weight_distances_table, {"weight_distances": weight_distances_figure}),
}
