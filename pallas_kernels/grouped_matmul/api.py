"""Public functions of the grouped matmul: contracts, checks, dispatch.

The rows are sorted by group (expert): the first group_sizes[0] rows are of group 0, the next group_sizes[1] of
group 1, and so on. A group without rows costs nothing: its matrix is not read.

Letters: R rows, E groups, I channels in, O channels out, F channels of the activation.
"""

import math
from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Operation

# In order of preference.
_MODULES = {
    "mosaic_gpu": "pallas_kernels.grouped_matmul.mosaic_gpu",
    "reference": "pallas_kernels.grouped_matmul.reference",
}
OPERATIONS = {name: Operation(name, _MODULES) for name in ("grouped_matmul", "grouped_swiglu")}


def grouped_matmul(
    rows: Float[Array, "R I"],
    weights: Float[Array, "E O I"],
    group_sizes: Int32[Array, " E"],
    *,
    impl: str | None = None,
) -> Float[Array, "R O"]:
    """out[r] = weights[group of r] @ rows[r], accumulated in float32 and returned in the rows' dtype.

    rows, weights: bfloat16, float16 or float32, both of one dtype. Rows behind the last group may hold anything.
    group_sizes: not negative, their sum at most R.
    impl: name of an implementation; None takes the first that is supported.

    Returns the products; what stands in rows behind the last group is not specified.
    Differentiable in rows and weights.
    Raises ValueError or TypeError for shapes and dtypes that do not fit, NotImplementedError when the
    implementation cannot serve them.
    """
    shapes = checks.Shapes()
    shapes.bind("rows", rows, "R I")
    shapes.bind("weights", weights, "E O I")
    _check(shapes, rows, group_sizes, weights=weights)
    return OPERATIONS["grouped_matmul"](rows, weights, group_sizes, impl=impl)


def grouped_swiglu(
    rows: Float[Array, "R I"],
    gate_up: Float[Array, "E 2 F I"],
    group_sizes: Int32[Array, " E"],
    *,
    alpha: float,
    limit: float,
    beta: float,
    impl: str | None = None,
) -> Float[Array, "R F"]:
    """SwiGLU-OAI of two products of each row, those with its group's gate_up[:, 0] (gate) and gate_up[:, 1] (up).

    With g = gate @ row and u = up @ row: gate = min(g, limit), up = clip(u, -limit, limit), and the result is
    (up + beta) * gate * sigmoid(alpha * gate), gpt-oss' activation. All of it is computed in float32 from the
    float32 products and rounded once, to the rows' dtype: a path that rounds g and u first differs by that
    rounding (relative 2^-8 of g and of u in bfloat16).

    alpha, limit, beta: finite numbers, limit positive. Everything else is as in `grouped_matmul`.
    """
    shapes = checks.Shapes()
    shapes.bind("rows", rows, "R I")
    shapes.bind("gate_up", gate_up, "E 2 F I")
    if gate_up.shape[1] != 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}, whose second axis must be 2: gate and up")
    _check(shapes, rows, group_sizes, gate_up=gate_up)
    constants = {"alpha": alpha, "limit": limit, "beta": beta}
    for name, value in constants.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r} must be a Python float, not {type(value).__name__}")
        if not math.isfinite(value) or (name == "limit" and value <= 0):
            raise ValueError(f"{name}={value} must be {'positive and ' if name == 'limit' else ''}finite")
    constants = {name: float(value) for name, value in constants.items()}
    return OPERATIONS["grouped_swiglu"](rows, gate_up, group_sizes, **constants, impl=impl)


def _check(shapes: checks.Shapes, rows: Any, group_sizes: Any, **weights: Any) -> None:
    shapes.bind("group_sizes", group_sizes, "E")
    checks.check_cache_dtypes("rows", rows, **weights)
    checks.check_int32(group_sizes=group_sizes)
