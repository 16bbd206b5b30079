# Files that others publish. Local: compute nodes often have no way out, and there is nothing to compute.
rule download:
    input:
        download_inputs,
    output:
        paths.download("{download}"),
    log:
        "logs/download/{download}.log",
    localrule: True
    params:
        settings=slice_of("download", "download"),
    shell:
        "python -m mixflow download {wildcards.download:q} --settings {params.settings:q}"
        " --out {output:q} --log {log:q}"


if settings.stand_ins is not None:

    rule stand_ins:
        output:
            paths.stand_ins(settings.stand_ins.folder),
        log:
            "logs/stand_ins.log",
        resources:
            mem_mb=2000,
            runtime=10,
        params:
            settings=slice_of("stand_ins"),
        shell:
            "python -m mixflow make-stand-ins --settings {params.settings:q} --out {output:q} --log {log:q}"
