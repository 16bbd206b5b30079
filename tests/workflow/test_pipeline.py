"""The rehearsal through every rule: kills, resumption, what runs again, and how work may be split."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests import forked
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

REHEARSAL = ROOT / "rehearsal.yaml"
# One arm, two samplers: enough to pass through every rule.
SMALL = {
    "tables": {
        "digits": {
            "columns": [{"sampler": "euler5", "metric": "fd"}, {"sampler": "euler5-cfg2", "metric": "fd"}],
            "rows": [
                {"checkpoint": "digits-base", "label": "base"},
                {"checkpoint": "digits-mixflow-g0.8", "label": "MixFlow 0.8"},
            ],
        }
    }
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return ["--configfile", str(REHEARSAL), str(path)]


def metrics_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("results/metrics/*/*/metrics.json")}


def jobs(result) -> set[str]:
    """Names of the rules that a dry run lists, from its job table."""
    lines = result.stdout.splitlines()
    if not any(line.startswith("job ") for line in lines):
        assert "Nothing to be done" in result.stdout + result.stderr
        return set()
    start = next(i for i, line in enumerate(lines) if line.startswith("job ")) + 2
    return {line.split()[0] for line in lines[start:] if line.strip()} & {
        *("cache_latents", "train", "train_extractor", "make_reference", "sample", "evaluate", "row", "figure"),
        "render",
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    """An undisturbed run."""
    from tests.conftest import run_snakemake

    folder = tmp_path_factory.mktemp("finished")
    result = run_snakemake(folder, *small)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_the_whole_table_is_made_and_nothing_is_left_behind(finished, small, snakemake):
    table = (finished / "results/tables/digits.md").read_text()
    assert "MixFlow 0.8" in table
    page = (finished / "results/tables/digits.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    row = json.loads((finished / "results/tables/digits/digits-mixflow-g0.8.json").read_text())
    metrics = json.loads((finished / "results/metrics/digits-mixflow-g0.8/euler5/metrics.json").read_text())
    assert row["cells"][0]["value"] == metrics["metrics"]["fd"]
    record = json.loads((finished / "results/checkpoints/digits-mixflow-g0.8/run.json").read_text())
    base = json.loads((finished / "results/checkpoints/digits-base/run.json").read_text())
    assert record["parents"]["init"]["sha256"] == base["outputs"]["model.safetensors"]
    assert record["settings"]["train"]["law"] == "mixflow"
    assert not (finished / "scratch").exists() or not list((finished / "scratch").rglob("*.pt"))
    assert jobs(snakemake(finished, *small, "--dry-run")) == set()


def test_samples_are_a_whole_adm_file(finished):
    with np.load(finished / "results/samples/digits-base/euler5/samples.npz", allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (100, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(labels, np.arange(100) % 10)
    assert images.std() > 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"samplers": {"euler5": {"num_steps": 4}}}, {"sample", "evaluate", "row", "figure", "render"}),
        ({"samplers": {"euler10": {"seed": 7}}}, set()),  # no cell of this table uses it
        ({"tables": {"digits": {"notes": ["Another note."]}}}, {"render"}),
        (
            {"checkpoints": {"digits-mixflow-g0.8": {"train": {"gamma": 0.7}}}},
            {"train", "sample", "evaluate", "row", "figure", "render"},
        ),
        ({"extractors": {"digits-classifier": {"seed": 5}}},
         {"train_extractor", "make_reference", "evaluate", "row", "figure", "render"}),
    ],
    ids=["a sampler", "an unused sampler", "a note", "gamma", "the classifier"],
)  # fmt: skip
def test_a_change_reruns_only_what_depends_on_it(finished, small, snakemake, tmp_path, change, expected):
    path = tmp_path / "change.yaml"
    path.write_text(yaml.safe_dump(change))
    assert jobs(snakemake(finished, *small, str(path), "--dry-run")) == expected


def test_touched_weights_and_latents_rerun_nothing(finished, small, snakemake):
    for name in ("results/checkpoints/digits-base/model.safetensors", "results/samples/digits-base/euler5/samples.npz"):
        os.utime(finished / name)
    assert jobs(snakemake(finished, *small, "--dry-run")) == set()


def test_one_cell_and_one_row_can_be_made_alone(tmp_path, small, snakemake):
    result = snakemake(tmp_path, "results/tables/digits/digits-base.json", *small, "--dry-run")
    assert jobs(result) == {"cache_latents", "train", "train_extractor", "make_reference", "sample", "evaluate", "row"}
    counts = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines() if len(line.split()) == 2}
    assert (counts["train"], counts["sample"]) == ("1", "2")


# --- kills -----------------------------------------------------------------------------------------------------------


def descendants(process: int) -> list[int]:
    """Process ids below `process`, from /proc."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    found, frontier = [], [process]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def kill_when(folder: Path, small: list[str], is_due, only_stage: str | None = None) -> None:
    """Start the pipeline and SIGKILL it, with everything below it, as soon as `is_due` holds."""
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2", "--nolock"),
        *("--directory", str(folder), "--workflow-profile", str(ROOT / "profiles/default"), *small),
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not is_due():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for victim in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def test_killed_anywhere_it_continues_to_the_same_bytes(finished, small, snakemake, tmp_path):
    """SIGKILL in training, in sampling and in evaluation; then the same command gives identical metrics.json."""

    def exists(pattern):
        return lambda: any(tmp_path.glob(pattern))

    # A job writes its log's first line only at its end, so the sign of a running job is its work folder or its log.
    kill_when(tmp_path, small, exists("scratch/train/digits-base/*.lock"))
    kill_when(tmp_path, small, exists("scratch/sample/*/*/*/done.npy"))
    kill_when(tmp_path, small, exists("results/metrics/*/*/run.json"))
    kill_when(tmp_path, small, exists("logs/evaluate/digits-mixflow-g0.8/*.log"))
    result = snakemake(tmp_path, *small, "--nolock")
    assert result.returncode == 0, result.stderr[-3000:]
    expected, found = metrics_of(finished), metrics_of(tmp_path)
    assert len(expected) == 4
    assert found == expected


def kill_command_when(is_due, *arguments, cwd) -> None:
    """Start `python -m mixflow ...` and SIGKILL it as soon as `is_due` holds."""
    process = forked.start(*arguments, cwd=cwd)
    while not is_due():
        assert process.exitcode is None, "the command ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.join()


def test_training_and_sampling_killed_midway_go_on_from_there(small, tmp_path, mixflow):
    """SIGKILL after a resume point of training (twice) and after a batch of sampling: the same bytes in the end."""
    config = ["--config", ROOT / "config.yaml", *small[1:]]
    train = ["train", "digits-base", *config, "--save-every", "0"]
    sample = ["sample", "digits-base", "euler5", *config, "--batch", "10"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        assert mixflow("cache-latents", "digits", *config, cwd=folder).returncode == 0
    assert mixflow(*train, cwd=whole).returncode == 0
    assert mixflow(*sample, cwd=whole).returncode == 0

    def resume_point():
        (path,) = list(cut.glob("scratch/train/digits-base/*/resume.pt")) or [None]
        return path.stat().st_mtime_ns if path else 0

    for _ in range(2):
        before = resume_point()
        kill_command_when(lambda before=before: resume_point() > before, *train, cwd=cut)
    result = mixflow(*train, cwd=cut)
    assert result.returncode == 0, result.stderr
    assert "continuing from step" in result.stderr
    weights = "results/checkpoints/digits-base/model.safetensors"
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()

    def one_batch_done():
        (path,) = list(cut.glob("scratch/sample/digits-base/euler5/*/done.npy")) or [None]
        return path is not None and bool(np.load(path).any())

    kill_command_when(one_batch_done, *sample, cwd=cut)
    result = mixflow(*sample, cwd=cut)
    assert result.returncode == 0, result.stderr
    record = json.loads((cut / "results/samples/digits-base/euler5/run.json").read_text())
    assert record["measured"]["images_this_attempt"] < 100
    samples = "results/samples/digits-base/euler5/samples.npz"
    assert (cut / samples).read_bytes() == (whole / samples).read_bytes()
    again = mixflow(*sample, cwd=cut)
    assert "already made" in again.stderr


def test_a_time_budget_saves_and_asks_to_be_called_again(small, tmp_path, mixflow):
    config = ["--config", ROOT / "config.yaml", *small[1:]]
    assert mixflow("cache-latents", "digits", *config).returncode == 0
    result = mixflow("train", "digits-base", *config, "--time-budget", "0.0001")
    assert result.returncode == 75
    assert "run the same command again" in result.stderr
    assert mixflow("train", "digits-base", *config).returncode == 0


# --- splits ----------------------------------------------------------------------------------------------------------


def two_processes(*arguments, cwd):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mixflow"),
        *map(str, arguments),
    ]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


def test_one_and_two_processes_agree(tmp_path, small, mixflow):
    """Losses within 1e-5 over 20 steps, weights and samples within float rounding; batches of 7 and 64 agree too."""
    overlay = tmp_path / "twenty.yaml"
    overlay.write_text(yaml.safe_dump({"checkpoints": {"digits-base": {"train": {"num_steps": 20}}}}))
    config = ["--config", ROOT / "config.yaml", *small[1:], overlay]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        assert mixflow("cache-latents", "digits", *config, cwd=folder).returncode == 0
    result = mixflow("train", "digits-base", *config, cwd=one)
    assert result.returncode == 0, result.stderr
    two_processes("train", "digits-base", *config, cwd=two)
    losses = [json.loads((f / "results/checkpoints/digits-base/losses.json").read_text())["loss"] for f in (one, two)]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    a, b = (load_file(folder / "results/checkpoints/digits-base/model.safetensors") for folder in (one, two))
    assert all(np.allclose(a[key], b[key], atol=1e-5) for key in a)

    weights = one / "results/checkpoints/digits-base/model.safetensors"
    result = mixflow("sample", "digits-base", "euler5-cfg2", *config, "--weights", weights, cwd=one)
    assert result.returncode == 0, result.stderr
    two_processes("sample", "digits-base", "euler5-cfg2", *config, "--weights", weights, "--batch", "7", cwd=two)
    x, y = (np.load(f / "results/samples/digits-base/euler5-cfg2/samples.npz")["arr_0"].astype(int) for f in (one, two))
    assert abs(x - y).max() <= 1
    assert (x != y).mean() < 0.01
