# From scores and runs to tables, figures, verdicts and the MLflow database: one rule a stage, all its files at once.


rule tables:
    input:
        scores=SCORES,
        runs=RUNS,
        curves=CURVES,
        distribution="<results>/distribution.csv" if DISTRIBUTION else [],
        published="src/invdpo/evidence/published.csv",
    output:
        csv=[shown(TABLES[name], f"<results>/tables/{name}.csv", "report/tables.rst", "Tables") for name in TABLES],
        text=expand("<results>/tables/{name}.{format}", name=TABLES, format=["md", "tex"]),
        costs="<results>/costs.json",
    log:
        "<logs>/tables.log",
    params:
        study=STUDY,
        key=EVIDENCE_KEY,
        code=CODE["tables"],
        lock=LOCK,
    message:
        "tables of {study.study}"
    shell:
        "invdpo tables --study {params.study} --log {log}"


# Measured by `make bench`, not by a study: shown in its report beside the costs.
rule speed:
    input:
        "results/reference/benchmarks/cpu-2-threads.csv",
    output:
        shown("speed and memory of the code", "<results>/tables/speed.csv", "report/speed.rst", "Tables"),
    log:
        "<logs>/speed.log",
    message:
        "the speed table of {study.study}"
    shell:
        "cp {input} {output} 2> {log}"


rule figures:
    input:
        scores=SCORES,
        images=IMAGES,
        runs=RUNS,
        curves=CURVES,
        published="src/invdpo/evidence/published.csv",
    output:
        png=[shown(FIGURES[name], f"<results>/figures/{name}.png", "report/figures.rst", "Figures") for name in FIGURES],
        pdf=expand("<results>/figures/{name}.pdf", name=FIGURES),
    log:
        "<logs>/figures.log",
    params:
        study=STUDY,
        key=EVIDENCE_KEY,
        code=CODE["figures"],
        lock=LOCK,
    message:
        "figures of {study.study}"
    shell:
        "invdpo figures --study {params.study} --log {log}"


# experiment -> its files that claims are judged by
JUDGED_BY = {"precision": ["agreement", "latents"], "audit": ["gradients"], "inversion_error": ["errors"]}


rule claims:
    input:
        scores=SCORES,
        runs=RUNS,
        curves=CURVES,
        experiments=[
            f"<results>/experiments/{name}/{file}.csv"
            for name, files in JUDGED_BY.items()
            if name in STUDIED
            for file in files
        ],
        distribution=["<results>/distribution.csv"] if DISTRIBUTION else [],
        votes=TABLE_S4,
        claims=local(study.claims),
    output:
        json="<results>/claims.json",
        text=shown("Every claim", "<results>/claims.md", "report/claims.rst", "Verdicts"),
    log:
        "<logs>/claims.log",
    params:
        study=STUDY,
        key=EVIDENCE_KEY,
        code=CODE["claims"],
        lock=LOCK,
    message:
        "verdicts of {study.study}"
    shell:
        "invdpo claims --study {params.study} --log {log}"


rule model_cards:
    input:
        expand("<results>/runs/{arm}/seed{seed}/{part}", arm=TRAINED, seed=study.seeds, part=["run.json", "unet"]),
    output:
        expand("<results>/runs/{arm}/seed{seed}/README.md", arm=TRAINED, seed=study.seeds),
    log:
        "<logs>/model_cards.log",
    params:
        study=STUDY,
        code=CODE["model_cards"],
    message:
        "model cards of {study.study}"
    shell:
        "invdpo model-cards --study {params.study} --log {log}"


rule mlflow:
    input:
        scores=SCORES,
        runs=RUNS,
        curves=CURVES,
        claims=rules.claims.output.json if study.claims else [],
        tables=[*rules.tables.output.csv, *rules.tables.output.text, *rules.speed.output],
        figures=rules.figures.output.png,
        experiments=[
            *expand("<results>/tables/{name}.{format}", name=STUDIED, format=["csv", "md"]),
            *expand("<results>/figures/{name}.png", name=[name for _, drawn in STUDIED.values() for name in drawn]),
        ],
        votes=TABLE_S4,
    output:
        # The import replaces only runs that changed, so the database of the last time is kept.
        update("<results>/mlflow.db"),
    log:
        "<logs>/mlflow.log",
    resources:
        mlflow=1,
    params:
        study=STUDY,
        key=EVIDENCE_KEY,
        code=CODE["mlflow"],
        lock=LOCK,
    message:
        "importing the runs of {study.study} into MLflow"
    shell:
        "invdpo mlflow --study {params.study} --log {log}"
