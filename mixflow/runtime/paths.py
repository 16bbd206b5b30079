"""Where every result lies, in one place: the rules, the stages and the tables agree on these names."""

from __future__ import annotations


def download(name: str) -> str:
    return f"results/downloads/{name}.json"


def stand_ins(folder: str) -> str:
    return f"{folder}/stand-ins.json"


def latents(name: str) -> str:
    return f"results/latents/{name}/index.json"


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


def metrics(checkpoint: str, sampler: str) -> str:
    return f"results/metrics/{checkpoint}/{sampler}/metrics.json"


def row(table: str, name: str) -> str:
    return f"results/tables/{table}/{name}.json"


def figure(table: str, name: str) -> str:
    return f"results/tables/{table}/{name}.png"


def table(name: str, ending: str) -> str:
    return f"results/tables/{name}.{ending}"


def record(path: str) -> str:
    """Return the `run.json` beside a result."""
    return path.rsplit("/", 1)[0] + "/run.json" if "/" in path else "run.json"
