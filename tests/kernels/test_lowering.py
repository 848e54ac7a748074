"""The Mosaic GPU kernels are lowered for Hopper on any machine: what ptxas never sees is found without a GPU.

Where a kernel gives its arrays their layouts, jax 0.11.2 takes the result of a select whose first value is a scalar for
unsigned, and compares it so: a -1 is then the largest number. Nothing that the kernels compare may be.
"""

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray

import pallas_kernels as ops
from pallas_kernels import hopper

PAGE, DIM = 128, 128
# Where the sign of an integer decides what comes out.
DECIDES = {"_compare", "reduce", "max", "min", "abs", "__floordiv__", "__rfloordiv__", "trunc_div"}
DECIDES |= {"__mod__", "__rmod__", "__rshift__", "astype"}


@pytest.fixture
def unsigned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operations on 32-bit integers in registers that were taken for unsigned. The default device is an H200."""
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    monkeypatch.setattr(hopper, "default_device", lambda: device)
    seen: list[str] = []
    slot: Any = vars(FragmentedArray)["is_signed"]

    def get(array: FragmentedArray) -> bool | None:
        signed, caller = slot.__get__(array), sys._getframe(1).f_code.co_name
        if signed is False and str(array.mlir_dtype) == "i32" and caller in DECIDES:
            seen.append(caller)
        return signed

    monkeypatch.setattr(FragmentedArray, "is_signed", property(get, slot.__set__))
    return seen


def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def lower(op: Any, *arrays: Any, **options: Any) -> None:
    def call(*arrays):
        return op(*arrays, impl="mosaic_gpu", **options)

    text = jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("batch", "queries", "blocks", "kv_heads", "group", "top_k"),
    [
        (1, 1, 16, 4, 16, 16),  # pairs of all blocks compared; a cluster attends
        (1, 1, 1024, 4, 16, 16),  # one CTA chooses
        (1, 2, 8192, 2, 8, 32),  # a cluster chooses
        (2, 1, 9000, 1, 16, 4),  # more CTAs than a cluster has choose
        (64, 4, 256, 4, 16, 8),  # nothing is divided
    ],
)
def test_decode(unsigned, dtype, batch: int, queries: int, blocks: int, kv_heads: int, group: int, top_k: int) -> None:
    rows = batch * queries
    cache = array(64, kv_heads, PAGE, DIM, dtype=dtype)
    table, lengths = array(batch, blocks), array(batch)
    index = (array(rows, kv_heads, DIM, dtype=dtype), array(64, PAGE, DIM, dtype=dtype))
    lower(ops.index_topk_decode, *index, table, lengths, top_k=top_k)
    q = array(rows, kv_heads * group, DIM, dtype=dtype)
    lower(ops.sparse_attention_decode, q, cache, cache, array(rows, kv_heads, top_k), table, lengths)
    lower(ops.paged_attention_decode, q, cache, cache, table, lengths)
    lower(ops.index_sparse_attention_decode, *index, q, cache, cache, table, lengths, top_k=top_k)
    assert not unsigned


@pytest.mark.parametrize(
    ("rows", "batch", "blocks", "kv_heads", "group", "top_k", "local_blocks"),
    [(8192, 1, 64, 4, 16, 16, 1), (64, 3, 9, 1, 16, 4, 0), (512, 2, 300, 2, 2, 32, 2)],
)
def test_prefill(
    unsigned, rows: int, batch: int, blocks: int, kv_heads: int, group: int, top_k: int, local_blocks: int
) -> None:
    def wide(*shape: int):
        return array(*shape, dtype=jnp.bfloat16)

    lengths = (array(batch, blocks), array(batch + 1), array(batch), array(batch))
    index = wide(rows, kv_heads, DIM), wide(64, PAGE, DIM)
    lower(ops.index_topk_prefill, *index, *lengths, top_k=top_k, init_blocks=1, local_blocks=local_blocks)
    cache = wide(64, kv_heads, PAGE, DIM)
    q = wide(rows, kv_heads * group, DIM)
    lower(ops.sparse_attention_prefill, q, cache, cache, array(rows, kv_heads, top_k), *lengths)
    assert not unsigned


@pytest.mark.parametrize(("rows", "outs"), [(1, (8192, 512, 128)), (12, (64, 128)), (64, (6144,))])
def test_skinny_matmul(unsigned, rows: int, outs: tuple[int, ...]) -> None:
    matrices = [array(out, 1024, dtype=jnp.bfloat16) for out in outs]
    lower(
        lambda rows, *matrices, impl: ops.skinny_matmul(rows, matrices, impl=impl),
        array(rows, 1024, dtype=jnp.bfloat16),
        *matrices,
    )
    assert not unsigned


def test_what_is_looked_for_is_there(unsigned) -> None:
    """Else the tests above could not fail."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.mosaic import compiler_params

    def kernel(scalars, out):
        number = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        chosen = jnp.where(number < 64, scalars[0], scalars[1])
        out[...] = (chosen >= 0).astype(jnp.int32)

    run = plgpu.kernel(kernel, out_type=array(128), compiler_params=compiler_params())
    jax.jit(run).trace(array(2)).lower(lowering_platforms=("cuda",))
    assert "_compare" in unsigned
