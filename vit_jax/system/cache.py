"""One folder for what can be downloaded or computed again: it may be deleted at any time.

$VIT_JAX_CACHE, else `vit_jax` in $XDG_CACHE_HOME, else in ~/.cache. It holds downloaded
weights, `folders/` (lists of the files of large data sets) and `compiled/`.
"""

import os
from pathlib import Path

COMPILED_BYTES = 4 << 30  # above this the least recently used programs are deleted


def folder() -> Path:
    if chosen := os.environ.get("VIT_JAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vit_jax"


def keep_compiled_programs() -> None:
    """Makes JAX cache programs that took more than a second to compile, for later processes.

    Only for accelerators, where a program may take minutes. On CPU it takes seconds, and code
    compiled for one CPU crashes on another that shares the home folder. JAX's own setting
    ($JAX_COMPILATION_CACHE_DIR), where there is one, is left as it is, on any device.
    """
    import jax  # here, since finding a file does not need it

    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(folder() / "compiled"))
