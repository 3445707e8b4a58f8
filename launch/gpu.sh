#!/usr/bin/env bash
# Trains on all GPUs of this machine, and begins again where a killed process left off.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/gpu.sh --config=FILE[:ARGUMENT] --workdir=DIR [--config.FIELD=VALUE ...]

Runs `python -m vit_jax.train` with these flags: one process, all GPUs of this machine.
Ctrl-C and SIGTERM save and end it; the same command goes on from there.

Variables:
  PYTHON   the interpreter (default: python)
  RETRIES  how often to begin again after the process was killed (default: 3)
END
}

PYTHON=${PYTHON:-python}
RETRIES=${RETRIES:-3}

fail() {
  echo "error: $1" >&2
  exit 1
}

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
[[ $1 != --help && $1 != -h ]] || { usage; exit 0; }
command -v "$PYTHON" >/dev/null ||
  fail "there is no $PYTHON: activate the virtual environment, or set PYTHON"
backend=$("$PYTHON" -c 'import jax; print(jax.default_backend())') ||
  fail "$PYTHON cannot import jax: pip install -e '.[cuda]'"
[[ $backend == gpu ]] ||
  fail "JAX sees no GPU, only $backend: check nvidia-smi, then pip install -e '.[cuda]'"

# In the background, so that this shell is free to pass a signal on while it waits.
child='' signalled='' stopped=''
trap 'signalled=1; stopped=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT

train() {
  "$PYTHON" -m vit_jax.train "$@" &
  child=$!
  # A signal may have come before its number was known here.
  [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null || true
  local code=0 again
  wait "$child" || code=$?
  while [[ -n $signalled ]]; do # perhaps the signal ended the wait, not the child
    signalled='' again=0
    wait "$child" 2>/dev/null || again=$?
    [[ $again -eq 127 ]] || code=$again # 127: the child had ended before
  done
  return "$code"
}

for ((attempt = 0; ; attempt++)); do
  code=0
  train "$@" || code=$?
  # 1 is an error that training would meet again; above 128 the process was killed, by the
  # kernel for want of memory or by a driver.
  if [[ $code -le 128 || -n $stopped || $attempt -ge $RETRIES ]]; then
    exit "$code"
  fi
  echo "killed by signal $((code - 128)): beginning again ($((attempt + 1)) of $RETRIES)" >&2
done
