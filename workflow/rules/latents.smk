rule cache_latents:
    output:
        index=paths.latents("{latents}"),
        record=record_of(paths.latents("{latents}")),
    log:
        "logs/cache_latents/{latents}.log",
    threads: 2
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        settings=slice_of("cache_latents", "latents"),
    shell:
        "python -m mixflow cache-latents {wildcards.latents:q} --settings {params.settings:q}"
        " --out {output.index:q} --log {log:q}"
