"""Every implementation of norm, rotation and cache write against NumPy, and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import norm_rope_cases as cases
import pytest

from pallas_kernels.norm_rope_cache import Heads, norm_rope_cache
from pallas_kernels.norm_rope_cache.api import OPERATIONS

OPERATION = OPERATIONS["norm_rope_cache"]


@pytest.mark.parametrize("impl", ["reference", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_against_numpy(case: cases.Case, impl: str):
    arguments = cases.make_arguments(case)
    reason = OPERATION.why_not(impl, *arguments, eps=cases.EPS)
    if reason is not None:
        pytest.skip(reason)
    run = jax.jit(lambda heads, *tables: norm_rope_cache(heads, *tables, eps=cases.EPS, impl=impl))
    cases.check(case, run(*arguments))


def test_a_donated_cache_is_written_in_place():
    heads, *tables = cases.make_arguments(cases.CASES[0])
    caches = [jnp.asarray(one.cache) for one in heads if one.cache is not None]

    def run(caches, *tables):
        given = iter(caches)
        cached = [one._replace(cache=None if one.cache is None else next(given)) for one in heads]
        results = norm_rope_cache(cached, *tables, eps=cases.EPS)
        return [result for one, result in zip(heads, results, strict=True) if one.cache is not None]

    memory = jax.jit(run, donate_argnums=0).lower(caches, *tables).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == sum(cache.nbytes for cache in caches)


def test_rows_are_rounded_to_the_caches_dtype():
    heads, *tables = cases.make_arguments(cases.CASES[0])
    wide = norm_rope_cache(heads, *tables, eps=cases.EPS)
    narrow = [one._replace(cache=None if one.cache is None else one.cache.astype(jnp.bfloat16)) for one in heads]
    for one, result, expected in zip(heads, norm_rope_cache(narrow, *tables, eps=cases.EPS), wide, strict=True):
        assert result.dtype == (jnp.float32 if one.cache is None else jnp.bfloat16)
        assert (result == expected.astype(result.dtype)).all()


ARRAY: Any = jax.ShapeDtypeStruct
GOOD = {
    "x": ARRAY((6, 3, 8), jnp.float32),
    "norm": ARRAY((8,), jnp.float32),
    "cache": ARRAY((4, 3, 5, 8), jnp.float32),
    "cos": ARRAY((6, 4), jnp.float32),
    "sin": ARRAY((6, 4), jnp.float32),
    "pages": ARRAY((6,), jnp.int32),
    "slots": ARRAY((6,), jnp.int32),
    "eps": 1e-6,
}


def call(**changed):
    arguments = GOOD | changed
    static = {name: arguments.pop(name) for name in ("eps", "impl") if name in arguments}

    def run(x, norm, cache, cos, sin, pages, slots):
        return norm_rope_cache([Heads(x, norm, cache)], cos, sin, pages, slots, **static)

    return jax.eval_shape(run, *arguments.values())


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("x", ARRAY((6, 8), jnp.float32), ValueError, r"heads\[0\].x has shape \(6, 8\).* 3 axes"),
        ("x", ARRAY((6, 3, 8), jnp.int8), TypeError, r"heads\[0\].x has dtype int8"),
        ("norm", ARRAY((9,), jnp.float32), ValueError, r"heads\[0\].norm .* must be 8"),
        ("cache", ARRAY((4, 2, 5, 8), jnp.float32), ValueError, r"heads\[0\].cache .* must be 3"),
        ("cache", ARRAY((4, 3, 5, 8), jnp.float8_e4m3fn), TypeError, r"heads\[0\].cache has dtype float8_e4m3fn"),
        ("cos", ARRAY((6, 4), jnp.bfloat16), TypeError, "cos has dtype bfloat16, which must be float32"),
        ("sin", ARRAY((6, 3), jnp.float32), ValueError, "sin has shape .* must be 4, as in cos"),
        ("pages", ARRAY((7,), jnp.int32), ValueError, "pages has shape .* must be 6"),
        ("slots", ARRAY((6,), jnp.int16), TypeError, "slots has dtype int16, which must be int32"),
        ("eps", 0.0, ValueError, "eps=0.0 must be positive and finite"),
        ("eps", "1", TypeError, "eps='1' must be a Python float"),
        ("impl", "fast", ValueError, "impl='fast' must be None or one of mosaic_gpu, reference"),
    ],
)
def test_bad_arguments_are_refused(argument: str, value, error: type[Exception], message: str):
    assert call()[0].shape == (4, 3, 5, 8)
    with pytest.raises(error, match=message):
        call(**{argument: value})


def test_more_pairs_than_channels_are_refused():
    wide = ARRAY((6, 5), jnp.float32)
    with pytest.raises(ValueError, match=r"cos has R=5 pairs of channels, more than half of heads\[0\].x's 8"):
        call(cos=wide, sin=wide)


def test_no_heads_are_refused():
    with pytest.raises(ValueError, match="heads must not be empty"):
        norm_rope_cache([], *(jnp.zeros((1, 1)),) * 2, *(jnp.zeros(1, jnp.int32),) * 2, eps=1e-6)


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("the dtypes are float32, not one of bfloat16, float16", {}),
        ("the dtypes are bfloat16, float16, not one of bfloat16, float16", {"dtypes": ("bfloat16", "float16")}),
        ("a head dim is 64, not 128", {"dtypes": ("bfloat16",) * 2, "dim": 64}),
        ("12 pairs of channels are rotated, not a multiple of 8", {"dtypes": ("bfloat16",) * 2, "half": 12}),
    ],
)
def test_what_the_kernel_does_not_serve(reason: str, changed: dict):
    dtypes, dim, half = (
        changed.get(name, good) for name, good in (("dtypes", ("float32",) * 2), ("dim", 128), ("half", 32))
    )
    heads = (Heads(ARRAY((6, 3, dim), dtypes[0]), ARRAY((dim,), dtypes[0]), ARRAY((4, 3, 128, dim), dtypes[1])),)
    table, places = ARRAY((6, half), jnp.float32), ARRAY((6,), jnp.int32)
    assert OPERATION.why_not("mosaic_gpu", heads, table, table, places, places, eps=1e-6) == reason
