"""Which blocks a row of a decode call attends to, for its kernel: all that it sees, those it is given, or its choice.

A CTA has one of the row's shares of them. What a kind of blocks needs beside the attention's own: operands, results,
and shared memory, whose Refs `walk` is given in this order.
"""

# jax does not export every name of Mosaic GPU.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.index_topk.mosaic_gpu_choose import Chooser
from pallas_kernels.mosaic import when


class Place(NamedTuple):
    """Of a CTA: row, KV head and share; the row's sequence, its number among the sequence's queries, and its own block,
    -1 of a dead row.
    """

    row: Any
    head: Any
    share: Any
    sequence: Any
    query: Any
    own: Any

    def used(self, block: Any) -> Any:
        """Whether the row sees a block."""
        return jnp.logical_and(block >= 0, block <= self.own)


class Walk(NamedTuple):
    """How many blocks a CTA has, and its i-th, of which more may be asked for."""

    count: Any
    block: Callable[[Any], Any]


@dataclass(frozen=True)
class AllBlocks:
    """All of a table of so many up to a row's own, in equal shares of what is visible."""

    number: int
    shares: int
    operands: Sequence[Any] = ()
    results: Sequence[Any] = ()
    scratch: Sequence[Any] = ()

    def early(self, _place: Place) -> Any:
        """Nothing is to be waited for."""
        return None

    def walk(self, place: Place) -> Walk:
        """What a CTA has of them."""
        visible = jnp.minimum(place.own + 1, self.number)
        share = lax.div(visible + (self.shares - 1), jnp.int32(self.shares))
        first = place.share * share
        return Walk(jnp.clip(visible - first, 0, share), lambda i: first + i)


@dataclass(frozen=True)
class GivenBlocks:
    """So many of each share, i32[T, K, shares * most]; what is negative or invisible is not used."""

    most: int
    operands: Sequence[Any]
    results: Sequence[Any] = ()
    scratch: Sequence[Any] = ()

    def early(self, _place: Place) -> Any:
        """Nothing is to be waited for but what is read."""
        return None

    def walk(self, place: Place, ids_gmem: Any) -> Walk:
        """What a CTA has of them."""
        return _walk(ids_gmem.at[place.row, place.head], self.most, place)


class ChosenBlocks:
    """What each CTA of a row chooses by itself, so many of each share, from scores as `Chooser` takes them.

    A result: the choice, i32[T, K, C].
    """

    def __init__(self, scores: Any, chooser: Chooser, most: int, rows: int):
        choice = chooser.choice
        self.chooser, self.most = chooser, most
        self.operands = (chooser.operand(scores),)
        self.results = (jax.ShapeDtypeStruct((rows, choice.num_heads, choice.top_k), jnp.int32),)
        self.scratch = (plgpu.SMEM((choice.top_k,), jnp.int32), *chooser.scratch())

    def early(self, place: Place) -> Any:
        """The first block of a row's first share, where it does not depend on scores."""
        return self.chooser.first(place.own)

    def walk(self, place: Place, scores_gmem: Any, out_gmem: Any, chosen_smem: Any, *scratch: Any) -> Walk:
        """What a CTA has of them, once it has chosen."""
        column = place.query * self.chooser.choice.num_heads + place.head
        chosen = self.chooser.choose(scores_gmem, place.sequence, column, place.own, scratch)
        chosen_smem[...] = chosen
        plgpu.commit_smem()

        @when(place.share == 0)
        def _():
            out_gmem[place.row, place.head] = chosen

        return _walk(chosen_smem, self.most, place)


def _walk(ids: Any, most: int, place: Place) -> Walk:
    def block(i):
        # Looked at a step before anybody knows whether there is such a block.
        return ids[place.share * most + jnp.minimum(i, most - 1)]

    # Unused ids lie on the right as a rule; one in between is walked over with every key masked.
    count = jnp.int32(0)
    for i in range(most):
        count = jnp.where(place.used(block(i)), i + 1, count)
    return Walk(count, block)
