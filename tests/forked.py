"""`python -m mixflow ...` in processes of its own that need not import torch first: seconds less for each command.

They are forked off a server that has imported what the stages import and has computed nothing. What Snakemake and
torchrun start begins as a user's command does, in the tests of the pipeline.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("mixflow.cli", "mixflow.stages.cache_latents", "mixflow.stages.train", "mixflow.stages.sample"),
        *("mixflow.stages.evaluate_files", "mixflow.stages.import_weights", "mixflow.stages.stand_ins"),
        *("diffusers.models.autoencoders.autoencoder_kl", "torch_fidelity.feature_extractor_inceptionv3"),
    ]
)


def start(*arguments, cwd, env=None, output=(os.devnull, os.devnull)):
    """Start `python -m mixflow ARGUMENTS` in folder `cwd`, its output into two files; returns a running Process."""
    command = ["mixflow", *map(str, arguments)]
    process = SERVER.Process(target=_command, args=(command, os.fspath(cwd), dict(env or os.environ), output))
    process.start()
    return process


def mixflow(*arguments, cwd, env=None, timeout=600):
    """Run the command to its end; returns the finished process with its text."""
    return together(1, *arguments, cwd=cwd, env=env, timeout=timeout)[0]


def together(processes, *arguments, cwd, env=None, timeout=600):
    """Run the command in several processes that find each other as torchrun's do; returns them when all have ended."""
    shared = dict(env or os.environ)
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(processes)]
        started = [
            start(
                *arguments,
                cwd=cwd,
                env={**shared, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
                output=output,
            )
            for rank, output in enumerate(outputs)
        ]
        running, deadline = list(started), time.monotonic() + timeout
        # As torchrun does: one that fails ends the others.
        while running and not any(process.exitcode for process in started) and time.monotonic() < deadline:
            wait([process.sentinel for process in running], timeout=deadline - time.monotonic())
            running = [process for process in running if process.exitcode is None]
        for process in started:
            process.kill()
            process.join()
        if time.monotonic() >= deadline:
            raise subprocess.TimeoutExpired(["mixflow", *map(str, arguments)], timeout)
        return [
            subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in output))
            for process, output in zip(started, outputs, strict=True)
        ]


def _command(command, cwd, environment, output):
    for number, file in enumerate(output, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    runpy.run_module("mixflow", run_name="__main__", alter_sys=True)
