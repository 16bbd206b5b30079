rule row:
    input:
        unpack(row_metrics),
    output:
        paths.row("{table}", "{row}"),
    log:
        "logs/row/{table}/{row}.log",
    localrule: True
    params:
        settings=slice_of("row", "table", "row"),
    shell:
        "python -m mixflow tables row {wildcards.table:q} {wildcards.row:q} --settings {params.settings:q}"
        " --out {output:q} --log {log:q}"


rule figure:
    input:
        unpack(figure_inputs),
    output:
        report(
            paths.figure("{table}", "{figure}"),
            caption="../report/figure.rst",
            category="{table}",
            labels={"figure": "{figure}"},
        ),
    log:
        "logs/figure/{table}/{figure}.log",
    localrule: True
    params:
        settings=slice_of("figure", "table", "figure"),
    shell:
        "python -m mixflow tables figure {wildcards.table:q} {wildcards.figure:q} --settings {params.settings:q}"
        " --files {input.drawn_from:q} --out {output:q} --log {log:q}"


rule render:
    input:
        unpack(table_parts),
    output:
        markdown=paths.table("{table}", "md"),
        page=report(
            paths.table("{table}", "html"),
            caption="../report/table.rst",
            category="{table}",
            labels={"figure": "table"},
        ),
    log:
        "logs/render/{table}.log",
    localrule: True
    params:
        settings=slice_of("render", "table"),
    shell:
        "python -m mixflow tables render {wildcards.table:q} --settings {params.settings:q}"
        " --rows {input.rows:q} --figures {input.figures:q}"
        " --markdown {output.markdown:q} --page {output.page:q} --log {log:q}"
