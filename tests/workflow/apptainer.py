"""Stands in for `apptainer`: the variables and arguments of `exec` as Apptainer 1.4 takes them, without a container.

An image named bare* holds no program but the shell. tests/image/check_apptainer.sh tries the real one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print("apptainer version 1.4.5")
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("verb", choices=["exec"])
    parser.add_argument("--home", required=True)
    parser.add_argument("--nv", action="store_true")
    parser.add_argument("--cleanenv", action="store_true")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--bind", action="append")
    parser.add_argument("image")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    program = shutil.which(options.command[0])
    assert program is not None
    environment = {} if options.cleanenv else dict(os.environ)
    path = "/nowhere" if os.path.basename(options.image).startswith("bare") else os.environ["PATH"]
    environment |= {"PATH": path, "HOME": options.home}
    start = "APPTAINERENV_"
    environment |= {name.removeprefix(start): value for name, value in os.environ.items() if name.startswith(start)}
    environment |= dict(pair.split("=", 1) for pair in options.env)
    os.execve(program, options.command, environment)


if __name__ == "__main__":
    main()
