# A target of its own: it needs nothing, and takes about a minute.
rule theory:
    output:
        result=paths.theory("json"),
        figure=report(
            paths.theory("png"),
            caption="../report/theory.rst",
            category="Theory",
            labels={"figure": "perfect networks"},
        ),
        record=record_of(paths.theory("json")),
    log:
        "logs/theory.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        settings=lambda wildcards: mixflow_config.to_json(settings.slice("theory")),
    shell:
        "python -m mixflow theory --settings {params.settings:q}"
        " --out {output.result:q} --figure {output.figure:q} --log {log:q}"
