#!/usr/bin/env bash
# Trains on a Cloud TPU VM or slice, requested as a queued resource; see --help.
set -euo pipefail

usage() {
  cat <<'EOF'
Trains on a Cloud TPU slice, and resumes after each preemption until the run is done.

  launch/tpu_vm.sh train  --name=NAME --zone=ZONE --type=TYPE [--spot] [--images=gs://...] \
                          -- ARGUMENTS OF music_jax.main
  launch/tpu_vm.sh create --name=NAME --zone=ZONE --type=TYPE [--spot]
  launch/tpu_vm.sh setup  --name=NAME --zone=ZONE [--images=gs://...]
                          copies the repository, creates the environment, copies the images
  launch/tpu_vm.sh run    --name=NAME --zone=ZONE -- ARGUMENTS    runs once on all workers
  launch/tpu_vm.sh stop   --name=NAME --zone=ZONE      saves and ends the run with exit code 75
  launch/tpu_vm.sh status --name=NAME --zone=ZONE
  launch/tpu_vm.sh delete --name=NAME --zone=ZONE

`train` performs all steps: it creates the slice if it does not exist, waits for it, sets it up and
runs. After a preemption it deletes the slice, requests another and resumes. The workdir must be in
gs://. The slice remains at the end; `delete` it. Ctrl-C saves and stops the run. Three failures in a
row on one slice, each within ten minutes of its start, end the command.

  --name=NAME      name of the queued resource and its TPU
  --zone=ZONE      zone, such as us-central1-a
  --type=TYPE      accelerator type, such as v5litepod-32 or v6e-16
  --project=ID     project, by default that of gcloud
  --runtime=IMAGE  TPU software version, by default the one for the type
  --spot           uses cheaper, preemptible machines
  --images=gs://BUCKET/FOLDER
                   folder to copy to /tmp/images on every worker of every new slice. Pass it behind
                   -- as --config.dataset.data_dir=/tmp/images if TFDS prepared it, otherwise as
                   --config.dataset.path=/tmp/images or a folder in it
  --dry-run        prints the commands without running them

Exit codes are those of music_jax.main; 2 and 3 end `train`, 75 does not.
EOF
}

die() {
  echo "error: $*" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
poll_seconds=${POLL_SECONDS:-60}
long_seconds=${LONG_SECONDS:-600} # a later failure is not one of the start
name='' zone='' type='' project='' runtime='' images='' spot='' dry_run=''
main_arguments=()

command=${1:-}
case $command in
  train | create | setup | run | stop | status | delete) shift ;;
  -h | --help | help)
    usage
    exit
    ;;
  '') die "expected a command: train, create, setup, run, stop, status or delete; see --help" ;;
  *) die "unknown command '$command'; --help lists them" ;;
esac
while (($#)); do
  case $1 in
    --name=* | --zone=* | --type=* | --project=* | --runtime=* | --images=*)
      option=${1%%=*}
      printf -v "${option#--}" %s "${1#*=}"
      ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help)
      usage
      exit
      ;;
    --)
      shift
      main_arguments=("$@")
      break
      ;;
    *) die "unknown option '$1'; options of music_jax.main go behind --, and --help lists the others" ;;
  esac
  shift
done

[[ -n $name && -n $zone ]] || die "--name=NAME and --zone=ZONE are needed"
if [[ -n $images ]]; then
  case $command in train | setup) ;; *) die "--images is for train and setup" ;; esac
  [[ $images == gs://?* ]] || die "--images is gs://BUCKET or gs://BUCKET/FOLDER, not '$images'"
fi
case $command in train | create) [[ -n $type ]] || die "--type=TYPE is needed, such as v5litepod-32" ;; esac
case $command in
  train | run)
    workdir=
    for argument in ${main_arguments[@]+"${main_arguments[@]}"}; do
      case $argument in --workdir=*) workdir=${argument#*=} ;; esac
    done
    [[ $workdir == gs://* ]] ||
      die "pass --workdir=gs://BUCKET/DIR behind --, which all workers and later slices can reach"
    ;;
esac
if [[ -z $runtime ]]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi
where=(--zone="$zone")
if [[ -n $project ]]; then where+=(--project="$project"); fi

# Runs a command, or prints it in a form that can be pasted into a shell.
do_() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# on_workers COMMAND: runs it in a shell on all workers; returns the exit code of one that failed.
on_workers() {
  do_ gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# Prints nothing if the queued resource does not exist; any other error ends the script.
state() {
  local errors result=0
  errors=$(mktemp)
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>"$errors" || result=$?
  if ((result)) && ! grep -q NOT_FOUND "$errors"; then cat "$errors" >&2; else result=0; fi
  rm -f "$errors"
  return "$result"
}

create() {
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  if [[ -n $spot ]]; then options+=(--spot); fi
  do_ gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}"
}

delete() {
  do_ gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Packs the files under version control with their current changes.
setup() {
  local archive commit
  archive=$(mktemp -d)/music_jax.tar.gz
  commit=$(git -C "$root" stash create 2>/dev/null) ||
    die "$root is not a git checkout that git can read: $(git -C "$root" rev-parse HEAD 2>&1 | head -n 1)"
  do_ git -C "$root" archive --format=tar.gz --output="$archive" "${commit:-HEAD}" || return
  do_ gcloud compute tpus tpu-vm scp "$archive" "$name:music_jax.tar.gz" "${where[@]}" \
    --worker=all || return
  rm -rf "$(dirname "$archive")"
  on_workers "$(
    cat <<'EOF'
set -eu
mkdir -p music_jax
cd music_jax
find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
tar -xzf ../music_jax.tar.gz
export ACCELERATOR=tpu
# Some images come with an older Python than this project needs.
if ! bash -c 'source launch/environment.sh; find_python' >/dev/null 2>&1; then
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.11
  PYTHON=$(python3 -m uv python find 3.11)
  export PYTHON
fi
bash -euc 'source launch/environment.sh; ensure_environment requirements.txt'
EOF
  )" || return
  if [[ -n $images ]]; then copy_images; fi
}

# Copies all images to every worker, as each may read any of them. Existing files are skipped.
copy_images() {
  local source
  printf -v source %q "$images"
  on_workers "mkdir -p /tmp/images && gcloud storage rsync --recursive $source /tmp/images"
}

run() {
  local arguments
  printf -v arguments ' %q' "${main_arguments[@]}"
  on_workers "cd music_jax && ACCELERATOR=tpu exec launch/local.sh$arguments"
}

# The brackets keep pkill from matching its own shell.
stop() { on_workers "pkill -TERM -f '[m]usic_jax.main' || true"; }

# Waits until the slice is active; requests one if there is none or the last one was lost.
# A new slice is not set up, and failures on the previous one do not count.
await_slice() {
  local now
  while :; do
    now=$(state) || now='not known'
    case $now in
      ACTIVE)
        had_slice=1
        return
        ;;
      '')
        # An error of the first request is probably wrong input, one of a later request probably passes.
        create || ((had_slice)) || return
        is_set_up='' failures=0
        ;;
      FAILED | SUSPENDED)
        echo "the slice is $now; requesting another" >&2
        is_set_up='' had_slice=1
        if delete; then continue; fi
        ;;
      *) echo "the slice is $now; waiting" >&2 ;;
    esac
    sleep "$poll_seconds"
  done
}

train() {
  local code started early
  is_set_up='' failures=0 had_slice=0
  if [[ -n $dry_run ]]; then
    create
    setup
    run
    return
  fi
  state >/dev/null # ends here, before the loop, if not signed in or without such a project
  trap 'echo "stopping the run; rerun the command to resume it" >&2; stop || true; exit 75' INT TERM
  while :; do
    await_slice
    code=0
    started=$SECONDS
    if [[ -z $is_set_up ]]; then
      (setup) || code=$?
      if ((code == 0)); then is_set_up=1; fi
    fi
    if ((code == 0)); then
      run || code=$?
      case $code in 0 | 2 | 3) return "$code" ;; esac
      if ((code != 75)); then stop || true; fi
    fi
    early=$((code != 75 && SECONDS - started < long_seconds))
    if ((!early)); then failures=0; fi
    # A slice that is being preempted stays ACTIVE for a while.
    sleep "$poll_seconds"
    if ((early)) && [[ $(state) == ACTIVE ]]; then
      failures=$((failures + 1))
      if ((failures == 3)); then
        echo "error: failed $failures times on an active slice, last with exit code $code" >&2
        return "$code"
      fi
    fi
    echo "exit code $code; resuming" >&2
  done
}

status() {
  do_ gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
}

"$command"
