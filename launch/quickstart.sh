#!/usr/bin/env bash
# Trains a small JanusFlow on lone objects of the built-in world from scratch: about 15 minutes on 2 cores.
# After a stop, the same command resumes. Arguments: [FOLDER], the output folder (default quickstart).
#   JFLOW_ACCELERATOR=cuda13|tpu   train on an accelerator
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-quickstart}
export JAX_PLATFORMS=${JAX_PLATFORMS:-$([ -n "${JFLOW_ACCELERATOR:-}" ] || echo cpu)}
source launch/xla_flags.sh
[ "$JAX_PLATFORMS" != cpu ] || jflow_xla_flags cpu
echo "[1/6] installing into ${JFLOW_VENV:-.venv}"
bash launch/install.sh
python=${JFLOW_VENV:-.venv}/bin/python
# Fitting and stage 0 leave a core idle, which fills the cache of compiled programs for the later stages.
warming=
if [ "$JAX_PLATFORMS" = cpu ] && [ ! -e "$out/stage1" ]; then
  warm=$(mktemp -d)
  setsid bash -c 'for stage in 1 2 3; do
    "$1" -m jflow train --config=configs/stage$stage.py:quick --workdir="$2/$stage" --config.train.steps=1
  done' warm "$python" "$warm" >"$warm/log" 2>&1 &
  warming=$!
  trap 'kill -- -$warming 2>/dev/null || true; rm -rf "$warm"' EXIT
fi
before=
number=2
for stage in 0 1 2 3; do
  echo "[$number/6] stage $stage"
  "$python" -m jflow train --config=configs/stage$stage.py:quick --workdir="$out/stage$stage" \
    --config.train.init_from="$before"
  [ $stage != 0 ] || wait $warming || true
  before=$out/stage$stage
  number=$((number + 1))
done
echo "[6/6] generating from prompts and answering questions about new pictures"
"$python" launch/quickstart.py "$out"
