#!/bin/bash
# After a killed head process Snakemake's lock stays behind. Remove it, unless a live snakemake works in this folder.
set -euo pipefail
[ -n "$(ls -A .snakemake/locks 2>/dev/null)" ] || exit 0
for process in /proc/[0-9]*; do
  [ "$(readlink "$process/cwd" 2>/dev/null)" = "$PWD" ] || continue
  if tr '\0' ' ' <"$process/cmdline" 2>/dev/null | grep -q 'snakemake'; then
    echo "Another snakemake (process ${process#/proc/}) is at work in this folder: wait for it, or end it." >&2
    exit 1
  fi
done
snakemake --unlock --quiet all
