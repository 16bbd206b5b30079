rule cache_latents:
    input:
        images=images_of,
        autoencoder=autoencoder_inputs(own_latents, "encode"),
    output:
        index=paths.latents("{latents}"),
        record=record_of(paths.latents("{latents}")),
    log:
        "logs/cache_latents/{latents}.log",
    # JPEGs are read by threads; Snakemake takes fewer where there are fewer.
    threads: sized(digits=1, imagenet=16)
    resources:
        gpu=encoding_gpus,
        cpus_per_gpu=8,
        nodes=1,
        mem_mb=sized(digits=4000, imagenet=128000),
        runtime=sized(digits=30, imagenet=1440),
    params:
        settings=slice_of("cache_latents", "latents"),
        launch=launcher,
        limits=limits,
        batch=rows_per_pass("--batch"),
        images=folder_of_images,
        autoencoder=autoencoder_option(own_latents, "encode"),
    shell:
        "{params.launch} cache-latents {wildcards.latents:q} --settings {params.settings:q}"
        " {params.images} {params.autoencoder} {params.batch} {params.limits} --workers {threads}"
        " --out {output.index:q} --log {log:q}"
