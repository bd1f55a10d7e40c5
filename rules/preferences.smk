# Preference pairs: read, filtered, encoded once for all arms.


rule preferences:
    input:
        base=local(study.base, study.vae),
        pairs=local(study.preferences),
        scorer=local(*(PAIR_SCORER or {}).values()),
    output:
        pairs="<results>/preferences/pairs.parquet",
        cache="<results>/preferences/cache.safetensors",
        latents=directory("<results>/preferences/latents"),
        captions=directory("<results>/preferences/captions"),
        report="<results>/preferences/report.json",
    log:
        "<logs>/preferences.log",
    benchmark:
        "<benchmarks>/preferences.jsonl"
    threads: workflow.cores
    resources:
        gpu=GPU,
    params:
        study=STUDY,
        key=PREFERENCES_KEY,
        code=CODE["preferences"],
        lock=LOCK,
    message:
        "encoding the preference pairs of {study.study}"
    shell:
        "invdpo prepare --study {params.study} --threads {threads} --log {log}"
