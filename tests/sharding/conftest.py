"""Optimised compilation for the tests of memory."""

from collections.abc import Iterator

import jax
import pytest

# Memory is compared with what XLA reserves: there the optimizations count.
OPTIMIZED = ("test_plan", "test_random_weights")


@pytest.fixture(scope="module", autouse=True)
def _optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    if request.module.__name__ in OPTIMIZED:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
