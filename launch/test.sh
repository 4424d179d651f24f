#!/usr/bin/env bash
# Installs what the tests need and runs all but those marked `kill` or `soak`: on up to four cores, a file on each, and
# those marked `alone` after them, one by one.
#   launch/test.sh --all      also those marked `kill` or `soak`
#   launch/test.sh ...        pytest with these arguments in its place: -m fast, the laws alone, in under three minutes
#   JFLOW_COMPILE=1 also installs libtpu (213 MB), for the step compiled for a TPU (skipped without it)
#   JFLOW_DEMO=1    also installs Gradio and Selenium, for the page's test (skipped without them and chromium-driver)
#   JFLOW_PARITY=1  also installs PyTorch, diffusers, PEFT and clean-fid: live comparisons (skipped without them)
set -euo pipefail
cd "$(dirname "$0")/.."
packages=()
export JFLOW_EXTRAS=serve,plots,test
[ "${JFLOW_COMPILE:-0}" = 1 ] && JFLOW_EXTRAS+=,compile
[ "${JFLOW_PARITY:-0}" = 1 ] && JFLOW_EXTRAS+=,parity packages+=("torch==2.13.0")
[ "${JFLOW_DEMO:-0}" = 1 ] && JFLOW_EXTRAS+=,demo packages+=("selenium>=4.30")
bash launch/install.sh "${packages[@]}"
python=${JFLOW_VENV:-.venv}/bin/python
# Its resize alone is used, which needs PyTorch; with its requirements it would bring torchvision too.
[ "${JFLOW_PARITY:-0}" = 1 ] && "$python" -m pip install --quiet --no-deps "clean-fid==0.1.35"
export JAX_PLATFORMS=${JAX_PLATFORMS:-$([ -n "${JFLOW_ACCELERATOR:-}" ] || echo cpu)}
but=" and not kill and not soak"
[ "$*" != --all ] || { but=; set --; }
[ $# = 0 ] || exec "$python" -m pytest "$@"
cores=$([ -n "${JFLOW_ACCELERATOR:-}" ] && echo 1 || nproc)  # one process has the accelerator
status=0
"$python" -m pytest -n $((cores < 4 ? cores : 4)) --dist loadfile -m "not alone$but" || status=$?
"$python" -m pytest -m "alone$but" || status=$?
exit "$status"
