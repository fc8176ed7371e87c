#!/usr/bin/env bash
# A real two-node SLURM cluster on one machine, in namespaces of its own: hosts ctl, n1 and n2 with their networks, host
# names, /dev/shm and ssh servers. Needs root; leaves nothing behind but FOLDER.
#
#   cluster.sh up FOLDER             returns when both nodes are idle
#   cluster.sh on HOST FOLDER CMD    runs a command on ctl, n1 or n2
#   cluster.sh down FOLDER
#
# Debian packages: slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2 util-linux procps
set -euo pipefail

NET=10.77.0

up() {
  rm -rf "$D" && mkdir -p "$D"/{ctl,n1,n2,log,ssh}
  # Partition high preempts jobs in main, which get SIGTERM and, after GraceTime, SIGKILL.
  cat >"$D/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=ctl($NET.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$D/ctl
SlurmdSpoolDir=$D/%n
SlurmctldPidFile=$D/ctl.pid
SlurmdPidFile=$D/%n.pid
SlurmctldLogFile=$D/log/ctl.log
SlurmdLogFile=$D/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=$NET.1 CPUs=2 State=UNKNOWN
NodeName=n2 NodeAddr=$NET.2 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10 PreemptMode=off State=UP
CONF
  printf '127.0.0.1 localhost\n%s.254 ctl\n%s.1 n1\n%s.2 n2\n' $NET $NET $NET >"$D/hosts"
  setsid unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc \
    bash "$SELF" init "$D" >"$D/log/init.log" 2>&1 </dev/null &
  echo $! >"$D/unshare.pid"
  for _ in $(seq 300); do
    [ "$(on ctl sinfo -h -p main -o '%D %t' 2>/dev/null)" = "2 idle" ] && return
    kill -0 "$(cat "$D/unshare.pid")" 2>/dev/null || break
    sleep 0.1
  done
  tail -n 20 "$D"/log/* >&2
  return 1
}

# Process 1 of the namespaces: every other one inside dies with it.
init() {
  hostname ctl
  ip link set lo up
  mount --bind "$D/hosts" /etc/hosts
  mount -t tmpfs tmpfs /run
  mkdir -p /run/netns /run/sshd
  ip link add br0 type bridge
  ip addr add $NET.254/24 dev br0
  ip link set br0 up
  for key in host user; do ssh-keygen -q -t ed25519 -N '' -f "$D/ssh/$key"; done
  cp "$D/ssh/user.pub" "$D/ssh/authorized_keys"
  printf 'ctl,n1,n2 %s\n' "$(cut -d' ' -f1,2 "$D/ssh/host.pub")" >"$D/ssh/known_hosts"
  printf 'Host n1 n2\n IdentityFile %s\n UserKnownHostsFile %s\n BatchMode yes\n' \
    "$D/ssh/user" "$D/ssh/known_hosts" >"$D/ssh/ssh_config"
  mount --bind "$D/ssh" /etc/ssh # ssh in here has this key and no other
  export SLURM_CONF="$D/slurm.conf"
  slurmctld -D -c >/dev/null 2>&1 &
  for i in 1 2; do
    ip netns add n$i
    ip link add v$i type veth peer name eth0 netns n$i
    ip link set v$i master br0 up
    ip -n n$i addr add $NET.$i/24 dev eth0
    ip -n n$i link set lo up
    ip -n n$i link set eth0 up
    nsenter --net=/run/netns/n$i unshare --uts --mount bash "$SELF" node "$D" n$i $NET.$i &
  done
  while :; do # reaps what its children leave
    sleep 3600 &
    wait $! || true
  done
}

node() {
  hostname "$1"
  mount -t tmpfs tmpfs /dev/shm
  echo $$ >"$D/$1.node" # in the namespaces' own numbers
  /usr/sbin/sshd -D -f /dev/null -h "$D/ssh/host" -o ListenAddress="$2" -o PasswordAuthentication=no \
    -o StrictModes=no -o AuthorizedKeysFile="$D/ssh/authorized_keys" -o PidFile=none -o UsePAM=no 2>"$D/log/sshd-$1.log" &
  exec slurmd -D -N "$1" >/dev/null 2>&1
}

on() {
  local host=$1 first
  shift
  first=$(pgrep -P "$(cat "$D/unshare.pid")") || return 1
  local inside=(nsenter -t "$first" --net --mount --uts --ipc --pid --wd="$PWD" env SLURM_CONF="$D/slurm.conf")
  if [ "$host" = ctl ]; then
    "${inside[@]}" "$@"
  else
    "${inside[@]}" nsenter -t "$(cat "$D/$host.node")" --net --mount --uts --wd="$PWD" "$@"
  fi
}

SELF=$(realpath "$0")
what=$1
shift
case $what in
  up | init | node) D=$(realpath -m "$1") && shift && "$what" "$@" ;;
  on) host=$1 && D=$(realpath -m "$2") && shift 2 && on "$host" "$@" ;;
  down) kill -KILL "$(cat "$1/unshare.pid")" ;;
esac
