"""The Mosaic GPU kernels against the reference, on a GPU: many random batches, and the released model's shapes.

M3_KERNEL_DRAWS sets the number of random batches of each bucket of static shapes.
"""

import os
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.index_sparse_attention.api import OPERATIONS as BOTH
from pallas_kernels.index_topk.api import OPERATIONS as INDEX
from pallas_kernels.sparse_attention import mosaic_gpu
from pallas_kernels.sparse_attention.api import OPERATIONS as ATTENTION

pytestmark = pytest.mark.gpu
DRAWS = int(os.environ.get("M3_KERNEL_DRAWS", "10"))
PAGE, DIM, GROUP = 128, 128, 16
# Relative, of a whole result, in each dtype: the weights and the result are rounded to it.
TOLERANCES = {"bfloat16": 4e-3, "float16": 5e-4}


@dataclass(frozen=True)
class Bucket:
    """Static shapes of a call: `tokens` is Q, tokens a sequence, in a decode call, and T in a prefill call.

    in_common: attention looks for blocks that neighbouring rows have in common, where it would not by itself.
    """

    kind: str
    sequences: int
    tokens: int
    table_width: int
    pages: int
    kv_heads: int
    top_k: int
    init_blocks: int = 0
    local_blocks: int = 1
    dtype: str = "bfloat16"
    impl: str = "mosaic_gpu"
    in_common: bool = False

    def __str__(self) -> str:
        sizes = f"B{self.sequences}-T{self.tokens}-M{self.table_width}-P{self.pages}-K{self.kv_heads}"
        return f"{self.kind}-{sizes}{'-in-common' if self.in_common else ''}"

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens if self.kind == "decode" else self.tokens

    @property
    def choice(self) -> dict[str, int]:
        return {"top_k": self.top_k, "init_blocks": self.init_blocks, "local_blocks": self.local_blocks}


# With fewer pages than entries of the table, sequences share them, and attention sorts by page instead of block.
BUCKETS = (
    Bucket("decode", 1, 1, 40, 60, 4, 16),
    Bucket("decode", 7, 3, 33, 100, 2, 8, 1, 2, "float16"),
    Bucket("decode", 64, 1, 20, 1500, 1, 4, 0, 0),
    Bucket("decode", 3, 8, 70, 80, 4, 32, 2, 2),
    Bucket("decode", 2, 1, 2000, 500, 1, 16),
    Bucket("decode", 256, 1, 12, 900, 4, 16),
    Bucket("decode", 5, 7, 1100, 300, 1, 8, 1, 1, "float16"),
    Bucket("prefill", 1, 500, 40, 60, 4, 16),
    Bucket("prefill", 5, 700, 24, 50, 2, 8, 2, 0, "float16"),
    Bucket("prefill", 20, 333, 9, 300, 1, 4),
    Bucket("prefill", 3, 301, 600, 900, 4, 32, 1, 2),
    Bucket("prefill", 256, 777, 8, 400, 4, 16),
    Bucket("prefill", 1, 3, 1100, 1200, 1, 16, 0, 2),
    Bucket("prefill", 1, 500, 40, 60, 4, 16, in_common=True),
    Bucket("prefill", 5, 700, 24, 50, 2, 8, 2, 0, "float16", in_common=True),
    Bucket("prefill", 20, 333, 9, 300, 1, 4, in_common=True),
    Bucket("prefill", 2, 900, 64, 150, 2, 32, 1, 2, in_common=True),
    Bucket("prefill", 256, 777, 8, 400, 4, 16, in_common=True),
)


def draw_lengths(bucket: Bucket, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """(seq_lens,) of a decode call, or (cu_seqlens, seq_lens, context_lens)."""
    capacity = bucket.table_width * PAGE
    edges = [0, 1, 2, 127, 128, 129, bucket.top_k * PAGE - 1, bucket.top_k * PAGE, bucket.top_k * PAGE + 1, capacity]

    def draw() -> np.ndarray:
        lengths = np.where(
            rng.random(bucket.sequences) < 0.5,
            rng.choice(edges, bucket.sequences),
            (capacity * rng.random(bucket.sequences) ** 2).astype(int),
        )
        return np.minimum(lengths, capacity).astype(np.int32)

    if bucket.kind == "decode":
        return (draw(),)
    ends = np.sort(rng.integers(0, bucket.tokens + 1, bucket.sequences))
    if rng.random() < 0.5:
        ends[-1] = bucket.tokens
    cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
    widths = np.diff(cu_seqlens)
    slack = np.where(rng.random(bucket.sequences) < 0.3, rng.integers(0, 4, bucket.sequences), 0)
    new = np.minimum(np.maximum(widths - slack, 0), capacity).astype(np.int32)
    context = np.minimum(draw(), capacity - new)
    return cu_seqlens, context + new, context


def positions(bucket: Bucket, lengths: tuple[np.ndarray, ...]) -> np.ndarray:
    if bucket.kind == "decode":
        number = np.arange(bucket.tokens) - bucket.tokens
        return np.maximum(lengths[0][:, None] + number, -1).reshape(-1)
    cu_seqlens, seq_lens, context_lens = lengths
    result = np.full(bucket.tokens, -1)
    for b in range(bucket.sequences):
        new = seq_lens[b] - context_lens[b]
        result[cu_seqlens[b] : cu_seqlens[b] + new] = context_lens[b] + np.arange(new)
    return result


def draw_tables(bucket: Bucket, seq_lens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A table of any pages with garbage beyond the sequences' blocks, and how many slots of each page are filled."""
    shape = (bucket.sequences, bucket.table_width)
    table = rng.integers(0, bucket.pages, shape).astype(np.int32)
    fill = np.clip(seq_lens[:, None] - np.arange(bucket.table_width) * PAGE, 0, PAGE)
    filled = np.zeros(bucket.pages, np.int32)
    np.maximum.at(filled, table, fill)
    garbage = rng.choice(np.array([-1, 0, 2**31 - 1, -(2**31), bucket.pages, 12_345_678], np.int32), shape)
    return np.where(fill > 0, table, garbage), filled


@partial(jax.jit, static_argnames=("bucket", "exact"))
def run_and_compare(bucket: Bucket, exact: bool, seed, table, filled, lengths, position):
    """What has to be true or small, as a dict of scalars."""
    keys = jax.random.split(jax.random.key(seed), 6)
    dtype = bucket.dtype
    slot_is_filled = jnp.arange(PAGE) < filled[:, None]
    live = (position >= 0)[:, None, None]

    def draw(key, *shape):
        if exact:
            return jax.random.randint(key, shape, -15, 16).astype(dtype)
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    index_q = jnp.where(live, draw(keys[0], bucket.rows, bucket.kv_heads, DIM), jnp.nan).astype(dtype)
    q = jnp.where(live, draw(keys[1], bucket.rows, GROUP * bucket.kv_heads, DIM), jnp.nan).astype(dtype)
    index_k = jnp.where(slot_is_filled[..., None], draw(keys[2], bucket.pages, PAGE, DIM), jnp.inf).astype(dtype)
    k, v = (
        jnp.where(
            slot_is_filled[:, None, :, None], draw(key, bucket.pages, bucket.kv_heads, PAGE, DIM), jnp.nan
        ).astype(dtype)
        for key in keys[3:5]
    )
    args = (index_q, index_k, table, *lengths)
    score, choose = INDEX[f"index_score_{bucket.kind}"], INDEX[f"index_topk_{bucket.kind}"]
    attend = ATTENTION[f"sparse_attention_{bucket.kind}"]
    ids = choose(*args, impl=bucket.impl, **bucket.choice)
    expected_ids = choose(*args, impl="reference", **bucket.choice)
    scores, expected_scores = score(*args, impl=bucket.impl), score(*args, impl="reference")
    visible = jnp.isfinite(expected_scores)
    largest = jnp.max(jnp.where(visible, jnp.abs(expected_scores), 0), initial=1e-6)

    def of_ids(ids):
        block = jnp.clip(ids, 0, bucket.table_width - 1)
        return jnp.where(ids >= 0, jnp.take_along_axis(expected_scores, block, axis=2), 0)

    # Any of a row's blocks, in any order, with holes: not only those that the indexer chooses.
    some_ids = jax.random.permutation(keys[5], expected_ids, axis=2, independent=True)
    scale = DIM**-0.5
    attention_args = (some_ids, table, *lengths)
    out = attend(q, k, v, *attention_args, scale=scale, impl=bucket.impl)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = attend(*wide, *attention_args, scale=scale, impl="reference")
    error = jnp.linalg.norm(out.astype(jnp.float32) - expected)
    norm = jnp.linalg.norm(expected)
    differences = jnp.where(visible, jnp.abs(scores - expected_scores), 0) / largest

    def relative(error, norm):
        return jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1), error)

    found = {}
    if bucket.kind == "decode":
        both = partial(BOTH["index_sparse_attention_decode"], impl=bucket.impl, scale=scale, **bucket.choice)
        joint, joint_ids = both(*args[:2], q, k, v, table, *lengths)
        apart = attend(q, k, v, ids, table, *lengths, scale=scale, impl=bucket.impl).astype(jnp.float32)
        difference = jnp.linalg.norm(joint.astype(jnp.float32) - apart)
        found = {
            "same ids in one": jnp.all(joint_ids == ids),
            "attention in one": relative(difference, jnp.linalg.norm(apart)),
        }
        out = jnp.concatenate([out, joint])
    return found | {
        "same ids": jnp.all(ids == expected_ids),
        "same number of ids": jnp.all((ids >= 0) == (expected_ids >= 0)),
        "rank difference": jnp.max(jnp.abs(of_ids(ids) - of_ids(expected_ids))) / largest,
        "same visible": jnp.all(jnp.isneginf(scores) == ~visible),
        "score difference": jnp.max(differences),
        "finite": jnp.all(jnp.isfinite(out.astype(jnp.float32))),
        "dead rows": jnp.max(jnp.abs(jnp.where(live, 0, out.reshape(-1, *q.shape).astype(jnp.float32)))),
        "attention": relative(error, norm),
    }, (ids, scores, out)


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_random_batches(bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    if bucket.in_common:
        monkeypatch.setattr(mosaic_gpu, "_looks_for_common", lambda *_: True)
    check_random_batches(bucket)


def check_random_batches(bucket: Bucket) -> None:
    """Exact data: the same ids in the same order. Real data: the same up to what rounding can turn round."""
    rng = np.random.default_rng(len(str(bucket)))
    for draw in range(DRAWS):
        lengths = draw_lengths(bucket, rng)
        seq_lens = lengths[0] if bucket.kind == "decode" else lengths[1]
        table, filled = draw_tables(bucket, seq_lens, rng)
        exact = draw % 2 == 0
        arrays = (table, filled, tuple(map(jnp.asarray, lengths)), positions(bucket, lengths))
        found, results = run_and_compare(bucket, exact, draw, *arrays)
        found = {name: np.asarray(value).item() for name, value in found.items()}
        context = f"draw {draw}, lengths {lengths}: {found}"
        assert found["same number of ids"], context
        assert found["same visible"], context
        assert found["finite"], context
        assert found["dead rows"] == 0, context
        assert found["same ids"] or not exact, context
        assert found["rank difference"] <= (0 if exact else 2e-6), context
        assert found["score difference"] <= (0 if exact else 2e-6), context
        assert found.get("same ids in one", True), context
        # Of the same blocks in the same order.
        assert found.get("attention in one", 0) <= 1e-3 * TOLERANCES[bucket.dtype], context
        # Integers' logits leave one weight that counts: no more than the result is rounded.
        assert found["attention"] <= TOLERANCES[bucket.dtype], context
        if draw < 4:
            _, again = run_and_compare(bucket, exact, draw, *arrays)
            for first, second in zip(results, again, strict=True):
                np.testing.assert_array_equal(bits(first), bits(second))


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize(("tokens", "prefix"), [(8192, 0), (4096, 122_880), (36_000, 1000)])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_released_prefill(tokens: int, prefix: int, kv_heads: int):
    """Real shapes; the reference computes some stretches of rows, as later chunks of the same sequence."""
    keys = jax.random.split(jax.random.key(0), 5)
    width = -(-(tokens + prefix) // PAGE)
    table = jax.random.permutation(keys[0], width + 5)[None, :width].astype(jnp.int32)

    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.bfloat16)

    index_q, index_k = normal(keys[1], tokens, kv_heads, DIM), normal(keys[2], width + 5, PAGE, DIM)
    q = normal(keys[3], tokens, GROUP * kv_heads, DIM)
    k, v = (normal(key, width + 5, kv_heads, PAGE, DIM) for key in jax.random.split(keys[4]))

    def lengths(start, end):
        return tuple(jnp.asarray(x, jnp.int32) for x in ([0, end - start], [prefix + end], [prefix + start]))

    choose = partial(INDEX["index_topk_prefill"], top_k=16, init_blocks=0, local_blocks=1)
    attend = partial(ATTENTION["sparse_attention_prefill"], scale=DIM**-0.5)
    ids = jax.jit(partial(choose, impl="mosaic_gpu"))(index_q, index_k, table, *lengths(0, tokens))
    out = jax.jit(partial(attend, impl="mosaic_gpu"))(q, k, v, ids, table, *lengths(0, tokens))
    assert bool(jnp.all(jnp.isfinite(out)))
    for start in (0, 1900, tokens // 2, tokens - 70):
        rows = slice(start, start + 70)
        expected_ids = choose(index_q[rows], index_k, table, *lengths(start, start + 70), impl="reference")
        assert float(jnp.mean(jnp.sort(ids[rows]) == jnp.sort(expected_ids))) > 0.999
        expected = attend(q[rows], k, v, ids[rows], table, *lengths(start, start + 70), impl="reference")
        expected = expected.astype(jnp.float32)
        error = jnp.linalg.norm(out[rows].astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert float(error) <= TOLERANCES["bfloat16"]


@pytest.mark.parametrize(("batch", "context", "queries"), [(1, 1_048_576, 1), (16, 32_768, 4), (128, 8192, 1)])
def test_released_decode(batch: int, context: int, queries: int):
    keys = jax.random.split(jax.random.key(0), 6)
    width, num_pages = context // PAGE, 16_384
    kv_heads, rows = 4, batch * queries
    table = jax.random.permutation(keys[0], num_pages)[: batch * width].reshape(batch, width).astype(jnp.int32)
    seq_lens = context - jax.random.randint(keys[5], (batch,), 0, 300)

    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.bfloat16)

    index_args = (normal(keys[1], rows, kv_heads, DIM), normal(keys[2], num_pages, PAGE, DIM), table, seq_lens)
    q = normal(keys[3], rows, GROUP * kv_heads, DIM)
    k, v = (normal(key, num_pages, kv_heads, PAGE, DIM) for key in jax.random.split(keys[4]))
    choose = partial(INDEX["index_topk_decode"], top_k=16, init_blocks=0, local_blocks=1)
    ids, expected_ids = (choose(*index_args, impl=impl) for impl in ("mosaic_gpu", "reference"))
    assert float(jnp.mean(jnp.sort(ids) == jnp.sort(expected_ids))) > 0.999
    attend = partial(ATTENTION["sparse_attention_decode"], scale=DIM**-0.5)
    out, expected = (attend(q, k, v, ids, table, seq_lens, impl=impl) for impl in ("mosaic_gpu", "reference"))
    expected = expected.astype(jnp.float32)
    error = jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert float(error) <= TOLERANCES["bfloat16"]
