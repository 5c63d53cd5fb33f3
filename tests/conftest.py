"""Settings of the test process, made before jax starts."""

import gc
import json
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent

jax.config.update("jax_compilation_cache_dir", str(ROOT.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# Tests compile for longer than they compute. As an XLA flag it would reach the compilers of children, for GPUs too.
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_PLATFORMS"] == "cpu")


class Golden:
    """One file of recorded outputs of the original code; see the README beside the files."""

    def __init__(self, path: pathlib.Path):
        self._arrays = np.load(path)
        self.meta = json.loads(str(self._arrays["meta"]))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def weights(self, prefix: str = "weights/") -> dict[str, np.ndarray]:
        """The tensors below a prefix, under their original names."""
        return {name.removeprefix(prefix): self._arrays[name] for name in self._arrays if name.startswith(prefix)}


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module():
    """Each holds dozens of memory maps, and Linux allows a process 65530: a whole run in two processes needs more."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def golden():
    """golden("lpd/sample") -> Golden."""
    return lambda name: Golden(ROOT / "goldens" / f"{name}.npz")


@pytest.fixture(scope="session")
def run_program():
    """Runs train.py or evaluate.py as a user does, on one device; unoptimised programs compile in half the time."""

    def run(script: str, *flags: str) -> str:
        environment = os.environ | {
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(ROOT.parent / ".jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, script, *flags]
        done = subprocess.run(command, cwd=ROOT.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
