"""Compiled programs kept on disk: a shape is compiled once on a machine, not once a process."""

import hashlib
import os
import platform
from pathlib import Path

import jax
import jaxlib


def keep_programs() -> None:
    """Has JAX keep what it compiles under `$XDG_CACHE_HOME/moeret` (`~/.cache/moeret`), for this and later processes.

    The folder may be deleted at any time. Changes nothing where JAX's cache was set up or switched off by its own settings
    (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=false), nor where no folder can be made.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = home / "moeret" / f"programs-{_machine()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written is no reason not to search
        return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _machine() -> str:
    """What code is compiled for: JAX does not tell one x86 processor from another, and homes are shared by machines."""
    features = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    return hashlib.sha256(f"{jaxlib.__version__} {platform.machine()} {features}".encode()).hexdigest()[:12]
