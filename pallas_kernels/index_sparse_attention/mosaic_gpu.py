"""Choice of blocks and attention of a decode call on Hopper in two kernels: the scores, and all that follows them.

Each CTA that attends chooses its row's blocks by itself, out of as many as one can see, and has a block that is chosen
in any case brought meanwhile. Of more blocks the choice is a kernel of its own. On an H200, 1 x 128 K takes 16.8 us
instead of 17.8, and 16 x 32 K 53.0 instead of 55.3. Bringing what is likely to be chosen, each warp's best, into the L2
cache before that is certain makes it slower, 16 x 32 K by 0.6 us.
"""

from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.index_sparse_attention import reference
from pallas_kernels.index_sparse_attention.composition import composed
from pallas_kernels.index_topk import mosaic_gpu as index
from pallas_kernels.sparse_attention import mosaic_gpu as attention

_one_after_the_other = composed(index.index_topk_decode, attention.sparse_attention_decode)


def _decode(index_q, index_k, q, k, v, block_table, seq_lens, *, scale, interpret=None, **choice):
    found = index.scores_to_choose_from(index_q, index_k, block_table, seq_lens, interpret=interpret, **choice)
    if found is None:
        return _one_after_the_other.run(index_q, index_k, q, k, v, block_table, seq_lens, scale=scale, **choice)
    scores, chooser = found
    return attention.attend_decode(
        q, k, v, scores, block_table, seq_lens, scale=scale, chooser=chooser, interpret=interpret
    )


index_sparse_attention_decode = Implementation(
    _one_after_the_other.supported,
    with_derivative_of(reference.index_sparse_attention_decode.run, _decode),
)
