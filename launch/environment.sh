# Creates the Python environment of the project, .venv, from the pinned requirements.
# Sourced by the launchers, tests/run.sh and .ci/run. Sets root and venv.
# ACCELERATOR=tpu, cuda13 or cuda12 installs the JAX package for it, at the pinned version of JAX.
# shellcheck shell=bash

# Variables that the user's shell sets for other projects must not affect this one.
unset CDPATH PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_ROOT PIP_CONSTRAINT
export PIP_USER=0

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
accelerator=${ACCELERATOR:-cpu}

# Prints the first Python that runs (a pyenv shim may not), is new enough and can create environments.
find_python() {
  local candidate candidates=(python3.11 python3.12 python3.13 python3 python)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -I -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: need Python 3.11 or newer with venv and ensurepip (Debian: python3-venv)," \
    "found none as ${candidates[*]}; set PYTHON to one" >&2
  return 2
}

# .venv has a copy of each requirements file that was installed completely.
stamp() { echo "$venv/installed-${1//\//-}"; }

is_installed() {
  local file
  for file in "$@"; do cmp -s "$root/$file" "$(stamp "$file")" || return 1; done
  [[ -x $venv/bin/python ]]
}

has_accelerator() { [[ $accelerator == cpu || -e $venv/installed-jax-$accelerator ]]; }

# install WHAT PIP_ARGUMENT...: shows the output of pip only if it fails.
install() {
  if ! "$venv/bin/python" -I -m pip install --quiet --no-input "${@:2}" >"$venv/pip.log" 2>&1; then
    cat "$venv/pip.log" >&2
    echo "error: could not install $1; the same command tries again" >&2
    exit 1
  fi
}

# ensure_environment FILE...: updates .venv to the requirements files.
# If the first file has changed, or an installation was interrupted, .venv is created again.
ensure_environment() {
  case $accelerator in
    cpu | tpu | cuda12 | cuda13) ;;
    *)
      echo "error: ACCELERATOR is cpu, tpu, cuda12 or cuda13, not '$accelerator'" >&2
      return 2
      ;;
  esac
  if is_installed "$@" && has_accelerator; then return; fi
  (
    python=$(find_python)
    if [[ -e $venv/pyvenv.cfg && ! -e $venv/music_jax.lock ]]; then
      echo "error: $venv was made by something else; move it away" >&2
      exit 2
    fi
    mkdir -p "$venv"
    # One installation at a time. Uses Python, as macOS has no flock command; closing 9 unlocks.
    exec 9>"$venv/music_jax.lock"
    "$python" -I -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    if is_installed "$@" && has_accelerator; then exit; fi

    echo "Making the Python environment $venv (once, one to three minutes) ..." >&2
    if ! is_installed "$1"; then
      find "$venv/" -mindepth 1 -maxdepth 1 ! -name music_jax.lock -exec rm -rf {} +
      "$python" -I -m venv "$venv"
    fi
    for file in "$@"; do
      if is_installed "$file"; then continue; fi
      copy=$venv/installing.txt
      cp "$root/$file" "$copy"
      install "$file" --require-hashes -r "$copy"
      # music_jax itself, by a relative path so that the repository can be moved.
      for site_packages in "$venv"/lib/python3*/site-packages; do
        echo ../../../.. >"$site_packages/music_jax.pth"
      done
      mv "$copy" "$(stamp "$file")"
    done
    if ! has_accelerator; then
      # pip keeps the installed JAX and adds the packages of that version for the accelerator.
      install "jax[$accelerator]" "jax[$accelerator]"
      touch "$venv/installed-jax-$accelerator"
    fi
    echo "Made it in $SECONDS s." >&2
  )
}
