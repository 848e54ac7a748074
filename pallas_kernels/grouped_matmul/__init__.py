"""Rows sorted by group, each group times its own matrix: the two matmuls of a mixture of experts."""

from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu

__all__ = ["grouped_matmul", "grouped_swiglu"]
