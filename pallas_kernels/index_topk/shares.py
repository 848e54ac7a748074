"""Which blocks are a share's, for kernels: block d + i * number is number i of share d."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Shares:
    """table_width: blocks of the whole table. number: shares that they are dealt to, one after the other."""

    table_width: int
    number: int = 1

    @property
    def width(self) -> int:
        """Blocks of the largest share."""
        return -(-self.table_width // self.number)

    def of(self, share_ref: Any) -> Any:
        """The share, out of an i32[1] in memory; where there is but one, nothing is read."""
        return share_ref[0] if self.number > 1 else 0

    def block(self, own: Any, share: Any) -> Any:
        """Number in the table of a share's block."""
        return own * self.number + share if self.number > 1 else own

    def count(self, blocks: Any, share: Any) -> Any:
        """How many of the first `blocks` blocks, a scalar of at least 0, are the share's."""
        if self.number == 1:
            return blocks
        return lax.div(jnp.maximum(blocks - share, 0) + (self.number - 1), jnp.int32(self.number))


def whole(block_table: Any) -> tuple[Any, Shares]:
    """All blocks of a table as the only share: its number i32[1], which nothing reads, and the shares."""
    return jnp.zeros((1,), jnp.int32), Shares(block_table.shape[1])
