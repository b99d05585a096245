#!/usr/bin/env bash
# A Slurm of two nodes, n1 and n2 with two cores each, for tests/slurm_cluster.py. As root:
#
#   unshare --mount --uts --net --pid --fork --kill-child --mount-proc bash tests/slurm.sh DIR
#
# prints "ready" once jobs can be submitted. Its names, addresses, ports and processes belong to these namespaces, and
# all of it ends with its standard input. Its files are in DIR, which has to be empty.
set -euo pipefail

cd "$1"
mkdir state n1 n2

# A host with loopback addresses alone resolves no names.
ip address add 10.0.0.1 dev lo
ip link set lo up
printf '%s\n' '127.0.0.1 localhost' '10.0.0.1 head n1 n2' >hosts
mount --bind hosts /etc/hosts
hostname head

# cred_expire is also the time that a requeued job waits, 5 s or more; SlurmdTimeout, that until a node counts as lost.
cat >slurm.conf <<CONF
ClusterName=test
SlurmctldHost=head
SlurmUser=root
AuthInfo=socket=$PWD/munge.socket,cred_expire=5
StateSaveLocation=$PWD/state
SlurmdSpoolDir=$PWD/%n
SlurmctldPidFile=$PWD/slurmctld.pid
SlurmdPidFile=$PWD/%n/slurmd.pid
SlurmctldLogFile=$PWD/slurmctld.log
SlurmdLogFile=$PWD/%n.log
SlurmdTimeout=10
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 Port=6821 CPUs=2
NodeName=n2 Port=6822 CPUs=2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
CONF
export SLURM_CONF=$PWD/slurm.conf

mungekey --create --keyfile="$PWD/munge.key"
# As root, munged warns about permissions.
munged --force --socket="$PWD/munge.socket" --key-file="$PWD/munge.key" --seed-file="$PWD/munge.seed" \
  --pid-file="$PWD/munged.pid" --log-file="$PWD/munged.log" 2>/dev/null
slurmctld

# Runs a node. Killing the process NODE.pid ends all processes of the node at once, as a loss of power does. It starts
# again as soon as there is no file NODE.off.
node() {
  while true; do
    # bash stays the first process of the node, which collects those that end.
    unshare --uts --pid --fork --kill-child --mount-proc bash -c "hostname '$1'; slurmd -D; exit" &
    echo $! >"$1.pid"
    wait
    while [[ -e $1.off ]]; do sleep 0.2; done
  done
}
for name in n1 n2; do node "$name" >"$name.out" 2>&1 & done

for _ in {1..150}; do
  if [[ $(sinfo --noheader --Node --partition=low --format=%T) == $'idle\nidle' ]]; then
    echo ready
    cat
    exit
  fi
  sleep 0.2
done
tail -n 20 ./*.log ./*.out >&2
exit 1
