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

# XLA's buffers in large pages (glibc 2.35 or newer): training on CPUs takes about a fifth less time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
exec "$venv/bin/python" -m music_jax.main "$@"
