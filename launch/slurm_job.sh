# On the first node, outside any container. It starts Ray by role, then the driver, and ends with the driver's exit code.
set -uo pipefail

say() { echo "align launch: $*" >&2; }
fail() { say "$*"; exit 69; } # 69: there is no cluster to run on
alive() { kill -0 "$1" 2>/dev/null; }
quote() { # the end of logs, so that what is wrong is seen in this one
  for log in "$@"; do
    [ -s "$log" ] || continue
    say "the end of $log:"
    tail -n 15 "$log" | cut -c 1-1000 | sed 's/^/    /' >&2
  done
}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rm -f "$folder"/token.* "$folder"/driver.pid "$folder"/ended.*
stopping=
trap 'stopping=yes' TERM

ray_steps=()
if [ -n "$with_ray" ]; then
  address=$(getent ahostsv4 "$head" | awk '$1 !~ /^127\./ { print $1; exit }')
  [ -n "$address" ] || address=$(hostname -I | awk '{ print $1 }')
  [ -n "$address" ] || fail "$head has no address that other nodes could reach"
  export RAY_ADDRESS=$address:$((20000 + SLURM_JOB_ID % 10000))

  # A new token for each attempt, in a file that nobody else can read; the environment has its path alone.
  token=$folder/token.${SLURM_RESTART_COUNT:-0}
  trap 'rm -f "$token"' EXIT
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token") || fail "cannot write $token"
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
  unset RAY_AUTH_TOKEN

  if [ -n "$make_temp" ]; then # a container can mount only what is there
    temp=/tmp/align-$SLURM_JOB_ID
    "${bare[@]}" --nodes="$nodes" --ntasks="$nodes" \
      bash -c 'mkdir -m 700 "$0" 2>/dev/null || [ -O "$0" ]' "$temp" || fail "cannot make $temp on all nodes"
  fi
  "${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" --output="$folder/head.log" --open-mode=append \
    "${on_node[@]}" head 2>>"$folder/head.log" &
  ray_steps+=($!)
  if [ "$nodes" -gt 1 ]; then
    "${step[@]}" --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$head" \
      --output="$folder/worker-%N.log" --open-mode=append "${on_node[@]}" worker 2>>"$folder/head.log" &
    ray_steps+=($!)
  fi
fi
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" "${on_node[@]}" driver &
driver=$!

told= lost=
while alive "$driver"; do
  if [ -n "$stopping" ] && [ -z "$told" ] && pid=$(cat "$folder/driver.pid" 2>/dev/null); then
    say "told to stop; the driver saves the last completed step"
    # Not through srun, which would kill it, nor through scancel, which would signal its children too.
    kill -TERM "$pid"
    told=yes
  fi
  if [ -n "$with_ray" ] && [ -z "$lost" ] && ! alive "${ray_steps[0]}"; then
    say "Ray's head on $head has ended; see $folder/head.log"
    quote "$folder/head.log"
    lost=$SECONDS
  fi
  if [ -n "$lost" ] && [ $((SECONDS - lost)) -gt "$head_lost_s" ]; then
    say "the driver did not end within $head_lost_s s of its cluster; killing it"
    kill -KILL "$(cat "$folder/driver.pid")"
    lost=$SECONDS
  fi
  sleep 1 & wait $! # not a plain sleep, which would hold signals up
done
wait "$driver"
code=$?

if [ -n "$with_ray" ] && [ $code = 69 ] && [ -z "$lost" ]; then
  logs=()
  for ended in "$folder"/ended.*; do
    node=${ended##*/ended.}
    if [ "$node" = "$head" ]; then logs+=("$folder/head.log"); else logs+=("$folder/worker-$node.log"); fi
  done
  [ -e "$ended" ] || logs=("$folder"/head.log "$folder"/worker-*.log) # none has ended: one did not join
  quote "${logs[@]:0:4}"
fi
for pid in ${ray_steps[@]+"${ray_steps[@]}"}; do kill "$pid" 2>/dev/null; done
wait
if [ -n "$with_ray" ] && { [ $code = 0 ] || [ $code = 75 ]; }; then # after a failure, Ray's logs stay in /tmp
  if [ -n "$make_temp" ]; then
    "${bare[@]}" --nodes="$nodes" --ntasks="$nodes" rm -rf "$temp" 2>>"$folder/head.log"
  else
    "${step[@]}" --nodes="$nodes" --ntasks="$nodes" "${on_node[@]}" clean 2>>"$folder/head.log"
  fi
fi

# 75: saved, and the same command would go on. 143: told to stop before it had begun.
if [ $code = 75 ] || { [ $code = 143 ] && [ -n "$stopping" ]; }; then
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
  if [ "$state" != RUNNING ]; then
    say "not queued again: the job is $state"
  elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_requeues" ]; then
    say "not queued again: that was done ${SLURM_RESTART_COUNT:-0} times (slurm.max_requeues)"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "queued again; it goes on from the last completed step"
  fi
fi
exit $code
