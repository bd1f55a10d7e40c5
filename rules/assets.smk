# `shapes_xl`: the committed base in SDXL's layout, which is too large to commit as well and takes seconds to make.
# `snakemake assets`: the shapes world's data and weights again from nothing (hours). No other rule needs it: studies use
# the committed files, which it leaves alone, and compare hashes.


rule shapes_xl:
    input:
        local("assets/shapes/base"),
    output:
        directory(SHAPES_XL),
    log:
        "logs/world/shapes_xl.log",
    params:
        code=CODE["assets"],
        lock=LOCK,
    message:
        "converting the shapes world's base to SDXL's layout"
    shell:
        "invdpo world sdxl-layout --base assets/shapes/base --out {output} > {log} 2>&1"


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
