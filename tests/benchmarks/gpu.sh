#!/bin/sh
# Measures everything on one GPU in at most 8 minutes, and writes one JSON file:
#   tests/benchmarks/gpu.sh --json=gpu.json
#   tests/benchmarks/gpu.sh --small --json=small.json    tiny shapes, also on a CPU
# PYTHON names the interpreter; by default that of .venv, or else python3.
cd "$(dirname "$0")/../.." || exit 1
[ -n "$PYTHON" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" tests/benchmarks/gpu.py "$@"
