#!/usr/bin/env bash
# The gates, in seconds: lint, format, and types of the core; rules in pyproject.toml. CI runs them before the tests.
#   launch/check.sh          checks
#   launch/check.sh --fix    first fixes what ruff can
#   JFLOW_VENV               the environment that holds jflow and the tools, or gets them (default .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${JFLOW_VENV:-.venv}/bin
tools=("ruff==0.17.6" "pyrefly==1.5.0")
for tool in "${tools[@]}"; do
  [ "$("$bin/${tool%%=*}" --version 2>/dev/null)" = "${tool/==/ }" ] || { bash launch/install.sh "${tools[@]}"; break; }
done
if [ "${1:-}" = --fix ]; then
  "$bin/ruff" check --quiet --fix . || true
  "$bin/ruff" format --quiet .
fi
"$bin/ruff" check --quiet --output-format concise .
"$bin/ruff" format --quiet --check .
"$bin/pyrefly" check --python-interpreter-path "$bin/python" --output-format min-text
