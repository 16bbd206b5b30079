#!/bin/sh
# Runs any command in the image. tini passes signals to all its processes, so that `docker stop` lets them save.
set -eu

# Libraries ask for the user's name, which a uid without an account does not have.
if ! id -un >/dev/null 2>&1; then
  LOGNAME="uid$(id -u)"
  export LOGNAME
fi

# A working folder without a pipeline of its own gets the image's.
if [ "${1:-}" = snakemake ] && [ ! -e Snakefile ] && [ ! -e workflow/Snakefile ]; then
  shift
  set -- snakemake --snakefile /opt/mixflow/Snakefile "$@"
fi
exec tini -g -- "$@"
