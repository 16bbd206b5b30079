"""The commands that a user calls, on the rehearsal's stand-ins."""

import os
import signal
import subprocess
import sys
import time

from tests.conftest import ROOT

CONFIG = ["--config", ROOT / "config.yaml", ROOT / "rehearsal.yaml"]
# The number of threads decides the order of sums, and so the last bit.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder, *arguments, config=CONFIG, code=0):
    """Run `python -m mixflow ...` in `folder`; returns the finished process."""
    command = [sys.executable, "-m", "mixflow", *map(str, arguments), *map(str, config)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    assert result.returncode == code, result.stderr[-3000:]
    return result


def state(folder, pattern):
    """What a kill waits for: the number of files, and their contents where one file tells the progress."""
    return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.glob(pattern))]


def kill_when_changed(folder, pattern, arguments, config):
    """Start a command and SIGKILL it as soon as it has saved something more."""
    command = [sys.executable, "-m", "mixflow", *map(str, arguments), *map(str, config)]
    before = state(folder, pattern)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **quiet)
    changes, last, deadline = 0, before, time.monotonic() + 120
    wanted = 2 if "sample" in arguments else 1  # the first change of done.npy is its creation, or the start's
    while changes < wanted:
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
        if (now := state(folder, pattern)) != last:
            changes, last = changes + 1, now
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def two_processes(folder, *arguments, config=CONFIG):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mixflow"]
    command = [*launch, *map(str, arguments), *map(str, config)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]


def sentence(result):
    """The one line that a user sees."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("mixflow: ")]
    assert "Traceback" not in result.stderr
    return lines[-1]
