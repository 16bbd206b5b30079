rule sample:
    input:
        unpack(guide_parts),
        unpack(shifting_clock),
        weights=ancient(paths.weights("{checkpoint}")),
        weights_record=record_of(paths.weights("{checkpoint}")),
        autoencoder=autoencoder_inputs(sampled_latents, "decode"),
    output:
        samples=paths.samples("{checkpoint}", "{sampler}"),
        record=record_of(paths.samples("{checkpoint}", "{sampler}")),
    log:
        "logs/sample/{checkpoint}/{sampler}.log",
    threads: 1
    resources:
        gpu=gpus(8),
        cpus_per_gpu=8,
        nodes=1,
        mem_mb=sized(digits=4000, imagenet=128000),
        runtime=sized(digits=60, imagenet=1440),
    params:
        settings=slice_of("sample", "checkpoint", "sampler"),
        launch=launcher,
        limits=limits,
        batch=rows_per_pass("--batch"),
        guide=option("--guide", "guide"),
        clock=option("--clock", "clock"),
        autoencoder=autoencoder_option(sampled_latents, "decode"),
    shell:
        "{params.launch} sample {wildcards.checkpoint:q} {wildcards.sampler:q} --settings {params.settings:q}"
        " --weights {input.weights:q} {params.guide} {params.clock} {params.autoencoder} {params.batch}"
        " {params.limits} --out {output.samples:q} --log {log:q}"
