"""The public function of the skinny matmul: contract, checks, dispatch.

So few rows that a product takes the time in which its matrix comes from memory. Matrices that are smaller than what
memory brings in the time of a launch are read together, several of them in one kernel.

Letters: T rows, I channels in, O channels out.
"""

from collections.abc import Sequence

from jax import Array
from jaxtyping import Float

from pallas_kernels import checks
from pallas_kernels.dispatch import Operation

# In order of preference.
_MODULES = {
    "mosaic_gpu": "pallas_kernels.skinny_matmul.mosaic_gpu",
    "reference": "pallas_kernels.skinny_matmul.reference",
}
OPERATIONS = {"skinny_matmul": Operation("skinny_matmul", _MODULES)}


def skinny_matmul(
    rows: Float[Array, "T I"], matrices: Sequence[Float[Array, "O I"]], *, impl: str | None = None
) -> list[Float[Array, "T O"]]:
    """rows @ matrix.T for each of the matrices, accumulated in float32 and returned in the rows' dtype.

    rows, matrices: bfloat16, float16 or float32, all of one dtype. Each matrix has an O of its own.
    impl: name of an implementation; None takes the first that is supported.

    Returns the products in the order of the matrices. Differentiable in rows and matrices.
    Raises ValueError or TypeError for shapes and dtypes that do not fit, NotImplementedError when the implementation
    cannot serve them.
    """
    if not matrices:
        raise ValueError("matrices must not be empty")
    shapes = checks.Shapes()
    shapes.bind("rows", rows, "T I")
    for i, matrix in enumerate(matrices):
        shapes.bind(f"matrices[{i}]", matrix, f"O{i} I")
    checks.check_cache_dtypes("rows", rows, **{f"matrices[{i}]": matrix for i, matrix in enumerate(matrices)})
    return OPERATIONS["skinny_matmul"](rows, *matrices, impl=impl)
