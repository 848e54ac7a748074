"""Samplers: the distribution that they draw from, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3_jax import Greedy, Sampler

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)
DRAWS = 20_000


def expected(temperature: float, keep: np.ndarray) -> np.ndarray:
    p = np.where(keep, np.exp(LOGITS / temperature), 0)
    return p / p.sum()


def frequencies(sampler: Sampler) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    tokens = jax.jit(lambda s, x, k: s(x, k))(sampler, jnp.tile(LOGITS, (DRAWS, 1)), keys)
    return np.bincount(np.asarray(tokens), minlength=6) / DRAWS


PROBABILITIES = expected(1.0, np.ones(6, bool))


@pytest.mark.parametrize(
    ("sampler", "temperature", "kept"),
    [
        (Sampler(), 1.0, 6),
        (Sampler(temperature=0.5), 0.5, 6),
        (Sampler(temperature=3.0, top_k=2), 3.0, 2),
        (Sampler(top_k=100), 1.0, 6),
        (Sampler(top_k=1), 1.0, 1),
        (Sampler(top_p=float(PROBABILITIES[:2].sum()) + 1e-3), 1.0, 3),
        (Sampler(top_p=float(PROBABILITIES[:2].sum()) - 1e-3), 1.0, 2),
        (Sampler(top_p=1e-6), 1.0, 1),
        (Sampler(top_p=1.0), 1.0, 6),
        (Sampler(min_p=float(np.exp(-1.6))), 1.0, 3),
        (Sampler(min_p=0.0), 1.0, 6),
        (Sampler(temperature=2.0, min_p=float(np.exp(-0.9))), 2.0, 3),
        # top-p counts what top-k left, renormalised: 2 of 3 make 90 % where 2 of 6 would not.
        (Sampler(top_k=3, top_p=0.85), 1.0, 2),
    ],
)
def test_distribution(sampler: Sampler, temperature: float, kept: int) -> None:
    want, got = expected(temperature, np.arange(6) < kept), frequencies(sampler)
    assert (got[want == 0] == 0).all()
    # Five standard deviations of a binomial frequency.
    np.testing.assert_array_less(np.abs(got - want), 5 * np.sqrt(want * (1 - want) / DRAWS) + 1e-12)


def test_temperature_zero_is_greedy() -> None:
    logits = jnp.asarray(np.random.RandomState(0).standard_normal((50, 33)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 50)
    greedy = Greedy()(logits, keys)
    np.testing.assert_array_equal(greedy, np.argmax(logits, -1))
    for sampler in (Sampler(temperature=0), Sampler(temperature=0.0, top_k=5, top_p=0.3, min_p=0.2)):
        np.testing.assert_array_equal(sampler(logits, keys), greedy)


def test_ties_go_to_the_lowest_id() -> None:
    assert Greedy()(jnp.asarray([[1.0, 3.0, 3.0, 0.0]]), jax.random.split(jax.random.key(0), 1)).tolist() == [1]


def test_a_row_depends_on_its_own_key_alone() -> None:
    logits = jnp.asarray(np.random.RandomState(0).standard_normal((4, 99)), jnp.float32)
    keys = jax.random.split(jax.random.key(5), 4)
    sampler = Sampler(temperature=1.3, top_k=50, top_p=0.95)
    together = sampler(logits, keys)
    for row in range(4):
        assert sampler(logits[row : row + 1], keys[row : row + 1])[0] == together[row]
    np.testing.assert_array_equal(sampler(logits[::-1], keys[::-1]), together[::-1])


def test_another_temperature_compiles_nothing() -> None:
    draw = jax.jit(lambda s, x, k: s(x, k))
    arguments = jnp.tile(LOGITS, (2, 1)), jax.random.split(jax.random.key(0), 2)
    draw(Sampler(0.5, top_k=3), *arguments)
    draw(Sampler(0.9, top_k=4), *arguments)
    assert draw._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be finite and at least 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0: must be an integer of at least 1"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.5}, "min_p=-0.5: must be between 0 and 1"),
        ({"min_p": 2}, "min_p=2"),
    ],
)
def test_values_are_checked(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)  # pyright: ignore[reportArgumentType]
