"""Quick compilation for the tests of meshes."""

from collections.abc import Iterator

import jax
import pytest

# Memory is compared with what XLA reserves: there the optimizations count.
OPTIMIZED = ("test_plan", "test_random_weights")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most of the time goes into compiling what runs for milliseconds."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", request.module.__name__ not in OPTIMIZED)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
