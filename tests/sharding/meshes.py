"""The model, the meshes and the helpers that the tests of sharded passes share."""

import collections
import dataclasses
import re

import jax
import models
from jax.sharding import Mesh

from m3_jax import M3Config, make_mesh

# Every size divides by eight but the KV heads, of which tensor=8 repeats each; sizes that coincide in M3 differ.
CONFIG = dataclasses.replace(
    M3Config.tiny(),
    hidden_size=40,
    num_hidden_layers=2,
    num_attention_heads=24,
    num_key_value_heads=4,
    moe_intermediate_size=24,
    shared_intermediate_size=48,
    num_experts=16,
    sparse_attention=dataclasses.replace(M3Config.tiny().sparse_attention, num_index_heads=4, topk_blocks=3),
    sparse_attention_layers=(False, True),
    moe_layers=(False, True),
)
SIZES: list[dict[str, int]] = [
    {},
    *({"tensor": size} for size in (2, 4, 8)),
    *({"expert": size} for size in (2, 4, 8)),
    {"data": 2, "tensor": 4},
    {"data": 2, "expert": 4},
    {"data": 2, "expert": 2, "tensor": 2},
]


def name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items()) or "one device"


def mesh(sizes: dict[str, int]) -> Mesh:
    return make_mesh(**sizes, devices=jax.devices("cpu"))


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How many collectives of each kind an executable holds, by its HLO."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
    text = compiled.as_text()
    assert text is not None
    return dict(collections.Counter(re.findall(rf" ({kinds}|collective-broadcast)(?:-start)?\(", text)))


REFERENCE = models.random_model(CONFIG)
