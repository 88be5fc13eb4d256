#!/usr/bin/env bash
# A real SLURM on one machine: see usage() below, or `tools/local_slurm.sh --help`.
set -euo pipefail

usage() {
  cat <<'HELP'
A real SLURM cluster on this machine, from Debian's or Ubuntu's packages, to try job scripts on:

  eval "$(tools/local_slurm.sh up)"      start it; in this shell sbatch, squeue, sacct, … now talk to it
  sbatch --partition=low job.sh          use it
  tools/local_slurm.sh status            daemons, nodes and partitions; exit code 1 when it is not (wholly) up
  tools/local_slurm.sh down              cancel its jobs, end every process it started, remove its folder

  --nodes N   virtual nodes of `up`: node1 … nodeN (default 2), each with 4 CPUs and 8 GB, whatever the machine has
  --dir DIR   the one folder of its state, logs and settings (default /tmp/mser-slurm-UID); two folders, two clusters

`up` on a running cluster only prints the `export` line again. Neither systemd nor root is needed: the daemons run as
you, on free ports, and touch nothing of an installed SLURM, munge or MariaDB. As root, jobs of other users run too.

  partition low    default; its jobs are preempted: user signal (sbatch --signal), 30 s of grace, then requeued
  partition high   pushes jobs of low out

A requeued job waits 15 s before it may start again (AuthInfo=cred_expire, 120 s on most clusters). A job cancelled or
out of time has 15 s between TERM and KILL. There are no GPUs (sbatch --gpus-per-node=0), or with --gpus N pretended ones:
SLURM hands out N names of each node, as --gpus-per-node, --gres=gpu: or --gpus-per-task ask for.
HELP
}

PACKAGES="slurm-wlm slurmdbd mariadb-server munge"
CPUS=4 MEMORY=8000 # of a virtual node; MB. Nothing enforces them: tasks share the machine
GRACE=30           # seconds between a preemption's signal and its end
DAEMONS="munged|mariadbd|slurmdbd|slurmctld|slurmd|slurmstepd"
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps daemons; an ordinary user's PATH lacks it

say() { echo "local_slurm.sh: $*" >&2; }
fail() {
  say "error: $*"
  exit 2
}

# ---- what is there ---------------------------------------------------------------------------------------------------
# Our daemons: by name, with a file of our folder open. Neither a pid file that is out of date nor an editor on a log
# can make `down` end a stranger.
daemons() {
  local pid exe
  for pid in $(find /proc/[0-9]*/fd -lname "$dir/*" 2>/dev/null | cut -d/ -f3 | sort -nu); do
    exe=$(readlink "/proc/$pid/exe") || continue
    exe=${exe##*/} exe=${exe%-wlm} # Debian's slurmd is a link to slurmd-wlm
    [[ $exe =~ ^($DAEMONS)$ ]] && echo "$pid $exe"
  done
  return 0
}

# Processes of jobs, which outlive a slurmstepd that was killed: SLURM gives them both variables.
job_processes() {
  local file pid
  # shellcheck disable=SC2013 # such names have no spaces
  for file in $(grep -lzxF "SLURM_CONF=$dir/slurm.conf" /proc/[0-9]*/environ 2>/dev/null); do
    pid=${file//[!0-9]/}
    grep -qz '^SLURM_JOB_ID=' "$file" 2>/dev/null && [[ $pid != "$$" && $pid != "$PPID" ]] && echo "$pid"
  done
  return 0
}

# client COMMAND …: a SLURM client of this cluster; without a limit it would wait for minutes for a daemon that is gone.
client() { SLURM_CONF=$dir/slurm.conf timeout --kill-after=1 10 "$@" 2>/dev/null; }

healthy() {
  local states
  [ -f "$dir/slurm.conf" ] && client scontrol ping | grep -q "is UP" && client sacctmgr -n show cluster >/dev/null || return
  states=$(client sinfo -h -N -o %t) && ! grep -qvE '^(idle|mix|alloc|comp)$' <<<"$states"
}

# await SECONDS WHAT LOG COMMAND …: until COMMAND succeeds.
await() {
  local deadline=$((SECONDS + $1)) what=$2 log=$dir/log/$3.log
  shift 3
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || fail "$what: $(tail -n 1 "$log" 2>/dev/null) ($log; \`$0 down --dir $dir\` clears up)"
    sleep 0.3
  done
}

# ---- up --------------------------------------------------------------------------------------------------------------
# Ports that nothing listens on, below those that the kernel hands out to clients and that trainings agree on.
free_ports() {
  local wanted=$1 port found=()
  while ((${#found[@]} < wanted)); do
    port=$((10000 + RANDOM % 9000))
    [[ " ${found[*]} " == *" $port "* ]] && continue
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || found+=("$port")
  done
  echo "${found[@]}"
}

write_settings() {
  local host user ports i gres=''
  if ((gpus)); then gres=" Gres=gpu:$gpus"; fi
  host=$(hostname -s) user=$(id -un)
  read -ra ports <<<"$(free_ports $((nodes + 2)))"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$user
SlurmdUser=$user
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
# cred_expire is also how long a requeued job waits; it must outlast the launch of a job on a busy machine.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=15
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=${ports[1]}
AccountingStoragePass=$dir/run/munge.socket
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
ReturnToService=2
KillWait=15
SlurmdTimeout=60
MessageTimeout=30
MinJobAge=3600
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
CONF
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[i + 1]} CPUs=$CPUS RealMemory=$MEMORY$gres"
  done >>"$dir/slurm.conf"
  if ((gpus)); then pretend_gpus; fi
  # DbdHost is compared with the machine's name; DbdAddr is where it listens. The database has no port and no password:
  # its socket lets in the user who owns it (StorageHost=localhost and MYSQL_UNIX_PORT, see below).
  (umask 077 && cat >"$dir/slurmdbd.conf") <<CONF
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=${ports[1]}
SlurmUser=$user
AuthInfo=socket=$dir/run/munge.socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$user
PidFile=$dir/run/slurmdbd.pid
LogFile=$dir/log/slurmdbd.log
CONF
}

# Links to a device in place of /dev/nvidia0 and so on, as a file that is no device is not handed on to tasks.
pretend_gpus() {
  local i k
  mkdir "$dir/gpus"
  for ((i = 1; i <= nodes; i++)); do
    for ((k = 0; k < gpus; k++)); do ln -s /dev/null "$dir/gpus/node$i-$k"; done
    echo "NodeName=node$i Name=gpu File=$dir/gpus/node$i-[0-$((gpus - 1))]"
  done >"$dir/gres.conf"
}

# launch NAME COMMAND …: a daemon, without this shell's pipes, which whoever reads them would wait for.
launch() {
  local name=$1
  shift
  (cd "$dir" && SLURM_CONF=$dir/slurm.conf exec "$@") </dev/null >>"$dir/log/$name.out" 2>&1 ||
    fail "$name does not start: $(tail -n 1 "$dir/log/$name.out") ($dir/log; \`$0 down --dir $dir\` clears up)"
}

up() {
  local missing=() command i
  for command in munged mariadbd mariadb-install-db slurmdbd slurmctld slurmd sbatch sacctmgr timeout; do
    command -v "$command" >/dev/null || missing+=("$command")
  done
  ((${#missing[@]} == 0)) || fail "no ${missing[*]}: on Debian or Ubuntu \`apt-get install $PACKAGES\` brings them"
  ((${#dir} <= 80)) || fail "$dir is too long a path for sockets (108 bytes): give a shorter --dir"
  if [ -e "$dir" ]; then
    [ -O "$dir" ] || fail "$dir belongs to $(stat -c %U "$dir"): give another --dir"
    if healthy; then
      print_exports
      return
    fi
    # A folder that is not ours is never cleared, whatever --dir says.
    [ -f "$dir/.local_slurm" ] || [ -z "$(ls -A "$dir")" ] || fail "$dir has other files in it: give a new --dir"
    [ ! -f "$dir/.local_slurm" ] || { say "found it half up in $dir: starting anew" && down; }
  fi
  mkdir -p "$dir" && chmod 755 "$dir" # munged wants its socket reachable; what is secret below is closed by itself
  : >"$dir/.local_slurm"
  mkdir "$dir"/{run,log,state} && mkdir -m 700 "$dir/db" && chmod 755 "$dir/run"
  for ((i = 1; i <= nodes; i++)); do mkdir "$dir/spool-node$i"; done
  write_settings

  (umask 077 && head -c 128 /dev/urandom >"$dir/run/munge.key")
  launch munged munged --force --socket="$dir/run/munge.socket" --key-file="$dir/run/munge.key" --num-threads=2 \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"

  launch mariadb-install mariadb-install-db --no-defaults --user="$(id -un)" --datadir="$dir/db" --skip-test-db \
    --auth-root-authentication-method=socket --auth-root-socket-user="$(id -un)" --innodb-log-file-size=8M
  launch mariadbd setsid --fork mariadbd --no-defaults --user="$(id -un)" --datadir="$dir/db" --skip-networking \
    --socket="$dir/run/db.socket" --pid-file="$dir/run/mariadbd.pid" --log-error="$dir/log/mariadbd.log" \
    --innodb-buffer-pool-size=16M --innodb-log-file-size=8M --innodb-flush-log-at-trx-commit=0 \
    --innodb-use-native-aio=0 --performance-schema=OFF --max-connections=20 --innodb-lock-wait-timeout=900
  await 60 "MariaDB does not answer" mariadbd mariadb-admin --no-defaults --socket="$dir/run/db.socket" ping

  launch slurmdbd env MYSQL_UNIX_PORT="$dir/run/db.socket" slurmdbd
  # slurmctld would start without its accounting, and keep what it cannot send, if slurmdbd did not know the cluster.
  await 60 "slurmdbd does not answer" slurmdbd client sacctmgr -i add cluster local
  launch slurmctld slurmctld -f "$dir/slurm.conf"
  for ((i = 1; i <= nodes; i++)); do launch "node$i" slurmd -f "$dir/slurm.conf" -N "node$i"; done
  await 60 "the nodes do not come up" slurmctld healthy
  say "SLURM is up: $nodes nodes of $CPUS CPUs, partitions low and high, everything in $dir"
  print_exports
}

print_exports() { printf 'export SLURM_CONF=%q\n' "$dir/slurm.conf"; }

# ---- down and status -------------------------------------------------------------------------------------------------
# end SIGNAL SECONDS LISTER NAME …: signal what LISTER shows, and wait for it to be gone.
end() {
  local signal=$1 deadline=$((SECONDS + $2)) pids
  shift 2
  while pids=$("$@" | cut -d' ' -f1) && [ -n "$pids" ]; do
    # shellcheck disable=SC2086
    [ "$signal" = 0 ] || kill -s "$signal" $pids 2>/dev/null || true
    ((SECONDS < deadline)) || return 0
    sleep 0.3
  done
}

down() {
  [ -e "$dir" ] || { say "nothing at $dir" && return; }
  [ -O "$dir" ] || fail "$dir belongs to $(stat -c %U "$dir"): run this as that user"
  [ -f "$dir/.local_slurm" ] || fail "$dir was not made by this script: nothing done"
  if client scontrol ping | grep -q "is UP"; then
    client scancel --state=PENDING || true # first, or each job that is ended here would let the next one start
    client scancel --state=RUNNING || true
    local deadline=$((SECONDS + 25)) # KillWait and some
    while [ -n "$(client squeue -h)" ] && ((SECONDS < deadline)); do sleep 0.3; done
  fi
  end KILL 5 only slurmstepd # still here only if slurmctld was gone or a job would not die
  end KILL 5 job_processes
  end TERM 10 only 'slurmctld|slurmd'
  end TERM 10 only 'slurmdbd' # it writes to the database at its end
  end TERM 15 daemons
  end KILL 5 daemons
  rm -rf "$dir"
  say "SLURM is down, $dir is gone"
}

only() { daemons | grep -E " ($1)$" || true; }

status() {
  [ -e "$dir" ] || { echo "down: no $dir" && return 1; }
  echo "folder   $dir"
  echo "daemons  $(daemons | cut -d' ' -f2 | sort | uniq -c | awk '{printf "%s%s × %s", (NR > 1 ? ", " : ""), $1, $2}')"
  if ! healthy; then
    echo "down, or only half up: logs in $dir/log; \`$0 up\` starts it anew"
    return 1
  fi
  client sinfo -o '%9P %.5a %.6D %.8t %N'
  client squeue -o '%.8A %9P %20j %.10T %.10M %R'
}

# ---- the command line ------------------------------------------------------------------------------------------------
verb='' nodes=2 gpus=0 dir=/tmp/mser-slurm-$UID
while (($#)); do
  case $1 in
  up | down | status) [ -z "$verb" ] || fail "one of up, down and status, not both $verb and $1"; verb=$1 ;;
  --nodes | --dir | --gpus)
    [ -n "${2:-}" ] || fail "$1 wants a value: see --help"
    case $1 in --nodes) nodes=$2 ;; --gpus) gpus=$2 ;; *) dir=$2 ;; esac
    shift
    ;;
  -h | --help) usage && exit ;;
  *) fail "unknown word $1: up, down or status, --nodes N, --gpus N, --dir DIR; --help teaches" ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "--nodes $nodes: a number from 1 to 99"
[[ $gpus =~ ^[0-9]$ ]] || fail "--gpus $gpus: a number from 0 to 9"
dir=$(realpath -m -- "$dir")
[[ $dir =~ ^[A-Za-z0-9/._+-]+$ ]] || fail "$dir: SLURM's settings take no spaces or special characters: another --dir"
case $verb in
up) up ;;
down) down ;;
status) status ;;
*) usage >&2 && exit 2 ;;
esac
