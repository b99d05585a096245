#!/usr/bin/env bash
# Pre-trains on this machine, after creating the environment if it does not exist:
#
#   launch/local.sh --config=configs/mnist5k.py --workdir=DIR
#
# All arguments are passed to music_jax.main. PYTHON=... sets the interpreter of a new environment;
# ACCELERATOR=tpu, cuda13 or cuda12 installs the JAX package for it.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment requirements.txt

exec "$venv/bin/python" -m music_jax.main "$@"
