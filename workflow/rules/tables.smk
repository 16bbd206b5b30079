def row_metrics(wildcards):
    """The metrics of each cell of a row, with the run records that tell how they were made."""
    files = [paths.metrics(*cell) for cell in settings.cells(wildcards.table, wildcards.row)]
    return {"metrics": files, "records": [record_of(file) for file in files]}


def figure_inputs(wildcards):
    return ancient(figure_files(settings.slice("figure", wildcards.table, wildcards.figure)))


def figure_triggers(wildcards):
    """The run records beside the files a figure is drawn from (a row's own JSON is small enough to stand for itself)."""
    files = figure_files(settings.slice("figure", wildcards.table, wildcards.figure))
    return [file if wildcards.figure == "steps" else record_of(file) for file in files]


def table_parts(wildcards):
    rows = [paths.row(wildcards.table, row.key) for row in settings.tables[wildcards.table].rows]
    return {"rows": rows, "figures": figure_paths(settings, wildcards.table)}


rule row:
    input:
        unpack(row_metrics),
    output:
        paths.row("{table}", "{row}"),
    params:
        settings=slice_of("row", "table", "row"),
    log:
        "logs/row/{table}/{row}.log",
    localrule: True
    shell:
        "python -m mixflow tables row {wildcards.table:q} {wildcards.row:q} --settings {params.settings:q}"
        " --out {output:q} --log {log:q}"


rule figure:
    input:
        drawn_from=figure_inputs,
        triggers=figure_triggers,
    output:
        report(
            paths.figure("{table}", "{figure}"),
            caption="../report/figure.rst",
            category="{table}",
            labels={"figure": "{figure}"},
        ),
    params:
        settings=slice_of("figure", "table", "figure"),
    log:
        "logs/figure/{table}/{figure}.log",
    localrule: True
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
    params:
        settings=slice_of("render", "table"),
    log:
        "logs/render/{table}.log",
    localrule: True
    shell:
        "python -m mixflow tables render {wildcards.table:q} --settings {params.settings:q}"
        " --rows {input.rows:q} --figures {input.figures:q}"
        " --markdown {output.markdown:q} --page {output.page:q} --log {log:q}"
