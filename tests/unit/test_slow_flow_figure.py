"""The figure of Slow Flow: columns of its arms, the null that knows the labels, gaps where a clock has no answer."""

from __future__ import annotations

import json

from PIL import Image

from mixflow.config import load_config
from mixflow.stages import draw_slow_flow as stage
from tests.conftest import ROOT

TIMES = [0.0, 0.5, 1.0]
QUANTILES = ("min", "p5", "median", "p95", "max")


def result(lag=0.0, classes=True, clocks=("wasserstein", "energy")):
    def series(shift):
        return {name: [t - shift - 0.01 * k * t for t in TIMES] for k, name in enumerate(reversed(QUANTILES))}

    nulls = ["gaussian", *(["class_gaussian"] if classes else [])]
    part = {
        "times": TIMES,
        "measured": series(lag),
        "nulls": {name: series(0.1) for name in nulls},
        "exact_flow": {name: [0.9 * t for t in TIMES] for name in nulls},
    }
    read = {name: [0.01, None if clock == "energy" else 0.5, 0.9] for name in ("measured", *nulls)
            for clock in clocks}  # fmt: skip
    return {
        "num_images": 1234,
        "start": 0.05,
        "readings": {"from_start": part, "from_noise": part, "own_end": part},
        "clocks": {"times": TIMES, **dict.fromkeys(clocks, read)},
    }


def drawn(tmp_path, name, settings, results):
    files = []
    for index, found in enumerate(results):
        files.append(tmp_path / f"{name}{index}.json")
        files[-1].write_text(json.dumps(found))
    stage.draw_slow_flow(settings, files, tmp_path / f"{name}.png")
    return tmp_path / f"{name}.png"


def test_figure_1_with_the_papers_borders(tmp_path):
    settings = load_config(ROOT / "config.yaml").slice("slow_flow_figure", "figure1")
    assert [arm["checkpoint"] for arm in settings["arms"]][::2] == ["sit-b2-256", "sit-b2-256-mixflow"]
    a = drawn(tmp_path, "a", settings, [result(0.1), result(), result()])
    with Image.open(a) as image:
        assert image.format == "PNG"
    assert a.read_bytes() == drawn(tmp_path, "b", settings, [result(0.1), result(), result()]).read_bytes()
    assert a.read_bytes() != drawn(tmp_path, "c", settings, [result(0.2), result(), result()]).read_bytes()
    without = {key: value for key, value in settings.items() if key != "paper"}
    assert a.read_bytes() != drawn(tmp_path, "d", without, [result(0.1), result(), result()]).read_bytes()


def test_a_checkpoint_stands_beside_the_one_that_it_starts_from(tmp_path):
    config = load_config(ROOT / "config.yaml")
    settings = config.slice("slow_flow_figure", "digits-mixflow-g0.8", "slow-flow-euler50")
    assert [arm["checkpoint"] for arm in settings["arms"]] == ["digits-base", "digits-mixflow-g0.8"]
    two = drawn(tmp_path, "two", settings, [result(), result(classes=False)])
    alone = config.slice("slow_flow_figure", "digits-base", "slow-flow-euler50")
    one = drawn(tmp_path, "one", alone, [result(clocks=("wasserstein",))])
    with Image.open(two) as wide, Image.open(one) as narrow:
        assert wide.size[0] > narrow.size[0]


def test_the_null_that_knows_the_labels_is_drawn_where_there_is_one():
    assert stage.null_of(result()["readings"]["from_noise"]) == "class_gaussian"
    assert stage.null_of(result(classes=False)["readings"]["from_noise"]) == "gaussian"
