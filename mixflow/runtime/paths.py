"""Where every result lies, in one place: the rules, the stages and the tables agree on these names."""

from __future__ import annotations

from pathlib import Path

from mixflow.runtime.errors import UserError


def download(name: str) -> str:
    return f"results/downloads/{name}.json"


def stand_ins(folder: str) -> str:
    return f"{folder}/stand-ins.json"


def latents(name: str) -> str:
    return f"results/latents/{name}/index.json"


def clock(latents: str) -> str:
    return f"results/clocks/{latents}/model.safetensors"


def extractor(name: str) -> str:
    return f"results/extractors/{name}/model.safetensors"


def reference(name: str) -> str:
    return f"results/references/{name}/reference.safetensors"


def weights(checkpoint: str) -> str:
    return f"results/checkpoints/{checkpoint}/model.safetensors"


def losses(checkpoint: str) -> str:
    return f"results/checkpoints/{checkpoint}/losses.json"


def samples(checkpoint: str, sampler: str) -> str:
    return f"results/samples/{checkpoint}/{sampler}/samples.npz"


def sampled(path: Path) -> tuple[str, str]:
    """Return (checkpoint, sampler) of a sample file by its place. `UserError` for one that lies elsewhere."""
    parts = path.parts[-5:]
    if len(parts) != 5 or (*parts[:2], parts[4]) != ("results", "samples", "samples.npz"):
        raise UserError(
            f"'{path}' is no sample file of the pipeline (results/samples/CHECKPOINT/SAMPLER/samples.npz): say with "
            "--reference what to compare it with"
        )
    return parts[2], parts[3]


def metrics(checkpoint: str, sampler: str, reference: str | None = None) -> str:
    """Return the metrics of a sample set against its dataset's first reference, or against a further one."""
    further = f"{reference}/" if reference else ""
    return f"results/metrics/{checkpoint}/{sampler}/{further}metrics.json"


def slow_flow(checkpoint: str, sampler: str, ending: str = "json") -> str:
    return f"results/slow_flow/{checkpoint}/{sampler}/slow_flow.{ending}"


def comparison(figure: str) -> str:
    """Return the Slow Flow of several checkpoints, an entry of the figures."""
    return f"results/slow_flow/{figure}.png"


def theory(ending: str) -> str:
    return f"results/theory/theory.{ending}"


def row(table: str, name: str) -> str:
    return f"results/tables/{table}/{name}.json"


def figure(table: str, name: str) -> str:
    return f"results/tables/{table}/{name}.png"


def table(name: str, ending: str) -> str:
    return f"results/tables/{name}.{ending}"


def report() -> str:
    return "results/report/index.html"


def record(path: str) -> str:
    """Return the `run.json` beside a result."""
    return path.rsplit("/", 1)[0] + "/run.json" if "/" in path else "run.json"
