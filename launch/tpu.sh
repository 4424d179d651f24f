#!/usr/bin/env bash
# Trains on every VM of a TPU pod slice (or several slices), one process per VM, with the same command on each.
#   TPU=my-slice ZONE=us-east5-a bash launch/tpu.sh --config=configs/stage2.py --workdir=/mnt/runs/stage2 \
#     --config.mesh.fsdp=16 --config.train.accumulation=32 ...   # 512 rows a step: one at a time on each of 16 v5e
# /mnt/runs is shared: Filestore, or a bucket mounted with Cloud Storage FUSE
# (rename-dir-limit=200000, unless the bucket has a hierarchical namespace). jflow and its .venv
# (JFLOW_ACCELERATOR=tpu bash launch/install.sh) lie in JFLOW_DIR (default ~/jflow) of every VM.
# On a VM itself (or from a startup script): bash launch/tpu.sh --here --config=...
#   JFLOW_RESTARTS   starts after a failure (default 10); a queued resource starts the VMs again after a preemption
set -uo pipefail
if [ "${1:-}" != --here ]; then
  : "${TPU:?name the TPU in TPU=}" "${ZONE:?name its zone in ZONE=}"
  printf -v command '%q ' bash launch/tpu.sh --here "$@"
  folder='"$HOME/jflow"'
  [ -z "${JFLOW_DIR:-}" ] || printf -v folder %q "$JFLOW_DIR"
  exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd $folder && JFLOW_RESTARTS=${JFLOW_RESTARTS:-10} $command"
fi
shift
cd "$(dirname "$0")/.."
source launch/xla_flags.sh
jflow_xla_flags tpu
venv=${JFLOW_VENV:-.venv}
child=
stop() { asked=1; kill -TERM "$child" 2>/dev/null; }
asked=0
trap stop INT TERM
for ((try = 0; ; try++)); do
  "$venv/bin/python" -m jflow train "$@" --config.distributed.cluster=auto &
  child=$!
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
  # 2 is a mistake in the command. All VMs end together when one fails, so all start again together.
  if [ "$code" = 0 ] || [ "$code" = 2 ] || [ "$asked" = 1 ] || [ "$try" -ge "${JFLOW_RESTARTS:-10}" ]; then
    exit "$code"
  fi
  echo "launch/tpu.sh: ended with code $code; goes on from the last checkpoint" >&2
  sleep 10
done
