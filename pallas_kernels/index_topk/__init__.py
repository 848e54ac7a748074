"""Score the blocks of a paged index-key cache for every query, and choose the best."""

from pallas_kernels.index_topk.api import (
    index_candidates_decode,
    index_candidates_prefill,
    index_score_decode,
    index_score_prefill,
    index_topk_decode,
    index_topk_prefill,
    merge_candidates,
)

__all__ = [
    "index_candidates_decode",
    "index_candidates_prefill",
    "index_score_decode",
    "index_score_prefill",
    "index_topk_decode",
    "index_topk_prefill",
    "merge_candidates",
]
