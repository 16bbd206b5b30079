"""The report: what is there now of the tables that it names, read from files, on one page. Starts no job. No torch."""

from __future__ import annotations

import datetime
import os
import shlex
from pathlib import Path
from typing import Any

from mixflow import report as pages
from mixflow.config import REHEARSAL_NOTE, Config
from mixflow.runtime import paths
from mixflow.runtime.files import atomic_path
from mixflow.runtime.progress import duration
from mixflow.runtime.provenance import code_version
from mixflow.stages.costs import GPUS_OF_A_NODE, HEAD_SECONDS, Machine, Rates, Works, gpu_seconds, wall_seconds
from mixflow.stages.jobs import WITHOUT_WORK
from mixflow.stages.plan import Plan, default_cores
from mixflow.stages.report_records import Records, commit_text, date_text, picture
from mixflow.stages.report_tables import Builder, counted
from mixflow.tables import build_row

BY_CHANCE = 0.05  # of comparisons, when nothing differs


def make_report(
    config: Config,
    configs: list[str],  # the files of the config, for the commands on the page
    out: Path,
    *,
    root: Path = Path(),
) -> None:
    """Write the page of `report` in the config from what lies below `root`; the rest of it reads "not run"."""
    text = pages.render(collect(config, configs, root))
    with atomic_path(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def collect(config: Config, configs: list[str], root: Path = Path()) -> pages.Page:
    """Return what the page says. Raises `UserError` where the config has no report."""
    settings, entry = config.slice("report"), config.report
    assert entry is not None
    options = f" --cores all{_overlays(configs)}"
    records = Records(root, options)
    tables, answered = [], {}
    for name in entry.tables:
        shown = config.get("tables", name)  # the banner says that it is a rehearsal
        render = settings["tables"][name]["render"] | {"title": shown.title, "notes": shown.notes}
        rows = [build_row(row, records.read) for row in settings["tables"][name]["rows"]]
        builder = Builder(render, rows, records)
        answered[name] = builder
        tables.append(builder.table(f"snakemake {name}{options}"))
    slow_flow = [_slow_flow(config, name, records, options) for name in entry.slow_flow]
    targets = {name: (table.title, table.key) for name, table in zip(entry.tables, tables, strict=True)}
    targets |= {name: (one.title, one.key) for name, one in zip(entry.slow_flow, slow_flow, strict=True)}
    costs, cost_notes = _costs(config, configs, targets, root)
    code = code_version()
    return pages.Page(
        title=entry.title,
        rehearsal=REHEARSAL_NOTE.removeprefix("This is a rehearsal: ").capitalize() if config.stand_ins else "",
        question=entry.question,
        answers=[answered[answer["table"]].answer(answer) for answer in settings.get("answers", ())],
        tally=_tally(tables),
        tables=tables,
        slow_flow=slow_flow,
        costs=costs,
        cost_notes=cost_notes,
        environment=_environment(records, code),
        sources=records.sources(),
        made=f"{datetime.datetime.now(datetime.UTC):%-d %B %Y, %H:%M} UTC",
        commit=commit_text(code),
    )


def _overlays(configs: list[str]) -> str:
    """Return the flag for Snakemake of the files laid over config.yaml, as seen from its folder."""
    files = _relative(configs)[1:]
    return f" --configfile {' '.join(files)}" if files else ""


def _relative(configs: list[str]) -> list[str]:
    folder = Path(configs[0]).parent
    return [shlex.quote(Path(os.path.relpath(file, folder)).as_posix()) for file in configs]


def _tally(tables: list[pages.Table]) -> pages.Tally | None:
    """Return how the comparisons of all tables with their controls came out."""
    outcomes = [gap.outcome for table in tables for compared in table.controlled for gap in compared.gaps]
    decided = [outcome for outcome in outcomes if outcome != "none"]
    if not decided:
        return None
    by_chance = len(decided) * BY_CHANCE
    return pages.Tally(
        f"Of {len(decided):,} comparisons with a control: {counted(decided)}.",
        f"If nothing differed at all, about {by_chance:.0f} of so many would be called by chance."
        if by_chance >= 1
        else "",
    )


# --- Slow Flow -------------------------------------------------------------------------------------------------------

_LAST = {  # what is shown of the last step
    "from_start": "same pair, from early on",
    "from_noise": "same pair, from noise",
    "wasserstein": "marginal clock, W2",
    "learned": "marginal clock, learned",
}


def _slow_flow(config: Config, name: str, records: Records, options: str) -> pages.SlowFlow:
    """Return a figure of Slow Flow with the times that it shows at the end, each beside its null."""
    entry = config.figures[name]
    files = {arm.label: paths.slow_flow(arm.checkpoint, entry.sampler) for arm in entry.arms}
    told = {label: found for label, file in files.items() if (found := records.read(file)) is not None}
    sources = tuple(dict.fromkeys(key for label in told for key in records.chain(files[label])[:1]))
    labels = ", ".join(files)
    shown = [key for key in _LAST if any(key in {**found["readings"], **found["clocks"]} for found in told.values())]
    lines = [
        pages.Line(label, "", [_last(label, key, found, records.chain(files[label])) for key in shown])
        for label, found in told.items()
    ]
    return pages.SlowFlow(
        key=f"slow-flow-{name}",
        title=entry.title,
        figure=picture(
            paths.comparison(name),
            f"{entry.title}, {config.samplers[entry.sampler].description}: {labels}. Nearest time against the time of "
            "sampling; grey dashes are the null.",
            f"Nearest time against the time of sampling for {labels}",
            records.root,
            sources,
        ),
        heads=[
            pages.Head(_LAST[key], "m at the end" if "pair" in _LAST[key] else "m − t at the end", _MEANINGS[key], None)
            for key in shown
        ],
        lines=lines,
        command=f"snakemake {name}{options}",
    )


_MEANINGS = {
    "from_start": "time of the nearest point of the real pair's own path, trajectories from real interpolants; median",
    "from_noise": "time of the nearest point of the real pair's own path, trajectories from noise; median",
    "wasserstein": "time at which noisy data spread as the samples do, less the sampler's time",
    "learned": "time that a small network reads off the samples, less what it reads off noisy data",
}


def _last(label: str, key: str, found: dict[str, Any], sources: tuple[str, ...]) -> pages.Number:
    """Return a time at the last step, with its null under it."""
    if key in found["readings"]:
        part = found["readings"][key]
        null = part["nulls"]["class_gaussian" if "class_gaussian" in part["nulls"] else "gaussian"]
        measured, expected = part["measured"]["median"][-1], null["median"][-1]
    elif key in found["clocks"]:
        part, last = found["clocks"][key], found["clocks"]["times"][-1]
        series = part["class_gaussian" if "class_gaussian" in part else "gaussian"]
        measured, expected = (None if m[-1] is None else m[-1] - last for m in (part["measured"], series))
    else:
        measured = expected = None
    text, under = ("–" if value is None else f"{value:.3f}".replace("-", "−") for value in (measured, expected))
    facts = [] if measured is None else [("measured", f"{measured:.5g}"), ("null", under)]
    return pages.Number(text, [f"null {under}"], f"{label}: {_LAST[key]}", facts=facts, sources=sources)


# --- costs and environment -------------------------------------------------------------------------------------------


def _costs(
    config: Config,
    configs: list[str],
    targets: dict[str, tuple[str, str]],  # target -> title, key of its section
    root: Path,
) -> tuple[list[pages.Cost], list[str]]:
    """Return what each target still takes, all of them together at the end, and what the numbers rest on."""
    machine = Machine(GPUS_OF_A_NODE, default_cores())
    rates = Rates(Works(config), machine, root)
    overlay = f" --config {' '.join(_relative(configs))}" if configs[1:] else ""

    def cost(names: list[str], title: str, key: str) -> list[pages.Cost]:
        command = f"python -m mixflow plan {' '.join(names)}{overlay}"
        return _cost(Plan(config, names, root=root), rates, machine, title, key, command)

    found = {name: cost([name], title, key) for name, (title, key) in targets.items()}
    waiting = [name for name, costs in found.items() if costs]
    if not waiting:
        return [], []
    together = cost(waiting, "all together", "") if len(waiting) > 1 else []
    note = (
        f"Time: on {machine.gpus} GPUs and {machine.cores} cores. As runs in this folder were measured where there "
        f"are any, else from FLOPs at {machine.tflops:g} TFLOP/s of a GPU in TF32. Targets share jobs, so that "
        "all together take less than their sum. The command says more."
    )
    return [one for costs in (*found.values(), together) for one in costs], [note]


def _cost(plan: Plan, rates: Rates, machine: Machine, title: str, key: str, command: str) -> list[pages.Cost]:
    """Return the cost of the jobs that are left; nothing where only what gathers is."""
    if all(job.rule in WITHOUT_WORK or not plan.jobs.outputs(job) for job in plan.left):
        return []
    found = {job: rates.cost(job) for job in plan.left}
    hours = gpu_seconds(found.values()) / 3600
    text = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}" if hours else "none"
    seconds = HEAD_SECONDS + wall_seconds(plan.jobs.needs, plan.left, found, machine)
    return [pages.Cost(title, key, f"{len(plan.left):,}", text, duration(seconds), command)]


def _environment(records: Records, code: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what the results on the page were made with; where runs differ, all of it."""
    told = records.told()
    codes = [record.get("code", {}) for record in told] or [code]
    devices = {device: None for record in told for device in record.get("machine", {}).get("devices") or ()}
    packages: dict[str, dict[str, None]] = {}
    for found in codes:
        for package, version in {"python": found.get("python"), **found.get("packages", {})}.items():
            if version:
                packages.setdefault(package, {})[version] = None
    seconds = sum(record.get("measured", {}).get("wall_seconds", 0.0) for record in told)
    starts = sorted(record["started"] for record in told if record.get("started"))
    facts = [
        ("commits", ", ".join(sorted({commit_text(found) for found in codes} - {""}))),
        ("images", ", ".join(sorted({found["image"] for found in codes if found.get("image")}))),
        ("devices", ", ".join(devices)),
        ("made", " to ".join(dict.fromkeys(date_text(start) for start in (starts[0], starts[-1]))) if starts else ""),
        ("work", f"{duration(seconds)} in {len(told):,} jobs" if told else ""),
        ("versions", ", ".join(f"{package} {' and '.join(found)}" for package, found in packages.items())),
    ]
    return [(term, text) for term, text in facts if text]
