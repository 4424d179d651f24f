#!/usr/bin/env bash
# Trains a small model of the built-in world that ships with jflow, stages 0 to 3 from nothing.
#   bash launch/experiments/world.sh [FOLDER]           JanusFlow (`world`), then twice on rewards: some five hours of one core
#   bash launch/experiments/world.sh --codes [FOLDER]   Janus (`world-codes`): two hours of one core
# FOLDER is runs/world or runs/world-codes unless named; behind it, --config.FIELD=VALUE for every stage (not for the
# rewards: there a batch counts pictures). After a stop, the same command resumes.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=world family=
[ "${1:-}" != --codes ] || { name=world-codes family=janus/; shift; }
out=runs/$name
[[ "${1:---}" == --* ]] || { out=$1; shift; }
python=${JFLOW_VENV:-.venv}/bin/python
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
source launch/xla_flags.sh
[ "$JAX_PLATFORMS" != cpu ] || jflow_xla_flags cpu
before=
for stage in 0 1 2 3; do
  "$python" -m jflow train --config="configs/${family}stage$stage.py:world" --workdir="$out/stage$stage" \
    --config.train.init_from="$before" "$@"
  before=$out/stage$stage
done
checkpoint=$before
if [ "$name" = world ]; then
  checkpoint=$out/rewarded
  "$python" -m jflow train --config=configs/grpo.py:world --workdir="$out/rewarded_once" --config.train.init_from="$before"
  # Again from there, from fresh moments: two thirds of the steps, 23 % of the prompts about one object without a color.
  "$python" -m jflow train --config=configs/grpo.py:world --workdir="$checkpoint" --config.train.init_from="$out/rewarded_once" \
    --config.train.seed=1 --config.data.shapes.tags.single_object=0.25 --config.train.steps=400 \
    --config.optimizer.cooldown_start=200 --config.optimizer.cooldown_steps=200
fi
echo "score it: $python -m jflow evaluate --benchmark=shapes --checkpoint=$checkpoint --output=$out/scores"
