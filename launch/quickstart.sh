#!/usr/bin/env bash
# From nothing to a small JanusFlow that reads and paints, on the built-in world: about 15 minutes on 2 cores.
# Stopped half-way? The same command goes on where it was. Arguments: [FOLDER], where all goes (default quickstart).
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
before=
number=2
for stage in 0 1 2 3; do
  echo "[$number/6] stage $stage"
  "$python" -m jflow train --config=configs/stage$stage.py:shapes --workdir="$out/stage$stage" \
    --config.train.init_from="$before"
  before=$out/stage$stage
  number=$((number + 1))
done
echo "[6/6] painting from prompts and answering questions about held-out pictures"
"$python" launch/quickstart.py "$out"
