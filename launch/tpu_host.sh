#!/usr/bin/env bash
# What launch/tpu.sh does on each host of a TPU.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=$HOME/train.log
stopped=$HOME/stopped # says that a person ended training, not the end of a spot TPU

usage() {
  echo "usage: tpu_host.sh install BUCKET | start FLAGS | state | forget | stop"
}

install() { # BUCKET
  # The image's own Python may be older than the one we need.
  if [[ ! -x venv/bin/python ]]; then
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --python 3.11 venv
  fi
  python3 -m uv pip install --quiet --python venv/bin/python \
    --constraint requirements.lock --editable '.[tpu]'
  if ! command -v gcsfuse >/dev/null; then
    local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  if ! mountpoint --quiet /gcs; then
    sudo mkdir -p /gcs
    sudo chown "$(id -u):$(id -g)" /gcs
    # No caching of names: a host must see at once what another has written.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$1" /gcs
  fi
}

# As a service of systemd, training outlives the connection, gets SIGTERM when the machine is
# shut down, and is there at most once. Only the main process gets it (mixed): the rest is its
# own. The TPU driver locks memory, of which a service may have little by default.
start() { # FLAGS
  if systemctl is-active --quiet vit_jax; then
    return
  fi
  rm -f "$stopped"
  [[ ! -f $log ]] || mv -f "$log" "$log.before"
  sudo systemctl reset-failed vit_jax 2>/dev/null || true
  sudo systemd-run --quiet --unit=vit_jax --uid="$(id -u)" --gid="$(id -g)" --same-dir \
    --setenv=PYTHONUNBUFFERED=1 --property=KillMode=mixed --property=TimeoutStopSec=300 \
    --property=LimitMEMLOCK=infinity --property=LimitNOFILE=65536 \
    --property=StandardOutput="append:$log" --property=StandardError="append:$log" \
    "$PWD/venv/bin/python" -m vit_jax.train "$@"
}

# One word and the last line of the log. Only the first host's log has what training says.
state() {
  local word=IDLE last='' end=''
  [[ ! -f $log ]] || end=$(tail -n 20 "$log") last=$(tail -n 1 "$log")
  if systemctl is-active --quiet vit_jax; then
    word=RUNNING
  elif [[ -f $stopped ]]; then
    word=STOPPED
  elif grep -Eq '^(accuracy|loss) .* of [0-9]+ examples$' <<<"$end"; then
    word=FINISHED
  elif [[ -f $log ]]; then
    word=INTERRUPTED
    # 1 is an error of training itself, unless it is that another host is gone.
    [[ $(systemctl show vit_jax --property=ExecMainStatus --value) != 1 ||
      $end == *" has died, so "* ]] || word=BROKEN
  fi
  echo "$word $last"
}

# Makes an end, good or bad, one that training is to be begun after.
forget() {
  systemctl is-active --quiet vit_jax || rm -f "$log" "$stopped"
}

stop() {
  touch "$stopped"
  sudo systemctl stop vit_jax 2>/dev/null || true # where it does not run there is no such unit
}

case ${1:-} in
  install | start | state | forget | stop) "$@" ;;
  --help | -h) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
