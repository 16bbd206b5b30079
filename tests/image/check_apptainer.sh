#!/bin/bash
# Runs an image under Apptainer as a cluster does: `tests/image/check_apptainer.sh mixflow.sif` makes digits in miniature
# through profiles/apptainer. Needs apptainer and snakemake on the PATH, as on a login node; run it as a user.
set -euo pipefail
if ! command -v apptainer >/dev/null || ! command -v snakemake >/dev/null; then
  echo "check_apptainer skipped: it needs apptainer and snakemake on the PATH"
  exit 0
fi
image=$(realpath "$1")
repository=$(realpath "$(dirname "$0")/../..")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
step() { printf '\n== %s (at %d s)\n' "$*" "$SECONDS"; }

step "doctor in the image"
apptainer exec --cleanenv --home "$folder" "$image" python -m mixflow doctor

step "digits in miniature, every job in the image"
options=(--snakefile "$repository/Snakefile" --configfile "$repository/rehearsal.yaml" --cores 2
  --profile "$repository/profiles/apptainer" --config "image=$image")
snakemake digits --quiet "${options[@]}"
snakemake digits "${options[@]}" 2>&1 | grep "Nothing to be done"
sed -n 1,12p results/tables/digits.md
grep -H '"commit"\|"image"' results/checkpoints/digits-base/run.json results/metrics/digits-base/euler50/run.json
# The threads that Snakemake gave, though the environment is a clean one.
grep -H '"threads": 2' results/checkpoints/digits-base/run.json
grep -H '"threads": 1' results/metrics/digits-base/euler50/run.json

step "done"
