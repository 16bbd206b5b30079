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
        mem_mb=4000,
        runtime=30,
    params:
        settings=slice_of("make_reference", "reference"),
    shell:
        "python -m mixflow make-reference {wildcards.reference:q} --settings {params.settings:q}"
        " --source {input.source:q} --extractor {input.extractor:q} --out {output.reference:q} --log {log:q}"


rule evaluate:
    input:
        unpack(evaluate_inputs),
        samples=ancient(paths.samples("{checkpoint}", "{sampler}")),
        samples_record=record_of(paths.samples("{checkpoint}", "{sampler}")),
    output:
        metrics=paths.metrics("{checkpoint}", "{sampler}"),
        record=record_of(paths.metrics("{checkpoint}", "{sampler}")),
    log:
        "logs/evaluate/{checkpoint}/{sampler}.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        settings=slice_of("evaluate", "checkpoint", "sampler"),
    shell:
        "python -m mixflow evaluate {wildcards.checkpoint:q} {wildcards.sampler:q} --settings {params.settings:q}"
        " --samples {input.samples:q} --reference {input.reference:q} --extractor {input.extractor:q}"
        " --out {output.metrics:q} --log {log:q}"
