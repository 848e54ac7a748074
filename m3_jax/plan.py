"""What a model takes of every device's memory, before any of it is allocated.

    python -m m3_jax.plan --mesh tensor=8 --context 131072 --batch 4

Weights and cache are counted exactly, shard by shard. For the temporary memory of a pass there are two sources:

- "compiled": XLA's own account of the executables that `generate` would run (`memory_analysis`), for a model cut to
  a few layers of each kind, since the layers of a pass take turns with the same memory. It needs the devices of the
  mesh, and the time of a compilation; nothing is run.
- "formula": the largest arrays that live together in a pass on a GPU, added up here by hand. It needs no device.

The command takes the first on a GPU machine that has the devices, and else the second. Not counted: what CUDA and NCCL
keep for themselves outside of JAX's pool, about 1 GB a GPU.
"""

import dataclasses
import math
import os
import re
import sys
from collections import Counter
from typing import Any

import click
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from m3_jax import generation
from m3_jax.abstract_model import abstract_model
from m3_jax.cache import Cache
from m3_jax.config import M3Config
from m3_jax.mesh_option import parse_mesh
from m3_jax.model import M3ForCausalLM, Structure, split
from m3_jax.moe import GATHER_ROWS
from m3_jax.random_weights import named_config
from m3_jax.sampling import Greedy
from m3_jax.sharding import MESH_AXES, make_mesh, mesh_of

SOURCES = ("compiled", "formula")
# Layers of each kind in the model that is compiled: with two, a layer's output lives beside the next one's input.
COMPILED_LAYERS = 2
# An H200 as its maker counts.
DEFAULT_MEMORY = "141GB"
MiB, GB = 2**20, 10**9


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device, the one that holds most.

    Attributes:
      weights: shards of all weights.
      cache: pages of all layers and what goes with them.
      passes: temporary memory of each kind of pass, "prefill", "first token" and "decode"; only one runs at a time.
      source: where `passes` come from, "compiled" or "formula".
    """

    weights: int
    cache: int
    passes: dict[str, int]
    source: str

    @property
    def activations(self) -> int:
        """Temporary memory of the pass that takes most."""
        return max(self.passes.values())

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.cache + self.activations

    def check(self, memory: int) -> None:
        """Raises `ValueError` with the numbers where a device with so many bytes is too small."""
        if self.total > memory:
            raise ValueError(
                f"does not fit: {_gb(self.total)} a device are needed (weights {_gb(self.weights)}, cache "
                f"{_gb(self.cache)}, activations {_gb(self.activations)}), {_gb(memory)} are there"
            )


def _gb(nbytes: int) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB / 10 else f"{nbytes / GB:.4f} GB"


def plan(
    config: M3Config,
    *,
    context: int,
    batch: int,
    mesh: Mesh | AbstractMesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    prefill_chunk: int = generation.PREFILL_CHUNK,
    source: str = "formula",
) -> MemoryPlan:
    """The memory of `generate` for `batch` prompts, each of up to `context` tokens with what it generates.

    Args:
      config: the model's sizes.
      context: tokens of prompt and continuation together.
      batch: prompts.
      mesh: as for `load`, or an abstract mesh of the same axes where there are no such devices; None: one device.
      dtype: of weights, cache and activations.
      prefill_chunk: as for `generate`.
      source: "compiled" or "formula", see the module; "compiled" needs a mesh of devices.

    Raises `ValueError` for sizes out of range and weights that do not divide over the mesh.
    """
    for name, value in (("context", context), ("batch", batch), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if context > config.max_position_embeddings:
        raise ValueError(f"context={context}: the model has max_position_embeddings={config.max_position_embeddings}")
    if source not in SOURCES:
        raise ValueError(f"source={source!r}: must be one of {', '.join(SOURCES)}")
    if source == "compiled" and isinstance(mesh, AbstractMesh):
        raise ValueError("source='compiled' needs a mesh of devices, not an abstract one")
    model = abstract_model(config, dtype=dtype, mesh=mesh)
    call = _Call.of(model, context, batch, prefill_chunk)
    if source == "compiled":
        small = abstract_model(_few_layers(config), dtype=dtype, mesh=mesh)
        passes = _compiled(_Call.of(small, context, batch, prefill_chunk))
    else:
        passes = _formula(call)
    return MemoryPlan(_shard_bytes(call.weights), _shard_bytes((call.cache, call.hidden)), passes, source)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The arguments that `generate` gives to its passes, without values: `jax.ShapeDtypeStruct`s with their places."""

    structure: Structure
    weights: nnx.State
    cache: Cache
    hidden: jax.ShapeDtypeStruct
    context: int
    chunk: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, model: M3ForCausalLM, context: int, batch: int, prefill_chunk: int) -> "_Call":
        """As `generate` rounds sizes up."""
        structure, weights = split(model)
        parts, page = structure.batch_parts, model.config.sparse_attention.block_size
        rows = parts * generation._power_of_two(-(-batch // parts))
        length = generation._length_bucket(-(-context // page)) * page
        chunk = max(size for _, size in generation._chunks(context, prefill_chunk))
        cache, hidden = jax.eval_shape(lambda: generation._allocate(structure, rows, length, model.dtype))
        call = cls(structure, weights, cache, hidden, length, chunk, model.dtype)
        return dataclasses.replace(
            call,
            cache=call.placed(cache, generation._cache_specs(structure)),
            hidden=call.placed(hidden, structure.spec("batch")),
        )

    @property
    def config(self) -> M3Config:
        """The model's sizes."""
        return self.structure.config

    @property
    def batch(self) -> int:
        """Sequences on all devices."""
        return self.hidden.shape[0]

    def placed(self, arrays: Any, specs: Any) -> Any:
        """Abstract arrays with their places: on the mesh, cut by `specs`, or where the weights are."""
        mesh = self.structure.mesh
        single = jax.tree.leaves(self.weights)[0].sharding

        def at(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=single if mesh is None else NamedSharding(mesh, spec)
            )

        if isinstance(specs, PartitionSpec):
            return jax.tree.map(lambda x: at(x, specs), arrays)
        return jax.tree.map(at, arrays, specs)

    def rows(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An argument with an entry for every sequence."""
        return self.placed(jax.ShapeDtypeStruct((self.batch, *shape), dtype), self.structure.spec("batch"))

    def whole(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An integer argument that every device has."""
        return self.placed(jax.ShapeDtypeStruct(shape, jnp.int32), PartitionSpec())


def _shard_bytes(arrays: Any) -> int:
    """Bytes of one device's shards; all devices have equal ones."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _few_layers(config: M3Config) -> M3Config:
    """The first layers of each kind, in their order."""
    seen: Counter[tuple[bool, bool]] = Counter()
    kept = []
    for kind in config.layer_kinds:
        seen[kind] += 1
        if seen[kind] <= COMPILED_LAYERS:
            kept.append(kind)
    return config.with_layers(kept)


def _compiled(call: _Call) -> dict[str, int]:
    """What XLA reserves for each pass beyond its arguments; donated ones come back in place."""
    structure, weights = call.structure, call.weights
    sampler, stops, capacity = Greedy(), call.whole(1), generation.MIN_CHUNK
    first = (weights, call.cache, call.hidden, call.rows(dtype=jnp.uint32), call.rows(dtype=jnp.bool_))
    state = jax.eval_shape(lambda *args: generation._first_token(structure, *args, sampler, stops, capacity), *first)
    state = call.placed(state, PartitionSpec() if structure.mesh is None else generation._state_specs(structure))
    lowered = {
        "prefill": generation._prefill.lower(structure, *first[:3], call.rows(call.chunk), call.rows()),
        "first token": generation._first_token.lower(structure, *first, sampler, stops, capacity),
        "decode": generation._decode_loop.lower(structure, weights, state, sampler, stops, call.whole()),
    }
    passes = {}
    for name, program in lowered.items():
        stats = program.compile().memory_analysis()
        if stats is None:
            raise ValueError(f"source='compiled': {jax.default_backend()} does not tell the memory of an executable")
        passes[name] = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return passes


# Of Hopper's prefill kernels: partial results held at a time, and bytes of one, 16 heads of so many words for bfloat16
# and for float16. See `pallas_kernels.sparse_attention.mosaic_gpu_partials`.
PARTIALS, PARTIAL_BYTES, WIDE_PARTIAL_BYTES = 2**19, 16 * 42 * 4, 16 * 64 * 4
# Up to so many blocks a sequence there is one more for each (token, KV head) held at a time.
COMMON_BLOCKS = 64
# What a decode step's kernels leave for each other; XLA reserves 1 to 32 MB for it.
DECODE_BYTES = 16 * MiB


def _formula(call: _Call) -> dict[str, int]:
    """The arrays that live together in each pass, on a Hopper GPU with its kernels.

    A layer carries the residual along; over `tensor`, while attention runs, also its norm and a sum on its way. The
    largest of attention, dense and sparse, and MLP, dense and of experts, comes on top. Beside XLA's account of layers
    of the released model on meshes of 1, 2 and 8 GPUs, batch 1 to 16, context 8 K to 1 M, prefill is 2 % less to 35 %
    more, at full size 0.3 % of the total.
    """
    config, mesh = call.config, mesh_of(call.weights)
    tensor, expert = (1, 1) if mesh is None else (mesh.shape["tensor"], mesh.shape["expert"])
    item, size, channels = call.dtype.itemsize, config.hidden_size, config.head_dim
    sequences = call.batch // call.structure.batch_parts
    rows = sequences * call.chunk
    heads = config.num_attention_heads // tensor
    kv_heads = max(1, config.num_key_value_heads // tensor)
    residual = rows * size * item
    carried = residual if tensor == 1 else 3 * residual
    queries = rows * heads * channels
    top_k = config.sparse_attention.topk_blocks
    chosen = min(rows * kv_heads * top_k, PARTIALS)
    if call.context <= COMMON_BLOCKS * config.sparse_attention.block_size:
        chosen += chosen // top_k
    partial_bytes = PARTIAL_BYTES if call.dtype == jnp.bfloat16 else WIDE_PARTIAL_BYTES
    pairs, width = rows * config.num_experts_per_tok, config.moe_intermediate_size // tensor
    # Rows of each expert and their products; where they are exchanged, a round's of both and all that came back.
    routed = residual + pairs * (2 * size + width) * item
    if expert > 1 and rows * expert > GATHER_ROWS:
        routed = 3 * residual + pairs * size * item + 5 * pairs * (2 * size + width) * item // 4
    kinds = {
        (True, None): carried + queries * item + chosen * partial_bytes,
        # The pages gathered, and the part of them before the chunk and the chunk's own in float32.
        (False, None): carried + 2 * sequences * call.context * kv_heads * channels * item + queries * (item + 2 * 4),
        (None, True): routed,
        (None, False): carried + 3 * rows * (config.dense_intermediate_size // tensor) * item,
    }
    present = {(sparse, None) for sparse in config.sparse_attention_layers}
    present |= {(None, moe) for moe in config.moe_layers}
    logits = 2 * sequences * config.vocab_size * 4
    return {
        "prefill": max(kinds[kind] for kind in present),
        "first token": logits,
        "decode": logits + DECODE_BYTES,
    }


UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for kind, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("kMGT")
}


def parse_bytes(text: str) -> int:
    """Bytes from a number and a unit: "141GB", "131GiB", "1.5 TB", "800000000".

    Raises `ValueError` for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise ValueError(f"memory {text!r}: must be a number above 0 and a unit of {', '.join(filter(None, UNITS))}")
    return int(float(found[1]) * UNITS[found[2]])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "name", default="m3", show_default=True, help="m3, tiny, or the path of a config.json.")
@click.option(
    "--mesh", "mesh_text", default="tensor=1", show_default=True, metavar="AXIS=SIZE,...", help="The devices."
)
@click.option("--context", required=True, type=click.IntRange(min=1), help="Tokens of prompt and continuation.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Prompts.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option(
    "--prefill-chunk", default=generation.PREFILL_CHUNK, show_default=True, type=click.IntRange(min=1), help="Tokens."
)
@click.option(
    "--memory",
    metavar="BYTES",
    help=f"Of a device, such as 141GB; default: what JAX may take of the GPU that is here, else {DEFAULT_MEMORY}.",
)
@click.option("--source", type=click.Choice(SOURCES), help="Of activations; default: compiled on a GPU, else formula.")
def main(
    name: str,
    mesh_text: str,
    context: int,
    batch: int,
    dtype: str,
    prefill_chunk: int,
    memory: str | None,
    source: str | None,
) -> None:
    """Print what a model takes of every device's memory, allocating none of it.

    Ends with exit status 1 and one line where it does not fit. JAX takes 75 % of a GPU unless
    XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """
    # Looking at a GPU must not take its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        config, sizes = named_config(name), parse_mesh(mesh_text)
        devices = math.prod(sizes.values())
        mesh = _mesh(sizes) if devices > 1 else None
        here = jax.default_backend() == "gpu" and not isinstance(mesh, AbstractMesh)
        planned = plan(
            config,
            context=context,
            batch=batch,
            mesh=mesh,
            dtype=dtype,
            prefill_chunk=prefill_chunk,
            source=source or ("compiled" if here else "formula"),
        )
        if memory is not None:
            available, whose = parse_bytes(memory), "--memory"
        elif jax.default_backend() == "gpu":
            available, whose = jax.local_devices()[0].memory_stats()["bytes_limit"], "JAX's part of this GPU"
        else:
            available, whose = parse_bytes(DEFAULT_MEMORY), "an H200"
        click.echo(f"{name}, {dtype}, {devices} device{'s' * (devices > 1)}: {', '.join(_sizes(sizes))}")
        click.echo(f"{batch} prompts of up to {context:,} tokens, prefill in chunks of {prefill_chunk:,}")
        lines = [
            ("weights", planned.weights, ""),
            ("cache", planned.cache, ""),
            ("activations", planned.activations, planned.source),
            *((f"  {kind}", nbytes, "") for kind, nbytes in planned.passes.items()),
            ("total", planned.total, ""),
            ("memory", available, whose),
        ]
        for title, nbytes, remark in lines:
            click.echo(f"{title:<14}{nbytes:>18,} bytes {nbytes / GB:>9.2f} GB  {remark}".rstrip())
        planned.check(available)
    except (OSError, ValueError) as error:
        click.echo(f"m3_jax.plan: error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


def _sizes(sizes: dict[str, int]) -> list[str]:
    return [f"{axis}={size}" for axis, size in sizes.items()]


def _mesh(sizes: dict[str, int]) -> Mesh | AbstractMesh:
    """The devices that are here, or as many that are not."""
    if math.prod(sizes.values()) <= len(jax.devices()):
        return make_mesh(data=sizes["data"], expert=sizes["expert"], tensor=sizes["tensor"])
    return AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


if __name__ == "__main__":
    main()
