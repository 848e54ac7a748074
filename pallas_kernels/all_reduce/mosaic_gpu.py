"""The sum over devices as one kernel that writes to the other devices' memory over NVLink.

Every thread of the grid works for itself, with the thread of the same number on the other devices: it sends its 16
bytes to all of them, waits until theirs have come, adds them in float32 in the order of the devices, which makes all
results equal bit for bit, and empties the places it read from. No flags are sent: a place with all bits set is one to
which nothing has come, and what is sent is never that (two NaNs become other NaNs). So a sum costs one way over NVLink,
where a flag behind the data would cost a fence and a second way.

Calls take turns with two halves of the places. Nobody writes to a half that is still being read: who sends for call
c + 2 has received what this thread sent for c + 1, and that kernel began after the one that emptied the places of c.

A CTA waits for those of its own number alone, so that it does not matter how many of them run at once.

Each device sends its x to all others: of 64 rows of 6,144 in bfloat16, 5.5 MB among 8. Above that the bytes count, and
a collective that sends each device its part alone, and then the sums, is better; those are left to XLA.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu

from pallas_kernels import hopper
from pallas_kernels.all_reduce import reference
from pallas_kernels.all_reduce.workspace import (
    BLOCK_BYTES,
    BLOCKS,
    COUNTER_BYTES,
    EMPTY,
    MAX_CTAS,
    THREADS,
    VECTOR_BYTES,
    place_bytes,
)
from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.mosaic_inline import c32, global_address, i32, i64, ptx

DTYPES = ("bfloat16", "float16", "float32")
_NAN = 0x7FFF7FFF


def _blocks(num_bytes: int) -> int | None:
    """Blocks that each CTA takes: as few as possible; None where no number fits."""
    total, rest = divmod(num_bytes, BLOCK_BYTES)
    if rest or not total:
        return None
    return next((n for n in range(1, BLOCKS + 1) if total % n == 0 and total // n <= MAX_CTAS), None)


def _supported(x, table, *, axes) -> str | None:
    if table is None:
        return "there is no workspace"
    if str(x.dtype) not in DTYPES:
        return f"the dtype is {x.dtype}, not one of {', '.join(DTYPES)}"
    num_bytes = x.size * x.dtype.itemsize
    if _blocks(num_bytes) is None:
        return f"x has {num_bytes} bytes, not up to {MAX_CTAS} times 1 to {BLOCKS} blocks of {BLOCK_BYTES}"
    return hopper.why_not_here()


def _run(x, table, *, axes):
    return _sum(x, table, devices=lax.axis_size(axes))


@functools.partial(jax.jit, static_argnames=("devices",))
def _sum(x, table, *, devices: int):
    num_bytes = x.size * x.dtype.itemsize
    blocks = _blocks(num_bytes)
    assert blocks is not None

    def all_reduce(x_gmem, table_gmem, out_gmem):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
        def add(_ctx, *refs):
            _emit(*(global_address(ref) for ref in refs), devices=devices, dtype=str(x.dtype), blocks=blocks)

        add(x_gmem, table_gmem, out_gmem)

    return plgpu.kernel(
        all_reduce,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(num_bytes // BLOCK_BYTES // blocks,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=mgpu.LoweringSemantics.Lane),
    )(x, table)


def _emit(x, table, out, *, devices: int, dtype: str, blocks: int) -> None:
    """A thread's work. Addresses are 64-bit numbers, 16 bytes are four words; block b of a CTA is vector b of each."""
    cta, thread = (arith.index_cast(i64(), id_(gpu.Dimension.x)) for id_ in (gpu.block_id, gpu.thread_id))
    lane = arith.muli(thread, _c64(VECTOR_BYTES))
    first = arith.addi(arith.muli(cta, _c64(blocks * BLOCK_BYTES)), lane)
    x, out = arith.addi(x, first), arith.addi(out, first)
    sent = [_never_empty(_load(_plus(x, block * BLOCK_BYTES))) for block in range(blocks)]
    me, own, *others = (
        ptx([i64()], [table], f"ld.global.b64 $0, [$1+{8 * i}];", "=l,l")[0] for i in range(devices + 1)
    )

    counter = arith.addi(own, arith.muli(arith.addi(arith.muli(cta, _c64(THREADS)), thread), _c64(4)))
    [calls] = ptx([i32()], [counter], "ld.global.b32 $0, [$1];", "=r,l")
    half = arith.extui(i64(), arith.andi(calls, c32(1)))
    places = arith.muli(arith.addi(arith.muli(half, _c64(MAX_CTAS)), cta), _c64(place_bytes(devices)))
    places = _plus(arith.addi(places, lane), COUNTER_BYTES)
    mine = arith.addi(places, arith.muli(me, _c64(BLOCKS * BLOCK_BYTES)))
    here = arith.addi(own, places)

    # To itself too, which makes it one of them. Each begins with the one behind it: no two send to one device at once.
    for block, words in enumerate(sent):
        for device in (*others, own):
            _store(_plus(arith.addi(device, mine), block * BLOCK_BYTES), words, _SYSTEM)
    for block in range(blocks):
        offsets = [(device * BLOCKS + block) * BLOCK_BYTES for device in range(devices)]
        found = _wait(here, offsets)
        for offset in offsets:
            _store(_plus(here, offset), [c32(EMPTY)] * 4, _SYSTEM)
        _store(_plus(out, block * BLOCK_BYTES), _add(found, dtype))
    ptx([], [counter, arith.addi(calls, c32(1))], "st.global.b32 [$0], $1;", "l,r")


def _never_empty(words: Sequence[Any]) -> list[Any]:
    empty, nan = c32(EMPTY), c32(_NAN)
    return [arith.select(arith.cmpi(arith.CmpIPredicate.eq, word, empty), nan, word) for word in words]


def _add(vectors: Sequence[Sequence[Any]], dtype: str) -> list[Any]:
    first, *rest = (_widen(words, dtype) for words in vectors)
    sums = functools.reduce(lambda a, b: [arith.addf(*pair) for pair in zip(a, b, strict=True)], rest, first)
    if dtype == "float32":
        return [arith.bitcast(i32(), value) for value in sums]
    narrow = f"cvt.rn.{'bf16x2' if dtype == 'bfloat16' else 'f16x2'}.f32 $0, $1, $2;"
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return [ptx([i32()], [high, low], narrow, "=r,f,f")[0] for low, high in pairs]


def _widen(words: Sequence[Any], dtype: str) -> list[Any]:
    f32 = ir.F32Type.get()
    if dtype == "float32":
        return [arith.bitcast(f32, word) for word in words]
    if dtype == "bfloat16":
        parts = ((arith.shli(word, c32(16)), arith.andi(word, c32(0xFFFF0000))) for word in words)
        return [arith.bitcast(f32, part) for pair in parts for part in pair]
    halves = "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
    return [value for word in words for value in ptx([f32, f32], [word], halves, "=f,=f,r")]


# --- Instructions

# In order at each address on all devices, past any cache but the owner's; between addresses no order is needed.
_SYSTEM = ".relaxed.sys"


def _load(address) -> list[Any]:
    return ptx([i32()] * 4, [address], "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l")


def _store(address, words: Sequence[Any], order: str = "") -> None:
    ptx([], [address, *words], f"st{order}.global.v4.b32 [$0], {{$1, $2, $3, $4}};", "l,r,r,r,r")


def _wait(address, offsets: Sequence[int]) -> list[list[Any]]:
    """The 16 bytes at each offset, once none of their words is empty. They are loaded side by side."""
    count = 4 * len(offsets)
    lines = ["{", ".reg .pred p;", "AGAIN:"]
    for i, offset in enumerate(offsets):
        words = ", ".join(f"${4 * i + j}" for j in range(4))
        lines.append(f"ld{_SYSTEM}.global.v4.b32 {{{words}}}, [${count}+{offset}];")
    lines.append(f"setp.eq.u32 p, $0, {EMPTY:#x};")
    lines += [f"setp.eq.or.u32 p, ${i}, {EMPTY:#x}, p;" for i in range(1, count)]
    lines += ["@p bra AGAIN;", "}"]
    words = ptx([i32()] * count, [address], "\n".join(lines), "=&r," * count + "l")
    return [words[i : i + 4] for i in range(0, count, 4)]


def _plus(address, offset: int):
    return arith.addi(address, _c64(offset)) if offset else address


def _c64(value: int):
    return arith.constant(i64(), value)


all_reduce = Implementation(_supported, with_derivative_of(reference.all_reduce.run, _run))
