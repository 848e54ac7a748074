"""A few rows times several matrices, all of which are read in one go: the projections of a decode step."""

from pallas_kernels.skinny_matmul.api import skinny_matmul

__all__ = ["skinny_matmul"]
