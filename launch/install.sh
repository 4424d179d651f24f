#!/usr/bin/env bash
# Makes .venv and installs jflow's requirements into it; further arguments are handed to pip.
#   JFLOW_PYTHON       the Python to use (3.11 or newer; default python3)
#   JFLOW_VENV         where the environment goes (default .venv)
#   JFLOW_ACCELERATOR  cuda13 or tpu, for the matching jax; default CPU
set -euo pipefail
cd "$(dirname "$0")/.."
python=${JFLOW_PYTHON:-python3}
venv=${JFLOW_VENV:-.venv}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "jflow needs Python 3.11 or newer; name one in JFLOW_PYTHON" >&2; exit 2; }
case "${JFLOW_ACCELERATOR:-}" in
  "") extra=() ;;
  cuda13 | tpu) extra=("jax[$JFLOW_ACCELERATOR]>=0.10,<0.13") ;;
  *) echo "JFLOW_ACCELERATOR=$JFLOW_ACCELERATOR is unknown: use cuda13 or tpu" >&2; exit 2 ;;
esac
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt "${extra[@]}" "$@"
