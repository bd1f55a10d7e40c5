# One HTML page that shows it all; `make report` writes Snakemake's own beside it.


rule report:
    input:
        tables=rules.tables.output,
        speed=rules.speed.output,
        claims=rules.claims.output if study.claims else [],
        experiments=rules.present.output if STUDIED else [],
        measured=expand("<results>/experiments/{name}/provenance.json", name=STUDIED),
        votes=rules.user_study_analysis.output if study.user_study else [],
        scores=SCORES,
        images=IMAGES,
        runs=RUNS,
        curves=CURVES,
        page=local("src/invdpo/evidence/report_page"),
    output:
        "<results>/report.html",
    log:
        "<logs>/report.log",
    params:
        study=STUDY,
        key=EVIDENCE_KEY,
        # No input: it is a target of `make tune`, which this page must not start.
        tuned=digest(GRID.read_text() if GRID.is_file() else None),
        code=CODE["report"],
        lock=LOCK,
    message:
        "the report of {study.study}"
    shell:
        "invdpo report --study {params.study} --log {log}"
