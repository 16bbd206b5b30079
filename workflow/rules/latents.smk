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
    threads: 16
    resources:
        mem_mb=8000,
        runtime=1440,
    params:
        settings=slice_of("cache_latents", "latents"),
        launch=launcher,
        batch=rows_per_pass("--batch"),
        images=folder_of_images,
        autoencoder=autoencoder_option(own_latents, "encode"),
    shell:
        "{params.launch} cache-latents {wildcards.latents:q} --settings {params.settings:q}"
        " {params.images} {params.autoencoder} {params.batch} --workers {threads}"
        " --out {output.index:q} --log {log:q}"
