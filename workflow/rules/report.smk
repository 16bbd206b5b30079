if settings.report is not None:

    rule report:
        input:
            [table_files(table) for table in settings.report.made],
        output:
            paths.report(),
        log:
            "logs/report.log",
        localrule: True
        params:
            # The page reads what there is of all its tables, so it takes the whole config; the key is the trigger.
            key=mixflow_config.slice_key(settings.slice("report")),
            configs=[f"{workflow.basedir}/config.yaml", *workflow.overwrite_configfiles],
        shell:
            "python -m mixflow report --config {params.configs:q} --key {params.key} --out {output:q} --log {log:q}"
