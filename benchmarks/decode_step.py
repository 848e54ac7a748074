"""Times of decode at the released model's widths, beside the bytes that have to move.

    python benchmarks/decode_step.py [--cases TEXT ...] [--output benchmarks/results/decode_step.json]

"module" is the sparse layers' attention: projections, norms, rotation, cache write, choice of blocks, attention and
output projection. Several modules, each with weights and pages of its own, follow one another in one jitted call,
and the figures are those of one module. "step" is a decode step of three dense and three sparse (MoE) layers, with
embedding and final norm, without and with head and greedy choice. The cache is donated, as `generate` does it.
`kernels` is the sum of the kernels' durations as CUPTI gives them, and `call` the time of calls from an idle GPU on,
which with so few layers wait for the host; medians, in microseconds. The floor is the bytes at 4.3 TB/s, the card's
measured copy rate: weights that take part (of the experts those that were chosen), keys and values, index keys.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from kernels import BYTES_PER_S, environment, time_jitted  # pyright: ignore[reportAttributeAccessIssue]

from m3_jax.attention import Attention
from m3_jax.cache import Cache, LayerCache, Step
from m3_jax.config import M3Config
from m3_jax.layers import rotary_tables
from m3_jax.model import M3ForCausalLM
from m3_jax.moe import Router

M3 = M3Config.m3()
SIX_LAYERS = dataclasses.replace(M3.with_layers(M3.layer_kinds[:6]), vision=None)
# Modules of one call, as far as their pages find room.
MOST_MODULES, MOST_CACHE_BYTES = 4, 40e9
DTYPE = jnp.dtype(jnp.bfloat16)
ITEM = DTYPE.itemsize
PAGE = M3.sparse_attention.block_size


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: "module" or "step", with or without the head; tokens in the cache, the new one included."""

    what: str
    batch: int
    context: int
    head: bool = False

    @property
    def name(self) -> str:
        head = " with head" if self.head else ""
        return f"{self.what}{head} {self.batch} x {self.context // 1024} K"

    @property
    def config(self) -> M3Config:
        return SIX_LAYERS if self.what == "step" else M3


CASES = (
    Case("module", 1, 8192),
    Case("step", 1, 8192),
    Case("module", 1, 131_072),
    Case("step", 16, 8192),
    Case("step", 1, 131_072),
    Case("step", 16, 131_072),
    *(Case("module", 1, context) for context in (32_768, 1_048_576)),
    *(Case("module", 64, context) for context in (8192, 32_768, 131_072)),
    *(Case("step", batch, 8192, head=True) for batch in (1, 16)),
)


def random_weights(model: Callable[[], nnx.Module]) -> tuple[Any, nnx.State]:
    """A graph definition and normal weights, made array by array on the device; experts all get the same."""
    graphdef, state = nnx.split(nnx.eval_shape(model))
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 10_000))

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return _normal(next(keys), leaf.shape, leaf.dtype)

    return graphdef, jax.tree.map(fill, state)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What takes gigabytes (experts) repeats along its first dimension: to draw it takes memory several times over."""
    drawn = shape[1:] if math.prod(shape) > 2**31 else shape
    return jnp.broadcast_to(0.02 * jax.random.normal(key, drawn, dtype), shape)


def random_cache(config: M3Config, batch: int, context: int, seed: int = 0) -> Cache:
    """Pages in random order, filled with normal values; `seq_lens` is one less than `context`."""
    blocks = -(-context // PAGE)
    shapes = jax.eval_shape(lambda: Cache.allocate(config, batch, context, dtype=DTYPE))
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 1000))
    layers = jax.tree.map(lambda x: 50 * _normal(next(keys), x.shape, x.dtype), shapes.layers)
    table = np.random.default_rng(seed).permutation(batch * blocks).reshape(batch, blocks)
    return Cache(layers, jnp.asarray(table, jnp.int32), jnp.full(batch, context - 1, jnp.int32))


class Donating:
    """A jitted function (fixed, donated) -> (result, donated), called again and again with what it gave back.

    `measure` of JAX's profiler takes what has the methods of a jitted function as it is.
    """

    def __init__(self, function: Callable[..., Any], fixed: Any, donated: Any):
        self._jitted = jax.jit(function, donate_argnums=1)
        self._fixed, self._donated = fixed, donated
        started = time.perf_counter()
        self._compiled = self._jitted.lower(fixed, donated).compile()
        self.compile_s = time.perf_counter() - started

    def __call__(self) -> Any:
        result, self._donated = self._compiled(self._fixed, self._donated)
        return result

    @property
    def hlo(self) -> str:
        return self._compiled.as_text() or ""

    def trace(self) -> Any:
        return self._jitted.trace(self._fixed, self._donated)

    def lower(self) -> Any:
        return self._jitted.lower(self._fixed, self._donated)


def module_call(case: Case) -> tuple[Donating, int, dict[str, float]]:
    """The modules one after another, how many they are, and the bytes that one of them moves."""
    token = ITEM * (2 * M3.num_key_value_heads * M3.head_dim + M3.sparse_attention.index_dim)
    count = int(max(1, min(MOST_MODULES, MOST_CACHE_BYTES // (case.batch * case.context * token))))
    config = M3.with_layers([(True, True)] * count)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: _attention(config)))
    weights = [random_weights(lambda: _attention(config))[1] for _ in range(count)]
    cache = random_cache(config, case.batch, case.context)
    x = _normal(jax.random.key(1), (case.batch, 1, config.hidden_size), DTYPE) * 50

    def run(fixed: Any, layers: tuple[LayerCache, ...]) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        weights, x, table, context_lens = fixed
        step = Step(True, context_lens, jnp.ones_like(context_lens), table, 1)
        rotary = rotary_tables(step.positions, config.rotary_dim, config.rope_theta)
        written = []
        for state, layer in zip(weights, layers, strict=True):
            out, layer, _ = nnx.merge(graphdef, state)(x, rotary, layer, step)
            # As the residual stream and the norm before the next module would, but for their traffic.
            x = x + out
            written.append(layer)
        return x, tuple(written)

    moved = {"weights": _bytes(weights[0])} | _cache_bytes(case, sparse=1)
    return Donating(run, (weights, x, cache.block_table, cache.seq_lens), cache.layers), count, moved


def _attention(config: M3Config) -> Attention:
    return Attention(config, sparse=True, dtype=DTYPE, rngs=nnx.Rngs(0))


@functools.cache
def step_weights() -> tuple[Any, nnx.State]:
    return random_weights(lambda: M3ForCausalLM(SIX_LAYERS, dtype=DTYPE, rngs=nnx.Rngs(0)))


def step_call(case: Case) -> tuple[Donating, int, dict[str, float]]:
    """The decode step, 1, and the bytes that it moves."""
    config = case.config
    graphdef, weights = step_weights()
    cache = random_cache(config, case.batch, case.context)
    tokens = jax.random.randint(jax.random.key(2), (case.batch, 1), 0, config.vocab_size)

    def forward(fixed: Any, layers: tuple[LayerCache, ...]) -> tuple[M3ForCausalLM, Any]:
        weights, tokens, table, context_lens = fixed
        model = nnx.merge(graphdef, weights)
        return model, model.forward(tokens, Cache(layers, table, context_lens), decode=True)

    def run(fixed: Any, layers: tuple[LayerCache, ...]) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        model, output = forward(fixed, layers)
        result = jnp.argmax(model.logits(output.last_hidden), axis=-1) if case.head else output.last_hidden
        return result, output.cache.layers

    fixed = (weights, tokens, cache.block_table, cache.seq_lens)
    experts = chosen_experts(forward, fixed, cache.layers)
    moved: dict[str, float] = {}
    for number in range(config.num_hidden_layers):
        layer = weights["layers"][number]
        mlp = dict(layer["mlp"])
        if config.moe_layers[number]:
            share = experts[len([m for m in config.moe_layers[:number] if m])] / config.num_experts
            routed = mlp.pop("experts")
            moved["chosen experts"] = moved.get("chosen experts", 0) + _bytes(routed) * share
            moved["router and shared expert"] = moved.get("router and shared expert", 0) + _bytes(mlp)
        else:
            moved["dense MLP"] = moved.get("dense MLP", 0) + _bytes(mlp)
        moved["attention weights"] = moved.get("attention weights", 0) + _bytes(layer["self_attn"])
    sparse = sum(config.sparse_attention_layers)
    moved |= _cache_bytes(case, sparse=sparse, dense=config.num_hidden_layers - sparse)
    if case.head:
        moved["head"] = _bytes(weights["lm_head"])
    return Donating(run, fixed, cache.layers), 1, moved


def chosen_experts(forward: Callable[..., Any], *args: Any) -> list[int]:
    """How many experts each MoE layer's router chooses for the batch of forward(*args)."""
    found: list[jax.Array] = []
    call = Router.__call__

    def recording(self: Router, x: jax.Array) -> Any:
        weights, ids = call(self, x)
        found.append(ids)
        return weights, ids

    def ids_of(*args: Any) -> list[jax.Array]:
        forward(*args)
        return list(found)

    Router.__call__ = recording  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return [len(np.unique(ids)) for ids in jax.jit(ids_of)(*args)]
    finally:
        Router.__call__ = call


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cache_bytes(case: Case, *, sparse: int, dense: int = 0) -> dict[str, float]:
    token = 2 * M3.num_key_value_heads * M3.head_dim * ITEM
    chosen = min(M3.sparse_attention.topk_blocks * PAGE, case.context)
    moved: dict[str, float] = {
        "index keys": sparse * case.batch * case.context * M3.sparse_attention.index_dim * ITEM,
        "chosen keys and values": sparse * case.batch * chosen * token,
    }
    return moved | ({"all keys and values": dense * case.batch * case.context * token} if dense else {})


# What kernels of ours move, by the names of `moved`.
MOVES = {
    "attend": "chosen keys and values",
    "attend_all": "all keys and values",
    "multiply_groups": "chosen experts",
    "score": "index keys",
}


def longest(call: Donating, count: int, floors: dict[str, float]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The ten kernels that take most of a call's time, beside their floors, and all in their order; microseconds."""
    from jax.experimental.mosaic.gpu import profiler

    kernels: Any
    _, kernels = profiler.Cupti(finalize=False).measure(call, aggregate=False)()
    ordered = [(name, duration * 1e3) for name, duration in kernels]
    groups: dict[str, list[float]] = {}
    for name, duration in ordered:
        groups.setdefault(name.removesuffix("_mosaic_gpu_kernel"), []).append(duration)
    fusions = fusions_of(call.hlo)
    rows = []
    for name, durations in sorted(groups.items(), key=lambda item: -sum(item[1]))[:10]:
        what, num_bytes = fusions.get(name, (name, None))
        floor = None if num_bytes is None else num_bytes / BYTES_PER_S * 1e6 * len(durations) / count
        if name in MOVES:
            floor = floors.get(MOVES[name])
        us = sum(durations) / count
        if floor is not None and floor > us:
            floor = None  # a gather, which does not read all of its operand
        rows.append({"kernel": name, "what": what, "launches": len(durations) / count, "us": us, "floor": floor})
    return rows, ordered


def fusions_of(hlo: str) -> dict[str, tuple[str, int]]:
    """By kernel name, what XLA's fusions read most of and the bytes of their operands and results."""
    shapes: dict[str, int] = {}
    weights: dict[str, str] = {}
    fusions = {}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        found = re.match(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)[,\s]", line)
        if not found:
            continue
        name, result, kind, operands = found.groups()
        shapes[name] = _bytes_of_shapes(result)
        op_name = re.search(r'op_name="([^"]*)"', line)
        if kind == "parameter" and op_name:
            weights[name] = " ".join(re.findall(r"[a-z_]\w*|\d+", op_name[1].split("]", 1)[-1]))
        if kind == "bitcast" and (operand := operands.split("%")[-1]) in weights:
            weights[name] = weights[operand]
        if kind == "fusion":
            used = re.findall(r"%([^\s,]+)", operands)
            most = max(used, key=lambda operand: shapes.get(operand, 0), default="")
            what = op_name[1].split("/", 1)[-1] if op_name else name
            what = weights.get(most, what) if shapes.get(most, 0) > 2**20 else what
            fusions[name.replace(".", "_")] = (what, shapes[name] + sum(shapes.get(operand, 0) for operand in used))
    return fusions


def _bytes_of_shapes(text: str) -> int:
    sizes = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
    return sum(
        sizes.get(dtype, 8) * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", text)
    )


def measure(case: Case) -> dict[str, Any]:
    call, count, moved = (module_call if case.what == "module" else step_call)(case)
    floors = {name: num_bytes / BYTES_PER_S * 1e6 for name, num_bytes in moved.items()}
    times = time_jitted(call, count) | {"compile_s": call.compile_s}
    del times["by_kernel"]
    table, ordered = longest(call, count, floors)
    result = {"case": dataclasses.asdict(case), "name": case.name, "floor": sum(floors.values()), "floors": floors}
    return result | times | {"longest": table, "kernels_in_order": ordered}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[""], help="parts of the names of the cases to run")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--verbose", action="store_true", help="print every kernel in its order")
    args = parser.parse_args()
    results = []
    for case in CASES:
        if not any(part in case.name for part in args.cases):
            continue
        result = measure(case)
        ordered = result.pop("kernels_in_order")
        results.append(result)
        print(
            f"{case.name:26} floor {result['floor']:8.1f} kernels {result['kernels']:8.1f} "
            f"call {result['call']:8.1f} launches {result['launches']:6.1f} "
            f"compile {result['compile_s']:.1f} s",
            flush=True,
        )
        print("   ", {name: round(value, 1) for name, value in result["floors"].items()}, flush=True)
        for row in result["longest"]:
            floor = "" if row["floor"] is None else f"{row['floor']:9.2f}"
            print(f"    {row['us']:9.2f} us, floor {floor:9} {row['launches']:6.1f} x {row['kernel']}: {row['what']}")
        if args.verbose:
            for name, duration in ordered:
                print(f"        {duration:9.2f} {name[:120]}")
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(
                json.dumps({"environment": environment("flax"), "results": results}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
