#!/usr/bin/env bash
# Trains on a GKE cluster that xpk made, as an xpk workload; see --help.
set -euo pipefail

usage() {
  cat <<'EOF'
Trains on a GKE cluster that xpk made, as an xpk workload that restarts after preemption.

  launch/xpk.sh --cluster=CLUSTER --workload=NAME --tpu-type=v5litepod-32 --docker-image=IMAGE \
    [XPK OPTION ...] -- ARGUMENTS OF music_jax.main

All before -- goes to `xpk workload create`, such as --zone, --project, --num-slices,
--device-type for GPUs, or --storage=NAME for images that `xpk storage attach` made known to the
cluster; launch/README.md tells how. IMAGE is built from launch/Dockerfile. --dry-run prints the
command.
Exit codes 2 and 3 of music_jax.main end the workload; after all others, and after lost nodes, it
starts again, up to 100 times. To stop it, or to start again what has ended, first
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
  echo "error: behind -- must come --workdir=gs://BUCKET/DIR, which all workers can reach" >&2
  exit 2
fi

# xpk starts again after 42 and 127 to 255 by itself, and takes any other code that it is not given for
# final. When a node is lost, the processes on the others end with 1, before Kubernetes has noticed.
# exec, so that the SIGTERM which xpk passes on reaches Python and not a shell around it.
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
