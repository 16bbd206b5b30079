rule train_clock:
    input:
        latents=lambda wildcards: whole_latents(wildcards.latents),
        autoencoder=clock_autoencoder,
    output:
        weights=paths.clock("{latents}"),
        record=record_of(paths.clock("{latents}")),
    log:
        "logs/train_clock/{latents}.log",
    threads: 1
    resources:
        gpu=gpus(1),
        cpus_per_gpu=8,
        nodes=1,
        mem_mb=sized(digits=4000, imagenet=64000),
        runtime=sized(digits=60, imagenet=240),
    params:
        settings=slice_of("train_clock", "latents"),
        launch=launcher,
        limits=limits,
        autoencoder=clock_autoencoder_option,
    shell:
        "{params.launch} train-clock {wildcards.latents:q} --settings {params.settings:q}"
        " --cache {input.latents:q} {params.autoencoder} {params.limits} --out {output.weights:q} --log {log:q}"


# What is measured of finished blocks of images lies in scratch/, so that a killed job goes on where it was.
rule slow_flow:
    input:
        unpack(guide_parts),
        unpack(clock_parts),
        weights=ancient(paths.weights("{checkpoint}")),
        weights_record=record_of(paths.weights("{checkpoint}")),
        latents=lambda wildcards: whole_latents(
            settings.latents_of(wildcards.checkpoint)
        ),
        autoencoder=training_autoencoder,
    output:
        result=paths.slow_flow("{checkpoint}", "{sampler}"),
        record=record_of(paths.slow_flow("{checkpoint}", "{sampler}")),
    log:
        "logs/slow_flow/{checkpoint}/{sampler}.log",
    threads: 1
    resources:
        gpu=gpus(8),
        cpus_per_gpu=8,
        nodes=1,
        mem_mb=sized(digits=4000, imagenet=128000),
        runtime=sized(digits=60, imagenet=1440),
    params:
        settings=slice_of("slow_flow", "checkpoint", "sampler"),
        launch=launcher,
        limits=limits,
        batch=rows_per_pass("--batch"),
        guide=option("--guide", "guide"),
        clock=option("--clock", "clock"),
        autoencoder=training_autoencoder_option,
    shell:
        "{params.launch} slow-flow {wildcards.checkpoint:q} {wildcards.sampler:q} --settings {params.settings:q}"
        " --weights {input.weights:q} --latents {input.latents:q} {params.guide} {params.clock} {params.autoencoder}"
        " {params.batch} {params.limits} --out {output.result:q} --log {log:q}"


# One checkpoint, beside the one that it starts from.
rule slow_flow_figure:
    input:
        slow_flow_arms("checkpoint", "sampler"),
    output:
        report(
            paths.slow_flow("{checkpoint}", "{sampler}", "png"),
            caption="../report/slow_flow.rst",
            category="Slow Flow",
            labels={"figure": "{checkpoint}, {sampler}"},
        ),
    log:
        "logs/slow_flow_figure/{checkpoint}/{sampler}.log",
    localrule: True
    params:
        settings=slice_of("slow_flow_figure", "checkpoint", "sampler"),
    shell:
        "python -m mixflow draw-slow-flow {wildcards.checkpoint:q} {wildcards.sampler:q}"
        " --settings {params.settings:q} --files {input:q} --out {output:q} --log {log:q}"


rule slow_flow_comparison:
    input:
        slow_flow_arms("figure"),
    output:
        report(
            paths.comparison("{figure}"),
            caption="../report/slow_flow.rst",
            category="Slow Flow",
            labels={"figure": "{figure}"},
        ),
    log:
        "logs/slow_flow_comparison/{figure}.log",
    wildcard_constraints:
        figure=one_of(settings.figures),
    localrule: True
    params:
        settings=slice_of("slow_flow_figure", "figure"),
    shell:
        "python -m mixflow draw-slow-flow {wildcards.figure:q}"
        " --settings {params.settings:q} --files {input:q} --out {output:q} --log {log:q}"
