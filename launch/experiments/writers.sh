#!/usr/bin/env bash
# Flow against codes on the built-in world at equal budgets: the same LLM, SigLIP, data, rows and steps, stages 0 to 3.
#   bash launch/experiments/writers.sh [FOLDER] [SIZE] [--config.FIELD=VALUE ...]
# FOLDER (default runs/writers) gets flow/stageN and codes/stageN, their scores, curves.png and the cost of a picture. SIZE is
# quick (default; lone large objects, some 35 minutes of one core for the two), scored by writers.py; or shapes
# (hours), scored by --benchmark=shapes. The fields are set in every run. After a stop, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/writers} size=${2:-quick}
shift $(($# < 2 ? $# : 2))
python=${JFLOW_VENV:-.venv}/bin/python
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
source launch/xla_flags.sh
[ "$JAX_PLATFORMS" != cpu ] || jflow_xla_flags cpu
declare -A config=([flow]=stage [codes]=janus/stage) sampling=([flow]="--guidance=3" [codes]="--guidance=2 --temperature=0.6")
for writer in flow codes; do
  before=
  for stage in 0 1 2 3; do
    "$python" -m jflow train --config="${config[$writer]}$stage:$size" --workdir="$out/$writer/stage$stage" \
      --config.train.init_from="$before" "$@"
    before=$out/$writer/stage$stage
  done
done
if [ "$size" = quick ]; then
  for stage in 2 3; do
    [ -e "$out/stage$stage.json" ] || "$python" launch/experiments/writers.py "$out" --stage="$stage"
  done
  exit
fi
for writer in flow codes; do
  last=$out/$writer/stage3
  [ -e "$out/$writer/scores/report.json" ] || "$python" -m jflow evaluate --benchmark=shapes --checkpoint="$last" \
    --output="$out/$writer/scores" ${sampling[$writer]}
  "$python" -m jflow generate --checkpoint="$last" --output="$out/$writer/pictures" --overwrite ${sampling[$writer]} \
    --prompt="a picture of a red circle" --prompt="a picture of a blue star" --prompt="a green square left of a heart"
  [ -e "$out/$writer/cost.json" ] || "$python" -m jflow bench generate --config="${config[$writer]}3:$size" \
    --json="$out/$writer/cost.json"
done
"$python" -m jflow plot "$out/flow/stage2" "$out/codes/stage2" --metric=loss_text --output="$out/curves.png"
echo "scores: $out/{flow,codes}/scores/report.html; cost per picture: $out/{flow,codes}/cost.json; curves: $out/curves.png"
