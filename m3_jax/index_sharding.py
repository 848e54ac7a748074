"""When the devices of a mesh score a share of the blocks each for all index heads, not all blocks for their own heads.

Index heads share one index key a token, so however few heads a device has, it reads the whole index cache for them.
Sharded over pages it reads its share, and the devices exchange queries before and candidates after.
"""

from dataclasses import dataclass

# An NVIDIA H200's measured rates, and what a small NCCL collective between 8 of them takes (see `sharding`).
_BYTES_PER_S, _FLOPS_PER_S = 4.3e12, 790e12
_LINK_BYTES_PER_S, _COLLECTIVE_S = 350e9, 30e-6


@dataclass(frozen=True)
class Scoring:
    """Static sizes of a pass's scoring on one of the devices along `tensor`.

    rows: query rows. sequences: their sequences, each with a table that has room for `context` tokens. heads: index
    heads of the model. own_heads: those of the device. devices: along `tensor`. index_dim, itemsize: of an index key.
    top_k: chosen blocks. decode: whether it is a decode step.
    """

    rows: int
    sequences: int
    context: int
    heads: int
    own_heads: int
    devices: int
    index_dim: int
    itemsize: int
    top_k: int
    decode: bool

    def seconds_saved(self) -> float:
        """What sharding over pages gains on an H200; negative where it loses.

        Scoring takes as long as reading the keys, sequences x context x index_dim x itemsize bytes, or in a prefill
        pass as multiplying them, rows x heads x context x index_dim x 2 FLOPs, of which the passes of a prompt need
        half on average; sharded, it is 1 / devices of all heads' instead of own_heads'. Two collectives of 30 us are to
        be paid for it, the queries of all heads and each device's candidates (a key and a number, 4 bytes each) for
        the device's own heads, beside their bytes over NVLink at 350 GB/s.

        With 4 heads on 8 devices a decode step saves 7/8 of 256 bytes a token, 52 ns for a thousand tokens, and so
        gains from 1.16 million tokens in the batch on, such as 9 sequences of 128 K. Prefill saves multiplications only
        where devices hold the same head, half of them here: 8 K rows gain from a context of about 160 K on.
        """
        read = self.sequences * self.context * self.index_dim * self.itemsize / _BYTES_PER_S
        multiply = 0.0 if self.decode else self.rows * self.context * self.index_dim / _FLOPS_PER_S
        now = max(read, multiply * self.own_heads)
        sharded = max(read, multiply * self.heads) / self.devices
        queries = self.rows * self.heads * self.index_dim * self.itemsize
        candidates = self.devices * self.rows * self.own_heads * self.top_k * 8
        exchange = 2 * _COLLECTIVE_S + (queries + candidates) / _LINK_BYTES_PER_S
        return now - sharded - exchange


def over_pages(scoring: Scoring) -> bool:
    """Whether a pass's scoring is sharded over pages; the choice is the same either way."""
    return scoring.devices > 1 and scoring.seconds_saved() > 0
