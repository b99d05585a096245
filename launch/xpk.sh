#!/usr/bin/env bash
# Trains on a GKE cluster created by xpk, as an xpk workload; see --help.
set -euo pipefail

usage() {
  cat <<'EOF'
Trains on a GKE cluster created by xpk, as an xpk workload that restarts after preemption.

  launch/xpk.sh --cluster=CLUSTER --workload=NAME --tpu-type=v5litepod-32 --docker-image=IMAGE \
    [XPK OPTION ...] -- ARGUMENTS OF music_jax.main

Options before -- are passed to `xpk workload create`, such as --zone, --project, --num-slices,
--device-type for GPUs, or --storage=NAME for images that `xpk storage attach` has registered (see
launch/README.md). IMAGE is built from launch/Dockerfile. --dry-run prints the command.

Exit codes 2 and 3 of music_jax.main end the workload; after any other, and after lost nodes, it
restarts, up to 100 times. To stop it, or before starting it again after it has ended, run
`xpk workload delete --workload=NAME --cluster=CLUSTER`.
EOF
}

options=() dry_run='' behind='' workdir=''
command='exec python -m music_jax.main'
for argument in "$@"; do
  if [[ -n $behind ]]; then
    printf -v quoted %q "$argument"
    command+=" $quoted"
    case $argument in --workdir=gs://*) workdir=1 ;; esac
    continue
  fi
  case $argument in
    -h | --help)
      usage
      exit
      ;;
    --dry-run) dry_run=1 ;;
    --) behind=1 ;;
    *) options+=("$argument") ;;
  esac
done
if [[ -z $workdir ]]; then
  echo "error: pass --workdir=gs://BUCKET/DIR behind --, which all workers can reach" >&2
  exit 2
fi

# xpk restarts after 42 and 127 to 255 by default, and after no other code that is not given here. When a
# node is lost, the processes on the others end with 1 before Kubernetes notices. exec, so that the
# SIGTERM that xpk forwards reaches Python and not a shell.
create=(xpk workload create ${options[@]+"${options[@]}"} --max-restarts=100
  "--restart-on-exit-codes=1,4-126" --termination-grace-period-seconds=300 --command="$command")
if [[ -n $dry_run ]]; then
  printf '%q ' "${create[@]}"
  echo
  exit
fi
if ! command -v xpk >/dev/null; then
  echo "error: xpk is not installed; pip install xpk" >&2
  exit 2
fi
exec "${create[@]}"
