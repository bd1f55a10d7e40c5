# `make tune`: the same small grid of learning rate and beta for every method, on seeds and prompts that are never reported.
# One job runs the whole grid of one arm. The chosen values go to config/tuned, to be committed: no output here, because
# Snakemake deletes outputs before a job, and without that file no tuned arm can be trained.


rule tune_arm:
    input:
        rules.preferences.output,
        base=local(study.base),
        prompts=local(TUNING.get("prompts")),
        scorers=scorer_files(),
    output:
        "<results>/tuning/{arm}.csv",
    log:
        "<logs>/tune/{arm}.log",
    benchmark:
        "<benchmarks>/tune/{arm}.jsonl"
    wildcard_constraints:
        arm="|".join(map(re.escape, TUNING.get("arms", []))),
    priority: arm_cost
    threads: STAGE_THREADS
    resources:
        gpu=GPU,
    params:
        study=STUDY,
        key=tuning_key,
        code=CODE["tune"],
        lock=LOCK,
    message:
        "tuning {wildcards.arm}"
    shell:
        "invdpo tune-arm --study {params.study} --arm {wildcards.arm} --threads {threads} --log {log}"


rule tune:
    input:
        expand("<results>/tuning/{arm}.csv", arm=TUNING.get("arms", [])),
    output:
        "<results>/tables/tuning.csv",
    log:
        "<logs>/tune/choice.log",
    params:
        study=STUDY,
        code=CODE["tune"],
        lock=LOCK,
    message:
        "choosing each method's learning rate and beta for {study.study}"
    shell:
        "invdpo tune --study {params.study} --log {log}"
