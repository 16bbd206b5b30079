"""Faults on a real cluster: `snakemake --profile slurm digits` in a fresh clone, hit while it works. Same numbers?

A throw-away cluster (cluster.py), the pipeline's digits in miniature, and an undisturbed run on this machine beside
it: every metrics.json has to be equal byte by byte. `make cluster-test` prints the table of docs/reliability.md.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.cluster.cluster import Cluster, free_ports, missing_programs

ROOT = Path(__file__).parents[2]
ARMS = ("digits-continued", "digits-mixflow-g0.8")
SAMPLER = "euler5"
SECONDS = 60.0  # of training, alone on a core: long enough to be hit several times
SMALL = {
    "samplers": {SAMPLER: {"num_images": 5000}},  # 20 batches
    "tables": {
        "digits": {
            "columns": [{"sampler": SAMPLER, "metric": "fd"}],
            "rows": [{"checkpoint": name, "label": name} for name in ARMS],
        }
    },
}
LITERAL = ["snakemake", "--profile", "slurm", "digits"]


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def merged(base: dict, overlay: dict) -> dict:
    return base | {
        key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in overlay.items()
    }


def small_config() -> dict:
    """Return config.yaml in miniature, with training runs that take about SECONDS on this machine."""
    config: dict = {}
    for part in (ROOT / "config.yaml", ROOT / "rehearsal.yaml"):
        config = merged(config, yaml.safe_load(part.read_text()))
    config = merged(config, SMALL)
    steps = 300
    with tempfile.TemporaryDirectory() as folder:
        trial = merged(config, {"checkpoints": {"digits-base": {"train": {"num_steps": steps}}}})
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(trial, sort_keys=False))
        for verb in (["cache-latents", "digits"], ["train", "digits-base"]):
            command = [sys.executable, "-m", "mixflow", *verb]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        record = json.loads((Path(folder) / "results/checkpoints/digits-base/run.json").read_text())
    steps = int(SECONDS * steps / record["measured"]["wall_seconds"])
    say(f"{steps} steps of training for each arm")
    return merged(config, {"checkpoints": {"digits-continued": {"train": {"num_steps": steps}}}})


def clone(folder: Path, config: dict) -> Path:
    """Return a fresh clone of this repository, with what is not committed yet, and with this config.yaml."""

    def git(*arguments: str) -> list[str]:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
        return [name for name in answer.stdout.split("\0") if name]

    git("clone", "--quiet", str(ROOT), str(folder))
    for name in git("ls-files", "-z", "--modified", "--others", "--exclude-standard"):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
        else:
            (folder / name).unlink(missing_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def wait_for(condition: Callable[[], object], what: str, seconds: float = 600) -> object:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
    return found


def processes() -> Iterator[tuple[int, list[str], Path]]:
    """Yield (process id, command line, working folder) of every process."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(entry.name), (entry / "cmdline").read_bytes().decode().split("\0"), (entry / "cwd").readlink()


class Run:
    """A clone, the snakemake at work in it, and the faults that it met."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.head: subprocess.Popen | None = None
        self.faults: list[tuple[str, str]] = []  # (fault, where)

    def call(self, *command: str) -> None:
        """Start the head process."""
        with open(self.folder / "head.log", "ab") as out:
            self.head = subprocess.Popen(
                command, cwd=self.folder, env=self.cluster.environment, stdout=out, stderr=out, start_new_session=True
            )

    def kill(self) -> None:
        """Kill the head process, whether it is at work or not."""
        if self.head is not None and self.head.poll() is None:
            os.killpg(self.head.pid, signal.SIGKILL)
            self.head.wait()

    def wait(self, seconds: float = 900) -> int:
        """Wait for the end of the head process and return its exit status."""
        assert self.head is not None
        return self.head.wait(timeout=seconds)

    def finish(self) -> None:
        """Wait for its end. Raises `AssertionError` when it failed."""
        assert self.wait() == 0, f"snakemake failed:\n{self.told()}"

    def told(self) -> str:
        """Return the end of what the head process said."""
        return (self.folder / "head.log").read_text()[-4000:]

    def nothing_to_do(self, target: str) -> bool:
        """Return whether Snakemake, without a cluster, takes the target as made."""
        command = ["snakemake", "--dry-run", target]
        answer = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True)
        return "Nothing to be done" in answer.stdout + answer.stderr

    def worker(self, stage: str, checkpoint: str) -> int | None:
        """Return the Python process that works on this stage of this checkpoint, once SIGTERM would make it save."""
        for process, command, folder in processes():
            if folder == self.folder and ["-m", "mixflow", stage, checkpoint] in (command[1:5], command[2:6]):
                with contextlib.suppress(OSError):
                    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
                    if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
                        return process
        return None

    def job(self, stage: str, checkpoint: str) -> str:
        """Return the number of the Slurm job that runs this stage of this checkpoint."""

        def running() -> str | None:
            assert self.head is not None
            assert self.head.poll() is None, f"snakemake ended early:\n{self.told()}"
            name = f"rule_{stage}_wildcards_{checkpoint}"
            return next(
                (n for n, comment in self.cluster.jobs(self.folder, "RUNNING").items() if comment.startswith(name)),
                None,
            )

        return str(wait_for(running, f"{stage} of {checkpoint} to run"))

    def hit(self, fault: str, stage: str, checkpoint: str) -> str:
        """Inflict `fault` on a stage at work: after a save, where what came later is lost. Return the job's number."""
        job = self.job(stage, checkpoint)
        worker = int(str(wait_for(lambda: self.worker(stage, checkpoint), f"{stage} of {checkpoint} to work")))
        started, saved = Path(f"/proc/{worker}").stat().st_mtime, "resume.pt" if stage == "train" else "done.npy"

        def newer() -> bool:
            files = self.folder.glob(f"scratch/{stage}/{checkpoint}/**/{saved}")
            return any(file.stat().st_mtime > started for file in files)

        if fault in LOSE_WHAT_IS_NOT_SAVED or stage == "sample":
            wait_for(newer, f"{stage} of {checkpoint} to save")
        else:
            time.sleep(3)  # in the midst of its steps
        FAULTS[fault](self.cluster, job, worker)
        say(f"{fault}: {stage} of {checkpoint}, job {job}")
        self.faults.append((fault, stage))
        return job


def metrics_of(folder: Path) -> dict[str, bytes]:
    files = folder.glob("results/metrics/*/*/metrics.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def lower_time_limit(cluster: Cluster, job: str, worker: int) -> None:
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+1")
    wait_for(lambda: cluster.job(job)["JobState"] != "RUNNING", "the time limit to strike", 180)


def lose_node(cluster: Cluster, job: str, worker: int) -> None:
    node = cluster.job(job)["NodeList"]
    cluster.lose_node(node)
    wait_for(lambda: cluster.job(job).get("NodeList") != node, "Slurm to see that a node is lost", 180)
    cluster.start_node(node)


SCANCEL = "`scancel`"
SIGTERM = "`scancel --signal TERM`, to the step alone"
SIGKILL = "SIGKILL of the process"
REQUEUE = "`scontrol requeue`, as after preemption"
TIME_LIMIT = "Slurm's time limit reached"
NODE_LOST = "node lost: slurmd and all processes killed"
FAULTS: dict[str, Callable[[Cluster, str, int], object]] = {
    SCANCEL: lambda cluster, job, worker: cluster.run("scancel", job),
    SIGTERM: lambda cluster, job, worker: cluster.run("scancel", "--signal", "TERM", job),
    SIGKILL: lambda cluster, job, worker: os.kill(worker, signal.SIGKILL),
    REQUEUE: lambda cluster, job, worker: cluster.run("scontrol", "requeue", job),
    TIME_LIMIT: lower_time_limit,
    NODE_LOST: lose_node,
}

LOSE_WHAT_IS_NOT_SAVED = (SIGKILL, NODE_LOST)


class Row(NamedTuple):
    """A fault that was tried, and whether every metrics.json was that of the undisturbed run."""

    fault: str
    where: str
    equal: bool


def one_process(cluster: Cluster, folder: Path, stack: contextlib.ExitStack, config: dict) -> list[Row]:
    """Hit the literal command in training and in sampling, kill the head process too, and compare with a local run."""
    run, undisturbed = (Run(cluster, clone(folder / name, config)) for name in ("clone", "undisturbed"))
    for each in (run, undisturbed):
        stack.callback(each.kill)
    run.call(*LITERAL)
    undisturbed.call("snakemake", "--cores", "2", "digits")
    one, other = ARMS
    run.hit(SCANCEL, "train", one)
    run.hit(SIGKILL, "train", other)
    run.hit(REQUEUE, "train", one)
    run.hit(TIME_LIMIT, "train", other)
    run.hit(NODE_LOST, "train", one)
    run.hit(SIGTERM, "train", other)

    job = run.job("train", one)
    for name in ARMS:
        (log,) = (file.read_text() for file in run.folder.glob(f"scratch/train/{name}/*/log.txt"))
        told = {words: log.count(words) for words in ("continuing from step", "SIGTERM arrived")}
        say(f"{name}: {told}")
        assert told["continuing from step"] >= 2, log
    run.kill()
    assert cluster.job(job)["JobState"] == "RUNNING"
    say("head process killed while its jobs run, and called again")
    run.faults.append(("SIGKILL of the head process, called again while its jobs run", "train"))
    subprocess.run(["snakemake", "--unlock"], cwd=run.folder, check=True, capture_output=True)
    run.call(*LITERAL)
    run.hit(SCANCEL, "sample", one)

    run.finish()
    undisturbed.finish()
    say("both runs are done")
    expected, found = metrics_of(undisturbed.folder), metrics_of(run.folder)
    assert len(expected) == len(ARMS)
    assert run.nothing_to_do("digits"), "what a cluster has made is not made for a local run"
    return [Row(fault, where, equal=expected == found) for fault, where in run.faults]


def time_budget(cluster: Cluster, folder: Path, stack: contextlib.ExitStack, config: dict) -> Callable[[], list[Row]]:
    """Start a training run that is longer than its job may be, and the same undisturbed. Call the result for its end.

    Two minutes are the shortest limit in which a job can start, work, and stop by itself before Slurm looks.
    """
    checkpoint, minutes = "digits-base", 2
    steps = int(config["checkpoints"][ARMS[0]]["train"]["num_steps"] * minutes * 60 / SECONDS)
    config = merged(config, {"checkpoints": {checkpoint: {"train": {"num_steps": steps}}}})
    trained = Path("results/checkpoints") / checkpoint / "model.safetensors"
    run, undisturbed = (Run(cluster, clone(folder / name, config)) for name in ("budget", "undisturbed-budget"))
    for each in (run, undisturbed):
        stack.callback(each.kill)
    one = ["--set-threads", "train=1"]
    run.call("snakemake", str(trained), "--profile", "slurm", *one, "--set-resources", f"train:runtime={minutes}")
    undisturbed.call("snakemake", str(trained), "--cores", "1", *one)

    def finished() -> list[Row]:
        run.finish()
        undisturbed.finish()
        log = (run.folder / f"logs/train/{checkpoint}.log").read_text()
        assert "because the time budget is used up" in log, log
        assert "continuing from step" in log, log
        equal = (run.folder / trained).read_bytes() == (undisturbed.folder / trained).read_bytes()
        return [Row("time budget used up: saved, exit 75", "train", equal)]

    return finished


def several_processes(cluster: Cluster, folder: Path, stack: contextlib.ExitStack, config: dict) -> list[Row]:
    """Two processes by torchrun, in one job and on two nodes, both cancelled once, against two on this machine.

    First of all GPUs, asked for in both ways: Slurm grants them, and where a node shows none a sentence says so.
    """
    checkpoint = "digits-base"
    steps = config["checkpoints"][ARMS[0]]["train"]["num_steps"] // 3
    config = merged(config, {"checkpoints": {checkpoint: {"train": {"num_steps": steps}}}})
    trained = Path("results/checkpoints") / checkpoint / "model.safetensors"
    run, undisturbed, two_nodes = (
        Run(cluster, clone(folder / name, config)) for name in ("processes", "undisturbed-processes", "two-nodes")
    )
    for each in (run, undisturbed):
        stack.callback(each.kill)
    slurm = ["--profile", "slurm", "--slurm-init-seconds-before-status-checks", "1"]

    for asked in (["gpu=2", "cpus_per_gpu=1"], ["gpu=0", "gres=gpu:2", "cpus_per_task=2"]):
        resources = ["--set-resources", *(f"train:{each}" for each in asked)]
        run.call("snakemake", str(trained), *slurm, "--retries", "0", *resources)
        run.wait()
        job = cluster.job(max(cluster.jobs(run.folder), key=int))
        granted = job.get("TresPerJob") or job.get("TresPerNode")
        say(f"{' '.join(asked)}: {job['JobState']}, granted {granted}, {job['NumCPUs']} cores, {job['NumNodes']} node")
        assert (granted, job["NumNodes"], job["NumCPUs"]) == ("gres:gpu:2", "1", "2")
        log = (run.folder / f"logs/train/{checkpoint}.log").read_text()
        assert "2 GPU(s) were asked for but 0 are visible" in log, log

    two = ["--set-threads", "train=1", "--set-resources", "train:processes=2"]
    run.call("snakemake", str(trained), *slurm, *two, "train:cpus_per_task=2", "train:slurm_extra=--gpus-per-node=2")
    run.hit(SCANCEL, "train", checkpoint)
    run.finish()
    say("two processes in one job are done")
    undisturbed.call("snakemake", str(trained), "--cores", "2", *two)
    undisturbed.finish()

    shutil.copytree(run.folder / "results/latents", two_nodes.folder / "results/latents")
    script = next(block for block in fenced(ROOT / "docs/slurm.md") if "# two-nodes.sh" in block)
    (two_nodes.folder / "two-nodes.sh").write_text(script.replace("$first:29500", f"localhost:{free_ports(1)[0]}"))
    small = ["--gpus-per-node=0", "--cpus-per-task=1", "--mem=2G", "--time=60"]
    submit = ["sbatch", "--parsable", "--nodes=2", *small, "two-nodes.sh", checkpoint]
    options = {"cwd": two_nodes.folder, "env": {**cluster.environment, "OMP_NUM_THREADS": "1"}}
    cancelled = cluster.run(*submit, **options).strip()
    wait_for(lambda: two_nodes.worker("train", checkpoint), "two nodes to work")
    time.sleep(3)
    cluster.run("scancel", cancelled)
    job = cluster.run(*submit, **options).strip()
    wait_for(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "two nodes to finish")
    say(f"two nodes: {cluster.job(cancelled)['JobState']}, then {cluster.job(job)['JobState']}")
    assert "continuing from step" in (two_nodes.folder / f"logs/train/{checkpoint}.log").read_text()
    assert two_nodes.nothing_to_do(str(trained)), "the pipeline does not take what was trained by hand"

    expected = (undisturbed.folder / trained).read_bytes()
    return [
        Row(SCANCEL, "train, 2 processes by torchrun", (run.folder / trained).read_bytes() == expected),
        Row(SCANCEL, "train, 2 nodes", (two_nodes.folder / trained).read_bytes() == expected),
    ]


def fenced(page: Path) -> list[str]:
    """Return the code blocks of a page."""
    return re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def table(rows: list[Row]) -> str:
    """Return the table of docs/reliability.md."""
    lines = ["| fault | where | times | same results |", "|---|---|---:|---|"]
    for fault, where in dict.fromkeys((row.fault, row.where) for row in rows):
        equal = [row.equal for row in rows if (row.fault, row.where) == (fault, where)]
        answer = "yes" if all(equal) else f"**no**, {equal.count(False)} of them"
        lines.append(f"| {fault} | {where} | {len(equal)} | {answer} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work, kept afterwards (default: a temporary folder)")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="do it all N times (default %(default)s)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table in the place of this page's own")
    options = parser.parse_args()
    if missing := missing_programs():
        print(f"cluster-test: skipped, for this machine lacks {', '.join(missing)}: install Slurm and munge")
        return 0
    start, rows = time.monotonic(), []
    for number in range(options.times):
        with contextlib.ExitStack() as stack:
            folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixflow-cluster-")))
            folder = folder.absolute() / str(number)
            cluster = stack.enter_context(Cluster(folder / "cluster"))
            config = small_config()
            in_time = time_budget(cluster, folder, stack, config)
            rows += several_processes(cluster, folder, stack, config)
            rows += one_process(cluster, folder, stack, config)
            rows += in_time()
    print(f"\n{table(rows)}\nmade in {time.monotonic() - start:.0f} s")
    if options.write:
        page = options.write.read_text()
        options.write.write_text(re.sub(r"\| fault \| where .*?\n(?!\|)", lambda _: table(rows), page, flags=re.DOTALL))
    return 0 if all(row.equal for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
