#!/usr/bin/env bash
# Installs what the tests need and runs all but those marked `kill` or `soak`; arguments go to pytest in its place:
#   launch/test.sh -m fast    laws alone, in under three minutes
#   launch/test.sh tests      all of them
#   JFLOW_COMPILE=1 also installs libtpu (213 MB), for the step compiled for a TPU (skipped without it)
#   JFLOW_DEMO=1    also installs Gradio and Selenium, for the page's test (skipped without them and chromium-driver)
#   JFLOW_PARITY=1  also installs PyTorch, diffusers and clean-fid: live comparisons (skipped without them)
set -euo pipefail
cd "$(dirname "$0")/.."
packages=("pytest>=8" "httpx>=0.27" "openai>=3" "scikit-image>=0.25" "scikit-learn>=1.6" "tensorboard>=2.18")
[ "${JFLOW_COMPILE:-0}" = 1 ] && packages+=("jax[tpu]>=0.10,<0.13")
[ "${JFLOW_PARITY:-0}" = 1 ] && packages+=("torch==2.13.0" "diffusers>=0.35")
[ "${JFLOW_DEMO:-0}" = 1 ] && packages+=("gradio>=6,<7" "selenium>=4.30")
bash launch/install.sh "${packages[@]}"
python=${JFLOW_VENV:-.venv}/bin/python
# Its resize alone is used, which needs PyTorch; with its requirements it would bring torchvision too.
[ "${JFLOW_PARITY:-0}" = 1 ] && "$python" -m pip install --quiet --no-deps "clean-fid==0.1.35"
export JAX_PLATFORMS=${JAX_PLATFORMS:-$([ -n "${JFLOW_ACCELERATOR:-}" ] || echo cpu)}
[ $# -gt 0 ] || set -- -m "not kill and not soak"
exec "$python" -m pytest "$@"
