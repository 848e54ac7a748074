"""Arrays that the CTAs of a cluster send into each other's shared memory.

A CTA says at its beginning how many bytes will be sent to it, and waits for these: a store (st.async) counts its bytes
where it arrives. Where CTAs read what others hold, all of them wait for all before and after, and what is read has to
come back.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from pallas_kernels.hopper import DIM
from pallas_kernels.mosaic_inline import c32, equal, ptx, shared_address, thread

# A barrier that counts bytes; inline code cannot be given a plgpu.Barrier.
MAILBOX = plgpu.SMEM((2,), jnp.int32)
_WARPS, _LANES = 4, 32
# What a wait of the hardware takes at most, in nanoseconds, before it looks again.
_TICKS = 10_000_000


def expect(mailbox: Any, words: int, *, first_only: bool = False) -> None:
    """Say, once, that so many words will be sent to this CTA, or only to the cluster's first one."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_ctx, *refs):
        [mailbox] = map(shared_address, refs)
        is_first = equal(thread(), 0)
        num_bytes = c32(words * 4)
        if first_only:
            num_bytes = arith.select(equal(_cta(), 0), num_bytes, c32(0))
        args = is_first, mailbox, num_bytes
        ptx([], args[:2], "@$0 mbarrier.init.shared::cta.b64 [$1], 1;", "b,r")
        ptx([], [], "fence.mbarrier_init.release.cluster;", "")
        ptx([], args, "@$0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;", "b,r,r")
        ptx([], [], "barrier.cluster.arrive.relaxed.aligned;", "")

    emit(mailbox)


def all_expect() -> None:
    """Wait, once and before anything is sent, until all CTAs of the cluster have said what they expect."""

    @plgpu.inline_mgpu()
    def emit(*_ctx):
        ptx([], [], "barrier.cluster.wait.aligned;", "")

    emit()


def send_parts(rows: Any, stats: Any, to_rows: Any, to_stats: Any, mailbox: Any, ctas: int) -> None:
    """Begin to send to each of the cluster's CTAs its part of the rows, and of their statistics, in shared memory.

    rows, to_rows: f32[R, DIM]. stats, to_stats: f32[2, R]. R: a multiple of ctas and of 4. CTA c is sent the c-th part
    of all CTAs' rows, and finds the parts in the order of the CTAs that they come from.
    """
    num_rows = rows.shape[0]
    each = num_rows // ctas

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 5)
    def emit(_ctx, *refs):
        rows, stats, to_rows, to_stats, mailbox = map(shared_address, refs)
        warp, lane = (fn(thread(), c32(_LANES)) for fn in (arith.divui, arith.remui))
        first = arith.muli(_cta(), c32(each))
        is_stat = arith.cmpi(arith.CmpIPredicate.ult, lane, c32(2))

        def of_row(base, row):
            return _plus(base, row, DIM * 4, lane, 16)

        def of_stat(base, row):
            return _plus(base, row, 4, lane, num_rows * 4)

        for i in range(num_rows // _WARPS):
            # A CTA begins with its own part, so that no two send to one CTA at a time.
            row = arith.remui(arith.addi(arith.addi(first, warp), c32(i * _WARPS)), c32(num_rows))
            to_cta, within = (fn(row, c32(each)) for fn in (arith.divui, arith.remui))
            to_row = arith.addi(first, within)
            _send(of_row(rows, row), of_row(to_rows, to_row), to_cta, mailbox, _true(), words=4)
            _send(of_stat(stats, row), of_stat(to_stats, to_row), to_cta, mailbox, is_stat, words=1)

    emit(rows, stats, to_rows, to_stats, mailbox)


def send_to_first(array: Any, to: Any, mailbox: Any) -> None:
    """Begin to send an array of n words in shared memory, n a multiple of 4, to the cluster's first CTA.

    to: n words for each CTA or more; there it finds the arrays, in the order of the CTAs that they come from.
    """
    vectors = math.prod(array.shape) // 4

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def emit(_ctx, *refs):
        array, to, mailbox = map(shared_address, refs)
        to = arith.addi(to, arith.muli(_cta(), c32(vectors * 16)))
        for first in range(0, vectors, _WARPS * _LANES):
            vector = arith.addi(thread(), c32(first))
            takes_part = arith.cmpi(arith.CmpIPredicate.ult, vector, c32(vectors))
            offset = arith.muli(vector, c32(16))
            _send(arith.addi(array, offset), arith.addi(to, offset), c32(0), mailbox, takes_part, words=4)

    emit(array, to, mailbox)


def _send(array: Any, to: Any, to_cta: Any, mailbox: Any, takes_part: Any, *, words: int) -> None:
    """Of the threads that take part each sends some words."""
    names = ", ".join("abcd"[:words])
    several = f".v{words}" if words > 1 else ""
    ptx(
        [],
        [array, to, to_cta, mailbox, takes_part],
        f"{{ .reg .b32 to, mailbox, {names};"
        " mapa.shared::cluster.u32 to, $1, $2;"
        " mapa.shared::cluster.u32 mailbox, $3, $2;"
        f" @$4 ld.shared{several}.b32 {{{names}}}, [$0];"
        f" @$4 st.async.shared::cluster.mbarrier::complete_tx::bytes{several}.b32 [to], {{{names}}}, [mailbox]; }}",
        "r,r,r,r,b",
    )


def wait(mailbox: Any) -> None:
    """Wait until all that this CTA expects has come."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_ctx, *refs):
        nvvm.mbarrier_try_wait_parity(utils.memref_ptr(*refs), c32(0), c32(_TICKS))

    emit(mailbox)


def _cta() -> Any:
    """Its number in the cluster."""
    return nvvm.read_ptx_sreg_cluster_ctarank()


def _plus(base: Any, row: Any, row_bytes: int, lane: Any, lane_bytes: int) -> Any:
    of_row, of_lane = arith.muli(row, c32(row_bytes)), arith.muli(lane, c32(lane_bytes))
    return arith.addi(base, arith.addi(of_row, of_lane))


def _true() -> Any:
    return arith.constant(ir.IntegerType.get_signless(1), 1)
