"""Tables and figures from made-up scores: right numbers, same bytes, and rows for what has not run."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evidence_fixture import SPREAD, make_config, make_study, write_scores
from matplotlib.figure import Figure

from invdpo.config import ArmList, DistributionConfig, StudyConfig
from invdpo.errors import InvdpoError
from invdpo.evidence import claims, compositional, figures, ledger, printing, publish, tables
from invdpo.evidence.load import arm_title, load_evidence, load_scores
from invdpo.evidence.statistics import Interval

ORACLE = ("oracle_utility", "oracle_sg_iou", "oracle_entity_iou", "oracle_relation_iou")
WITHOUT_ORACLE = ("pickscore", "clip", "aesthetic", "hps")


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_every_table_is_written_with_the_right_numbers() -> None:
    study = make_study()
    written = tables.write(study)
    names = {path.name for path in written}
    assert names == {f"{t}.{k}" for t in tables.TABLES for k in ("csv", "md", "tex")} | {"costs.json"}
    rows = {row["arm"]: row for row in read(study.root / "tables/table1.csv")}
    assert list(rows) == [*study.experiments.comparison.arms, "DDPO", "D3PO", "Demon", "IterComp"]  # pyright: ignore
    dpo, base = (load_scores(study.root, "diffusion_dpo"), load_scores(study.root, "base"))
    assert dpo is not None and base is not None
    gain = (dpo.final("pickscore") - base.final("pickscore")).mean()
    assert float(rows["diffusion_dpo"]["pickscore_minus_base"]) == pytest.approx(gain, rel=1e-5)
    assert float(rows["diffusion_dpo"]["pickscore"]) == pytest.approx(dpo.final("pickscore").mean(), rel=1e-5)
    assert rows["diffusion_dpo"]["unet_evals"] == "10000"
    assert (rows["base"]["optimizer_steps"], rows["base"]["unet_evals"]) == ("0", "0")
    assert rows["inversion_dpo_paper"]["pickscore_minus_base_low"] == "0"
    assert rows["inversion_dpo_paper"]["oracle_utility_win_rate"] == "0.5"


def test_the_papers_values_have_their_own_columns() -> None:
    study = make_study()
    tables.write(study)
    rows = {row["arm"]: row for row in read(study.root / "tables/table1.csv")}
    assert rows["base"]["paper_pickscore_sdxl"] == "0.223"
    assert rows["diffusion_dpo"]["paper_aesthetic_sd15"] == "5.73"
    assert rows["inversion_dpo_implied"]["paper_pickscore_sdxl"] == ""  # not a method of the paper
    assert "| 0.227 / 0.212 | 0.340 / 0.324 | 6.05 / 5.73 |" in (study.root / "tables/table1.md").read_text()
    s5 = read(study.root / "tables/table_s5.csv")
    assert [row["row"] for row in s5] == ["q_single", "p_single", "p_single - q_single"]
    assert (s5[2]["paper_aesthetic_sdxl"], s5[2]["paper_pickscore_sd15"]) == ("0.06", "0.000")


def test_rows_of_the_paper_that_a_study_cannot_fill_stand_in_its_tables() -> None:
    config = make_config()
    some = config.experiments.model_copy(update={"comparison": ArmList(arms=["base", "sft"]), "q_vs_p": None})
    study = make_study(prompts=8, study=config.model_copy(update={"experiments": some}))
    tables.write(study)
    rows = {row["arm"]: row for row in read(study.root / "tables/table1.csv")}
    assert list(rows)[2:] == ["Diffusion-DPO", "DDPO", "D3PO", "Demon", "IterComp", "Inversion-DPO"]
    assert rows["DDPO"]["status"] == "not run: no weights" and rows["DDPO"]["pickscore"] == ""
    assert (rows["DDPO"]["paper_pickscore_sdxl"], rows["DDPO"]["paper_pickscore_sd15"]) == ("0.222", "")
    assert rows["Inversion-DPO"]["status"] == "not run: no arm"
    assert rows["Inversion-DPO"]["paper_aesthetic_sd15"] == "5.74"
    text = (study.root / "tables/table1.md").read_text()
    mean, spent = text.split("**Mean score**")[1].split("\n\n")[1], text.split("(SDXL / SD1.5)**")[1]
    assert "| IterComp | not run: no weights | not run: no weights |" in mean
    assert "| IterComp | not run: no weights | not run: no weights | not run: no weights | 0.232 / – |" in spent
    assert "no arm of this study: Diffusion-DPO, DDPO, D3PO, Demon, IterComp, Inversion-DPO." in text
    s5 = read(study.root / "tables/table_s5.csv")
    assert [(row["row"], row["status"]) for row in s5] == [
        ("Diffusion-DPO (q)", "not run: no arm"),
        ("Inversion-DPO (p)", "not run: no arm"),
    ]
    assert "0.228 / 0.212" in (study.root / "tables/table_s5.md").read_text()


def test_table_s5_holds_every_arm_against_the_first() -> None:
    config = make_config()
    arms = {**config.arms, "p_single_as_q": config.arms["p_single"]}
    judged = ArmList(arms=["q_single", "p_single", "p_single_as_q"])
    some = config.experiments.model_copy(update={"q_vs_p": judged})
    study = make_study(prompts=8, study=config.model_copy(update={"arms": arms, "experiments": some}))
    tables.write(study)
    rows = {row["row"]: row for row in read(study.root / "tables/table_s5.csv")}
    assert list(rows) == [*judged.arms, "p_single - q_single", "p_single_as_q - q_single"]
    evidence = load_evidence(study)
    for arm in judged.arms[1:]:
        gain = evidence.final(arm, "clip").mean() - evidence.final("q_single", "clip").mean()
        assert float(rows[f"{arm} - q_single"]["clip"]) == pytest.approx(gain, rel=1e-4)
        assert rows[arm]["paper_clip_sdxl"] == "0.341" and rows[f"{arm} - q_single"]["paper_clip_sdxl"] == "0.001"
    text = (study.root / "tables/table_s5.md").read_text()
    assert "| one timestep of p, at q's values minus one timestep of q, paired |" in text


def test_table_3_has_the_papers_rows_and_puts_them_beside_the_same_method_and_steps() -> None:
    config = make_config()
    families = {**config.experiments.inversion_steps, "inversion_dpo_paper": {20: "inversion_dpo_paper"}}
    some = config.experiments.model_copy(update={"inversion_steps": families})
    study = make_study(prompts=8, study=config.model_copy(update={"experiments": some}))
    tables.write(study)
    rows = {row["arm"]: row for row in read(study.root / "tables/table3.csv")}
    assert rows["inversion_dpo_paper"]["paper_clip_sdxl"] == "0.340" and rows["p_single"]["paper_clip_sdxl"] == ""
    assert rows["Inversion-DPO, N = 20, step 2000"]["status"] == "Inversion-DPO (Eq. 16)"
    assert rows["Inversion-DPO, N = 80, step 2000"]["status"] == "not run: no arm"
    assert rows["Inversion-DPO, N = 20, step 1000"]["paper_pickscore_sdxl"] == "0.2247"
    text = (study.root / "tables/table3.md").read_text()
    assert "| Inversion-DPO | 80 | 2000 | 0.232 | 0.341 | 6.24 | Inversion-DPO, Table 3 | not run: no arm |" in text
    assert "| Diffusion-DPO (retrained) | – | 2000 | 0.2245 | – | – | Inversion-DPO, section 5.4 | Figure 3 |" in text
    assert "0.2247 for Inversion-DPO with N = 20 at step 1,000" in (study.root / "tables/to_target.md").read_text()


def test_controls_and_inversion_steps() -> None:
    study = make_study()
    tables.write(study)
    control = {(r["arm"], r["scorer"]): r for r in read(study.root / "tables/controls.csv")}
    row = control["diffusion_dpo_shuffled", "oracle_utility"]
    assert float(row["true_minus_control_low"]) > 0
    assert control["diffusion_dpo", "oracle_utility"]["true_minus_control"] == ""
    steps = read(study.root / "tables/table3.csv")
    assert [r["inversion_steps"] for r in steps if r["family"] == "p_single"] == ["10", "20", "40"]
    assert steps[0]["pickscore_minus_fewest"] == "" and float(steps[2]["pickscore_minus_fewest"]) > 0


DISTRIBUTION = """method,seed,fid_standard,fid_laionsg_compat,kid,kid_subset_sd,precision,recall,images,\
reference_images,features,rank,reference_rank
base,0,8.5,14.5,0.2,0.1,0.9,0.8,24,100,64,23,64
diffusion_dpo,0,10,10,0.3,0.1,0.9,0.8,24,100,64,23,64
diffusion_dpo,1,11,12,0.4,0.3,0.7,0.8,24,100,64,22,64
diffusion_dpo,2,10.5,11,0.35,0.2,0.8,0.8,24,100,64,22,64
"""


def study_with_sets() -> StudyConfig:
    """A made-up study with distances of image sets, scene-graph scores and a task of two benchmarks."""
    config = make_config()
    arms = ["base", "diffusion_dpo", "inversion_dpo_code"]
    sets = {"arms": arms, "reference": {"world": "shapes", "images": 100}}
    experiments = config.experiments.model_copy(update={"distribution": DistributionConfig.model_validate(sets)})
    study = make_study(skip=("inversion_dpo_code",), study=config.model_copy(update={"experiments": experiments}))
    (study.root / "distribution.csv").write_text(DISTRIBUTION)
    for arm in ("base", "diffusion_dpo"):
        for path in (study.root / "scores" / arm).glob("*.parquet"):
            rows = pd.read_parquet(path)
            own = rows[rows["scorer"] == "oracle_utility"]
            worse = arm == "base"
            new = [
                own.assign(scorer=f"oracle_{name}", score=0.25 if worse else 0.75)
                for name in ("sg_iou", "entity_iou", "relation_iou", "dpg_score")
            ]
            new += [own[own["prompt_id"] < 10].assign(scorer="oracle_geneval_counting", score=0.0 if worse else 1.0)]
            write_scores(path, pd.concat([rows, *new], ignore_index=True))
    return study


def test_table2_has_sets_over_seeds_scene_graphs_and_the_paper() -> None:
    study = study_with_sets()
    tables.write(study)
    rows = {row["arm"]: row for row in read(study.root / "tables/table2.csv")}
    dpo = rows["diffusion_dpo"]
    assert [dpo[f"fid_standard{end}"] for end in ("", "_seeds_low", "_seeds_high")] == ["10.5", "10", "11"]
    assert (dpo["kid"], dpo["kid_subset_sd"], dpo["images"], dpo["rank"]) == ("0.35", "0.2", "24", "22")
    assert (dpo["sg_iou"], dpo["sg_iou_minus_base"], dpo["fid"]) == ("0.75", "0.5", "")
    paper = rows["Inversion-DPO on SDXL-SG"]
    assert (paper["source"], paper["fid"], paper["sg_iou"], paper["fid_standard"]) == ("paper", "25.1", "0.354", "")
    assert (rows["R3CD"]["fid"], paper["entity_iou"], paper["status"]) == ("27.0", "0.830", "not run: no weights")
    assert dpo["status"] == "ok" and rows["inversion_dpo_code"]["status"].startswith("not run: invdpo train")
    assert rows["inversion_dpo_code"]["fid_standard"] == rows["inversion_dpo_code"]["sg_iou"] == ""
    text = (study.root / "tables/table2.md").read_text()
    assert "| Diffusion-DPO | 10.5 (10 to 11) | 11 (10 to 12) |" in text and "| Base | 8.5 | 14.5 |" in text
    assert "| Inversion-DPO (released code) | not run | not run |" in text
    assert "| R3CD | not stated | 27.0 | 0.342 | 0.803 | 0.715 | not run: no weights |" in text
    assert "CompSGen Bench of LAION-SG; number: 20838 (very likely: inferred" in text
    assert "24 images of each training seed against 100 reference images" in text
    assert "rank 22 to 23 (not full: more than 64 images are needed)" in text


def test_sets_of_images_are_not_averaged_over_fewer_seeds() -> None:
    study = study_with_sets()
    (study.root / "distribution.csv").write_text(DISTRIBUTION.replace("diffusion_dpo,1", "diffusion_dpo,7"))
    table = compositional.table2(load_evidence(study))
    printing.write_table(Path(), "table2", table)
    rows = {row["arm"]: row for row in read(Path("table2.csv"))}
    assert rows["diffusion_dpo"]["fid_standard"] == "" and rows["diffusion_dpo"]["sg_iou"] == "0.75"
    text = Path("table2.md").read_text()
    assert "| Diffusion-DPO | seed 1 missing | seed 1 missing |" in text
    assert rows["diffusion_dpo"]["status"].startswith("sets of images, seed 1 missing: invdpo distribution")
    assert "`invdpo distribution --study config/toy.yaml`" in text


def test_composition_table_counts_only_prompts_that_ask() -> None:
    study = study_with_sets()
    evidence = load_evidence(study)
    assert evidence.scorers == [*ORACLE, *WITHOUT_ORACLE], "tasks are no columns of the other tables"
    assert np.isnan(evidence.scores["base"].tasks["geneval_counting"]).sum() == 14
    tables.write(study)
    rows = {(r["arm"], r["benchmark"], r["task"]): r for r in read(study.root / "tables/composition.csv")}
    assert rows["diffusion_dpo", "geneval", "counting"]["prompts"] == "10"
    assert rows["diffusion_dpo", "geneval", "overall"]["score"] == "1"
    assert rows["base", "dpg", "score"]["score"] == "25"
    text = (study.root / "tables/composition.md").read_text()
    assert "| Inversion-DPO (released code) | not run | not run |" in text and "GenEval position" in text


@pytest.mark.parametrize("fault", ["a seed is missing", "twice"])
def test_task_scores_must_be_complete(fault: str) -> None:
    study = study_with_sets()
    path = study.root / "scores/diffusion_dpo/seed1.parquet"
    rows = pd.read_parquet(path)
    counted = rows[rows["scorer"] == "oracle_geneval_counting"]
    broken = (
        rows.drop(counted.index[-1:]) if fault == "a seed is missing" else pd.concat([rows, counted], ignore_index=True)
    )
    write_scores(path, broken)
    with pytest.raises(InvdpoError, match="geneval_counting is missing|twice"):
        load_evidence(study)


def test_what_has_not_run_says_so() -> None:
    study = make_study(skip=("inversion_dpo_code", "q_single", "diffusion_dpo_swapped", "p_single_n10"))
    tables.write(study)
    rows = {row["arm"]: row for row in read(study.root / "tables/table1.csv")}
    assert (
        rows["inversion_dpo_code"]["status"].startswith("not run: invdpo train")
        and rows["inversion_dpo_code"]["pickscore"] == ""
    )
    assert rows["diffusion_dpo"]["status"] == "ok"
    assert read(study.root / "tables/table_s5.csv")[2]["status"].startswith("not run: invdpo train")
    assert "not run" in (study.root / "tables/controls.md").read_text()
    figures.write(study)


def test_nothing_run_at_all_still_gives_every_file() -> None:
    study = make_study(skip=tuple(make_config().arms))
    tables.write(study)
    assert len(figures.write(study)) == 12
    assert all(row["status"].startswith("not run: ") for row in read(study.root / "tables/table1.csv"))


def test_a_score_in_another_unit_is_in_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPREAD, "pickscore_scaled", 0.2)
    study = make_study(scorers=(*WITHOUT_ORACLE, "pickscore_scaled"))
    evidence = load_evidence(study)
    assert evidence.has("base", "pickscore_scaled") and evidence.scorers == list(WITHOUT_ORACLE)


def test_a_study_without_an_oracle_uses_the_held_out_score() -> None:
    study = make_study(scorers=WITHOUT_ORACLE)
    evidence = load_evidence(study)
    assert evidence.primary == "hps"
    assert evidence.scorers == list(WITHOUT_ORACLE)
    tables.write(study)
    row = read(study.root / "tables/table1.csv")[0]
    assert "hps_win_rate" in row and not any("oracle" in column for column in row)


def test_same_scores_give_the_same_bytes() -> None:
    study = make_study()

    def write() -> dict[Path, bytes]:
        evidence = load_evidence(study)
        drawn = figures.save(figures.curves(evidence, "pickscore"), study.root / "figures", "fig3")
        return {path: path.read_bytes() for path in tables.write(study) + drawn}

    assert write() == write()


def test_seconds_and_memory_are_in_no_table() -> None:
    study = make_study()
    for path in tables.write(study):
        assert ("seconds" in path.read_text()) == (path.name == "costs.json")


def test_tex_is_balanced_and_escaped() -> None:
    assert printing.escape_tex("at least 3 ∞ θ₀ √2") == r"at least 3 $\infty$ $\theta$\textsubscript{0} $\surd$2"
    assert printing.escape_tex(r"a_b & 5% {x} \y ~^$#<") == (
        r"a\_b \& 5\% \{x\} \textbackslash{}y \textasciitilde{}\textasciicircum{}\$\#\textless{}"
    )
    study = make_study()
    tables.write(study)
    for path in (study.root / "tables").glob("*.tex"):
        text = re.sub(r"^%.*$", "", path.read_text(), flags=re.MULTILINE)
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") > 0
        bare = text.replace(r"\{", "").replace(r"\}", "")
        assert bare.count("{") == bare.count("}")
        for block in re.findall(r"\\begin\{tabular\}\{(l?r*)\}(.*?)\\end", text, flags=re.DOTALL):
            columns = len(block[0])
            for line in block[1].splitlines():
                if line.endswith(r"\\"):
                    assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
        assert not re.search(r"(?<!\\)[_#$%]", text)


@pytest.mark.parametrize(
    ("interval", "sign", "text"),
    [
        (Interval(0.21342, 0.2101, 0.2170, 0, 3, 9), False, "0.2134 [0.2101, 0.2170]"),
        (Interval(1.5, 1.2, 1.9, 0, 3, 9), True, "+1.50 [+1.20, +1.90]"),
        (Interval(0.0, 0.0, 0.0, 0, 3, 9), True, "0 [0, 0]"),
        (Interval(1.0, 1.0 - 1e-15, 1.0, 0, 3, 9), False, "1 [1, 1]"),
        (Interval(6051.2, 5900.0, 6200.0, 0, 3, 9), False, "6051 [5900, 6200]"),
        (Interval(0.468, 0.43749999999999994, 0.5, 0, 3, 9), False, "0.468 [0.438, 0.500]"),  # 7/16 on some processors
    ],
)
def test_intervals_in_print(interval: Interval, sign: bool, text: str) -> None:
    assert printing.format_interval(interval, sign) == text


def test_incomplete_scores_are_refused() -> None:
    study = make_study()
    path = study.root / "scores/sft/seed1.parquet"
    frame = pd.read_parquet(path)
    write_scores(path, frame.iloc[:-3])
    with pytest.raises(InvdpoError, match="sft.*missing"):
        load_evidence(study)
    path.write_bytes(b"not parquet")
    with pytest.raises(InvdpoError, match=r"seed1\.parquet"):
        load_evidence(study)


def test_different_prompts_are_never_paired() -> None:
    study = make_study()
    for path in (study.root / "scores/sft").glob("*.parquet"):
        frame = pd.read_parquet(path)
        write_scores(path, frame[frame["prompt_id"] != 3])
    with pytest.raises(InvdpoError, match="different prompts"):
        load_evidence(study).paired("sft", "base", "clip")


def test_a_missing_seed_is_said_in_the_cell_and_averages_nothing() -> None:
    study = make_study()
    (study.root / "scores/diffusion_dpo/seed2.parquet").unlink()
    tables.write(study)
    rows = {row["arm"]: row for row in read(study.root / "tables/table1.csv")}
    row, command = rows["diffusion_dpo"], "invdpo evaluate --study config/toy.yaml --arm diffusion_dpo --seed 2"
    assert row["status"] == f"seed 2 missing: {command}"
    assert row["pickscore"] == row["unet_evals"] == "" and rows["sft"]["status"] == "ok"
    text = (study.root / "tables/table1.md").read_text()
    assert f"\n\nDiffusion-DPO, seed 2 missing: {command}\n\n" in text
    assert "| Diffusion-DPO | seed 2 missing | seed 2 missing |" in text
    assert "Diffusion-DPO: seed 2 missing" not in text and "| SFT | not run" not in text
    claims.write(study)
    verdict = next(row for row in ledger.read_verdicts(study.root / "claims.json") if row.id == "dpo_above_base")
    assert verdict.verdict == ledger.NOT_RUN and command in verdict.reason and verdict.value is None
    (study.root / "runs/diffusion_dpo/seed2/run.json").unlink()
    lack = load_evidence(study).lack("diffusion_dpo")
    assert lack is not None and lack.command.startswith("invdpo train --study config/toy.yaml") and "&&" in lack.command


def test_a_missing_scorer_and_a_missing_log_are_said() -> None:
    study = make_study()
    for path in (study.root / "scores/sft").glob("*.parquet"):
        frame = pd.read_parquet(path)
        write_scores(path, frame[frame["scorer"] != "clip"])
    (study.root / "runs/q_single/seed1/train.jsonl").unlink()
    tables.write(study)
    row = read(study.root / "tables/table1.csv")[1]
    assert row["arm"] == "sft" and row["clip"] == "" and row["pickscore"] != ""
    assert row["status"] == "no CLIP: invdpo evaluate --study config/toy.yaml --arm sft"
    text = (study.root / "tables/table1.md").read_text()
    assert "SFT, no CLIP: invdpo evaluate" in text and "| no CLIP |" in text
    spent = {row["arm"]: row["unet_evals"] for row in read(study.root / "tables/costs.csv")}
    assert spent["q_single"] == "" and spent["p_single"] != ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config_hash": "feedfeedfeedfeed"}, r"scores/sft.*configurations.*seed1.parquet"),
        ({"sampling": {"steps": 6}}, r"scores/sft.*settings of sampling.*seed1.parquet"),
    ],
)
def test_scores_of_different_origin_in_one_folder_are_refused(change: dict, words: str) -> None:
    study = make_study()
    path = study.root / "scores/sft/seed1.parquet"
    noted = {"config_hash": study.arm("sft").hash, "sampling": study.sampling.model_dump(mode="json")}
    write_scores(path, pd.read_parquet(path), noted | change)
    with pytest.raises(InvdpoError, match=words):
        load_evidence(study)


def test_other_versions_of_a_scorer_are_refused_within_an_arm_and_between_arms() -> None:
    study = make_study()
    files = sorted((study.root / "scores/sft").glob("*.parquet"))
    for count, path in enumerate(files, start=1):
        frame = pd.read_parquet(path)
        frame.loc[frame["scorer"] == "clip", "scorer_version"] = "2"
        write_scores(path, frame)
        words = "seed0.parquet" if count < len(files) else "arms scored by different versions of clip.*sft"
        with pytest.raises(InvdpoError, match=words):
            load_evidence(study)


def test_scores_of_another_configuration_or_sampling_than_the_studys_are_refused() -> None:
    study = make_study()
    other = study.model_copy(update={"sampling": study.sampling.model_copy(update={"steps": 9})})
    with pytest.raises(InvdpoError, match="sampled with.*invdpo evaluate"):
        load_evidence(other)
    other = study.model_copy(update={"training": study.training.model_copy(update={"batch": 4})})
    with pytest.raises(InvdpoError, match="another configuration of this arm.*invdpo train"):
        load_evidence(other)


def test_scores_of_other_seeds_are_left_out() -> None:
    study = make_study(seeds=3)
    found = load_scores(study.root, "sft", (0, 2))
    assert found is not None and found.seeds == (0, 2)


def test_titles() -> None:
    assert arm_title("inversion_dpo_code_shuffled") == "Inversion-DPO (released code), labels shuffled"
    assert arm_title("p_single_n10") == "one timestep of p, N = 10"
    assert arm_title("my_method") == "my_method"
    assert arm_title("p_single_as_q") == "one timestep of p, at q's values"
    assert arm_title("inversion_dpo_minus_as_paper").startswith(arm_title("inversion_dpo_minus_rounded"))


def test_labels_are_moved_apart_but_stay_inside() -> None:
    placed = figures.spread_labels([0.5, 0.5, 0.52, 0.0, 1.0], [0.1] * 5, 0.0, 1.0)
    ordered = np.sort(placed)
    assert (np.diff(ordered) >= 0.1 - 1e-9).all()
    assert ordered[0] >= 0 and ordered[-1] <= 1
    assert placed[3] == 0.0 and placed[4] == 1.0
    assert figures.spread_labels([0.2, 0.8], [0.1] * 2, 0.0, 1.0) == [0.2, 0.8]
    assert figures.spread_labels([0.5, 0.5], [0.1, 0.3], 0.0, 1.0) == pytest.approx([0.4, 0.6]), "they touch"


def words_below(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def test_an_arm_without_a_curve_is_named_below_the_curves() -> None:
    study = make_study(prompts=8)
    assert "Not drawn" not in words_below(figures.curves(load_evidence(study), "pickscore"))
    (study.root / "scores/diffusion_dpo/seed2.parquet").unlink()
    for path in (study.root / "scores/sft").glob("*.parquet"):
        frame = pd.read_parquet(path)
        write_scores(path, frame[frame["scorer"] != "pickscore"])
    (study.root / "runs/inversion_dpo_code/seed1/train.jsonl").unlink()
    evidence = load_evidence(study)
    figure = figures.curves(evidence, "pickscore")
    text = words_below(figure)
    assert "Not drawn: SFT (no PickScore); Diffusion-DPO (seed 2 missing)." in text
    assert "Not drawn whole against evaluations and seconds: Inversion-DPO (released code)" in text
    assert "SFT" not in words_below(figures.curves(evidence, "clip")).split("Not drawn whole")[0]
    assert "Diffusion-DPO (seed 2 missing)" in words_below(figures.controls(evidence))
    labels = [text.get_text() for text in figure.axes[2].texts]
    assert "Inversion-DPO (released code)" in labels and "Diffusion-DPO" not in labels
    colour = figures.method_colour(study, "inversion_dpo_code")
    drawn = [sum(line.get_color() == colour for line in panel.lines) for panel in figure.axes]
    assert drawn[0] == 2 and drawn[1] == 1, "its published values have a log"
    other = make_config().model_copy(update={"study": "other"})
    evidence = load_evidence(make_study(skip=("p_single_n10",), prompts=8, study=other))
    assert "Not drawn: one timestep of p, N = 10 (not run)." in words_below(figures.inversion_steps(evidence))


def test_figure_3_has_the_papers_numbers_in_words() -> None:
    evidence = load_evidence(make_study(prompts=8))
    text = words_below(figures.curves(evidence, "pickscore"))
    assert "0.2247 for Inversion-DPO with N = 20 at step 1,000; 0.2245 for Diffusion-DPO (retrained) at step" in text
    assert "not on these axes" in text
    assert "0.2247" not in words_below(figures.curves(evidence, "clip"))


def test_arms_of_one_method_are_told_apart_by_their_lines() -> None:
    config = make_config()
    arms = {**config.arms, "p_single_as_q": config.arms["p_single"]}
    compared = ArmList(arms=["base", "p_single", "p_single_as_q"])
    some = config.experiments.model_copy(update={"comparison": compared})
    study = make_study(prompts=8, study=config.model_copy(update={"arms": arms, "experiments": some}))
    figure = figures.curves(load_evidence(study), "clip")
    samples = {(line.get_color(), line.get_marker(), line.get_linestyle())
               for line in figure.axes[2].lines if line.get_marker() != "None"}  # fmt: skip
    assert len({colour for colour, *_ in samples}) == 1 and len(samples) == 2


def test_publish_copies_and_rewrites_the_readme() -> None:
    study = make_study()
    readme = Path("README.md")
    readme.write_text(f"# Title\n{publish.BEGIN}\nold\n{publish.END}\nrest\n")
    with pytest.raises(InvdpoError, match="Not made yet"):
        publish.publish(study)
    tables.write(study)
    claims.write(study)
    for name in ("fig3.pdf", "fig3.png"):
        (study.root / "figures").mkdir(exist_ok=True)
        (study.root / "figures" / name).write_text("a drawing")
    (study.root / "experiments" / "precision").mkdir(parents=True)
    (study.root / "experiments" / "precision" / "latents.csv").write_text("pair\n")
    written = publish.publish(study)
    again = publish.publish(study)
    assert written == again
    names = {str(path.relative_to("results/reference/toy")) for path in written}
    assert {"tables/table1.csv", "figures/fig3.pdf", "claims.json", "costs.json", "provenance.json"} <= names
    assert {"scores/diffusion_dpo/seed2.parquet", "experiments/precision/latents.csv"} <= names
    assert load_scores(Path("results/reference/toy"), "sft") is not None
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nrest\n") and "old" not in text
    assert "**supported**" in text
    assert (Path("paper_figures") / "fig3.png").exists() and (Path("paper_figures") / "table3.tex").exists()
    readme.write_text("no marks")
    with pytest.raises(InvdpoError, match="verdicts:begin"):
        publish.publish(study)


def test_another_study_is_published_beside_the_one_that_judges_the_claims() -> None:
    first = make_study()
    second = first.model_copy(
        update={
            "study": "methods",
            "claims": None,
            "experiments": first.experiments.model_copy(update={"inversion_steps": {}, "q_vs_p": None}),
        }
    )
    make_study(study=second)
    readme = Path("README.md")
    readme.write_text(f"# Title\n{publish.BEGIN}\nold\n{publish.END}\n")
    for study in (first, second):
        tables.write(study)
        (study.root / "figures").mkdir()
        for name in ("fig3.png", "inversion_steps.png"):
            (study.root / "figures" / name).write_text(study.study)
    claims.write(first)

    written = publish.publish(second)
    names = {str(path.relative_to("results/reference/methods")) for path in written}
    assert {"tables/table1.csv", "tables/controls.md", "figures/fig3.png", "provenance.json"} <= names
    assert not [name for name in names if name.startswith(("claims", "tables/table3", "tables/table_s5"))]
    shown = {path.name for path in Path("paper_figures/methods").iterdir()}
    assert {"table1.tex", "fig3.png"} <= shown and not shown & {"table3.tex", "table_s5.tex", "inversion_steps.png"}
    assert "old" in readme.read_text()

    publish.publish(first)
    verdicts = readme.read_text()
    assert "old" not in verdicts
    assert {path.name for path in Path("paper_figures/methods").iterdir()} == shown
    assert Path("paper_figures/inversion_steps.png").is_file() and Path("paper_figures/table3.tex").is_file()
    publish.publish(second)
    assert readme.read_text() == verdicts
    assert Path("paper_figures/fig3.png").read_text() == "toy"
    assert Path("paper_figures/methods/fig3.png").read_text() == "methods"
