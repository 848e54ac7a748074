"""Markers and the model that most tests share."""

import os

# For the workers of pytest-xdist, which are started later: else each of them multiplies the oracle's small matrices
# with as many threads as the machine has cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before jax starts: else the first of the workers that share a GPU takes most of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import models
import pytest

from m3_jax import M3Config, M3ForCausalLM

# For the tests of meshes; every other test stays on the first device.
jax.config.update("jax_num_cpu_devices", 8)
# Most of the time on a CPU goes into compiling what runs for milliseconds.
jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that need a GPU where there is none, and says so."""
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    reason = f"needs an NVIDIA GPU: jax has {jax.devices()[0].platform} devices only"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny() -> M3ForCausalLM:
    """The tiny preset in float32 with random weights, one layer of each kind; tests do not change it."""
    config = M3Config.tiny()
    return models.random_model(config.with_layers(config.layer_kinds[:3]))
