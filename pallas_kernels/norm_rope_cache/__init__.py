"""What stands between an attention layer's projections and its attention: norm, rotation, cache write."""

from pallas_kernels.norm_rope_cache.api import Heads, norm_rope_cache

__all__ = ["Heads", "norm_rope_cache"]
