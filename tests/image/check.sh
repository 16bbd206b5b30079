#!/bin/bash
# Checks an image as a careful stranger runs it: any uid, a read-only root, no network, no privileges.
# `make image-test` builds the image and calls this; DOCKER is the engine's command.
set -euo pipefail
image=$1
engine=${DOCKER:-docker}
max_size_mib=8000

work=$("$engine" volume create)
trap '"$engine" volume rm "$work" >/dev/null' EXIT

# COMMAND ARGUMENT...: nothing is writable but /tmp and the working folder, which is empty at first.
run() {
  "$engine" run --rm --user 12345:12345 --read-only --network none --cap-drop ALL --security-opt no-new-privileges \
    --tmpfs /tmp:exec,mode=1777 --volume "$work:/work" "$image" "$@"
}
inspect() { "$engine" image inspect --format "$1" "$image"; }
step() { printf '\n== %s (at %d s)\n' "$*" "$SECONDS"; }
fail() {
  echo "image-test: $image: $*" >&2
  exit 1
}

step "what the image says of itself"
revision=$(inspect '{{index .Config.Labels "org.opencontainers.image.revision"}}')
for label in title version revision licenses base.name; do
  value=$(inspect "{{index .Config.Labels \"org.opencontainers.image.$label\"}}")
  [ -n "$value" ] || fail "has no label org.opencontainers.image.$label"
  echo "$label: $value"
done
size_mib=$(($(inspect '{{.Size}}') >> 20))
echo "size: $size_mib MiB unpacked"
[ "$size_mib" -le "$max_size_mib" ] || fail "is larger than $max_size_mib MiB: what was added?"
[[ $(inspect '{{.Config.User}}') =~ ^[1-9] ]] || fail "runs as root unless told otherwise"

step "what must not be in it"
if "$engine" image history --no-trunc --format '{{.CreatedBy}}' "$image" | grep -iE 'token|passw|api.?key|index.url'; then
  fail "has secrets in its history (above)"
fi
# Weights and certificates of a build; the tests carry small random weights of their own.
# shellcheck disable=SC2016
found=$(run sh -c 'find / -xdev \( -name "*.safetensors" -o -name "*.pt" -o -name "*.pth" -o -name "*.ckpt" \) -size +1M \
  -not -path "/proc/*" -not -path "/opt/mixflow/tests/*" 2>/dev/null; ls -A /run/secrets 2>/dev/null; true')
[ -z "$found" ] || fail "holds what it should not: $found"
echo "no weights, no secrets"

step "any command, its words and its exit status"
[ "$(run printf '%s|' one 'two  words')" = "one|two  words|" ] || fail "does not pass words on"
status=0
run sh -c 'exit 75' || status=$?
[ "$status" = 75 ] || fail "turns exit status 75 into $status"

step "python -m mixflow doctor"
findings=$(run)
echo "$findings"
[[ $findings == *"no problems found"* ]] || fail "doctor found problems"
[[ $findings == *"(${revision:0:12}"* ]] || fail "doctor does not name the commit ${revision:0:12}"

step "fast unit tests"
run env OMP_NUM_THREADS=1 python -m pytest -q -p no:cacheprovider -m "not slow" /opt/mixflow/tests/unit

step "digits in miniature, and again: nothing to do"
rehearsal=(snakemake digits --profile local --configfile /opt/mixflow/rehearsal.yaml)
run "${rehearsal[@]}" --quiet
run "${rehearsal[@]}" 2>&1 | grep "Nothing to be done"
run sed -n 1,12p results/tables/digits.md
run grep -F "\"commit\": \"${revision%-dirty}\"" results/checkpoints/digits-base/run.json

step "done: $image is $size_mib MiB"
