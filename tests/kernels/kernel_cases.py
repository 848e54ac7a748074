"""The cases that every implementation of an operation must pass, and the batches made from them.

Sizes that are equal in MiniMax-M3 differ here, so that a swapped axis cannot pass. Cases share sizes
wherever they can: a compiled function serves them all.
"""

import dataclasses
import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest

from pallas_kernels.dispatch import Operation

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Rounding of an output of each dtype, and the arithmetic of float32, relative to the largest value.
TOLERANCES = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-8}
# Table entries beyond a sequence's blocks: also far out of range.
GARBAGE_PAGES = (-1, 0, 2**31 - 1, -(2**31), 12345, 3)


@dataclass(frozen=True)
class Sizes:
    """Everything that a compiled function depends on, but the number of rows of a decode call."""

    num_sequences: int = 5
    num_rows: int = 60
    table_width: int = 21
    page_size: int = 8
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 16
    index_dim: int = 12
    top_k: int = 4
    init_blocks: int = 0
    local_blocks: int = 1
    dtype: str = "float32"

    @property
    def choice(self) -> dict[str, Any]:
        return {"top_k": self.top_k, "init_blocks": self.init_blocks, "local_blocks": self.local_blocks}


@dataclass(frozen=True)
class Case:
    """A ragged batch.

    lens: (keys cached before, tokens of this call) of each sequence. layout: "packed" rows, "padded" on the
    right to T / B a sequence, or "loose", with dead rows of uneven number after each sequence.
    data: "normal"; integers, whose dot products float32 holds exactly: "fine" (few equal scores), "ties"
    (many), "equal" (nothing but), "huge" (fine times a large power of two).
    poison: what fills unused slots and dead rows. shared: leading pages common to all sequences.
    num_queries: tokens a sequence when the case is run as a decode call.
    """

    name: str
    lens: tuple[tuple[int, int], ...]
    sizes: Sizes = Sizes()
    layout: str = "packed"
    data: str = "fine"
    poison: float = np.nan
    shared: int = 0
    num_queries: int = 1

    def __str__(self) -> str:
        return self.name


_MIXED = ((100, 17), (0, 20), (40, 0), (163, 5), (8, 8))
_PADDABLE = ((100, 12), (0, 11), (40, 0), (163, 5), (8, 8))
_BASE = Sizes()

CASES = (
    Case("short", ((0, 0), (0, 1), (0, 7), (0, 8), (0, 9))),
    Case("short-decode-2", ((0, 0), (0, 1), (0, 2), (0, 8), (0, 9)), num_queries=2),
    Case("around-top-k-blocks", ((24, 7), (25, 7), (26, 7), (0, 0), (30, 3)), num_queries=2),
    Case("all-empty", ((0, 0),) * 5),
    Case("nothing-new", ((0, 0), (1, 0), (32, 0), (33, 0), (168, 0)), num_queries=3),
    Case("mixed", _MIXED, num_queries=4),
    Case("mixed-padded", _PADDABLE, layout="padded"),
    Case("mixed-loose", _PADDABLE, layout="loose", num_queries=3),
    Case("one-sequence-has-all", ((0, 0), (0, 0), (0, 60), (0, 0), (0, 0))),
    Case("shared-pages", _MIXED, shared=5),
    Case("poison-inf", _MIXED, poison=np.inf),
    Case("poison-minus-inf", _MIXED, poison=-np.inf, layout="packed"),
    Case("ties", _MIXED, data="ties", num_queries=2),
    Case("all-equal", _MIXED, data="equal", num_queries=2),
    Case("huge", _MIXED, data="huge"),
    Case("normal", _MIXED, data="normal"),
    Case("bfloat16", _MIXED, replace(_BASE, dtype="bfloat16"), num_queries=2),
    Case("bfloat16-normal", _MIXED, replace(_BASE, dtype="bfloat16"), data="normal", num_queries=2),
    Case("bfloat16-huge", _MIXED, replace(_BASE, dtype="bfloat16"), data="huge", num_queries=2),
    Case("float16", _MIXED, replace(_BASE, dtype="float16"), poison=np.inf),
    Case("float16-normal", _MIXED, replace(_BASE, dtype="float16"), data="normal"),
    Case(
        "three-heads-init-1-local-2",
        _PADDABLE,
        Sizes(num_kv_heads=3, group=1, head_dim=10, index_dim=14, top_k=5, init_blocks=1, local_blocks=2),
        layout="padded",
    ),
    Case(
        "one-head-init-2-local-0",
        _MIXED,
        Sizes(num_kv_heads=1, group=4, top_k=3, init_blocks=2, local_blocks=0),
        data="ties",
        num_queries=2,
    ),
    Case("all-forced", _MIXED, Sizes(group=2, init_blocks=2, local_blocks=2)),
    Case("nothing-forced", _MIXED, Sizes(group=5, local_blocks=0)),
    Case(
        "narrow-table",
        ((0, 5), (30, 3), (48, 0), (17, 16), (0, 0)),
        Sizes(table_width=3, page_size=16, top_k=6, local_blocks=2),
    ),
    Case(
        "odd-page-top-16",
        ((70, 9), (79, 1), (80, 1), (0, 10), (104, 1)),
        Sizes(page_size=5, group=4, top_k=16, head_dim=9, index_dim=7),
    ),
    Case(
        "page-of-one",
        ((3, 4), (0, 1), (20, 1), (0, 0), (0, 21)),
        Sizes(page_size=1, num_kv_heads=3, group=2, top_k=7, local_blocks=2),
    ),
    Case(
        "long",
        ((8790, 3), (4090, 3)),
        Sizes(num_sequences=2, num_rows=7, table_width=1100, num_kv_heads=3, group=2, top_k=9),
        num_queries=2,
    ),
)


def at_kernel_sizes(case: Case) -> Case:
    """A case of pages of 8 tokens at the sizes that the Hopper kernels are written for: pages of 128 x 128.

    Lengths keep their blocks, and their distance from a block's ends where that is 0 or 1.
    """
    sizes = case.sizes
    assert sizes.page_size == 8

    def tokens(length: int) -> int:
        blocks, rest = divmod(length, 8)
        return 128 * blocks + {0: 0, 1: 1, 7: 127}.get(rest, 16 * rest + 3)

    lens = tuple((tokens(context), tokens(context + new) - tokens(context)) for context, new in case.lens)
    news = [new for _, new in lens]
    # Packed rows leave none over where many cases share lengths; the others share a number of rows instead.
    packed = sum(news) if case.lens == _MIXED else -(-sum(news) // 512) * 512
    num_rows = {"packed": packed, "padded": len(news) * max(news), "loose": sum(news) + 40}[case.layout]
    large = replace(
        sizes,
        num_rows=max(num_rows, len(news)),
        page_size=128,
        num_kv_heads={1: 1, 2: 2, 3: 4}[sizes.num_kv_heads],
        group=16,
        head_dim=128,
        index_dim=128,
        top_k=next(top_k for top_k in (4, 8, 16, 32) if top_k >= sizes.top_k),
        dtype="bfloat16" if sizes.dtype == "float32" else sizes.dtype,
    )
    return replace(case, name=f"{case.name}-128", lens=lens, sizes=large)


def _with_group(case: Case, group: int) -> Case:
    return replace(case, sizes=replace(case.sizes, group=group))


KERNEL_CASES = (
    # float32 becomes bfloat16, so the cases that differ in that alone are there already.
    *(
        at_kernel_sizes(case)
        for case in CASES
        if case.sizes.page_size == 8 and case.sizes.table_width == 21 and case.sizes.dtype != "bfloat16"
    ),
    at_kernel_sizes(Case("top-32", _MIXED, Sizes(num_kv_heads=3, top_k=32, local_blocks=2), num_queries=8)),
    at_kernel_sizes(Case("four-heads", _MIXED, Sizes(num_kv_heads=3, top_k=16), num_queries=5)),
    # Fewer heads a KV head, as one of several devices has.
    *(
        _with_group(at_kernel_sizes(Case(f"group-{group}", _MIXED, Sizes(num_kv_heads=1), num_queries=2)), group)
        for group in (1, 3, 8)
    ),
    # More blocks than any kernel holds in registers at once.
    at_kernel_sizes(
        Case(
            "long",
            ((8790, 3), (4090, 3)),
            Sizes(num_sequences=2, table_width=1100, num_kv_heads=1, top_k=9),
            num_queries=2,
        )
    ),
)
# For `parametrize`: the larger ones take minutes without a GPU.
EVERY_CASE = (*CASES, *(pytest.param(case, marks=pytest.mark.gpu) for case in KERNEL_CASES))


def check_attention(batch: "Batch", got: Any, block_ids: np.ndarray) -> None:
    """The attention to these blocks, as exact as its dtype lets it be."""
    expected = batch.attention(block_ids)
    error = np.abs(np.asarray(got, np.float64) - expected).max()
    assert error <= TOLERANCES[batch.sizes.dtype] * np.abs(expected).max(), error


_COMPILED: dict[tuple[Any, ...], Any] = {}


def compiled(operation: Operation, impl: str, **options: Any) -> Any:
    """The operation as one compiled function for all cases of a shape: one by one, its own operations compile too."""
    key = (operation.name, impl, *sorted(options.items()))
    if key not in _COMPILED:
        _COMPILED[key] = jax.jit(functools.partial(operation, impl=impl, **options))
    return _COMPILED[key]


@dataclass(frozen=True)
class Batch:
    """NumPy arguments of a call, with the sequence and position of each row as the oracle sees them."""

    sizes: Sizes
    decode: bool
    exact: bool
    scale: float
    index_q: np.ndarray
    index_k: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    block_table: np.ndarray
    lengths: tuple[np.ndarray, ...]
    sequence: np.ndarray
    position: np.ndarray
    written: np.ndarray

    @property
    def kind(self) -> str:
        return "decode" if self.decode else "prefill"

    @property
    def index_args(self) -> tuple[np.ndarray, ...]:
        return (self.index_q, self.index_k, self.block_table, *self.lengths)

    def attention_args(self, block_ids: np.ndarray) -> tuple[np.ndarray, ...]:
        return (self.q, self.k, self.v, block_ids, self.block_table, *self.lengths)

    def scores(self) -> np.ndarray:
        return oracle.index_scores(self.index_q, self.index_k, self.block_table, self.sequence, self.position)

    def choice(self) -> np.ndarray:
        return oracle.choose_blocks(self.scores(), self.position, page_size=self.sizes.page_size, **self.sizes.choice)

    def attention(self, block_ids: np.ndarray) -> np.ndarray:
        return oracle.sparse_attention(
            self.q,
            self.k,
            self.v,
            block_ids,
            self.block_table,
            self.sequence,
            self.position,
            self.scale,
        )


@functools.cache
def make_batch(case: Case, *, decode: bool, seed: int = 0) -> Batch:
    """The batch of a case; the same one every time. Its arrays are read-only."""
    sizes = case.sizes
    rng = np.random.default_rng(seed)
    context_lens, new = (np.array(column, np.int32) for column in zip(*case.lens, strict=True))
    seq_lens = context_lens + new
    assert len(case.lens) == sizes.num_sequences
    assert seq_lens.max() <= sizes.table_width * sizes.page_size

    if decode:
        num_rows, lengths = sizes.num_sequences * case.num_queries, (seq_lens,)
        sequence, position = oracle.decode_rows(num_rows, seq_lens)
    else:
        num_rows = sizes.num_rows
        cu_seqlens = _cu_seqlens(case, new)
        lengths = (cu_seqlens, seq_lens, context_lens)
        sequence, position = oracle.prefill_rows(num_rows, *lengths)
        assert (position >= 0).sum() == new.sum()

    table, written = _pages(case, seq_lens, rng)
    num_pages = len(written)
    dtype = DTYPES[sizes.dtype]

    def draw(*shape: int) -> np.ndarray:
        match case.data:
            case "normal":
                return rng.standard_normal(shape)
            case "ties":
                return rng.integers(-1, 2, shape).astype(float)
            case "equal":
                return np.ones(shape)
            case "fine":
                return rng.integers(-63, 64, shape).astype(float)
            case "huge":
                return rng.integers(-63, 64, shape) * (2.0**10 if sizes.dtype == "float16" else 2.0**40)
        raise ValueError(case.data)

    def rows(num_heads: int, dim: int) -> np.ndarray:
        drawn = draw(num_rows, num_heads, dim)
        drawn[position < 0] = case.poison
        return drawn.astype(dtype)

    def cache(*inner: int) -> np.ndarray:
        drawn = draw(num_pages, sizes.page_size, *inner)
        drawn[~written] = case.poison
        return drawn.astype(dtype)

    num_heads = sizes.num_kv_heads * sizes.group
    batch = Batch(
        sizes=sizes,
        decode=decode,
        exact=case.data != "normal",
        # A power of two, so that huge logits stay exact.
        scale=2.0**-3,
        index_q=rows(sizes.num_kv_heads, sizes.index_dim),
        index_k=cache(sizes.index_dim),
        q=rows(num_heads, sizes.head_dim),
        k=cache(sizes.num_kv_heads, sizes.head_dim).swapaxes(1, 2),
        v=cache(sizes.num_kv_heads, sizes.head_dim).swapaxes(1, 2),
        block_table=table,
        lengths=lengths,
        sequence=sequence,
        position=position,
        written=written,
    )
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return batch


def random_choice(batch: Batch, seed: int = 1) -> np.ndarray:
    """Block numbers of which nothing is known: any of the visible blocks, any number, any order."""
    rng = np.random.default_rng(seed)
    sizes = batch.sizes
    ids = np.full((len(batch.position), sizes.num_kv_heads, sizes.top_k), -1, np.int32)
    for row, position in enumerate(batch.position):
        num_visible = 0 if position < 0 else position // sizes.page_size + 1
        for head in range(sizes.num_kv_heads):
            count = rng.integers(0, min(sizes.top_k, num_visible) + 1)
            ids[row, head, :count] = rng.permutation(num_visible)[:count]
    return ids


def every_block(batch: Batch) -> np.ndarray:
    """All blocks of the table: what a row does not see of them is masked."""
    shape = (len(batch.position), batch.sizes.num_kv_heads, batch.block_table.shape[1])
    return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)


def _cu_seqlens(case: Case, new: np.ndarray) -> np.ndarray:
    num_rows, num_sequences = case.sizes.num_rows, case.sizes.num_sequences
    match case.layout:
        case "packed":
            widths = new
        case "padded":
            widths = np.full(num_sequences, num_rows // num_sequences)
        case "loose":
            slack = num_rows - new.sum()
            widths = new + np.array([slack // 2, 0, slack // 4, 1, 0])
        case _:
            raise ValueError(case.layout)
    assert (widths >= new).all()
    assert widths.sum() <= num_rows
    return np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)


def _pages(case: Case, seq_lens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A table of permuted pages and the slots [P, S] that hold a token."""
    sizes = case.sizes
    num_pages = sizes.num_sequences * sizes.table_width + 3
    free = list(rng.permutation(num_pages))
    shared = [free.pop() for _ in range(case.shared)]
    table = rng.choice(np.array(GARBAGE_PAGES), (sizes.num_sequences, sizes.table_width)).astype(np.int32)
    written = np.zeros((num_pages, sizes.page_size), bool)
    for b, length in enumerate(seq_lens):
        for block in range(-(-int(length) // sizes.page_size)):
            table[b, block] = shared[block] if block < case.shared else free.pop()
            written[table[b, block], : length - block * sizes.page_size] = True
    return table, written
