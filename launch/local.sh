#!/usr/bin/env bash
# Pre-trains on this machine, making the environment first if there is none:
#
#   launch/local.sh --config=configs/mnist5k.py --workdir=DIR
#
# All arguments go to music_jax.main. PYTHON=... chooses the interpreter of a new environment;
# ACCELERATOR=tpu, cuda13 or cuda12 adds what JAX needs for it.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment requirements.txt

exec "$venv/bin/python" -m music_jax.main "$@"
