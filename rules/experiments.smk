# Experiments on pairs that no run was trained on: one job each, and one for all their tables and figures.
# A study has those that its `experiments:` names.


if "inversion_error" in STUDIED:

    rule inversion_error:
        input:
            rules.preferences.output,
            base=local(study.base, study.vae),
            held_out=local(study.experiments.held_out),
            scorers=scorer_files(),
        output:
            errors="<results>/experiments/inversion_error/errors.csv",
            levels="<results>/experiments/inversion_error/levels.csv",
            pictures="<results>/experiments/inversion_error/pictures.parquet",
            provenance="<results>/experiments/inversion_error/provenance.json",
        log:
            "<logs>/experiments/inversion_error.log",
        benchmark:
            "<benchmarks>/experiments/inversion_error.jsonl"
        threads: STAGE_THREADS
        resources:
            gpu=GPU,
        params:
            study=STUDY,
            key=experiment_key("inversion_error"),
            code=CODE["experiments"],
            lock=LOCK,
        message:
            "how far inversion and sampling disagree"
        shell:
            "invdpo experiment inversion_error --study {params.study} --threads {threads} --log {log}"


if "precision" in STUDIED:

    rule precision:
        input:
            rules.preferences.output,
            base=local(study.base, study.vae),
            held_out=local(study.experiments.held_out),
            runs=runs_of("precision", ["run.json", "checkpoints"]),
        output:
            latents="<results>/experiments/precision/latents.csv",
            agreement="<results>/experiments/precision/agreement.csv",
            provenance="<results>/experiments/precision/provenance.json",
        log:
            "<logs>/experiments/precision.log",
        benchmark:
            "<benchmarks>/experiments/precision.jsonl"
        threads: STAGE_THREADS
        resources:
            gpu=GPU,
        params:
            study=STUDY,
            key=experiment_key("precision"),
            code=CODE["experiments"],
            lock=LOCK,
        message:
            "surrogate log-ratios against true ones"
        shell:
            "invdpo experiment precision --study {params.study} --threads {threads} --log {log}"


if "audit" in STUDIED:

    rule audit:
        input:
            rules.preferences.output,
            base=local(study.base, study.vae),
            held_out=local(study.experiments.held_out),
            prompts=local(study.prompts),
            scorers=scorer_files(),
            runs=runs_of("audit", ["run.json", "checkpoints"]),
        output:
            gradients="<results>/experiments/audit/gradients.csv",
            summary="<results>/experiments/audit/summary.csv",
            rewards="<results>/experiments/audit/rewards.csv",
            provenance="<results>/experiments/audit/provenance.json",
        log:
            "<logs>/experiments/audit.log",
        benchmark:
            "<benchmarks>/experiments/audit.jsonl"
        threads: STAGE_THREADS
        resources:
            gpu=GPU,
        params:
            study=STUDY,
            key=experiment_key("audit"),
            code=CODE["experiments"],
            lock=LOCK,
        message:
            "where the gradients point"
        shell:
            "invdpo experiment audit --study {params.study} --threads {threads} --log {log}"


if "preference_accuracy" in STUDIED:
    JUDGEMENTS = study.experiments.preference_accuracy

    rule preference_accuracy:
        input:
            votes=local(JUDGEMENTS.votes or study.experiments.held_out),
            validation=local(JUDGEMENTS.validation),
            scorers=scorer_files(),
        output:
            votes="<results>/experiments/preference_accuracy/votes.csv",
            accuracy="<results>/experiments/preference_accuracy/accuracy.csv",
            provenance="<results>/experiments/preference_accuracy/provenance.json",
        log:
            "<logs>/experiments/preference_accuracy.log",
        benchmark:
            "<benchmarks>/experiments/preference_accuracy.jsonl"
        threads: STAGE_THREADS
        resources:
            gpu=GPU,
        params:
            study=STUDY,
            key=experiment_key("preference_accuracy"),
            code=CODE["experiments"],
            lock=LOCK,
        message:
            "how the scores agree with held-out votes"
        shell:
            "invdpo experiment preference_accuracy --study {params.study} --threads {threads} --log {log}"


if "weight_distances" in STUDIED:
    COMPARED_ARMS = study.experiments.weight_distances.arms
    HELD_AGAINST = study.experiments.weight_distances.against

    rule weight_distances:
        input:
            base=sorted({file for arm in COMPARED_ARMS for file in own_base(arm)}),
            against=local(*HELD_AGAINST.values()),
            runs=runs_of("weight_distances", ["run.json", "checkpoints"]),
        output:
            tensors="<results>/experiments/weight_distances/tensors.parquet",
            summary="<results>/experiments/weight_distances/summary.csv",
            against=["<results>/experiments/weight_distances/against.csv"] if HELD_AGAINST else [],
            provenance="<results>/experiments/weight_distances/provenance.json",
        log:
            "<logs>/experiments/weight_distances.log",
        benchmark:
            "<benchmarks>/experiments/weight_distances.jsonl"
        params:
            study=STUDY,
            key=experiment_key("weight_distances"),
            code=CODE["experiments"],
            lock=LOCK,
        message:
            "how far training moved the weights"
        shell:
            "invdpo experiment weight_distances --study {params.study} --log {log}"


if STUDIED:

    rule present:
        input:
            [getattr(rules, name).output for name in STUDIED],
        output:
            csv=[
                shown(title, f"<results>/tables/{name}.csv", "report/experiments.rst", "Experiments")
                for name, (title, _) in STUDIED.items()
            ],
            text=expand("<results>/tables/{name}.{format}", name=STUDIED, format=["md", "tex"]),
            png=[
                shown(title, f"<results>/figures/{figure}.png", f"report/{name}.rst", "Experiments")
                for name, (_, figures) in STUDIED.items()
                for figure, title in figures.items()
            ],
            pdf=[f"<results>/figures/{figure}.pdf" for _, figures in STUDIED.values() for figure in figures],
        log:
            "<logs>/present.log",
        params:
            study=STUDY,
            key=digest({name: SETTINGS["experiments"][name] for name in STUDIED}, SETTINGS["arms"], SETTINGS["seeds"]),
            code=CODE["present"],
            lock=LOCK,
        message:
            "tables and figures of the experiments of {study.study}"
        shell:
            "invdpo present --study {params.study} --log {log}"
