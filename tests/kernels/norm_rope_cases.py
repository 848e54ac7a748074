"""Rows for `norm_rope_cache` and what NumPy makes of them."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.norm_rope_cache import Heads

EPS = 1e-5
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Case:
    """Projections (number of heads, normed, cached) of the same rows; some rows go to no page."""

    name: str
    projections: tuple[tuple[int, bool, bool], ...]
    num_rows: int = 7
    head_dim: int = 20
    index_dim: int = 14
    half: int = 6
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name


# Queries, keys, values, index queries and index keys; and what is left of them on a dense layer.
SPARSE = ((6, True, False), (3, True, True), (3, False, True), (2, True, False), (1, True, True))
DENSE = SPARSE[:3]
CASES = (
    Case("sparse", SPARSE),
    Case("dense", DENSE),
    Case("bfloat16", SPARSE, dtype="bfloat16"),
    Case("float16", SPARSE, dtype="float16"),
    Case("all-channels", DENSE, half=10),
    Case("one-row", SPARSE, num_rows=1),
    Case(
        "released-sizes",
        ((64, True, False), (4, True, True), (4, False, True), (4, True, False), (1, True, True)),
        5,
        128,
        128,
        32,
        "bfloat16",
    ),
    # What shared memory looks like depends on the numbers of heads: here all divide by 4.
    Case("released-sizes-dense", ((64, True, False), (4, True, True), (4, False, True)), 5, 128, 128, 32, "bfloat16"),
    Case("all-channels-dense", ((32, True, False), (8, True, True), (8, False, True)), 3, 128, 128, 64, "float16"),
    Case("few-heads", ((16, True, False), (1, True, True), (1, False, True)), 3, 128, 128, 16, "bfloat16"),
    Case(
        "more-than-a-tile",
        ((80, True, False), (72, True, True), (65, False, True), (66, False, False)),
        3,
        128,
        128,
        64,
        "float16",
    ),
)


def make_arguments(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """heads, cos, sin, pages, slots. Of every four rows one goes nowhere: before the first page, or behind the last."""
    rng = np.random.default_rng(seed)
    dtype, num_pages, page_size = DTYPES[case.dtype], 4, 5

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    def maybe(present: bool, array: np.ndarray) -> Any:
        return array if present else None

    heads = tuple(
        Heads(
            jnp.asarray(normal(case.num_rows, count, dim)),
            maybe(normed, normal(dim)),
            maybe(cached, normal(num_pages, count, page_size, dim)),
        )
        for count, normed, cached in case.projections
        # Index heads come last, and may have another dim.
        for dim in ([case.head_dim] if count > 2 else [case.index_dim])
    )
    angles = 7 * rng.standard_normal((case.num_rows, case.half))
    places = rng.permutation(num_pages * page_size)[: case.num_rows].astype(np.int32)
    pages, slots = places // page_size, places % page_size
    row = np.arange(case.num_rows)
    pages = np.where(row % 4 == 2, np.where(row % 8 == 2, num_pages, -1), pages).astype(np.int32)
    return heads, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), pages, slots.astype(np.int32)


def expected(heads: tuple[Heads, ...], cos: np.ndarray, sin: np.ndarray, pages: np.ndarray, slots: np.ndarray) -> list:
    """In float64, rounded where the operation rounds."""
    results = []
    for x, norm, cache in heads:
        dtype = x.dtype
        y = np.asarray(x, np.float64)
        if norm is not None:
            y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + EPS) * (1 + np.asarray(norm, np.float64))
            y = y.astype(dtype).astype(np.float64)
            half = cos.shape[1]
            first, second = y[..., :half].copy(), y[..., half : 2 * half].copy()
            c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
            y[..., :half], y[..., half : 2 * half] = first * c - second * s, second * c + first * s
        y = y.astype(dtype)
        if cache is not None:
            written = np.array(cache)
            for row, (page, slot) in enumerate(zip(pages, slots, strict=True)):
                if 0 <= page < len(written):
                    written[page, :, slot] = y[row]
            y = written
        results.append(y)
    return results


def check(case: Case, got: list) -> None:
    """Equal up to one rounding: a norm may round to the neighbour, which the rotation then mixes."""
    tolerance = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[case.dtype]
    arguments = make_arguments(case)
    for one, result, right in zip(arguments[0], got, expected(*arguments), strict=True):
        result = np.asarray(result)
        assert result.dtype == right.dtype
        if one.norm is None:
            np.testing.assert_array_equal(result, right)
        largest = np.abs(right.astype(np.float64)).max()
        np.testing.assert_allclose(
            result.astype(np.float64), right.astype(np.float64), atol=tolerance * largest, rtol=0
        )
        if one.cache is not None:
            untouched = np.ones(one.cache.shape[:1] + one.cache.shape[2:3], bool)
            inside = (arguments[3] >= 0) & (arguments[3] < len(one.cache))
            untouched[arguments[3][inside], arguments[4][inside]] = False
            np.testing.assert_array_equal(
                result.swapaxes(1, 2)[untouched], np.asarray(one.cache).swapaxes(1, 2)[untouched]
            )
