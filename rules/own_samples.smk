# Preference pairs of the base's own samples, where a study has `own_samples`: drawn, scored and ranked into the file that
# its `preferences` name. The images themselves are undeclared, because Snakemake deletes the declared outputs of a failed
# job: a stopped one goes on behind its last whole batch, and --replace deletes images of other settings.


if OWN_SAMPLES:

    rule sample:
        input:
            base=local(study.base, study.vae),
            prompts=local(OWN_SAMPLES.prompts),
        output:
            "<results>/own_samples/images/prompts.csv",
        log:
            "<logs>/own_samples/sample.log",
        benchmark:
            "<benchmarks>/own_samples/sample.jsonl"
        threads: STAGE_THREADS
        resources:
            gpu=GPU,
        params:
            study=STUDY,
            key=OWN_SAMPLES_KEY,
            options=f"--prompts {OWN_SAMPLES.prompts} --images {OWN_SAMPLES.images} --seed {OWN_SAMPLES.seed}",
            scale="" if OWN_SAMPLES.guidance_scale is None else f"--guidance-scale {OWN_SAMPLES.guidance_scale}",
            code=CODE["sample"],
            lock=LOCK,
        message:
            "drawing samples of the base of {study.study}"
        shell:
            "invdpo sample --study {params.study} {params.options} {params.scale} --replace "
            '--out "$(dirname {output})" --threads {threads} --log {log}'

    rule score_samples:
        input:
            prompts=rules.sample.output,
            scorers=scorer_files(),
        output:
            "<results>/own_samples/scores.parquet",
        log:
            "<logs>/own_samples/score.log",
        benchmark:
            "<benchmarks>/own_samples/score.jsonl"
        threads: STAGE_THREADS
        resources:
            gpu=GPU,
        params:
            study=STUDY,
            key=digest(SETTINGS["scorers"], study.device),
            device=study.device,
            code=CODE["score"],
            lock=LOCK,
        message:
            "scoring the samples of {study.study}"
        shell:
            'invdpo score "$(dirname {input.prompts})" --prompts {input.prompts} --study {params.study} --out {output} '
            "--method base --device {params.device} --workers 0 --threads {threads} --log {log}"

    rule rank_samples:
        input:
            scores=rules.score_samples.output,
            prompts=rules.sample.output,
        output:
            study.preferences,
        log:
            "<logs>/own_samples/rank.log",
        params:
            by=",".join(OWN_SAMPLES.by),
            code=CODE["rank"],
            lock=LOCK,
        message:
            "pairs of the samples of {study.study}"
        shell:
            'invdpo rank {input.scores} --images "$(dirname {input.prompts})" --by {params.by} --out {output} --log {log}'
