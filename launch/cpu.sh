#!/usr/bin/env bash
# Trains on this machine's processor, with memory kept from step to step.
#
# glibc returns large blocks to the system when they are freed, and every step faults them in
# again: hundreds of thousands of page faults. What tells it not to must be set before the
# process starts, so no Python can do it for itself. Steps were up to 1.2 times as fast
# (docs/performance.md, "memory kept"); other C libraries ignore it.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/cpu.sh --config=FILE[:ARGUMENT] --workdir=DIR [--config.FIELD=VALUE ...]

Runs `python -m vit_jax.train` with these flags on the processor.

Variables:
  PYTHON   the interpreter (default: python)
END
}

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
[[ $1 != --help && $1 != -h ]] || { usage; exit 0; }
export JAX_PLATFORMS=cpu
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0
export MALLOC_TRIM_THRESHOLD_=$((2 ** 40)) MALLOC_TOP_PAD_=$((2 ** 28))
exec "${PYTHON:-python}" -m vit_jax.train "$@"
