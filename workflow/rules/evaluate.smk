rule train_extractor:
    input:
        latents=lambda wildcards: whole_latents(
            settings.extractors[wildcards.extractor].latents
        ),
    output:
        weights=paths.extractor("{extractor}"),
        record=record_of(paths.extractor("{extractor}")),
    log:
        "logs/train_extractor/{extractor}.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=slice_of("train_extractor", "extractor"),
    shell:
        "python -m mixflow train-extractor {wildcards.extractor:q} --settings {params.settings:q}"
        " --latents {input.latents:q} --out {output.weights:q} --log {log:q}"


rule make_reference:
    input:
        unpack(reference_inputs),
    output:
        reference=paths.reference("{reference}"),
        record=record_of(paths.reference("{reference}")),
    log:
        "logs/make_reference/{reference}.log",
    resources:
        gpu=gpus(1),
        cpus_per_gpu=8,
        nodes=1,
        mem_mb=sized(digits=8000, imagenet=64000),
        runtime=sized(digits=60, imagenet=480),
    params:
        settings=slice_of("make_reference", "reference"),
        launch=launcher,
        limits=limits,
    shell:
        "{params.launch} make-reference {wildcards.reference:q} --settings {params.settings:q}"
        " --source {input.source:q} --extractor {input.extractor:q}"
        " {params.limits} --out {output.reference:q} --log {log:q}"


# Features of finished parts lie in scratch/, so that a killed job goes on where it was.
rule evaluate:
    input:
        unpack(reference_parts),
        samples=ancient(paths.samples("{checkpoint}", "{sampler}")),
        samples_record=record_of(paths.samples("{checkpoint}", "{sampler}")),
    output:
        metrics=paths.metrics("{checkpoint}", "{sampler}"),
        record=record_of(paths.metrics("{checkpoint}", "{sampler}")),
    log:
        "logs/evaluate/{checkpoint}/{sampler}.log",
    threads: 1
    resources:
        gpu=gpus(1),
        cpus_per_gpu=8,
        nodes=1,
        mem_mb=sized(digits=8000, imagenet=64000),
        runtime=sized(digits=60, imagenet=240),
    params:
        settings=slice_of("evaluate", "checkpoint", "sampler"),
        launch=launcher,
        limits=limits,
    shell:
        "{params.launch} evaluate {input.samples:q} --settings {params.settings:q}"
        " --reference {input.reference:q} --extractor {input.extractor:q}"
        " {params.limits} --out {output.metrics:q} --log {log:q}"


# The same samples against a further reference of their dataset, seen by another network.
use rule evaluate as evaluate_further with:
    output:
        metrics=paths.metrics("{checkpoint}", "{sampler}", "{reference}"),
        record=record_of(paths.metrics("{checkpoint}", "{sampler}", "{reference}")),
    log:
        "logs/evaluate/{checkpoint}/{sampler}/{reference}.log",
    params:
        settings=slice_of("evaluate", "checkpoint", "sampler", "reference"),
        launch=launcher,
        limits=limits,
