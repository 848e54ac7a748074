"""The public function of norm, rotation and cache write: contract, checks, dispatch.

A head's channels are normed (Gemma's RMSNorm: x / rms(x) * (1 + w), in float32, rounded to x's dtype), rotated (the
first 2R channels in halves, channel i with i + R, RoFormer's equation 34 in float32, rounded again), and written to a
page of the cache or returned. As one operation because each of these is far shorter than a launch in a decode step.

Letters: T rows, N heads, H head dim, R rotated pairs, P pages, S page size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Operation

# In order of preference.
_MODULES = {
    "mosaic_gpu": "pallas_kernels.norm_rope_cache.mosaic_gpu",
    "reference": "pallas_kernels.norm_rope_cache.reference",
}
OPERATIONS = {"norm_rope_cache": Operation("norm_rope_cache", _MODULES)}


class Heads(NamedTuple):
    """What one projection gives, and what becomes of it.

    x: the rows' heads. norm: the norm's weight; None leaves the heads as they are, without norm or rotation.
    cache: pages that the rows are written to; None returns the heads.
    """

    x: Float[Array, "T N H"]
    norm: Float[Array, " H"] | None
    cache: Float[Array, "P N S H"] | None


def norm_rope_cache(
    heads: Sequence[Heads],
    cos: Float32[Array, "T R"],
    sin: Float32[Array, "T R"],
    pages: Int32[Array, " T"],
    slots: Int32[Array, " T"],
    *,
    eps: float,
    impl: str | None = None,
) -> list[Array]:
    """Norm, rotate, and write or return the heads of several projections of the same rows.

    heads: bfloat16, float16 or float32. A cache has the heads of its rows, which are rounded to its dtype.
    cos, sin: of the angles of each row's position, 2 R at most the head dim of what is rotated.
    pages, slots: where each row goes; a page outside the cache writes nothing. No two rows go to the same place.
    eps: of the norms, positive.
    impl: name of an implementation; None takes the first that is supported.

    Returns for each of `heads` its cache with the rows in it, in place where the caller donates it or has no other
    use for it, or else the heads [T, N, H].
    Raises ValueError or TypeError for shapes and dtypes that do not fit, NotImplementedError when the implementation
    cannot serve them.
    """
    if not heads:
        raise ValueError("heads must not be empty")
    shapes = checks.Shapes()
    for i, (x, norm, cache) in enumerate(heads):
        shapes.bind(f"heads[{i}].x", x, f"T N{i} H{i}")
        checks.check_dtypes(**{f"heads[{i}].x": x})
        if norm is not None:
            shapes.bind(f"heads[{i}].norm", norm, f"H{i}")
            checks.check_dtypes(**{f"heads[{i}].norm": norm})
        if cache is not None:
            shapes.bind(f"heads[{i}].cache", cache, f"P{i} N{i} S{i} H{i}")
            checks.check_dtypes(**{f"heads[{i}].cache": cache})
    for name, table in (("cos", cos), ("sin", sin)):
        shapes.bind(name, table, "T R")
        if str(table.dtype) != "float32":
            raise TypeError(f"{name} has dtype {table.dtype}, which must be float32")
    for i, one in enumerate(heads):
        if one.norm is not None and 2 * shapes["R"] > shapes[f"H{i}"]:
            raise ValueError(
                f"cos has R={shapes['R']} pairs of channels, more than half of heads[{i}].x's {shapes[f'H{i}']}"
            )
    shapes.bind("pages", pages, "T")
    shapes.bind("slots", slots, "T")
    checks.check_int32(pages=pages, slots=slots)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps={eps!r} must be a Python float, not {type(eps).__name__}")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps={eps} must be positive and finite")
    return OPERATIONS["norm_rope_cache"](tuple(heads), cos, sin, pages, slots, eps=float(eps), impl=impl)
