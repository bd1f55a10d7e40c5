# The study with people: what they will see is frozen with the results; their votes are counted where there are any.

if study.user_study is not None:
    # The app is no part of the installed package.
    sys.path.append(str(workflow.basedir))

    from user_study_app.settings import Places, read_settings

    try:
        JUDGED = sorted({arm for group in read_settings(study).groups for arm in group.arms})
    except InvdpoError as error:
        raise WorkflowError(str(error))

    VOTED = Places(study).voted

    # The files of the arms that raters compare, and hashes of the app's code as of the package's in common.smk.
    SHOWN = {
        folder: [file for file in every_evaluation(folder) if Path(file).parent.name in JUDGED]
        for folder in ("images", "scores")
    }
    FREEZING, ANALYSING = (
        code_hash(tuple(f"../../user_study_app/{module}" for module in modules))[:16]
        for modules in (("bundle", "schedule", "settings"), ("analysis", "statistics", "settings"))
    )

    # Without votes, Table S4 has the paper's and says how to get one's own.
    SHOWS = {"table_s4": "Table S4: votes of people"}
    if VOTED:
        SHOWS["user_study"] = "Reliability of the votes"

    rule user_study_bundle:
        input:
            images=SHOWN["images"],
            scores=SHOWN["scores"],
        output:
            # Whether a new bundle takes the old one's place depends on what is there: see bundle.py.
            update("<results>/user_study/key.json"),
            update("<results>/user_study/bundle/manifest.json"),
            update("<results>/user_study/bundle/schedule.json"),
            update("<results>/user_study/bundle/consent.json"),
        log:
            "<logs>/user_study_bundle.log",
        params:
            study=STUDY,
            key=digest(SETTINGS["user_study"], SETTINGS["seeds"]),
            code=FREEZING,
            lock=LOCK,
        message:
            "freezing what raters of {study.study} will see"
        shell:
            "invdpo study bundle --study {params.study} 2>&1 | tee {log}"

    rule user_study_analysis:
        input:
            # Of the bundle that the votes name. It is no input: a changed study must not train again to count votes.
            votes="<results>/user_study/votes.csv" if VOTED else [],
            published="src/invdpo/evidence/published.csv",
        output:
            csv=[
                shown(title, f"<results>/tables/{name}.csv", "report/user_study.rst", "User study")
                for name, title in SHOWS.items()
            ],
            text=expand("<results>/tables/{name}.{format}", name=SHOWS, format=["md", "tex"]),
            summary="<results>/tables/user_study.json" if VOTED else [],
        log:
            "<logs>/user_study_analysis.log",
        params:
            study=STUDY,
            key=digest(SETTINGS["user_study"]["groups"], [SETTINGS["arms"][arm] for arm in JUDGED]),
            code=ANALYSING,
            package=code_hash(("evidence/load", "evidence/paper", "evidence/printing", "evidence/statistics", "evidence/votes"))[:16],
            lock=LOCK,
        message:
            "Table S4 of {study.study}"
        shell:
            "invdpo study analyse --study {params.study} 2>&1 | tee {log}"
