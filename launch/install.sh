#!/usr/bin/env bash
# Creates .venv and installs jflow's requirements and extras into it; further arguments go to pip.
#   JFLOW_PYTHON       the Python to use (3.11 or newer; default python3)
#   JFLOW_VENV         where the environment goes (default .venv)
#   JFLOW_ACCELERATOR  cuda13 or tpu, for the matching jax; default CPU
#   JFLOW_EXTRAS       extras of pyproject.toml, with commas between (default serve,plots)
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
# Not as jflow[...], which would install jflow itself.
extras=$("$venv/bin/python" - "${JFLOW_EXTRAS-serve,plots}" <<'EOF'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
  extras = tomllib.load(file)["project"]["optional-dependencies"]
names = [name for name in sys.argv[1].split(",") if name]
if unknown := sorted(set(names) - set(extras)):
  sys.exit(f"JFLOW_EXTRAS: {unknown[0]} is unknown: use {', '.join(extras)}")
print(*(package for name in names for package in extras[name]), sep="\n")
EOF
) || exit 2
[ -z "$extras" ] || mapfile -t -O "${#extra[@]}" extra <<<"$extras"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt "${extra[@]}" "$@"
