"""Attention of every query to all cached keys up to its own position."""

from pallas_kernels.paged_attention.api import paged_attention_decode

__all__ = ["paged_attention_decode"]
