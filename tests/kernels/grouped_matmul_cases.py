"""Cases of the grouped matmul for every implementation, and the oracle in NumPy."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Largest difference over largest value: a result is rounded once, to its dtype, and float32 sums have an order.
TOLERANCES = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 2e-6}
CONSTANTS: dict[str, Any] = {"alpha": 1.702, "limit": 7.0, "beta": 1.0}


@dataclass(frozen=True)
class Case:
    """Rows of each group, how many rows lie behind the last group, and the channels."""

    name: str
    group_sizes: tuple[int, ...]
    behind: int = 0
    channels: int = 128
    out_channels: int = 256
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


CASES = (
    Case("one row", (0, 1, 0)),
    Case("one group", (13,)),
    Case("one group has all", (0, 0, 40, 0)),
    Case("empty groups", (0, 3, 0, 0, 9, 1, 0)),
    Case("all sizes", tuple(range(20))),
    Case("at the edges of tiles", (8, 16, 24, 7, 1, 9, 15, 17)),
    Case("no rows in any group", (0, 0), behind=5),
    Case("rows behind the last group", (5, 0, 11), behind=9),
    Case("rows that are no multiple of 8", (2, 1), behind=2),
)


def make(case: Case, *, fused: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, weights and group sizes; NaN in every row behind the last group.

    Small enough in the fused case that neither clamp hides all, large enough that both clamp some.
    """
    rng = np.random.default_rng(len(case.name))
    num_rows = sum(case.group_sizes) + case.behind
    rows = rng.standard_normal((num_rows, case.channels))
    rows[sum(case.group_sizes) :] = np.nan
    shape = (2, case.out_channels // 2) if fused else (case.out_channels,)
    weights = 4 * rng.standard_normal((len(case.group_sizes), *shape, case.channels)) / np.sqrt(case.channels)
    return (
        jnp.asarray(rows, case.dtype),
        jnp.asarray(weights, case.dtype),
        jnp.asarray(case.group_sizes, jnp.int32),
    )


def expected_matmul(rows, weights, group_sizes) -> np.ndarray:
    """The products of the rows of the groups in float64."""
    rows, weights = np.asarray(rows, np.float64), np.asarray(weights, np.float64)
    ends = np.cumsum(group_sizes)
    of_groups = [
        rows[end - size : end] @ matrix.T for matrix, size, end in zip(weights, group_sizes, ends, strict=True)
    ]
    return np.concatenate(of_groups)


def expected_swiglu(rows, gate_up, group_sizes, *, alpha: float, limit: float, beta: float) -> np.ndarray:
    """SwiGLU-OAI of the products in float64."""
    num_groups, _, width, channels = gate_up.shape
    products = expected_matmul(rows, gate_up.reshape(num_groups, 2 * width, channels), group_sizes)
    gate, up = products[:, :width], products[:, width:]
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (up + beta) * gate / (1 + np.exp(-alpha * gate))


def check(got: jax.Array | np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Rows of groups agree within the dtype's tolerance."""
    rows = np.asarray(got, np.float64)[: len(expected)]
    assert np.isfinite(rows).all()
    if expected.size:
        error = np.abs(rows - expected).max() / np.abs(expected).max()
        assert error <= TOLERANCES[dtype], error
