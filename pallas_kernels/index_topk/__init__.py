"""Score the blocks of a paged index-key cache for every query, and choose the best."""

from pallas_kernels.index_topk.api import (
    index_score_decode,
    index_score_prefill,
    index_topk_decode,
    index_topk_prefill,
)

__all__ = ["index_score_decode", "index_score_prefill", "index_topk_decode", "index_topk_prefill"]
