# `snakemake assets`: the shapes world's data and weights again from nothing (hours). No other rule needs it: studies use
# the committed files, which it leaves alone, and compare hashes.


rule assets:
    output:
        directory("results/world/shapes"),
    log:
        "logs/world/build.log",
    threads: workflow.cores
    resources:
        gpu=GPU,
    params:
        code=CODE["assets"],
        lock=LOCK,
    message:
        "building the shapes world from nothing"
    shell:
        "invdpo world build --out {output} --threads {threads} 2>&1 | tee {log}"
