#!/usr/bin/env bash
# What one GPU does with the full model: a step for each remat policy and number of rows, painting and answering beside
# PyTorch. A report that is there is not made again, so the same command goes on where it was stopped.
#   bash launch/experiments/speed.sh runs/speed            # about an hour; needs pip install ".[parity]"
set -uo pipefail
out=${1:?name a folder for the reports}
mkdir -p "$out"
measure() { # NAME, then the words behind `bench`
  local file="$out/$1.json"
  shift
  [ -s "$file" ] || python -m jflow bench "$@" --json="$file" || echo "not measured: $file" >&2
}
for remat in full save:attended save:query,key,value,attended save:query,key,value,attended,gate,up none; do
  for rows in 4 8 16; do
    measure "train-$remat-$rows" train --config=configs/stage2.py --rows=$rows --fields "config.compute.remat=$remat"
  done
done
worker=tests/parity/torch_worker.py
for size in 1 16; do
  measure "generate-$size" generate --config=configs/stage3.py:384 --batch_size=$size --versus=$worker
  measure "understand-$size" understand --config=configs/stage3.py:384 --batch_size=$size --new_tokens=256 --versus=$worker
done
