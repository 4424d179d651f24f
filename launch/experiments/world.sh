#!/usr/bin/env bash
# Trains the small model of the built-in world, stages 0 to 3 from nothing and then on rewards: some four and a half hours of one core.
# After a stop, the same command resumes. Arguments: [FOLDER], the output folder (default runs/world), and
# --config.FIELD=VALUE for every stage (not for the rewards: there a batch counts pictures).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/world}
shift || true
python=${JFLOW_VENV:-.venv}/bin/python
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
source launch/xla_flags.sh
[ "$JAX_PLATFORMS" != cpu ] || jflow_xla_flags cpu
before=
for stage in 0 1 2 3; do
  "$python" -m jflow train --config=configs/stage$stage.py:world --workdir="$out/stage$stage" \
    --config.train.init_from="$before" "$@"
  before=$out/stage$stage
done
"$python" -m jflow train --config=configs/grpo.py:world --workdir="$out/rewarded" --config.train.init_from="$before"
echo "score it: $python -m jflow evaluate --benchmark=shapes --checkpoint=$out/rewarded --output=$out/scores --guidance=3"
