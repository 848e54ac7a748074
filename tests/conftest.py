"""Markers and the model that most tests share."""

import jax
import models
import pytest

from m3_jax import M3Config, M3ForCausalLM


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
    """The tiny preset in float32 with random weights; tests do not change it."""
    return models.random_model(M3Config.tiny())
