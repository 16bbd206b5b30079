"""The commands that a user calls, on the rehearsal's stand-ins."""

import time

from tests import forked
from tests.conftest import ROOT

CONFIG = ["--config", ROOT / "config.yaml", ROOT / "rehearsal.yaml"]


def run(folder, *arguments, config=CONFIG, code=0):
    """Run `python -m mixflow ...` in `folder`; returns the finished process."""
    result = forked.mixflow(*arguments, *config, cwd=folder)
    assert result.returncode == code, result.stderr[-3000:]
    return result


def state(folder, pattern):
    """What a kill waits for: the number of files, and their contents where one file tells the progress."""
    return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.glob(pattern))]


def kill_when_changed(folder, pattern, arguments, config):
    """Start a command and SIGKILL it as soon as it has saved something more."""
    before = state(folder, pattern)
    process = forked.start(*arguments, *config, cwd=folder)
    changes, last, deadline = 0, before, time.monotonic() + 120
    wanted = 2 if "sample" in arguments else 1  # the first change of done.npy is its creation, or the start's
    while changes < wanted:
        assert process.exitcode is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
        if (now := state(folder, pattern)) != last:
            changes, last = changes + 1, now
    process.kill()
    process.join()


def two_processes(folder, *arguments, config=CONFIG):
    for result in forked.together(2, *arguments, *config, cwd=folder):
        assert result.returncode == 0, result.stderr[-3000:]


def sentence(result):
    """The one line that a user sees."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("mixflow: ")]
    assert "Traceback" not in result.stderr
    return lines[-1]
