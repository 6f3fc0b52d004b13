# Sourced by every start command of deploy/cluster*.yaml: what Ray's processes must agree on, and who this host is.
export PATH="$HOME/expertmesh/venv/bin:$PATH"
export RAY_AUTH_MODE=token                                     # without it hosts fail with InvalidAuthToken
export RAY_enable_autoscaler_v2=0                              # v2 counts the head among the local provider's workers
export RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S=1  # how soon the policy sees a shard's load
export RAY_USAGE_STATS_ENABLED=0
ulimit -n 65536 2> /dev/null || true                           # a connection a stream; as far as the host allows
HOST_IP=$(echo "$SSH_CONNECTION" | cut -d' ' -f3)              # the address by which the other hosts reach this one

# Ray resources of a host, as JSON, from the file `roles`; its line `*` is for hosts without one of their own.
roles_of() {
  awk -v host="$1" '
    $1 == host || ($1 == "*" && found == "") { found = $0; sub(/^[^ ]+ +/, "", found) }
    $1 == host { exit }
    END { print found == "" ? "{}" : found }' "$HOME/expertmesh/hosts/roles"
}

# in_background LOG COMMAND...: goes on when ssh has left; its output is ~/expertmesh/LOG.
in_background() {
  local log="$1"; shift
  setsid nohup "$@" > "$HOME/expertmesh/$log" 2>&1 < /dev/null &
}
