# The study as a graph: preferences -> train -> evaluate -> tables, figures, claims, MLflow.
#
#   snakemake --configfile config/shapes.yaml            run everything (the default profile is loaded by itself)
#   snakemake --configfile config/shapes.yaml -n         say what would run, and why
#   snakemake results/shapes/tables/table1.csv           make one file and whatever it needs
#   snakemake tables --forcerun tables                   make one stage again
#   snakemake tables --configfile config/smoke.yaml      targets stand before --configfile, which takes all that follows
#   snakemake --rulegraph | dot -Tpdf > rules.pdf        draw the graph
#
# Every job calls one `invdpo` command, which also runs without Snakemake.

from snakemake.utils import min_version

min_version("9.27")

# --configfile merges into what a `configfile:` directive loads, so a default study may be named only when none is given.
if "study" not in config:

    configfile: "config/shapes.yaml"


# For --sdm apptainer: the image of envs/Dockerfile, built as its head says.
container: "invdpo.sif"


report: "rules/report/study.rst"


include: "rules/common.smk"


pathvars:
    results=str(study.root),
    logs=f"logs/{study.study}",
    benchmarks=f"{study.root}/benchmarks",


wildcard_constraints:
    arm="|".join(map(re.escape, study.arms)),


localrules:
    all,
    scores,
    speed,


include: "rules/own_samples.smk"
include: "rules/preferences.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/evidence.smk"
include: "rules/experiments.smk"
include: "rules/tune.smk"
include: "rules/assets.smk"
include: "rules/user_study.smk"
include: "rules/report.smk"


rule all:
    default_target: True
    input:
        rules.tables.output,
        rules.speed.output,
        rules.figures.output,
        rules.claims.output if study.claims else [],
        rules.model_cards.output,
        rules.mlflow.output,
        rules.report.output,
        rules.present.output if STUDIED else [],
        rules.user_study_bundle.output if study.user_study else [],
        rules.user_study_analysis.output if study.user_study else [],


onstart:
    write_study()


onsuccess:
    # make reproduce says it itself, also when there was nothing to do.
    if os.environ.get("INVDPO_PLACES") != "later":
        print(places(study))


onerror:
    print(how_to_resume(log))
