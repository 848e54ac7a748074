"""Whole passes over every mesh that divides: the logits, tokens and samples of a single device, by those collectives
that stand in the code and no others."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import meshes
import models
import numpy as np
import pytest
from compilations import compilations

from m3_jax import M3ForCausalLM, Sampler, generate, generation
from m3_jax import model as model_module
from m3_jax import moe as moe_module

CONFIG = meshes.CONFIG
TOKENS = models.random_tokens(CONFIG, 3, 90)
LENGTHS = np.array([90, 33, 61], np.int32)
PROMPTS = [models.random_tokens(CONFIG, length, seed=length).tolist() for length in (91, 20, 1, 41, 70)]
# The same sampler but for numbers, so that both share what is compiled. Temperature 0 is greedy.
SAMPLERS = {"greedy": Sampler(temperature=0.0, top_p=0.9), "sampled": Sampler(temperature=1.3, top_p=0.9)}

# Meshes on which chunks count as long.
HALVED = [{"tensor": 8}]
LAYERS, MOE = CONFIG.num_hidden_layers, sum(CONFIG.moe_layers)
# Collectives of each axis. `tensor`: a reduction after every attention and every MLP; at decode, the logits' gather.
# `expert`: of many rows a gather of counts and two exchanges a layer; of few rows a gather and a reduction a layer, and
# for all layers one gather that says which rows are tokens. `data` needs none.
COLLECTIVES: dict[str, dict[str, dict[str, int]]] = {
    "prefill": {"tensor": {"all-reduce": 2 * LAYERS}, "expert": {"all-gather": MOE, "all-to-all": 2 * MOE}},
    "decode": {
        "tensor": {"all-reduce": 2 * LAYERS, "all-gather": 1},
        "expert": {"all-gather": MOE + 1, "reduce-scatter": MOE},
        # Whether any sequence goes on: before the loop and in it.
        "batch": {"all-reduce": 2},
    },
}


def collectives(kind: str, sizes: dict[str, int]) -> dict[str, int]:
    """Of a pass over a mesh. A long chunk over `tensor` goes in two halves."""
    halves = 2 if kind == "prefill" and sizes in HALVED else 1
    axes = [*sizes, *(["batch"] if {"data", "expert"} & sizes.keys() else [])]
    counts = [COLLECTIVES[kind].get(axis, {}) for axis in axes]
    total = {name: halves * sum(c.get(name, 0) for c in counts) for name in {name for c in counts for name in c}}
    if "tensor" in sizes:
        total["all-reduce"] += 1  # after the embedding
    return total


class Recorder:
    """A jitted function that remembers what it was called with."""

    def __init__(self, jitted: Any):
        self._jitted = jitted
        self.arguments: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        self.arguments = jax.tree.map(abstract, arguments)
        return self._jitted(*arguments)

    def compiled(self) -> jax.stages.Compiled:
        """What ran; out of jax's cache."""
        return self._jitted.lower(*self.arguments).compile()


def abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x


@pytest.fixture(scope="module", autouse=True)
def _few_rows() -> Iterator[None]:
    """A bound that prefill exceeds and decode does not, so that both ways to the experts are taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_module, "GATHER_ROWS", 48)
        yield


def outputs(model: M3ForCausalLM) -> dict[str, Any]:
    found = {
        kind: generate(model, PROMPTS, max_new_tokens=10, sampler=sampler, seed=range(5), prefill_chunk=32)
        for kind, sampler in SAMPLERS.items()
    }
    return {
        "logits": np.asarray(model(TOKENS, LENGTHS)),
        **{f"{kind} tokens": out.tokens for kind, out in found.items()},
        **{f"{kind} logprobs": out.logprobs for kind, out in found.items()},
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    with jax.default_device(jax.devices("cpu")[0]):
        return outputs(meshes.REFERENCE)


# All three axes at once are in test_indexer_over_pages.py.
@pytest.mark.parametrize("sizes", meshes.SIZES[:-1], ids=meshes.name)
def test_any_mesh_gives_the_same(
    sizes: dict[str, int], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "OVERLAPPED_TOKENS", 32 if sizes in HALVED else 1024)
    prefill, decode = Recorder(generation._prefill), Recorder(generation._decode_loop)
    monkeypatch.setattr(generation, "_prefill", prefill)
    monkeypatch.setattr(generation, "_decode_loop", decode)
    found = outputs(models.placed(meshes.REFERENCE, meshes.mesh(sizes)))
    if sizes:
        with compilations() as compiled:
            assert meshes.collectives(prefill.compiled()) == collectives("prefill", sizes)
            assert meshes.collectives(decode.compiled()) == collectives("decode", sizes)
        assert not compiled
    for kind in SAMPLERS:
        assert found[f"{kind} tokens"] == expected[f"{kind} tokens"]
        np.testing.assert_allclose(found[f"{kind} logprobs"], expected[f"{kind} logprobs"], atol=1e-4)
    live = np.arange(TOKENS.shape[1]) < LENGTHS[:, None]
    logits = expected["logits"][live]
    assert found["logits"].dtype == np.float32
    np.testing.assert_allclose(found["logits"][live], logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_one_prompt_on_many_parts(expected: dict[str, Any]) -> None:
    """A batch smaller than the mesh's parts, streamed. Another prompt in its bucket compiles nothing."""
    model = models.placed(meshes.REFERENCE, meshes.mesh({"data": 2, "expert": 4}))
    events: list[tuple[int, int, float]] = []

    def run(prompt: list[int], stream: Callable[[int, int, float], None]) -> list[list[int]]:
        return generate(
            model,
            [prompt],
            max_new_tokens=10,
            sampler=SAMPLERS["sampled"],
            seed=[3],
            prefill_chunk=32,
            stream=stream,
        ).tokens

    tokens = run(PROMPTS[3], lambda *event: events.append(event))
    assert tokens == [expected["sampled tokens"][3]]
    assert [(index, token) for index, token, _ in events] == [(0, token) for token in tokens[0]]
    with compilations() as compiled:
        run(PROMPTS[3][1:], lambda *event: None)
    assert not compiled


def test_blocks_over_a_mesh() -> None:
    """The choice of every KV head, whole, where each device has one."""
    chosen = models.placed(meshes.REFERENCE, meshes.mesh({"tensor": 8})).chosen_blocks(TOKENS[:, :40])
    expected = meshes.REFERENCE.chosen_blocks(TOKENS[:, :40])
    assert chosen.keys() == expected.keys()
    for layer, ids in chosen.items():
        np.testing.assert_array_equal(ids, expected[layer])


def test_caches_hold_their_own_heads_and_pages() -> None:
    structure, _ = generation.split(models.placed(meshes.REFERENCE, meshes.mesh({"tensor": 8})))
    cache, _ = generation._allocate(structure, 2, 20, np.dtype("float32"))
    block = CONFIG.sparse_attention.block_size
    shards = cache.layers[1].k.addressable_shards
    assert {shard.data.shape for shard in shards} == {(6, 1, block, CONFIG.head_dim)}
    assert [shard.index[1].start for shard in shards] == [0, 0, 1, 1, 2, 2, 3, 3]
    structure, _ = generation.split(models.placed(meshes.REFERENCE, meshes.mesh({"data": 2, "expert": 2, "tensor": 2})))
    cache, _ = generation._allocate(structure, 8, 20, np.dtype("float32"))
    assert cache.block_table.tolist() == [[0, 1, 2], [3, 4, 5]] * 4
    assert {shard.data.shape for shard in cache.layers[0].k.addressable_shards} == {(6, 2, block, CONFIG.head_dim)}
