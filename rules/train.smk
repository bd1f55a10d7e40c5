# One job trains one arm, all seeds: importing the libraries costs more than a small run.
# What a run resumes from lies undeclared in <results>/state, because Snakemake deletes the declared outputs of a failed job.


rule train:
    input:
        rules.preferences.output,
        base=local(study.base),
    output:
        run=expand("<results>/runs/{{arm}}/seed{seed}/run.json", seed=study.seeds),
        curve=expand("<results>/runs/{{arm}}/seed{seed}/train.jsonl", seed=study.seeds),
        weights=directory(
            expand("<results>/runs/{{arm}}/seed{seed}/{part}", seed=study.seeds, part=["checkpoints", "unet"])
        ),
    log:
        "<logs>/train/{arm}.log",
    benchmark:
        "<benchmarks>/train/{arm}.jsonl"
    wildcard_constraints:
        arm=one_of(TRAINED),
    priority: arm_cost
    threads: train_threads
    resources:
        gpu=train_gpus,
        runtime=train_minutes,
    params:
        study=STUDY,
        key=arm_key,
        code=CODE["train"],
        lock=LOCK,
    message:
        "training {wildcards.arm}"
    shell:
        "invdpo train --study {params.study} --arm {wildcards.arm} --threads {threads} --log {log}"


use rule train as train_nothing with:
    input:
        [],
    output:
        run=expand("<results>/runs/{{arm}}/seed{seed}/run.json", seed=study.seeds),
        curve=expand("<results>/runs/{{arm}}/seed{seed}/train.jsonl", seed=study.seeds),
    wildcard_constraints:
        arm=one_of(UNTRAINED),
    priority: 0
    resources:
        gpu=0,
    message:
        "noting {wildcards.arm}, which is not trained"
