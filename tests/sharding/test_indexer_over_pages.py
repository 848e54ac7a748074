"""Scoring sharded over pages: the choice of one device, bit for bit, in one exchange."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import kernel_cases
import meshes
import models
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from m3_jax import generate, generation, index_sharding
from m3_jax.index_sharding import Scoring
from m3_jax.model import split
from m3_jax.sharding import place
from pallas_kernels.index_topk import merge_candidates
from pallas_kernels.index_topk.api import OPERATIONS

# Forced blocks at both ends; and no other test's, whose passes are compiled with the scoring that M3's size asks for.
SPARSE = dataclasses.replace(meshes.CONFIG.sparse_attention, topk_blocks=4, init_blocks=1)
CONFIG = dataclasses.replace(meshes.CONFIG, sparse_attention=SPARSE)
MODEL = models.random_model(CONFIG)
PROMPTS = [models.random_tokens(CONFIG, length, seed=length).tolist() for length in (91, 20, 1, 41)]
NAMES = ("mixed-loose", "ties", "around-top-k-blocks", "three-heads-init-1-local-2")


@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_operations_over_devices(tensor: int, decode: bool):
    mesh = meshes.mesh({"tensor": tensor})
    for case in kernel_cases.CASES:
        if case.name not in NAMES:
            continue
        batch = kernel_cases.make_batch(case, decode=decode)
        find = partial(OPERATIONS[f"index_candidates_{batch.kind}"], num_shares=tensor, **batch.sizes.choice)

        @jax.jit
        @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        def choose(*args, find=find):
            return merge_candidates(lax.all_gather(find(*args, lax.axis_index("tensor")), "tensor"))

        args = tuple(map(jnp.asarray, batch.index_args))
        for shard in choose(*args).addressable_shards:
            np.testing.assert_array_equal(shard.data, batch.choice())
        assert meshes.collectives(choose.lower(*args).compile()) == {"all-gather": 1}


@pytest.fixture(scope="module")
def expected() -> generation.GenerateOutput:
    return generated(MODEL)


def generated(model) -> generation.GenerateOutput:
    return generate(model, PROMPTS, max_new_tokens=6, prefill_chunk=32)


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"data": 2, "expert": 2, "tensor": 2}], ids=meshes.name)
def test_model_over_devices(sizes: dict[str, int], expected: generation.GenerateOutput, monkeypatch):
    """Of few tokens, sharded all the same: one gather of queries and one exchange of candidates a sparse layer."""
    asked: list[Scoring] = []
    monkeypatch.setattr(index_sharding, "over_pages", lambda scoring: asked.append(scoring) or True)
    model = models.placed(MODEL, meshes.mesh(sizes))
    got = generated(model)
    assert got.tokens == expected.tokens
    for logprobs, wanted in zip(got.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(logprobs, wanted, atol=1e-5)
    assert {scoring.decode for scoring in asked} == {False, True}
    assert {(scoring.heads, scoring.devices) for scoring in asked} == {(4, sizes["tensor"])}
    assert {scoring.own_heads for scoring in asked} == {max(1, 4 // sizes["tensor"])}


def test_collectives(monkeypatch):
    structure, weights = split(models.placed(MODEL, meshes.mesh({"tensor": 8})))
    cache, hidden = generation._allocate(structure, 2, 96, jnp.dtype("float32"))
    tokens = place(structure.mesh, ("batch", "whole"), np.zeros((2, 16), np.int32))
    lengths = place(structure.mesh, ("batch",), np.full(2, 16, np.int32))
    found = []
    for sharded in (False, True):
        monkeypatch.setattr(index_sharding, "over_pages", lambda _, sharded=sharded: sharded)
        jax.clear_caches()
        compiled = generation._prefill.lower(structure, weights, cache, hidden, tokens, lengths).compile()
        found.append(meshes.collectives(compiled))
    jax.clear_caches()
    more = {kind: count - found[0].get(kind, 0) for kind, count in found[1].items()}
    layers = sum(CONFIG.sparse_attention_layers)
    assert {kind: count for kind, count in more.items() if count} == {"all-gather": layers, "all-to-all": layers}


def scoring(**changed: Any) -> Scoring:
    sizes: dict[str, Any] = {"rows": 1, "sequences": 1, "context": 2**20, "heads": 4, "own_heads": 1, "devices": 8}
    return Scoring(**sizes | {"index_dim": 128, "itemsize": 2, "top_k": 16, "decode": True} | changed)


def test_where_it_wins():
    """Reading 8 x 128 K index keys takes 62 us; an exchange as long, and 16 sequences twice as long."""
    batch = partial(scoring, context=2**17)
    assert not index_sharding.over_pages(batch(sequences=8, rows=8))
    assert index_sharding.over_pages(batch(sequences=16, rows=16))
    saved = 7 / 8 * 16 * 2**17 * 256 / 4.3e12 - 60e-6
    assert batch(sequences=16, rows=16).seconds_saved() == pytest.approx(saved, rel=0.01)
    assert not index_sharding.over_pages(batch(sequences=64, rows=64, devices=1, own_heads=4))
    prefill = partial(scoring, rows=8192, decode=False)
    assert index_sharding.over_pages(prefill())
    # Each device has a head of its own: nothing is multiplied twice.
    assert not index_sharding.over_pages(prefill(devices=4))
