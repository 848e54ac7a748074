"""Instructions that Pallas has no name for, inside `plgpu.inline_mgpu`: PTX, and the numbers that it works with."""

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm


def ptx(results: Sequence[Any], operands: Sequence[Any], text: str, constraints: str) -> list[Any]:
    """Instructions that stay where they are: a side effect to the compiler."""
    if len(results) > 1:
        kind = llvm.StructType.get_literal(results)
    else:
        kind = results[0] if results else ir.Type.parse("!llvm.void")
    out = llvm.inline_asm(kind, operands, text, constraints, has_side_effects=True)
    if len(results) > 1:
        return [llvm.extractvalue(one, out, [i]) for i, one in enumerate(results)]
    return [out] if results else []


def c32(value: int) -> Any:
    """A word of these bits."""
    # MLIR takes the signed number that has them.
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), value - (1 << 32) if value >= 1 << 31 else value))


def i32() -> Any:
    """The type of a word."""
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    """The type of an address in global memory."""
    return ir.IntegerType.get_signless(64)


def thread() -> Any:
    """Its number in the CTA."""
    return arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))


def equal(value: Any, number: int) -> Any:
    """Whether a word is the number."""
    return arith.cmpi(arith.CmpIPredicate.eq, value, c32(number))


def shared_address(ref: Any) -> Any:
    """Where a Ref of shared memory begins, within it."""
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def global_address(ref: Any) -> Any:
    """Where a Ref of global memory begins."""
    return llvm.ptrtoint(i64(), utils.memref_ptr(ref))
