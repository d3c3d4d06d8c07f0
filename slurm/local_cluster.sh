#!/usr/bin/env bash
# A real Slurm on one machine, for tests: munged, slurmctld and N slurmd ("virtual nodes" node1 .. nodeN) with their own
# key, configuration, state and logs in one directory. Works as root or as an ordinary user; needs no systemd, no
# cgroups and no GPU. Where Linux namespaces are allowed, every node has its own hostname and loopback address, and jobs
# (but no other processes) can resolve the nodes' names, as on a real cluster.
#
#   local_cluster.sh up [N]            start (does nothing if it is up already; if it is up with another N, it is taken
#                                      down first, which ends its jobs)
#   local_cluster.sh down              kill the jobs, stop everything, delete the directory
#   local_cluster.sh status            nodes and queue; fails, and says why, if the cluster is not up
#   local_cluster.sh env               prints: export SLURM_CONF=...   (for eval)
#   local_cluster.sh kill-node NODE    kill -9 slurmd, slurmstepds and tasks of one node
#   local_cluster.sh start-node NODE   start the slurmd of a killed node again (does nothing if it runs)
#
#   SLURM_LOCAL_DIR    directory; keep it short (default /tmp/slurm-local-UID)
#   SLURM_LOCAL_NODES  number of nodes          (default 2; argument N wins)
#   SLURM_LOCAL_GPUS   simulated GPUs per node  (default 2)
#   SLURM_LOCAL_PORT   TCP ports PORT .. PORT+N (default 26817)
#   SLURM_LOCAL_NAMES  0: no namespaces         (default: use them where they are allowed)
set -euo pipefail

dir=${SLURM_LOCAL_DIR:-/tmp/slurm-local-$(id -u)}
gpus=${SLURM_LOCAL_GPUS:-2}
port=${SLURM_LOCAL_PORT:-26817}
uid=$(id -u) gid=$(id -g) user=$(id -un)
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin
MARK='# written by local_cluster.sh'

say() { echo "local_cluster: $*" >&2; }
die() { say "$*"; exit 1; }
configured() { grep -qsxF "$MARK" "$SLURM_CONF"; }

# in_node NODE COMMAND...: run the command with the node's hostname and host table, where that is allowed
in_node() {
  local node=$1; shift
  # shellcheck disable=SC2016  # for the inner shell to expand
  local enter='hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
  if [ "${SLURM_LOCAL_NAMES:-1}" = 0 ]; then
    "$@"
  elif [ "$uid" -eq 0 ] && unshare -mu true 2>/dev/null; then
    unshare -mu sh -c "$enter" sh "$node" "$dir/hosts" "$@"
  elif [ "$uid" -ne 0 ] && unshare -rmu unshare -U --map-user="$uid" --map-group="$gid" true 2>/dev/null; then
    unshare -rmu sh -c "$enter" sh "$node" "$dir/hosts" \
      unshare -U --map-user="$uid" --map-group="$gid" "$@"
  else
    "$@"
  fi
}

start_slurmd() {
  mkdir -p "$dir/spool/$1" "$dir/tmp/$1"
  in_node "$1" slurmd -f "$SLURM_CONF" -N "$1"
}

write_config() {
  mkdir -p "$dir"/{key,run,state,spool,tmp,log}
  chmod 755 "$dir" "$dir/run"   # munged requires that every user can reach its socket
  chmod 700 "$dir/key"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/key/munge.key")
  local i
  cp /etc/hosts "$dir/hosts"
  for i in $(seq "$nodes"); do echo "127.0.1.$i node$i"; done >>"$dir/hosts"
  for i in $(seq "$gpus"); do ln -sfn /dev/null "$dir/run/gpu$i"; done
  : >"$dir/gres.conf"
  # a count without File= does not work for gpu, which needs a character device
  [ "$gpus" -eq 0 ] || echo "Name=gpu File=$dir/run/gpu[1-$gpus]" >"$dir/gres.conf"
  cat >"$SLURM_CONF" <<CONF
$MARK
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits cred_expire + 1 seconds before it starts again (default 120, least 5)
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
# must differ between nodes, or srun --mpi=pmix fails with "Cannot create client cli tmpdir"
TmpFS=$dir/tmp/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
MailProg=/bin/true

# no cgroups, no binding, no memory limits, no accounting daemon
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# finished jobs stay in "scontrol show job" and "squeue -t all"; "sacct -c" reads jobcomp.txt
MinJobAge=86400
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt

# use the node line below, not the hardware's numbers
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu

# start, requeue and kill jobs and detect lost nodes within seconds
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdTimeout=10
SlurmctldTimeout=10
TCPTimeout=2
KillWait=5
JobRequeue=1
ReturnToService=2

NodeName=DEFAULT CPUs=256 RealMemory=2000000$([ "$gpus" -eq 0 ] || echo " Gres=gpu:$gpus")
$(for i in $(seq "$nodes"); do
    echo "NodeName=node$i NodeHostname=localhost NodeAddr=127.0.1.$i Port=$((port + i))"
  done)
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

# ours PID: whether the process is a running daemon of this cluster
ours() { tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -qF -- "$dir/"; }

# daemon FILE: print the pid in the pid file if that process runs and belongs to this cluster
daemon() {
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && ours "$pid" && echo "$pid"
}

# kill_processes [NODE]: kill -9 slurmd, slurmstepds (they hold the node's log open) and tasks of one node or of all
kill_processes() {
  local p node conf log pids=()
  for p in /proc/[0-9]*; do
    log=''
    case $(readlink "$p/exe" 2>/dev/null) in # other programs may read a node's log; Debian's binary is slurmd-wlm
      */slurmd* | */slurmstepd*) log=$(find "$p/fd" -lname "$dir/log/slurmd.${1:-*}.log" -print -quit 2>/dev/null) || true ;;
    esac
    if [ -z "$log" ]; then
      conf='' node=''
      {
        while IFS='=' read -r -d '' k v; do
          case $k in SLURM_CONF) conf=$v ;; SLURMD_NODENAME) node=$v ;; esac
        done <"$p/environ"
      } 2>/dev/null || true
      if [ "$conf" != "$SLURM_CONF" ] || [ -z "$node" ] || [ "$node" != "${1:-$node}" ]; then continue; fi
    fi
    pids+=("${p#/proc/}")
  done
  [ ${#pids[@]} -eq 0 ] || kill -9 "${pids[@]}" 2>/dev/null || true
}

# known NODE: fail unless the cluster is up and has the node
known() {
  configured || die "not up"
  grep -q "^NodeName=$1 " "$SLURM_CONF" || die "no node '$1': node1 to node$(count)"
}

kill_node() {
  kill_processes "$1"
  local i
  for i in $(seq 100); do
    daemon "$dir/run/slurmd.$1.pid" >/dev/null || return 0
    sleep 0.05
  done
  die "$1: its slurmd is still running"
}

count() { grep -c '^NodeName=node' "$SLURM_CONF"; }

# print why the cluster is not up, or nothing (sinfo alone waits for a minute if a daemon is missing)
faults() {
  configured || { echo "it was not started"; return; }
  local i states
  for i in munged slurmctld $(seq -f slurmd.node%g "$(count)"); do
    daemon "$dir/run/$i.pid" >/dev/null || { echo "$i does not run"; return; }
  done
  states=$(timeout 10 sinfo -h -N -o '%N %t %E' 2>/dev/null) || { echo "slurmctld does not respond"; return; }
  [ "$(wc -l <<<"$states")" -eq "$(count)" ] || { echo "slurmctld does not list all nodes"; return; }
  grep -vE '^node[0-9]+ (idle|plnd|mix|alloc|comp) ' <<<"$states" || true
}

ready() { [ -z "$(faults)" ]; }

up() {
  nodes=${1:-${SLURM_LOCAL_NODES:-2}}
  local tool i
  for tool in munged slurmctld slurmd sbatch; do
    command -v $tool >/dev/null || die "no $tool: apt-get install slurmctld slurmd slurm-client munge"
  done
  [[ $nodes =~ ^([1-9]|1[0-6])$ ]] || die "1 to 16 nodes"
  [ ${#dir} -le 60 ] || die "the directory's path is too long for sockets: $dir"
  if ready && [ "$(count)" -eq "$nodes" ]; then return; fi
  down
  [ ! -e "$dir" ] || [ -z "$(ls -A "$dir")" ] || configured || die "$dir is not empty"
  for i in $(seq "$port" $((port + nodes))); do
    ! (: <>"/dev/tcp/127.0.0.1/$i") 2>/dev/null || die "port $i is in use: set SLURM_LOCAL_PORT"
  done
  write_config
  munged --key-file="$dir/key/munge.key" --seed-file="$dir/key/seed" --pid-file="$dir/run/munged.pid" \
    --socket="$dir/run/munge.socket" --log-file="$dir/log/munged.log"
  slurmctld -f "$SLURM_CONF"
  for i in $(seq "$nodes"); do start_slurmd "node$i"; done
  for i in $(seq 100); do
    ! ready || return 0
    sleep 0.1
  done
  for i in "$dir"/log/*.log; do say "--- $i"; tail -n 20 "$i" >&2; done
  die "not ready after 10 s"
}

stop() { # stop PIDFILE: TERM, after 5 s KILL
  local pid i
  pid=$(daemon "$1") || return 0
  kill "$pid" 2>/dev/null || true
  for i in $(seq 100); do
    ours "$pid" || return 0     # not by the pid file, which slurmctld removes before it ends
    sleep 0.05
  done
  kill -9 "$pid" 2>/dev/null || true
}

down() {
  configured || return 0
  local f
  stop "$dir/run/slurmctld.pid"           # first, so that no more jobs are started or requeued
  for f in "$dir"/run/slurmd.*.pid; do stop "$f"; done
  kill_processes                          # jobs, also those that ignore SIGTERM
  stop "$dir/run/munged.pid"
  rm -rf "$dir"
}

case ${1:-} in
  up) up "${2:-}" ;;
  down) down ;;
  status)
    why=$(faults)
    [ -z "$why" ] || die "not up: $why"
    sinfo -N -o '%N %t %c %m %G'
    squeue
    ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  kill-node) known "${2-}"; kill_node "$2" ;;
  start-node) known "${2-}"; daemon "$dir/run/slurmd.$2.pid" >/dev/null || start_slurmd "$2" ;;
  *) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac
