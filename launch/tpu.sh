#!/usr/bin/env bash
# Trains on Cloud TPU, one host or a slice of many: creates it, installs, trains, deletes it.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu.sh COMMAND [FLAGS]

  plan FLAGS   does the training step fit, and how fast might it be? Costs nothing
  run FLAGS    plans, asks for the TPU, waits for it, installs, trains, shows the log, deletes
               the TPU at the end. Where it was preempted, asks for another and goes on. May
               itself be stopped, and be run again from anywhere: training goes on without it
  status       the state of the TPU and of the training
  log          the last lines of the log of every host
  stop         saves and ends training; the TPU stays, and costs, until deleted
  delete       deletes the TPU, and what is on its disks. The bucket stays

FLAGS are those of `python -m vit_jax.train`: --config=FILE[:ARGUMENT] --workdir=/gcs/DIR
[--config.FIELD=VALUE ...]. The bucket is the folder /gcs on every host.

Variables:
  NAME      of the TPU
  ZONE      for example us-west4-a
  TOPOLOGY  v4:..., v5e:..., v5p:... or v6e:..., for example v5e:2x4 (one host), v5e:8x8
  BUCKET    of Cloud Storage, with a hierarchical namespace, without gs://
  SPOT=1    cheaper, and may be taken away at any time
  KEEP=1    the TPU is not deleted at the end
  PLAN=skip the plan is not asked first
  RUNTIME   software version of the TPU VM (default: the one for this TPU)
  POLL      seconds between two looks (default: 30)
  PYTHON    the interpreter here, which plans (default: python; needs pip install -e '.[tpu]')
END
}

NAME=${NAME:-}
ZONE=${ZONE:-}
TOPOLOGY=${TOPOLOGY:-}
BUCKET=${BUCKET:-}
PYTHON=${PYTHON:-python}
POLL=${POLL:-30}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
host=vit_jax/launch/tpu_host.sh # as seen from the home folder of a host

fail() {
  echo "error: $1" >&2
  exit 1
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || fail "$name is not set: see launch/tpu.sh --help"
  done
}

# --- What to ask for -------------------------------------------------------------------------

# TOPOLOGY as Cloud TPU names it: v5e and v6e count chips, v4 and v5p two cores for each.
accelerator() {
  local sides=${TOPOLOGY#*:}
  local chips=$((${sides//x/*}))
  case $TOPOLOGY in
    v4:*) echo "v4-$((2 * chips)) tpu-ubuntu2204-base" ;;
    v5e:*) echo "v5litepod-$chips v2-alpha-tpuv5-lite" ;;
    v5p:*) echo "v5p-$((2 * chips)) v2-alpha-tpuv5" ;;
    v6e:*) echo "v6e-$chips v2-alpha-tpuv6e" ;;
  esac
}

check_topology() {
  need TOPOLOGY
  [[ $TOPOLOGY =~ ^v(4|5e|5p|6e):[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
    fail "TOPOLOGY is $TOPOLOGY: write for example v5e:4x4"
}

plan() {
  local flag flags=()
  for flag in "$@"; do
    [[ $flag == --workdir=* ]] || flags+=("$flag")
  done
  (cd "$root" && "$PYTHON" -m vit_jax.plan --topology="$TOPOLOGY" "${flags[@]}")
}

# --- The machine -----------------------------------------------------------------------------

tpus() {
  gcloud compute tpus "$@" --zone="$ZONE" --quiet
}

machine() {
  local states
  states=$(tpus queued-resources list \
    --format='csv[no-heading](name.basename(),state.state)') || return
  awk -F, -v name="$NAME" \
    '$1 == name { state = $2 } END { print state ? state : "ABSENT" }' <<<"$states"
}

create() {
  local type runtime
  read -r type runtime < <(accelerator)
  echo "asking for a $type in $ZONE"
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$type" \
    --runtime-version="${RUNTIME:-$runtime}" ${SPOT:+--spot}
}

delete() {
  echo "deleting $NAME"
  tpus queued-resources delete "$NAME" --force
}

# --- The hosts -------------------------------------------------------------------------------

on_host() { # WORKER COMMAND [ARGUMENT ...]
  local worker=$1
  shift
  tpus tpu-vm ssh "$NAME" --worker="$worker" --command="$(printf '%q ' "$@")"
}

install() {
  local archive code=0
  archive=$(mktemp --suffix=.tar.gz) || return
  tar -C "$root" -czf "$archive" --exclude=__pycache__ \
    vit_jax configs launch setup.py pyproject.toml README.md requirements.lock &&
    tpus tpu-vm scp "$archive" "$NAME:vit_jax.tar.gz" --worker=all &&
    on_host all bash -c "mkdir -p vit_jax && tar -C vit_jax -xzf vit_jax.tar.gz" &&
    on_host all bash "$host" install "$BUCKET" || code=$?
  rm -f "$archive"
  return "$code"
}

# `STATE last line of the log`, NEW where nothing is installed, or UNREACHABLE.
training() {
  local answer
  answer=$(on_host 0 bash -c "[ ! -f $host ] && echo NEW || bash $host state" 2>/dev/null) ||
    answer=UNREACHABLE
  tail -n 1 <<<"$answer"
}

log() {
  on_host all tail -n 50 train.log
}

# --- From nothing to the end -----------------------------------------------------------------

# Looks at what there is and does the next thing: so it may be ended and run again at any time.
run() {
  local state said='' starts=0 lost=0 running=0
  while true; do
    state=$(machine) || state=UNKNOWN
    [[ $state != ACTIVE ]] || state=$(training)
    [[ $state == "$said" ]] || echo "$(date +%H:%M:%S) $state"
    said=$state
    [[ $state =~ ^(UNKNOWN|UNREACHABLE)$ ]] || lost=0
    case ${state%% *} in
      ABSENT)
        create
        starts=0
        ;;
      SUSPENDED) delete ;; # preempted: the next round asks for another
      FAILED)
        tpus queued-resources describe "$NAME" || true
        delete
        fail "Google refused the TPU, for the reason above"
        ;;
      RUNNING)
        running=$((running + 1))
        [[ $running -lt 20 ]] || starts=0 # only what lasts has started
        ;;
      NEW | IDLE | INTERRUPTED)
        [[ $starts -lt 3 ]] || costly "training was begun three times and did not last"
        starts=$((starts + 1)) running=0
        install && on_host all bash "$host" start "$@" || echo "could not be started" >&2
        ;;
      UNKNOWN | UNREACHABLE)
        lost=$((lost + 1))
        [[ $lost -lt 40 ]] || costly "$NAME has not answered for long"
        ;;
      STOPPED) costly "stopped, state saved: run the same command to continue" ;;
      FINISHED)
        [[ -n ${KEEP:-} ]] || delete
        return
        ;;
      BROKEN)
        log || true
        [[ -z ${KEEP:-} ]] || costly "training ended with an error, which stands above"
        delete
        fail "training ended with an error, which stands above"
        ;;
    esac
    sleep "$POLL"
  done
}

costly() {
  fail "$1; $NAME may still cost: launch/tpu.sh log tells more, launch/tpu.sh delete ends it"
}

plan_first() {
  [[ ${PLAN:-} != skip ]] || return 0
  plan "$@" ||
    fail "the plan does not fit or cannot be made: no TPU was asked for (PLAN=skip: without a plan)"
}

# --- The door --------------------------------------------------------------------------------

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
command=$1
shift
case $command in
  --help | -h) usage ;;
  plan)
    check_topology
    plan "$@"
    ;;
  run)
    need NAME ZONE BUCKET
    check_topology
    [[ " $*" == *" --config="* && " $*" == *" --workdir=/gcs/"* ]] ||
      fail "run needs --config=FILE and --workdir=/gcs/DIR, a folder in the bucket"
    state=$(machine)
    if [[ $state == ACTIVE ]]; then
      on_host all bash "$host" forget || true # how an earlier training ended
    else
      plan_first "$@"
    fi
    run "$@"
    ;;
  status)
    need NAME ZONE
    state=$(machine)
    echo "$state"
    [[ $state != ACTIVE ]] || training
    ;;
  log)
    need NAME ZONE
    log
    ;;
  stop)
    need NAME ZONE
    on_host all bash "$host" stop
    ;;
  delete)
    need NAME ZONE
    delete
    ;;
  *) fail "there is no command $command: see launch/tpu.sh --help" ;;
esac
