"""Runs the Triton kernels in Triton's interpreter, on NumPy arrays, against the oracle.

    TRITON_INTERPRET=1 JAX_PLATFORMS=cpu python tests/kernels/triton_interpreter.py CHECK

TRITON_INTERPRET must be in the environment before triton is imported. The interpreter multiplies the bits of bfloat16,
so the cases are float16.
"""

import inspect
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton  # pyright: ignore[reportMissingImports]
import numpy as np
import triton.language as tl  # pyright: ignore[reportMissingImports]
from kernel_cases import Batch, Case, Sizes, check_attention, make_batch, random_choice

from pallas_kernels.index_topk import api
from pallas_kernels.index_topk import triton_gpu as index
from pallas_kernels.sparse_attention import triton_gpu as attention

SIZES = Sizes(
    num_sequences=4,
    num_rows=26,
    table_width=9,
    page_size=16,
    num_kv_heads=3,
    group=5,
    head_dim=64,
    index_dim=64,
    top_k=5,
    init_blocks=1,
    local_blocks=2,
    dtype="float16",
)
# A partial last block, an empty sequence, one shorter than its number of queries; garbage in the table, NaN in every
# unused slot, dead rows between sequences.
CASE = Case("interpreted", ((118, 17), (0, 0), (0, 1), (16, 0)), SIZES, num_queries=2, shared=1)


class Buffer:
    """A NumPy array with what the interpreter asks of a tensor of torch: an address, and a way to the host and back."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = {"float16": tl.float16, "float32": tl.float32, "int32": tl.int32}[str(array.dtype)]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Buffer":
        return self

    def cpu(self) -> "Buffer":
        return self

    def new_empty(self, *_size: int, device: str) -> "Buffer":
        return Buffer(self.array)

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return ()

    def set_(self, *_args: Any) -> None:
        """It views the array already."""

    def copy_(self, _other: "Buffer") -> None:
        """It views the array already."""


def triton_call(*args: Any, kernel: Any, out_type: Any, grid: Any, name: str, num_warps: int, num_stages: int, **named):
    """`jax_triton.triton_call`, for the arguments that our kernels use. What is not written stays garbage."""
    leaves, tree = jax.tree.flatten(out_type)

    def run(*arrays: Any) -> list[np.ndarray]:
        # Bytes of which every float is NaN.
        results = [np.frombuffer(b"\xff" * (leaf.size * leaf.dtype.itemsize), leaf.dtype).copy() for leaf in leaves]
        buffers = iter([Buffer(np.array(array)) for array in arrays] + [Buffer(result) for result in results])
        names = inspect.signature(kernel.fn).parameters
        kernel[grid](**{name: named[name] if name in named else next(buffers) for name in names})
        return [result.reshape(leaf.shape) for result, leaf in zip(results, leaves, strict=True)]

    return tree.unflatten(jax.pure_callback(run, leaves, *args))


def check_attentions(batch: Batch, run: Any) -> None:
    for block_ids in (batch.choice(), random_choice(batch)):
        check_attention(batch, run(*batch.attention_args(block_ids), scale=batch.scale), block_ids)


def index_decode() -> None:
    batch = make_batch(CASE, decode=True)
    np.testing.assert_array_equal(index._score_decode(*batch.index_args), batch.scores())
    np.testing.assert_array_equal(index._topk_decode(*batch.index_args, **SIZES.choice), batch.choice())
    candidates = []
    for share in range(2):
        args = [*batch.index_args, jnp.int32(share)]
        candidates.append(index._candidates_decode(*args, num_shares=2, **SIZES.choice))
    np.testing.assert_array_equal(api.merge_candidates(jnp.stack(candidates)), batch.choice())


def index_prefill() -> None:
    batch = make_batch(replace(CASE, sizes=replace(SIZES, num_rows=18), data="ties"), decode=False)
    np.testing.assert_array_equal(index._topk_prefill(*batch.index_args, **batch.sizes.choice), batch.choice())


def index_prefill_in_groups() -> None:
    """More tiles than are worked off at a time, and a last group that is not full."""
    index._TABLE_BYTES = 3 * 126 * 9 * 4
    batch = make_batch(CASE, decode=False)
    np.testing.assert_array_equal(index._score_prefill(*batch.index_args), batch.scores())


def attention_decode() -> None:
    check_attentions(make_batch(replace(CASE, data="normal"), decode=True), attention._decode)


def attention_prefill() -> None:
    check_attentions(make_batch(replace(CASE, data="normal"), decode=False), attention._prefill)


if __name__ == "__main__":
    jax_triton.triton_call = triton_call
    globals()[sys.argv[1]]()
