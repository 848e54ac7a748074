"""What the Mosaic GPU kernels share: where they run, and the layouts of their tiles.

The kernels are written for Hopper (compute capability 9.0: wgmma, TMA) and for pages of 128 tokens of 128
channels, so that a page of one head is one tile of shared memory.
"""

from typing import Any

import jax

PAGE_SIZE = 128
DIM = 128
GROUP = 16
TOP_KS = (4, 8, 16, 32)
KV_HEADS = (1, 2, 4)
MAX_QUERIES = 8
MAX_SEQUENCES = 256
DTYPES = ("bfloat16", "float16")
COMPUTE_CAPABILITY = "9.0"
NUM_SMS = 132
# CTAs of a cluster that any Hopper GPU can run.
MOST_CLUSTERED = 8


def default_device() -> Any:
    """The device on which an operation runs unless its arguments say otherwise."""
    device: Any = jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    return jax.devices(device)[0] if isinstance(device, str) else device


def why_not_here() -> str | None:
    """Return None when the default device can run the kernels, else the reason."""
    device = default_device()
    if device.platform not in ("gpu", "cuda"):
        return f"the backend is {device.platform}, not gpu"
    capability = getattr(device, "compute_capability", None)
    if capability != COMPUTE_CAPABILITY:
        return f"the GPU has compute capability {capability}, not {COMPUTE_CAPABILITY}"
    return None


def why_not_sizes(*, dtype: Any, page_size: int, num_sequences: int, kv_heads: int, **dims: int) -> str | None:
    """Return None when the kernels are written for these sizes, else the reason; `dims` are channels."""
    if str(dtype) not in DTYPES:
        return f"the dtype is {dtype}, not one of {', '.join(DTYPES)}"
    for name, dim in dims.items():
        if dim != DIM:
            return f"the {name.replace('_', ' ')} is {dim}, not {DIM}"
    if page_size != PAGE_SIZE:
        return f"the page size is {page_size}, not {PAGE_SIZE}"
    if kv_heads not in KV_HEADS:
        return f"there are {kv_heads} KV heads, not one of {', '.join(map(str, KV_HEADS))}"
    if num_sequences > MAX_SEQUENCES:
        return f"there are {num_sequences} sequences, more than {MAX_SEQUENCES}"
    return None


def why_not_group(num_heads: int, kv_heads: int) -> str | None:
    """Return None when few enough query heads share a KV head for one tile of rows, else the reason."""
    group = num_heads // kv_heads
    if group > GROUP:
        return f"{group} query heads share a KV head, more than {GROUP}"
    return None


def why_not_queries(num_rows: int, num_sequences: int) -> str | None:
    """Return None when a decode call has few enough tokens a sequence, else the reason."""
    num_queries = num_rows // num_sequences
    if num_queries > MAX_QUERIES:
        return f"there are {num_queries} query tokens a sequence, more than {MAX_QUERIES}"
    return None


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
