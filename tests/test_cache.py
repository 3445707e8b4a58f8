from pathlib import Path

import jax
import pytest

from vit_jax.system import cache


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """JAX without a cache, which gets back what it had."""
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", "~/elsewhere")
    assert cache.folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("VIT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.folder() == Path("/xdg/vit_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache/vit_jax"


def test_compiled_programs_are_kept_on_accelerators_only(unset, monkeypatch):
    cache.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cache.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(unset / "compiled")
    assert jax.config.jax_compilation_cache_max_size == cache.COMPILED_BYTES


def test_a_cache_of_the_user_stays(unset, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.config.update("jax_compilation_cache_dir", str(unset / "mine"))
    cache.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(unset / "mine")
