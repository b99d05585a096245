#!/bin/sh
# Measures everything on one GPU in at most 8 minutes, and writes one JSON file:
#   tests/benchmarks/gpu.sh --json=gpu.json
#   tests/benchmarks/gpu.sh --small --json=small.json    tiny shapes, also on a CPU
# PYTHON names the interpreter; by default that of .venv, or else python3.
root=$(cd "$(dirname "$0")/../.." && pwd) || exit 1
[ -n "$PYTHON" ] || { [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python; } || PYTHON=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" "$root/tests/benchmarks/gpu.py" "$@"
