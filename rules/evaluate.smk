# One job samples, decodes and scores every checkpoint of one arm, all seeds.


rule evaluate:
    input:
        runs=rules.train.output,
        base=local(study.base, study.vae),
        prompts=local(study.prompts),
        scorers=scorer_files(),
    output:
        images=expand("<results>/images/{{arm}}/seed{seed}.parquet", seed=study.seeds),
        scores=expand("<results>/scores/{{arm}}/seed{seed}.parquet", seed=study.seeds),
    log:
        "<logs>/evaluate/{arm}.log",
    benchmark:
        "<benchmarks>/evaluate/{arm}.jsonl"
    wildcard_constraints:
        arm=one_of(TRAINED),
    threads: STAGE_THREADS
    resources:
        gpu=GPU,
    params:
        study=STUDY,
        key=EVALUATION_KEY,
        code=CODE["evaluate"],
        lock=LOCK,
    message:
        "sampling and scoring {wildcards.arm}"
    shell:
        "invdpo evaluate --study {params.study} --arm {wildcards.arm} --threads {threads} --log {log}"


use rule evaluate as evaluate_base with:
    input:
        runs=rules.train_nothing.output,
        base=lambda wildcards: own_base(wildcards.arm),
        prompts=rules.evaluate.input.prompts,
        scorers=rules.evaluate.input.scorers,
    output:
        images="<results>/images/{arm}/seed0.parquet",
        scores="<results>/scores/{arm}/seed0.parquet",
    wildcard_constraints:
        arm=one_of(UNTRAINED),
    params:
        study=STUDY,
        key=evaluation_key,
        code=CODE["evaluate"],
        lock=LOCK,


# One job for all arms: what takes its time is to start, and the reference set.
if DISTRIBUTION:

    rule distribution:
        input:
            images=distribution_images(),
            prompts=local(study.prompts),
            files=distribution_files(),
        output:
            csv="<results>/distribution.csv",
            provenance="<results>/distribution.json",
        log:
            "<logs>/distribution.log",
        benchmark:
            "<benchmarks>/distribution.jsonl"
        threads: STAGE_THREADS
        resources:
            gpu=GPU,
        params:
            study=STUDY,
            key=digest(DISTRIBUTION, study.device, study.prompts, study.sampling.prompts),
            code=CODE["distribution"],
            lock=LOCK,
        message:
            "images of {study.study} against the reference set"
        shell:
            "invdpo distribution --study {params.study} --threads {threads} --log {log}"


rule scores:
    input:
        SCORES,
    message:
        "all scores of {study.study} are there"
