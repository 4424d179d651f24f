#!/usr/bin/env bash
# Trains one model with N processes on this machine, as on a cluster:
#   bash launch/local.sh 2 -- --config=configs/stage1.py:tiny --workdir=runs/two --config.mesh.data=2
# When one of them fails, all end, and the same command resumes from the last checkpoint. Ctrl-C saves first.
#   JFLOW_RESTARTS=3   number of restarts after a failure (default 0)
#   JFLOW_PYTHON       the Python to use (default .venv/bin/python, or python)
# With GPUs, process i sees only the i-th GPU (of CUDA_VISIBLE_DEVICES, if set); with JAX_PLATFORMS=cpu each has JAX_NUM_CPU_DEVICES (default 1).
set -uo pipefail
cd "$(dirname "$0")/.."
[[ "${1:-}" =~ ^[1-9][0-9]*$ && "${2:-}" == -- ]] || { sed -n '2,3p' launch/local.sh | cut -c3- >&2; exit 2; }
processes=$1
shift 2
venv=${JFLOW_VENV:-.venv}
python=${JFLOW_PYTHON:-$([ -x "$venv/bin/python" ] && echo "$venv/bin/python" || echo python)}
pids=()
IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((processes - 1)))}"
if [ "${JAX_PLATFORMS:-}" != cpu ] && [ "${#devices[@]}" -lt "$processes" ]; then
  echo "launch/local.sh: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names fewer GPUs than $processes processes" >&2
  exit 2
fi
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
  source launch/xla_flags.sh
  jflow_xla_flags gpu
fi

start() {
  local port
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  pids=()
  for ((i = 0; i < processes; i++)); do
    CUDA_VISIBLE_DEVICES=${devices[i]:-} "$python" -m jflow train "$@" \
      --config.distributed.coordinator="127.0.0.1:$port" --config.distributed.processes="$processes" \
      --config.distributed.process_id="$i" &
    pids+=($!)
  done
}

asked=0
forward() { asked=1; kill -TERM "${pids[@]}" 2>/dev/null; }
trap forward INT TERM

for ((try = 0; try <= ${JFLOW_RESTARTS:-0}; try++)); do
  start "$@"
  worst=0
  for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done # a signal ends `wait` before the process
    [ "$code" -gt "$worst" ] && worst=$code
  done
  # 2 is a mistake in the command: another try would make it again.
  if [ "$worst" = 0 ] || [ "$worst" = 2 ] || [ "$asked" = 1 ]; then exit "$worst"; fi
  echo "launch/local.sh: a process ended with code $worst; the run goes on from the last checkpoint" >&2
done
exit "$worst"
