#!/usr/bin/env bash
# Trains on a Slurm cluster, one process per GPU; Slurm places, restarts and ends the processes.
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh \
#     --config=configs/stage2.py --workdir=/shared/runs/stage2 --config.mesh.data=4 --config.mesh.fsdp=8 \
#     --config.train.accumulation=4 ...   # 512 rows a step: 4 at a time on each of 32 GPUs
# The workdir must be on a disk that all nodes share. Two minutes before the time limit, and when the job is preempted,
# the run saves and ends; Slurm requeues it and it resumes, as after a failed node.
#SBATCH --job-name=jflow
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source launch/xla_flags.sh
jflow_xla_flags gpu
venv=${JFLOW_VENV:-.venv}
# --kill-on-bad-exit: a process that fails ends the step at once, also where the others would not notice for a while.
srun --kill-on-bad-exit=1 --wait=60 "$venv/bin/python" -m jflow train "$@" --config.distributed.cluster=auto &
step=$!
requeue=0
stop() { requeue=1; kill -TERM "$step"; } # srun hands it to every process: they save and end
trap stop USR1 TERM
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done # a signal ends `wait` before the processes do
# 0: done. 2: a mistake in the command, which another start would make again. Up to 10 starts.
if [ "$code" != 0 ] && [ "$code" != 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then requeue=1; fi
if [ "$code" != 0 ] && [ "$code" != 2 ] && [ "$requeue" = 1 ]; then
  echo "launch/slurm.sh: ended with code $code; back into the queue" >&2
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
