"""The model's description: sizes and constants, read from and written to `config.json`.

The config describes the model and nothing else: meshes, kernels and sampling are arguments elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

ARCHITECTURE = "MiniMaxM3SparseForConditionalGeneration"
MODEL_TYPE = "minimax_m3_vl"
# transformers normalises the released "swigluoai" to "silu" when it saves; the activation is SwiGLU-OAI in both.
ACTIVATIONS = ("swigluoai", "silu")
SPARSE_LAYER, DENSE_LAYER = "minimax_m3_sparse", "full_attention"


class ConfigError(ValueError):
    """A key of a config has a value that this implementation does not support."""


def _refuse(key: str, value: object, supported: str) -> NoReturn:
    raise ConfigError(f"{key}={value!r}: {supported}")


def _require(condition: bool, key: str, value: object, supported: str) -> None:
    if not condition:
        _refuse(key, value, supported)


@dataclasses.dataclass(frozen=True)
class SparseAttentionConfig:
    """Block-sparse attention: which blocks of keys a query may attend to.

    Attributes:
      num_index_heads: heads of the lightning indexer, one for each KV head.
      index_dim: channels of an index head.
      block_size: tokens a block; the page size of the cache.
      topk_blocks: blocks chosen for a query, forced ones included.
      init_blocks: first blocks of a sequence, always chosen.
      local_blocks: the query's own block and those before it, always chosen.
    """

    num_index_heads: int
    index_dim: int
    block_size: int
    topk_blocks: int
    init_blocks: int = 0
    local_blocks: int = 1

    def __post_init__(self) -> None:
        for name in ("num_index_heads", "index_dim", "block_size", "topk_blocks"):
            _positive(f"sparse_attention.{name}", getattr(self, name))
        for name in ("init_blocks", "local_blocks"):
            _natural(f"sparse_attention.{name}", getattr(self, name))
        forced = self.init_blocks + self.local_blocks
        _require(
            forced <= self.topk_blocks,
            "sparse_attention.init_blocks + local_blocks",
            f"{self.init_blocks} + {self.local_blocks}",
            f"the forced blocks count inside topk_blocks={self.topk_blocks} and must not exceed it",
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its projector, kept as data: no module reads its weights yet."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 2016
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    layer_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    projector_hidden_size: int = 6144

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("layer_norm_eps", "rope_theta"):
                _require(_is_number(value) and value > 0, f"vision.{field.name}", value, "must be a number > 0")
            else:
                _positive(f"vision.{field.name}", value)
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            "vision.num_attention_heads",
            self.num_attention_heads,
            f"must divide vision.hidden_size={self.hidden_size}",
        )


@dataclasses.dataclass(frozen=True)
class M3Config:
    """A MiniMax-M3 text model, with its vision part as data.

    `sparse_attention_layers[n]` and `moe_layers[n]` say independently of each other whether layer n has block-sparse
    attention and whether its MLP is a mixture of experts. Raises `ConfigError` naming key, value and requirement.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    dense_intermediate_size: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_alpha: float
    swiglu_limit: float
    swiglu_beta: float
    sparse_attention: SparseAttentionConfig
    sparse_attention_layers: tuple[bool, ...]
    moe_layers: tuple[bool, ...]
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "rotary_dim", "max_position_embeddings", "dense_intermediate_size"),
            *("moe_intermediate_size", "shared_intermediate_size", "num_experts", "num_experts_per_tok"),
        ):
            _positive(name, getattr(self, name))
        for name in ("rope_theta", "rms_norm_eps", "swiglu_limit"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, value, "must be a number > 0")
        for name in ("routed_scaling_factor", "swiglu_alpha", "swiglu_beta"):
            _require(_is_number(getattr(self, name)), name, getattr(self, name), "must be a number")
        for name in ("sparse_attention_layers", "moe_layers"):
            value = getattr(self, name)
            _require(
                len(value) == self.num_hidden_layers,
                name,
                f"{len(value)} entries",
                f"must have one entry for each of num_hidden_layers={self.num_hidden_layers}",
            )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            self.num_attention_heads,
            f"must be a multiple of num_key_value_heads={self.num_key_value_heads}",
        )
        _require(
            self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim,
            "rotary_dim",
            self.rotary_dim,
            f"must be even and at most head_dim={self.head_dim}",
        )
        _require(
            self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"must be at most num_experts={self.num_experts}",
        )
        sparse = self.sparse_attention
        _require(
            sparse.num_index_heads == self.num_key_value_heads,
            "sparse_attention.num_index_heads",
            sparse.num_index_heads,
            f"must equal num_key_value_heads={self.num_key_value_heads}: each KV head has its own choice of blocks",
        )
        _require(
            self.rotary_dim <= sparse.index_dim,
            "sparse_attention.index_dim",
            sparse.index_dim,
            f"must be at least rotary_dim={self.rotary_dim}: index heads are rotated on the same channels",
        )

    @property
    def has_sparse_attention(self) -> bool:
        """Whether any layer has block-sparse attention."""
        return any(self.sparse_attention_layers)

    @property
    def layer_kinds(self) -> tuple[tuple[bool, bool], ...]:
        """Of each layer: whether its attention is block-sparse, and its MLP a mixture of experts."""
        return tuple(zip(self.sparse_attention_layers, self.moe_layers, strict=True))

    def with_layers(self, kinds: Sequence[tuple[bool, bool]]) -> M3Config:
        """The config of a model with layers of these kinds instead, such as the first ones of `layer_kinds`."""
        return dataclasses.replace(
            self,
            num_hidden_layers=len(kinds),
            sparse_attention_layers=tuple(sparse for sparse, _ in kinds),
            moe_layers=tuple(moe for _, moe in kinds),
        )

    @classmethod
    def m3(cls) -> M3Config:
        """The released MiniMax-M3: 427,040,140,160 parameters, vision included."""
        freq = (False,) * 3 + (True,) * 57
        return cls(
            vocab_size=200_064,
            hidden_size=6144,
            num_hidden_layers=60,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            rotary_dim=64,
            rope_theta=5e6,
            rms_norm_eps=1e-6,
            max_position_embeddings=1_048_576,
            dense_intermediate_size=12_288,
            moe_intermediate_size=3072,
            shared_intermediate_size=3072,
            num_experts=128,
            num_experts_per_tok=4,
            routed_scaling_factor=2.0,
            swiglu_alpha=1.702,
            swiglu_limit=7.0,
            swiglu_beta=1.0,
            sparse_attention=SparseAttentionConfig(
                num_index_heads=4,
                index_dim=128,
                block_size=128,
                topk_blocks=16,
                init_blocks=0,
                local_blocks=1,
            ),
            sparse_attention_layers=freq,
            moe_layers=freq,
            bos_token_id=200_019,
            eos_token_ids=(200_020,),
            vision=VisionConfig(),
            image_token_id=200_025,
            video_token_id=200_026,
        )

    @classmethod
    def tiny(cls) -> M3Config:
        """A model for tests: sizes that coincide in M3 all differ, and the two layer lists differ from each other."""
        return cls(
            vocab_size=320,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            rotary_dim=10,
            rope_theta=1e4,
            rms_norm_eps=1e-6,
            max_position_embeddings=65_536,
            dense_intermediate_size=56,
            moe_intermediate_size=20,
            shared_intermediate_size=28,
            num_experts=11,
            num_experts_per_tok=3,
            routed_scaling_factor=1.5,
            swiglu_alpha=1.6,
            swiglu_limit=5.0,
            swiglu_beta=1.0,
            sparse_attention=SparseAttentionConfig(
                num_index_heads=2, index_dim=12, block_size=8, topk_blocks=4, init_blocks=0, local_blocks=1
            ),
            sparse_attention_layers=(False, True, True, True),
            moe_layers=(False, False, True, True),
            bos_token_id=1,
            eos_token_ids=(2,),
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> M3Config:
        """Reads `config.json` in the released nested form or in the flat form that transformers writes.

        Keys without influence on the model are ignored; a value that asks for another model raises `ConfigError`.
        """
        return _read_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The released form of `config.json`; `from_hf` gives an equal config back."""
        return _write_hf(self)


def _is_number(value: object) -> bool:
    # Bounded, which refuses infinities and integers that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _positive(key: str, value: object) -> None:
    _require(_is_int(value) and value > 0, key, value, "must be an integer > 0")  # type: ignore[operator]


def _natural(key: str, value: object) -> None:
    _require(_is_int(value) and value >= 0, key, value, "must be an integer >= 0")  # type: ignore[operator]


_MISSING = object()


class _Section:
    """A mapping of a config with the dotted name that errors give its keys."""

    def __init__(self, values: object, name: str) -> None:
        if not isinstance(values, Mapping):
            _refuse(name, values, "must be an object")
        self.values = values
        self.prefix = f"{name}." if name else ""

    def get(self, *keys: str, default: Any = _MISSING) -> Any:
        """The first of `keys` that is there and not null; a missing key without a default is an error."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        if default is _MISSING:
            _refuse(f"{self.prefix}{keys[0]}", None, "is required")
        return default

    def section(self, key: str) -> _Section:
        return _Section(self.get(key, default={}), f"{self.prefix}{key}")

    def only(self, key: str, *supported: Any) -> None:
        """Refuses `key` where it is there with a value that is not supported."""
        value = self.get(key, default=supported[0])
        _require(value in supported, f"{self.prefix}{key}", value, f"supported: {', '.join(map(repr, supported))}")

    def freq(self, key: str) -> tuple[bool, ...] | None:
        """A 0/1 list, one entry a layer."""
        value = self.get(key, default=None)
        if value is None:
            return None
        _require(
            isinstance(value, list | tuple) and all(v in (0, 1) for v in value),
            f"{self.prefix}{key}",
            value,
            "must be a list of 0 and 1",
        )
        return tuple(bool(v) for v in value)

    def kinds(self, key: str, on: str, off: str) -> tuple[bool, ...] | None:
        """A list of two words, one entry a layer."""
        value = self.get(key, default=None)
        if value is None:
            return None
        _require(
            isinstance(value, list | tuple) and all(v in (on, off) for v in value),
            f"{self.prefix}{key}",
            value,
            f"must be a list of {on!r} and {off!r}",
        )
        return tuple(v == on for v in value)


def _same_length(section: _Section, keys: str, value: tuple[bool, ...], layers: Any) -> tuple[bool, ...]:
    _require(
        len(value) == layers,
        f"{section.prefix}{keys}",
        f"{len(value)} entries",
        f"must have one entry for each of num_hidden_layers={layers}",
    )
    return value


def _rope_theta(section: _Section, *types: str) -> float:
    rope = section.section("rope_parameters")
    rope.only("rope_type", *types)
    for key in ("factor", "low_freq_factor", "attention_factor"):
        if rope.get(key, default=None) is not None:
            _refuse(f"{rope.prefix}{key}", rope.get(key), "scaled rotary embeddings are not supported")
    if section.get("rope_scaling", default=None) is not None:
        scaling = section.section("rope_scaling")
        if scaling.get("rope_type", "type", default="default") != "default":
            _refuse(f"{section.prefix}rope_scaling", section.get("rope_scaling"), "supported: None")
    theta = rope.get("rope_theta", default=None)
    return theta if theta is not None else section.get("rope_theta")


def _rotary_dim(text: _Section, head_dim: Any) -> Any:
    explicit = text.get("rotary_dim", default=None)
    factor = text.section("rope_parameters").get("partial_rotary_factor", default=None)
    if factor is None:
        factor = text.get("partial_rotary_factor", default=None)
    if factor is not None:
        valid = _is_number(factor) and 0 < factor <= 1
        _require(valid, f"{text.prefix}partial_rotary_factor", factor, "must be a number above 0 and at most 1")
    if explicit is None:
        if factor is None:
            _refuse(f"{text.prefix}rotary_dim", None, "is required (or partial_rotary_factor)")
        return int(head_dim * factor)
    # transformers computes with the factor and never reads rotary_dim: where they differ, nobody knows what was meant.
    if factor is not None and int(head_dim * factor) != explicit:
        _refuse(
            f"{text.prefix}partial_rotary_factor",
            factor,
            f"contradicts rotary_dim={explicit} with head_dim={head_dim}",
        )
    return explicit


def _read_sparse(text: _Section, layers: Any) -> tuple[SparseAttentionConfig, tuple[bool, ...]]:
    nested = text.section("sparse_attention_config")
    nested.only("sparse_score_type", "max")
    nested.only("use_sparse_attention", True)
    text.only("index_score_type", "max")
    for key in ("sparse_init_tokens", "sparse_local_tokens"):
        if nested.get(key, default=None) is not None:
            _refuse(f"{nested.prefix}{key}", nested.get(key), "forced tokens are counted in blocks: sparse_*_block")

    def either(nested_key: str, flat_key: str, **default: Any) -> Any:
        value = nested.get(nested_key, default=None)
        return value if value is not None else text.get(flat_key, **default)

    chosen = nested.freq("sparse_attention_freq")
    if chosen is None:
        chosen = text.kinds("layer_types", SPARSE_LAYER, DENSE_LAYER)
        key = "layer_types"
    else:
        key = "sparse_attention_config.sparse_attention_freq"
    if chosen is None:
        _refuse(f"{text.prefix}{key}", None, "is required (or layer_types)")
    chosen = _same_length(text, key, chosen, layers)
    disabled = nested.freq("sparse_disable_index_value")
    if disabled is not None:
        _same_length(nested, "sparse_disable_index_value", disabled, layers)
        for layer, (sparse, off) in enumerate(zip(chosen, disabled, strict=True)):
            if sparse and not off:
                _refuse(
                    f"{nested.prefix}sparse_disable_index_value[{layer}]",
                    0,
                    "the index value branch is not supported: must be 1 on every sparse layer",
                )
    return (
        SparseAttentionConfig(
            num_index_heads=either("sparse_num_index_heads", "index_n_heads"),
            index_dim=either("sparse_index_dim", "index_head_dim"),
            block_size=either("sparse_block_size", "index_block_size"),
            topk_blocks=either("sparse_topk_blocks", "index_topk_blocks"),
            init_blocks=either("sparse_init_block", "index_init_blocks", default=0),
            local_blocks=either("sparse_local_block", "index_local_blocks"),
        ),
        chosen,
    )


def _read_vision(top: _Section) -> VisionConfig | None:
    if top.get("vision_config", default=None) is None:
        return None
    vision = top.section("vision_config")
    vision.only("hidden_act", "gelu")
    compression = vision.section("img_token_compression_config")
    defaults = VisionConfig()
    sizes = {
        field.name: vision.get(field.name, default=compression.get(field.name, default=getattr(defaults, field.name)))
        for field in dataclasses.fields(VisionConfig)
        if field.name not in ("rope_theta", "projector_hidden_size")
    }
    return VisionConfig(
        **sizes,
        rope_theta=_rope_theta(vision, "axial", "default")
        if vision.get("rope_parameters", "rope_theta", default=None) is not None
        else defaults.rope_theta,
        projector_hidden_size=top.get("projector_hidden_size", default=defaults.projector_hidden_size),
    )


def _read_hf(config: Mapping[str, Any]) -> M3Config:
    top = _Section(config, "")
    top.only("model_type", MODEL_TYPE)
    architectures = top.get("architectures", default=[ARCHITECTURE])
    _require(architectures == [ARCHITECTURE], "architectures", architectures, f"supported: [{ARCHITECTURE!r}]")
    if top.get("text_config", default=None) is None:
        _refuse("text_config", None, "is required")
    text = top.section("text_config")
    text.only("hidden_act", *ACTIVATIONS)
    text.only("qk_norm_type", "per_head")
    text.only("use_qk_norm", True)
    text.only("use_gemma_norm", True)
    text.only("attention_output_gate", False)
    text.only("scoring_func", "sigmoid")
    text.only("use_routing_bias", True)
    text.only("n_shared_experts", 1)
    text.only("norm_topk_prob", True)
    text.only("attention_bias", False)

    layers, head_dim = text.get("num_hidden_layers"), text.get("head_dim")
    _positive(f"{text.prefix}num_hidden_layers", layers)
    _positive(f"{text.prefix}head_dim", head_dim)
    sparse, sparse_layers = _read_sparse(text, layers)
    moe_layers, moe_key = text.freq("moe_layer_freq"), "moe_layer_freq"
    if moe_layers is None:
        moe_layers, moe_key = text.kinds("mlp_layer_types", "sparse", "dense"), "mlp_layer_types"
    if moe_layers is None:
        _refuse(f"{text.prefix}moe_layer_freq", None, "is required (or mlp_layer_types)")
    eos = text.get("eos_token_id", default=top.get("eos_token_id", default=[]))
    eos = eos if isinstance(eos, list | tuple) else [eos]
    _require(all(_is_int(token) for token in eos), f"{text.prefix}eos_token_id", eos, "must be token ids")
    return M3Config(
        vocab_size=text.get("vocab_size"),
        hidden_size=text.get("hidden_size"),
        num_hidden_layers=layers,
        num_attention_heads=text.get("num_attention_heads"),
        num_key_value_heads=text.get("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=_rotary_dim(text, head_dim),
        rope_theta=_rope_theta(text, "default"),
        rms_norm_eps=text.get("rms_norm_eps"),
        max_position_embeddings=text.get("max_position_embeddings"),
        dense_intermediate_size=text.get("dense_intermediate_size"),
        moe_intermediate_size=text.get("intermediate_size"),
        shared_intermediate_size=text.get("shared_intermediate_size"),
        num_experts=text.get("num_local_experts", "num_experts"),
        num_experts_per_tok=text.get("num_experts_per_tok"),
        routed_scaling_factor=text.get("routed_scaling_factor"),
        swiglu_alpha=text.get("swiglu_alpha"),
        swiglu_limit=text.get("swiglu_limit"),
        swiglu_beta=text.get("swiglu_beta", default=1.0),
        sparse_attention=sparse,
        sparse_attention_layers=sparse_layers,
        moe_layers=_same_length(text, moe_key, moe_layers, layers),
        tie_word_embeddings=bool(
            text.get("tie_word_embeddings", default=False) or top.get("tie_word_embeddings", default=False)
        ),
        bos_token_id=text.get("bos_token_id", default=top.get("bos_token_id", default=None)),
        eos_token_ids=tuple(eos),
        vision=_read_vision(top),
        image_token_id=top.get("image_token_index", "image_token_id", default=None),
        video_token_id=top.get("video_token_index", "video_token_id", default=None),
    )


def _partial_rotary_factor(rotary_dim: int, head_dim: int) -> float:
    factor = rotary_dim / head_dim
    # Readers truncate head_dim * factor: the quotient must not have been rounded down.
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, math.inf)


def _write_hf(config: M3Config) -> dict[str, Any]:
    sparse, freq = config.sparse_attention, [int(s) for s in config.sparse_attention_layers]
    eos = list(config.eos_token_ids)
    text = {
        "model_type": f"{MODEL_TYPE}_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rotary_dim": config.rotary_dim,
        "partial_rotary_factor": _partial_rotary_factor(config.rotary_dim, config.head_dim),
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "dense_intermediate_size": config.dense_intermediate_size,
        "intermediate_size": config.moe_intermediate_size,
        "shared_intermediate_size": config.shared_intermediate_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": config.routed_scaling_factor,
        "hidden_act": "swigluoai",
        "swiglu_alpha": config.swiglu_alpha,
        "swiglu_limit": config.swiglu_limit,
        "swiglu_beta": config.swiglu_beta,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "attention_output_gate": False,
        "moe_layer_freq": [int(m) for m in config.moe_layers],
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_num_index_heads": sparse.num_index_heads,
            "sparse_index_dim": sparse.index_dim,
            "sparse_block_size": sparse.block_size,
            "sparse_topk_blocks": sparse.topk_blocks,
            "sparse_init_block": sparse.init_blocks,
            "sparse_local_block": sparse.local_blocks,
            "sparse_score_type": "max",
            "sparse_attention_freq": freq,
            "sparse_disable_index_value": freq,
        },
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
    }
    top: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "tie_word_embeddings": config.tie_word_embeddings,
        "text_config": text,
    }
    if config.image_token_id is not None:
        top["image_token_index"] = config.image_token_id
    if config.video_token_id is not None:
        top["video_token_index"] = config.video_token_id
    if config.vision is not None:
        vision = dataclasses.asdict(config.vision)
        top["projector_hidden_size"] = vision.pop("projector_hidden_size")
        theta = vision.pop("rope_theta")
        top["vision_config"] = {
            "model_type": f"{MODEL_TYPE}_vision",
            "hidden_act": "gelu",
            **vision,
            "rope_parameters": {"rope_type": "axial", "rope_theta": theta},
        }
    return top
