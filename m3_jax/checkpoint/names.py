"""One table: what a tensor of the released layout is called, and which slice of which weight it is.

Convert, export, verify, inspect and direct loading all read it. Every operation between the two layouts is the same:
a released tensor is a contiguous slice `weight[index]` of a weight, in another shape but in the same order of
elements. So q_proj is a reshape, gate and up are the two rows of a stack, and expert 7's w1 is `weight[7, 0]`; each is
undone by taking the slice again.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from m3_jax.config import M3Config


class Slice(NamedTuple):
    """A tensor of the released layout: `weight[index]`, in its own shape."""

    name: str
    shape: tuple[int, ...]
    index: tuple[int, ...]


class Weight(NamedTuple):
    """A weight by its path in the model, and the pattern of the released tensors that fill it.

    `float32` says that it stays float32 whatever dtype the other weights are cast to; `num_experts` is None where the
    names have no "{e}".
    """

    path: str
    shape: tuple[int, ...]
    released: tuple[str, ...]
    released_shape: tuple[int, ...]
    num_experts: int | None
    float32: bool

    def slices(self) -> Iterator[Slice]:
        """The released tensors in the order of the weight's memory, which they fill without gap."""
        for expert in (None,) if self.num_experts is None else range(self.num_experts):
            for row, name in enumerate(self.released):
                index = (() if expert is None else (expert,)) + ((row,) if len(self.released) > 1 else ())
                yield Slice(name.format(e=expert), self.released_shape, index)


class Part(NamedTuple):
    """The weights that are written and read together; one folder of the Orbax layout."""

    name: str
    weights: tuple[Weight, ...]


class Rule(NamedTuple):
    """A row of the table. Shapes are letters of `_sizes`; a product is one released dimension split in several.

    A leading dimension of `shape` that `released_shape` lacks is a stack: over "{e}" of the names, then over the names.
    """

    path: str
    shape: str
    released: tuple[str, ...]
    released_shape: str
    float32: bool = False


EMBED = (Rule("embed_tokens.weight", "V D", ("language_model.model.embed_tokens.weight",), "V D"),)
NORM = (Rule("norm.weight", "D", ("language_model.model.norm.weight",), "D"),)
HEAD = (Rule("lm_head.weight", "V D", ("language_model.lm_head.weight",), "V D"),)

# Below here, paths are relative to a layer.
LAYER = (
    Rule("input_layernorm.weight", "D", ("input_layernorm.weight",), "D"),
    Rule("self_attn.q_proj.weight", "N H D", ("self_attn.q_proj.weight",), "N*H D"),
    Rule("self_attn.k_proj.weight", "K H D", ("self_attn.k_proj.weight",), "K*H D"),
    Rule("self_attn.v_proj.weight", "K H D", ("self_attn.v_proj.weight",), "K*H D"),
    Rule("self_attn.o_proj.weight", "D N H", ("self_attn.o_proj.weight",), "D N*H"),
    Rule("self_attn.q_norm.weight", "H", ("self_attn.q_norm.weight",), "H"),
    Rule("self_attn.k_norm.weight", "H", ("self_attn.k_norm.weight",), "H"),
    Rule("post_attention_layernorm.weight", "D", ("post_attention_layernorm.weight",), "D"),
)
INDEXER = (
    Rule("self_attn.indexer.q_proj.weight", "J I D", ("self_attn.index_q_proj.weight",), "J*I D"),
    Rule("self_attn.indexer.k_proj.weight", "I D", ("self_attn.index_k_proj.weight",), "I D"),
    Rule("self_attn.indexer.q_norm.weight", "I", ("self_attn.index_q_norm.weight",), "I"),
    Rule("self_attn.indexer.k_norm.weight", "I", ("self_attn.index_k_norm.weight",), "I"),
)
DENSE_MLP = (
    Rule("mlp.gate_up_proj.weight", "2 Fd D", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "Fd D"),
    Rule("mlp.down_proj.weight", "D Fd", ("mlp.down_proj.weight",), "D Fd"),
)
MOE = (
    Rule("mlp.gate.weight", "E D", ("block_sparse_moe.gate.weight",), "E D", float32=True),
    Rule("mlp.gate.e_score_correction_bias", "E", ("block_sparse_moe.e_score_correction_bias",), "E", float32=True),
    Rule(
        "mlp.experts.gate_up_proj.weight",
        "E 2 F D",
        ("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
        "F D",
    ),
    Rule("mlp.experts.down_proj.weight", "E D F", ("block_sparse_moe.experts.{e}.w2.weight",), "D F"),
    Rule(
        "mlp.shared_experts.gate_up_proj.weight",
        "2 Fs D",
        (
            "block_sparse_moe.shared_experts.gate_proj.weight",
            "block_sparse_moe.shared_experts.up_proj.weight",
        ),
        "Fs D",
    ),
    Rule("mlp.shared_experts.down_proj.weight", "D Fs", ("block_sparse_moe.shared_experts.down_proj.weight",), "D Fs"),
)


def _verbatim(prefix: str, shapes: Mapping[str, str], float32: bool = False) -> tuple[Rule, ...]:
    """Rules of the vision part, whose weights keep names and shapes of the release."""
    return tuple(Rule(prefix + n, shape, (prefix + n,), shape, float32) for n, shape in shapes.items())


VISION = (
    *_verbatim("vision_tower.vision_model.", {"embeddings.patch_embedding.weight": "vD vC vT vP vP"}, float32=True),
    *_verbatim("vision_tower.vision_model.", {"pre_layrnorm.weight": "vD", "pre_layrnorm.bias": "vD"}),
)
# Relative to a layer of the vision tower.
VISION_LAYER = _verbatim(
    "",
    {
        **{f"layer_norm1.{kind}": "vD" for kind in ("weight", "bias")},
        **{
            f"self_attn.{letter}_proj.{kind}": shape
            for letter in ("q", "k", "v", "out")
            for kind, shape in (("weight", "vD vD"), ("bias", "vD"))
        },
        **{f"layer_norm2.{kind}": "vD" for kind in ("weight", "bias")},
        **{"mlp.fc1.weight": "vF vD", "mlp.fc1.bias": "vF", "mlp.fc2.weight": "vD vF", "mlp.fc2.bias": "vD"},
    },
)
PROJECTORS = (
    *_verbatim("multi_modal_projector.linear_1.", {"weight": "vJ vD", "bias": "vJ"}),
    *_verbatim("multi_modal_projector.linear_2.", {"weight": "D vJ", "bias": "D"}),
    *_verbatim("patch_merge_mlp.linear_1.", {"weight": "vJ D*vM*vM", "bias": "vJ"}),
    *_verbatim("patch_merge_mlp.linear_2.", {"weight": "D vJ", "bias": "D"}),
)


def _sizes(config: M3Config) -> dict[str, int]:
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "J": config.sparse_attention.num_index_heads,
        "I": config.sparse_attention.index_dim,
        "E": config.num_experts,
        "F": config.moe_intermediate_size,
        "Fd": config.dense_intermediate_size,
        "Fs": config.shared_intermediate_size,
        "2": 2,
    }
    if (vision := config.vision) is not None:
        sizes |= {
            "vD": vision.hidden_size,
            "vF": vision.intermediate_size,
            "vC": vision.num_channels,
            "vT": vision.temporal_patch_size,
            "vP": vision.patch_size,
            "vM": vision.spatial_merge_size,
            "vJ": vision.projector_hidden_size,
        }
    return sizes


def _shape(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in dim.split("*")) for dim in letters.split())


def _weight(rule: Rule, sizes: Mapping[str, int], path: str = "", released: str = "") -> Weight:
    return Weight(
        path + rule.path,
        _shape(rule.shape, sizes),
        tuple(released + name for name in rule.released),
        _shape(rule.released_shape, sizes),
        sizes["E"] if "{e}" in rule.released[0] else None,
        rule.float32,
    )


def parts(config: M3Config) -> Iterator[Part]:
    """The parts of a checkpoint with their weights, in the model's order: embed, layers, head, vision.

    Lazy, because a damaged config may ask for billions of them.
    """
    sizes = _sizes(config)
    yield Part("embed", tuple(_weight(rule, sizes) for rule in EMBED))
    for n, (sparse, moe) in enumerate(config.layer_kinds):
        rules = LAYER + (INDEXER if sparse else ()) + (MOE if moe else DENSE_MLP)
        prefixes = f"layers.{n}.", f"language_model.model.layers.{n}."
        yield Part(f"layers.{n:05d}", tuple(_weight(rule, sizes, *prefixes) for rule in rules))
    head = NORM if config.tie_word_embeddings else NORM + HEAD
    yield Part("head", tuple(_weight(rule, sizes) for rule in head))
    if config.vision is not None:
        layers = [f"vision_tower.vision_model.encoder.layers.{n}." for n in range(config.vision.num_hidden_layers)]
        yield Part(
            "vision",
            (
                *(_weight(rule, sizes) for rule in VISION),
                *(_weight(rule, sizes, prefix, prefix) for prefix in layers for rule in VISION_LAYER),
                *(_weight(rule, sizes) for rule in PROJECTORS),
            ),
        )


def is_mtp(name: str) -> bool:
    """Whether a released tensor belongs to multi-token prediction, which the release announces and does not have."""
    return "mtp" in name.split(".")
