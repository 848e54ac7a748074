"""How the Mosaic GPU kernels are lowered."""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def compiler_params(**others: Any) -> plgpu.CompilerParams:
    """Parameters of a kernel that says the layout of every array in registers where it comes to be.

    Otherwise Mosaic looks for the layouts, which takes it about as long as all the rest of its lowering.
    """
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, **others)
