"""What the Triton kernels share: where they run, and which sizes they are written for.

They are the portable path on NVIDIA GPUs: tensor cores since Ampere (compute capability 8.0) and nothing of any
one generation. jax-triton compiles and launches them; it is an optional dependency (the extra `triton`).
"""

import importlib.util
from typing import Any

from pallas_kernels.hopper import default_device

PACKAGES = ("jax_triton", "triton")
DTYPES = ("bfloat16", "float16")
DIMS = (64, 128)
LEAST_PAGE_SIZE = 16
MAX_GROUP = 64
MAX_TOP_K = 64
# Rows of an operand of a matrix product are padded to this, the height of a tensor core's tile.
LEAST_ROWS = 16
COMPUTE_CAPABILITY = (8, 0)


def why_not_here() -> str | None:
    """Return None when the default device can run the kernels and jax-triton is there, else the reason."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            return f"it needs the package {package!r}, which is not installed"
    device = default_device()
    if device.platform not in ("gpu", "cuda"):
        return f"the backend is {device.platform}, not gpu"
    # Of a GPU of another maker it is the name of an architecture, such as gfx942.
    capability = str(getattr(device, "compute_capability", None))
    numbers = tuple(int(part) for part in capability.split(".") if part.isdecimal())
    if len(numbers) != 2 or numbers < COMPUTE_CAPABILITY:
        return f"the GPU has compute capability {capability}, not 8.0 or above"
    return None


def why_not_sizes(*, dtype: Any, page_size: int, **dims: int) -> str | None:
    """Return None when the kernels are written for these sizes, else the reason; `dims` are channels."""
    if str(dtype) not in DTYPES:
        return f"the dtype is {dtype}, not one of {', '.join(DTYPES)}"
    for name, dim in dims.items():
        if dim not in DIMS:
            return f"the {name.replace('_', ' ')} is {dim}, not one of {', '.join(map(str, DIMS))}"
    if page_size < LEAST_PAGE_SIZE or page_size & (page_size - 1):
        return f"the page size is {page_size}, not a power of two of at least {LEAST_PAGE_SIZE}"
    return None


def power_of_two(value: int) -> int:
    """The least power of two that is not below `value`, which is at least 1."""
    return 1 << (value - 1).bit_length()
