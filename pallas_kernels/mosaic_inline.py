"""Instructions that Pallas has no name for, inside `plgpu.inline_mgpu`: PTX, and the numbers that it works with."""

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


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
