#!/usr/bin/env bash
# An MLflow server as a lab runs it: see usage() below, or `tools/mlflow_server.sh --help`.
set -euo pipefail

usage() {
  cat <<'HELP'
An MLflow server on this machine: runs in PostgreSQL (from Debian's or Ubuntu's packages), files through the server.

  eval "$(tools/mlflow_server.sh up)"    start it; in this shell all runs are tracked there (MLFLOW_TRACKING_URI)
  tools/mlflow_server.sh status          whether it is up, and where; exit code 1 when it is not (wholly) up
  tools/mlflow_server.sh down            stop it; what it has stays in its folder, and `up` goes on with it

  --dir DIR   the one folder of its database, files and logs (default ~/.local/share/mser-mlflow; as root, for whom the
              database runs as the user postgres, /var/lib/mser-mlflow); two folders, two servers
  --port N    of its pages, at `up` (default: that of the last start, else 5000)

Many runs can write at once, which sqlite is not made for. It listens on 127.0.0.1 alone, the database on no port at
all; from another machine: ssh -L 5000:127.0.0.1:5000 THIS_MACHINE. MLflow asks nobody who he is: whoever is logged in
on this machine can read and change what is there.
HELP
}

say() { echo "mlflow_server.sh: $*" >&2; }
fail() {
  say "error: $*"
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
me=$(id -un)

# ---- what is there ---------------------------------------------------------------------------------------------------
# The newest of Debian's versions, or that which made the database.
find_postgres() {
  local version
  # shellcheck disable=SC2012 # Debian's folders are numbers
  version=$(cat "$dir/postgres/PG_VERSION" 2>/dev/null) || version=$(ls /usr/lib/postgresql 2>/dev/null | sort -n | tail -n 1)
  bin=/usr/lib/postgresql/$version/bin
  [[ -n $version && -x $bin/postgres ]] ||
    fail "no PostgreSQL${version:+ $version} here: as root on Debian or Ubuntu, apt-get install postgresql"
}

# as_owner COMMAND …: PostgreSQL refuses to run as root.
as_owner() {
  if [ "$me" = root ]; then (cd / && runuser -u postgres -- "$@"); else "$@"; fi
}

database_up() { as_owner "$bin/pg_ctl" status -D "$dir/postgres" >/dev/null 2>&1; }
server_pid() {
  local pid
  pid=$(cat "$dir/server.pid" 2>/dev/null) || return 1
  grep -qzF "host=$dir/run" "/proc/$pid/cmdline" 2>/dev/null && echo "$pid" # a number that is a stranger's by now is not
}
answers() { "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$1/health" 2>/dev/null; }
address() { echo "http://127.0.0.1:$(cat "$dir/port" 2>/dev/null || echo 5000)"; }

# ---- verbs -----------------------------------------------------------------------------------------------------------
make_database() {
  [ "$me" != root ] || id postgres >/dev/null 2>&1 || fail "as root, the user postgres is needed: apt-get install postgresql"
  mkdir -p "$dir" && chmod 711 "$dir"
  mkdir -p "$dir/postgres" "$dir/run" "$dir/artifacts" "$dir/log" && chmod 700 "$dir/artifacts" "$dir/log"
  [ "$me" != root ] || chown postgres "$dir/postgres" "$dir/run"
  # The folder of its socket is the owner's alone: who gets there needs no password.
  as_owner chmod 700 "$dir/postgres" "$dir/run" 2>/dev/null ||
    fail "the user postgres cannot get to $dir: choose a folder that others may pass through (--dir)"
  as_owner "$bin/initdb" -D "$dir/postgres" -U mser --auth=trust -E UTF8 --locale=C >"$dir/log/initdb.log" 2>&1 ||
    fail "the database cannot be made: $(tail -n 1 "$dir/log/initdb.log") ($dir/log/initdb.log)"
  cat >>"$dir/postgres/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$dir/run'
max_connections = 100
CONF
}

up() {
  find_postgres
  "$python" -c 'import mlflow, psycopg2' 2>/dev/null || fail "$python has no mlflow with psycopg2: pip install mlflow psycopg2-binary (make install brings both)"
  ((${#dir} <= 90)) || fail "$dir is too long a name for a socket: choose a shorter one (--dir)"
  [ -f "$dir/postgres/PG_VERSION" ] || make_database
  database_up || as_owner "$bin/pg_ctl" start -w -t 60 -D "$dir/postgres" -l "$dir/run/postgres.log" >/dev/null ||
    fail "the database does not start: $(tail -n 1 "$dir/run/postgres.log" 2>/dev/null) ($dir/run/postgres.log)"
  as_owner "$bin/psql" -h "$dir/run" -U mser -d postgres -Atc "SELECT 1 FROM pg_database WHERE datname = 'mser'" | grep -q 1 ||
    as_owner "$bin/createdb" -h "$dir/run" -U mser mser
  if ! server_pid >/dev/null; then
    [ -z "$port" ] || echo "$port" >"$dir/port"
    local own
    own=$(address)
    ! (exec 3<>"/dev/tcp/127.0.0.1/${own##*:}") 2>/dev/null || fail "port ${own##*:} is taken: choose another one (--port)"
    echo "${own##*:}" >"$dir/port"
    # Jobs are for chat applications: seven processes that nobody here needs.
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
      setsid nohup "$python" -m mlflow server --host 127.0.0.1 --port "${own##*:}" --workers 2 \
      --backend-store-uri "postgresql+psycopg2://mser@/mser?host=$dir/run" \
      --serve-artifacts --artifacts-destination "$dir/artifacts" >>"$dir/log/server.log" 2>&1 </dev/null &
    echo $! >"$dir/server.pid"
  fi
  local deadline=$((SECONDS + 180))
  until answers "$(address)"; do
    server_pid >/dev/null || fail "the server has ended: $(tail -n 1 "$dir/log/server.log") ($dir/log/server.log)"
    ((SECONDS < deadline)) || fail "the server does not answer: see $dir/log/server.log"
    sleep 0.3
  done
  say "MLflow at $(address), its data in $dir"
  echo "export MLFLOW_TRACKING_URI=$(address)"
}

down() {
  local pid deadline=$((SECONDS + 30))
  if pid=$(server_pid); then
    kill -TERM -- "-$pid" 2>/dev/null || true
    while kill -0 -- "-$pid" 2>/dev/null; do
      ((SECONDS < deadline)) || kill -KILL -- "-$pid" 2>/dev/null || true
      sleep 0.2
    done
  fi
  rm -f "$dir/server.pid"
  [ -f "$dir/postgres/PG_VERSION" ] || return 0
  find_postgres
  ! database_up || as_owner "$bin/pg_ctl" stop -m fast -w -t 60 -D "$dir/postgres" >/dev/null || fail "the database does not stop"
}

status() {
  local code=0
  [ -f "$dir/postgres/PG_VERSION" ] || fail "there is no server in $dir: start one by \`up\`, or name its folder by --dir"
  find_postgres
  if database_up; then echo "database: up, in $dir/postgres"; else echo "database: down" && code=1; fi
  if server_pid >/dev/null && answers "$(address)"; then echo "server:   up, $(address)"; else echo "server:   down" && code=1; fi
  return $code
}

# ---- words -----------------------------------------------------------------------------------------------------------
verb="" dir="" port=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    up | down | status) verb=$1 ;;
    --dir | --port)
      [ $# -ge 2 ] || fail "$1 needs a value (--help shows how)"
      [ "$1" = --dir ] && dir=$2 || port=$2
      shift
      ;;
    *) fail "$1 is neither up, down, status nor an option (--help lists them)" ;;
  esac
  shift
done
[ -n "$verb" ] || fail "up, down or status? (--help)"
[[ $port =~ ^[0-9]*$ ]] || fail "--port $port: a number, e.g. 5000"
[ -n "$dir" ] || { [ "$me" = root ] && dir=/var/lib/mser-mlflow || dir=${XDG_DATA_HOME:-$HOME/.local/share}/mser-mlflow; }
dir=$(realpath -m "$dir")
"$verb"
