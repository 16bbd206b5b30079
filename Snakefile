# MixFlow training, stage by stage: cached latents -> post-training -> samples -> metrics -> tables.
# `snakemake -c2` makes the digits table; `snakemake TABLE` any other; any file under results/ can be asked for by name.
from snakemake.utils import min_version

min_version("9.20")


# Found beside this file, so that `--directory` can put results elsewhere; `--configfile X` overlays it.
configfile: f"{workflow.basedir}/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/container.smk"
include: "workflow/rules/downloads.smk"
include: "workflow/rules/latents.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/slow_flow.smk"
include: "workflow/rules/theory.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/report.smk"


rule digits:
    default_target: True
    input:
        table_files("digits"),


rule digits_science:
    input:
        [table_files(table) for table in settings.science_tables()],


rule paper:
    input:
        [table_files(table) for table in settings.paper_tables()],


for table in settings.tables:
    if table != "digits":

        rule:
            name:
                table
            input:
                table_files(table),


for figure in settings.figures:

    rule:
        name:
            figure
        input:
            paths.comparison(figure),
