#!/usr/bin/env bash
# Trains a small JanusFlow on the built-in world from scratch: about 15 minutes on 2 cores.
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
before=
number=2
for stage in 0 1 2 3; do
  echo "[$number/6] stage $stage"
  "$python" -m jflow train --config=configs/stage$stage.py:shapes --workdir="$out/stage$stage" \
    --config.train.init_from="$before"
  before=$out/stage$stage
  number=$((number + 1))
done
echo "[6/6] generating from prompts and answering questions about held-out pictures"
"$python" launch/quickstart.py "$out"
