export RAY_gcs_rpc_server_reconnect_timeout_s=$head_lost_s
start=("$python" -m ray.scripts.scripts start --block --disable-usage-stats
  --num-cpus="${cpus:-$SLURM_CPUS_ON_NODE}" --num-gpus="$gpus"
  --min-worker-port=0 --max-worker-port=0) # ports that are free: another job may share the node

own_temp() { # nobody else may have made it
  mkdir -m 700 "$temp" 2>/dev/null || [ -O "$temp" ] || { echo "align launch: $temp belongs to another user" >&2; exit 69; }
}

case "$role" in
head)
  own_temp
  "${start[@]}" --head --include-dashboard=false --temp-dir="$temp" \
    --node-ip-address="${RAY_ADDRESS%:*}" --port="${RAY_ADDRESS##*:}"
  ;;
worker)
  own_temp
  until timeout 5 bash -c 'exec 3<>"/dev/tcp/${RAY_ADDRESS%:*}/${RAY_ADDRESS##*:}"' 2>/dev/null; do
    if [ "$SECONDS" -gt "$nodes_s" ]; then
      echo "align launch: no answer from Ray's head at $RAY_ADDRESS within $nodes_s s (deadlines.nodes_s)" >&2
      exit 69
    fi
    sleep 0.5
  done
  tries=1
  until "${start[@]}" --address="$RAY_ADDRESS"; do # Ray gives up after 30 s, which a busy node can take
    code=$?
    if [ "$tries" = 3 ] || [ "$SECONDS" -gt "$nodes_s" ]; then exit "$code"; fi
    tries=$((tries + 1))
  done
  ;;
driver)
  echo $$ >"$folder/driver.pid"
  driver
  ;;
esac
