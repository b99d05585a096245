#!/usr/bin/env bash
# Runs the tests, after creating the environment if it does not exist:
#
#   tests/run.sh                                    # all but the slow tests and those in a browser
#   tests/run.sh -m browser                         # the report in Chromium, which must be installed
#   tests/run.sh -m ''                              # all
#   tests/run.sh tests/objectives -k gradient       # arguments of pytest, with paths from the root
#   tests/run.sh -n 0 --pdb tests/config/test_fields.py  # in one process; by default one more than cores
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
ensure_environment requirements.txt tests/requirements.txt

cd "$root"
# One process more than there are cores, since some tests wait: for other processes, or until a lock expires.
exec "$venv/bin/python" -m pytest -m 'not slow and not browser' \
  --numprocesses $(($(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 8 --dist loadfile "$@"
