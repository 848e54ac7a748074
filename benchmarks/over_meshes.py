"""Times of decode and prefill over several GPUs, and of the reductions in them.

    python benchmarks/over_meshes.py [--meshes tensor=4 expert=2,tensor=2] [--layers 6] [--batches 1 4 16]
        [--context 8192] [--prefill 0] [--variants nccl xla pallas] [--output benchmarks/results/meshes.json]

The released model at full width with random weights, of `--layers` layers (the first three dense, the others sparse),
drawn on the GPUs. All 60 layers on 8 GPUs, with a prefill of 32 K tokens:

    python benchmarks/over_meshes.py --meshes tensor=8 --layers 60 --prefill 32768 --variants xla pallas --output FILE

- "sum": one all-reduce of rows x hidden size. A chain of 32 runs in one jitted call, with an elementwise operation
  between two; microseconds of one link, and of a link without its reduction.
- "step": `generate`'s decode step with head and greedy choice, the pages full of random values. Calls follow one
  another without waiting for the host, as far as it keeps up; microseconds of one.
- "loop", with `--loop`: one step of `generate`'s compiled loop, which looks at the tokens after each step whether to
  go on.
- "prefill": a prompt of one sequence in chunks of `--chunk` tokens, from the first call to the last result.

Variants: "nccl" leaves every reduction to NCCL, "xla" is XLA's choice, which for few rows takes kernels of its own that
read the other GPUs' memory, and "pallas" is what `generate` does: the small sums of a decode step in a kernel that
writes to it, the others as XLA chooses. The error of a sum is its largest, over the sum of the magnitudes.
Tokens and log-probabilities of a step are compared with those of the first variant.
The floor of a step is the bytes that a GPU has to read at the card's measured copy rate: its part of the weights, of
routed experts as many as random routing is expected to choose, keys and values, index keys. The floor of a prefill is
its FLOPs, evenly over the GPUs, at the card's measured bfloat16 rate.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The released model takes more than the 75 % of 8 GPUs that JAX would.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernels import BYTES_PER_S, FLOPS_PER_S, environment  # pyright: ignore[reportAttributeAccessIssue]

from m3_jax import Greedy, M3Config, M3ForCausalLM, generation, make_mesh, random_model
from m3_jax.mesh_option import parse_mesh
from m3_jax.model import split
from m3_jax.random_weights import named_config
from m3_jax.sharding import all_reduce, over_mesh, partition_spec, peer_table, place, sums_over_peers

KERNELS = "xla_gpu_experimental_use_collective_kernels"
# Compiler options.
VARIANTS = {
    # There is no way to ask for none of them but to ask for another.
    "nccl": {KERNELS: "COLLECTIVE_KERNEL_ALL_GATHER"},
    "xla": {},
    "pallas": {},
}
CHAIN = 32
ROWS = (1, 4, 16, 64)
# Steps compared, steps of one measurement and of one loop; the cache has room for all of them.
COMPARED, CALLS, LOOPED, ROUNDS = 4, 20, 32, 7
ROOM = COMPARED + CALLS * (ROUNDS + 1) + 4
Measure = Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """An executable, the seconds that lowering and compiling took, and how its reductions are made."""

    call: jax.stages.Compiled
    seconds: float
    reductions: dict[str, int]

    @classmethod
    def of(cls, lowered: jax.stages.Lowered, lowering_s: float, variant: str) -> "Compiled":
        started = time.perf_counter()
        compiled = lowered.compile(compiler_options=dict(VARIANTS[variant]))
        seconds = lowering_s + time.perf_counter() - started
        lines = (compiled.as_text() or "").splitlines()
        # What is computed in loops counts once.
        kinds = Counter(
            line.split('kernel_strategy":"', 1)[1].split('"', 1)[0].removeprefix("KERNEL_STRATEGY_").lower()
            if 'kernel_strategy":"' in line
            else "default"
            for line in lines
            if " all-reduce(" in line or " all-reduce-start(" in line
        )
        kinds += Counter(pallas=sum(" custom-call(" in line and "all_reduce" in line for line in lines))
        return cls(compiled, seconds, dict(kinds))


def lower(jitted: Any, *args: Any) -> tuple[jax.stages.Lowered, float]:
    started = time.perf_counter()
    return jitted.lower(*args), time.perf_counter() - started


def seconds(call: Callable[[], Any], calls: int) -> float:
    """The median time of `calls` calls that follow one another, each."""

    def once() -> float:
        started = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)][-1])
        return (time.perf_counter() - started) / calls

    once()
    return statistics.median(once() for _ in range(ROUNDS))


# --- Sums


def chain(mesh: Mesh, dtype: Any, *, reduced: bool) -> Any:
    """A jitted function of rows [R, D], the same on every device: `CHAIN` times their mean over the devices."""
    devices = mesh.size

    def links(x: jax.Array, peers: jax.Array | None) -> jax.Array:
        for _ in range(CHAIN):
            # Not a mean of equal values: each device adds its own number first.
            x = (x + jax.lax.axis_index("tensor").astype(dtype)) * jnp.asarray(1 / devices, dtype)
            x = summed(x, peers) if reduced else jax.lax.optimization_barrier(x)
        return x

    return jax.jit(over_mesh(mesh, links, (PartitionSpec(), partition_spec(("devices",), mesh)), PartitionSpec()))


def one_sum(mesh: Mesh) -> Any:
    cut = partition_spec(("devices",), mesh)
    return jax.jit(over_mesh(mesh, lambda x, peers: summed(x[0], peers), (cut, cut), PartitionSpec()))


def summed(x: jax.Array, peers: jax.Array | None) -> jax.Array:
    with sums_over_peers(peers):
        return all_reduce(x, "tensor")


def peers_of(mesh: Any, variant: str) -> jax.Array | None:
    return peer_table(mesh) if variant == "pallas" else None


def sums(
    mesh: Mesh, size: int, rows: Sequence[int], variants: Sequence[str], pool: ThreadPoolExecutor
) -> Iterator[Measure]:
    """What measures each sum, being compiled."""
    devices = mesh.size
    flat = make_mesh(tensor=devices, devices=mesh.devices.flatten().tolist())
    for dtype, count in itertools.product((jnp.bfloat16, jnp.float32), rows):
        same = jax.ShapeDtypeStruct((count, size), dtype, sharding=NamedSharding(flat, PartitionSpec()))
        cut = NamedSharding(flat, PartitionSpec("tensor"))
        own = jax.ShapeDtypeStruct((devices, count, size), dtype, sharding=cut)
        bare = pool.submit(Compiled.of, *lower(chain(flat, dtype, reduced=False), same, None), "xla")
        for variant in variants:
            peers = peers_of(flat, variant)
            linked = pool.submit(Compiled.of, *lower(chain(flat, dtype, reduced=True), same, peers), variant)
            single = pool.submit(Compiled.of, *lower(one_sum(flat), own, peers), variant)
            yield functools.partial(measure_sum, flat, same, own, variant, peers, linked, bare, single)


def measure_sum(
    mesh: Mesh,
    same: Any,
    own: Any,
    variant: str,
    peers: jax.Array | None,
    linked: Future[Compiled],
    bare: Future[Compiled],
    single: Future[Compiled],
) -> dict[str, Any]:
    values = np.random.default_rng(own.shape[1]).standard_normal(own.shape, np.float32)
    parts = place(mesh, ("heads", "whole", "whole"), values.astype(own.dtype))
    exact = np.asarray(jax.device_get(parts), np.float64)
    found = np.asarray(jax.device_get(single.result().call(parts, peers)), np.float64)
    error = float(np.max(np.abs(found - exact.sum(0)) / np.abs(exact).sum(0)))
    x = place(mesh, ("whole", "whole"), np.zeros(same.shape, own.dtype))
    calls = (functools.partial(linked.result().call, x, peers), functools.partial(bare.result().call, x, None))
    us, without = (seconds(call, 4) / CHAIN * 1e6 for call in calls)
    result = {
        "what": "sum",
        "rows": same.shape[0],
        "dtype": same.dtype.name,
        "devices": mesh.size,
        "variant": variant,
        "made_by": linked.result().reductions,
        "error": error,
        "us": us,
        "without": without,
    }
    print(
        f"sum {same.shape[0]:3} x {same.shape[1]} {same.dtype.name:8} over {mesh.size} {variant:8} {us:7.1f} us, "
        f"without {without:5.1f}, error {error:.1e} {result['made_by']}",
        flush=True,
    )
    # A sum in the dtype rounds once for each addend.
    assert error < mesh.size * float(jnp.finfo(same.dtype).eps), f"the sum is wrong: {result}"
    return result


# --- The model


def shard_bytes(array: Any) -> int:
    return int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize


def step_floor(model: M3ForCausalLM, batch: int, context: int) -> dict[str, float]:
    """Bytes that the busiest device reads in a decode step, by what they are."""
    config, (structure, weights) = model.config, split(model)
    mesh = structure.mesh
    sparse, item = config.sparse_attention, jnp.dtype(model.dtype).itemsize
    data = mesh.shape["data"] if mesh is not None else 1
    sequences = -(-batch // structure.batch_parts)
    share = config.num_experts_per_tok / config.num_experts
    moved = {"weights": 0.0, "chosen experts": 0.0}
    for path, weight in jax.tree.leaves_with_path(weights):
        name = jax.tree_util.keystr(path)
        if "embed_tokens" in name and not config.tie_word_embeddings:
            continue
        if "'experts'" in name:
            moved["chosen experts"] += shard_bytes(weight) * (1 - (1 - share) ** -(-batch // data))
        else:
            moved["weights"] += shard_bytes(weight)
    heads = config.num_key_value_heads
    if mesh is not None:
        heads //= mesh.shape.get("kv", mesh.shape.get("tensor", 1))
    token = 2 * heads * config.head_dim * item
    chosen = min(sparse.topk_blocks * sparse.block_size, context)
    num_sparse = sum(config.sparse_attention_layers)
    moved["index keys"] = num_sparse * sequences * context * sparse.index_dim * item
    moved["keys and values"] = (
        sequences * token * (num_sparse * chosen + (config.num_hidden_layers - num_sparse) * context)
    )
    return moved


def prefill_flops(model: M3ForCausalLM, tokens: int) -> dict[str, float]:
    """FLOPs of a prompt of one sequence: of weights that every token meets, and of attention and choice of blocks."""
    config, (_, weights) = model.config, split(model)
    sparse = config.sparse_attention
    met = 0.0
    for path, weight in jax.tree.leaves_with_path(weights):
        name = jax.tree_util.keystr(path)
        if "embed_tokens" in name or "lm_head" in name:
            continue
        share = config.num_experts_per_tok / config.num_experts if "'experts'" in name else 1
        met += weight.size * share
    pairs = tokens * (tokens + 1) / 2
    chosen = float(np.minimum(np.arange(1, tokens + 1), sparse.topk_blocks * sparse.block_size).sum())
    heads = 4 * config.num_attention_heads * config.head_dim
    num_sparse = sum(config.sparse_attention_layers)
    index = 2 * sparse.num_index_heads * sparse.index_dim
    attention = (config.num_hidden_layers - num_sparse) * pairs * heads + num_sparse * (chosen * heads + pairs * index)
    return {"weights": 2 * met * tokens, "attention": attention}


def random_state(model: M3ForCausalLM, batch: int, context: int, sampler: Greedy, stops: Any) -> Any:
    """What `generate` carries from step to step: pages of random values in random order, `context` - 1 tokens each.

    Rows behind the batch's have finished, as `generate` pads them.
    """
    structure, weights = split(model)
    rows = structure.batch_parts * -(-batch // structure.batch_parts)
    page = model.config.sparse_attention.block_size
    blocks = generation._length_bucket(-(-(context + ROOM) // page))
    cache, hidden = generation._allocate(structure, rows, blocks * page, model.dtype)
    keys = iter(jax.random.split(jax.random.key(batch), 1000))
    layers = jax.tree.map(lambda pages: _normal(pages.shape, pages.dtype, pages.sharding)(next(keys)), cache.layers)
    rng, own = np.random.default_rng(batch), rows // structure.batch_parts
    table = np.concatenate([rng.permutation(own * blocks).reshape(own, blocks) for _ in range(structure.batch_parts)])
    is_prompt = np.arange(rows) < batch
    cache = dataclasses.replace(
        cache,
        layers=layers,
        block_table=place(structure.mesh, ("batch", "whole"), table.astype(np.int32)),
        seq_lens=place(structure.mesh, ("batch",), np.where(is_prompt, context - 1, 0).astype(np.int32)),
    )
    hidden = place(
        structure.mesh, ("batch", "whole"), rng.standard_normal(hidden.shape, np.float32).astype(hidden.dtype)
    )
    seeds = place(structure.mesh, ("batch",), np.arange(rows, dtype=np.uint32))
    prompts = place(structure.mesh, ("batch",), is_prompt)
    return generation._first_token(structure, weights, cache, hidden, seeds, prompts, sampler, stops, 16)


_DRAWS: dict[Any, Any] = {}


def _normal(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    if (shape, dtype, sharding) not in _DRAWS:
        _DRAWS[shape, dtype, sharding] = jax.jit(
            lambda key: jax.random.normal(key, shape, dtype), out_shardings=sharding
        )
    return _DRAWS[shape, dtype, sharding]


def steps(
    model: M3ForCausalLM,
    batches: Sequence[int],
    context: int,
    variants: Sequence[str],
    loops: bool,
    profile: bool,
    pool: ThreadPoolExecutor,
) -> Iterator[Measure]:
    """What measures each decode step, and each step of the loop, being compiled."""
    structure, weights = split(model)
    sampler = Greedy()
    stops = place(structure.mesh, ("whole",), np.full(1, -1, np.int32))
    for batch in batches:
        state = random_state(model, batch, context, sampler, stops)
        tables = {variant: peers_of(structure.mesh, variant) for variant in variants}
        lowered: dict[bool, list[tuple[jax.stages.Lowered, float] | None]] = {}
        for peers in tables.values():
            # Once for the variants that are compiler options alone.
            if (peers is None) not in lowered:
                args = structure, weights, state, sampler, stops
                step = lower(generation._decode_step, *args, peers)
                loop = lower(generation._decode_loop, *args, np.int32(0), peers) if loops else None
                lowered[peers is None] = [step, loop]
        del state, args
        first: list[Any] = []
        for variant, peers in tables.items():
            compiled = [pool.submit(Compiled.of, *one, variant) if one else None for one in lowered[peers is None]]
            yield functools.partial(
                measure_step, model, batch, context, sampler, stops, variant, peers, profile, *compiled, first
            )


def measure_step(
    model: M3ForCausalLM,
    batch: int,
    context: int,
    sampler: Greedy,
    stops: Any,
    variant: str,
    peers: jax.Array | None,
    profile: bool,
    step: Future[Compiled],
    loop: Future[Compiled] | None,
    first: list[Any],
) -> dict[str, Any]:
    _, weights = split(model)
    compiled = step.result()
    state = random_state(model, batch, context, sampler, stops)
    for _ in range(COMPARED):
        state = compiled.call(weights, state, sampler, stops, peers)
    made = slice(0, COMPARED + 1)
    tokens, logprobs = (np.asarray(jax.device_get(x))[:batch, made] for x in (state.tokens, state.logprobs))
    if not first:
        first += [tokens, logprobs]
    # Behind the first token that differs, sequences are different ones.
    same = np.logical_and.accumulate(tokens == first[0], axis=1)
    apart = float(np.abs(logprobs - first[1])[same].max())

    def call() -> Any:
        nonlocal state
        state = compiled.call(weights, state, sampler, stops, peers)
        return state.token

    us = seconds(call, CALLS) * 1e6
    floors = {kind: size / BYTES_PER_S * 1e6 for kind, size in step_floor(model, batch, context).items()}
    floor, equal = sum(floors.values()), float(same.mean())
    print(
        f"step {batch:3} x {context // 1024} K {variant:8} {us:8.1f} us, floor {floor:8.1f}, ratio {us / floor:.2f}, "
        f"tokens equal {equal:.2f}, logprobs apart {apart:.1e}, compile {compiled.seconds:.1f} s "
        f"{compiled.reductions}",
        flush=True,
    )
    profiled = longest(call) if profile else None
    del state
    looped = None if loop is None else measure_loop(model, batch, context, sampler, stops, peers, loop.result())
    return {
        "what": "step",
        "batch": batch,
        "context": context,
        "variant": variant,
        "made_by": compiled.reductions,
        "us": us,
        "loop": looped,
        "floor": floor,
        "floors": floors,
        "compile_s": compiled.seconds,
        "tokens_equal": equal,
        "logprobs_apart": apart,
        "profile": profiled,
    }


def longest(step: Callable[[], Any], calls: int = 5) -> dict[str, Any]:
    """The kernels of the first GPU in a step, by what they take, and how long it computes and waits; microseconds."""
    step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([step() for _ in range(calls)][-1])
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU:0")]
    events = sorted(
        (event.start_ns, event.start_ns + event.duration_ns, event.name)
        for plane in planes
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
    if not events:
        return {}
    by_name: dict[str, list[float]] = {}
    busy, reached = 0.0, 0.0
    for start, end, name in events:
        by_name.setdefault(name, []).append((end - start) / 1e3)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    rows = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:16]
    result = {
        "span": (reached - events[0][0]) / 1e3 / calls,
        "busy": busy / 1e3 / calls,
        "launches": len(events) / calls,
        "longest": [{"kernel": name, "launches": len(times) / calls, "us": sum(times) / calls} for name, times in rows],
    }
    print(
        f"    of it the first GPU computes {result['busy']:.1f} us, in {result['launches']:.0f} launches; a profiled "
        f"step takes {result['span']:.1f} us",
        flush=True,
    )
    for row in result["longest"]:
        print(f"    {row['us']:9.2f} us {row['launches']:6.1f} x {row['kernel'][:90]}", flush=True)
    return result


def measure_loop(
    model: M3ForCausalLM,
    batch: int,
    context: int,
    sampler: Greedy,
    stops: Any,
    peers: jax.Array | None,
    loop: Compiled,
) -> float:
    _, weights = split(model)
    state = jax.block_until_ready(random_state(model, batch, context, sampler, stops))
    times, ended = [], 1
    for number in (4, *(LOOPED,) * 3):
        ended += number
        started = time.perf_counter()
        state = jax.block_until_ready(loop.call(weights, state, sampler, stops, np.int32(ended), peers))
        times.append((time.perf_counter() - started) / number * 1e6)
    print(f"    in the loop {statistics.median(times[1:]):.1f} us", flush=True)
    return statistics.median(times[1:])


def prefill(
    model: M3ForCausalLM, tokens: int, chunk: int, variants: Sequence[str], pool: ThreadPoolExecutor
) -> Iterator[Measure]:
    """What measures the prefill, being compiled."""
    structure, weights = split(model)
    chunk = min(chunk, tokens)
    if tokens % chunk:
        raise ValueError(f"--prefill {tokens} must be a multiple of --chunk {chunk}")
    calls = PrefillCalls(model, tokens, chunk)
    cache, hidden = calls.empty()
    lowered = lower(generation._prefill, structure, weights, cache, hidden, calls.parts[0], calls.query_lens)
    for variant in variants:
        yield functools.partial(measure_prefill, calls, variant, pool.submit(Compiled.of, *lowered, variant))


class PrefillCalls:
    """The arguments of a prompt's passes: one sequence, beside empty ones where the mesh cuts the batch."""

    def __init__(self, model: M3ForCausalLM, tokens: int, chunk: int):
        self.model, self.tokens, self.chunk = model, tokens, chunk
        self.structure, self.weights = split(model)
        self.rows = self.structure.batch_parts
        prompt = np.zeros((self.rows, tokens), np.int32)
        prompt[0] = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)
        self.parts = [
            place(self.structure.mesh, ("batch", "whole"), np.ascontiguousarray(prompt[:, start : start + chunk]))
            for start in range(0, tokens, chunk)
        ]
        self.query_lens = place(
            self.structure.mesh, ("batch",), np.where(np.arange(self.rows) == 0, chunk, 0).astype(np.int32)
        )

    def empty(self) -> Any:
        page = self.model.config.sparse_attention.block_size
        length = generation._length_bucket(-(-self.tokens // page)) * page
        return generation._allocate(self.structure, self.rows, length, self.model.dtype)


def measure_prefill(calls: PrefillCalls, variant: str, compiled: Future[Compiled]) -> dict[str, Any]:
    cache, hidden = calls.empty()
    mesh = calls.structure.mesh
    times = []
    for _ in range(4):
        cache = dataclasses.replace(cache, seq_lens=place(mesh, ("batch",), np.zeros(calls.rows, np.int32)))
        jax.block_until_ready(cache)
        started = time.perf_counter()
        for part in calls.parts:
            cache, hidden = compiled.result().call(calls.weights, cache, hidden, part, calls.query_lens)
        jax.block_until_ready(hidden)
        times.append(time.perf_counter() - started)
    devices = 1 if mesh is None else mesh.size
    flops = prefill_flops(calls.model, calls.tokens)
    floors = {kind: number / FLOPS_PER_S / devices * 1e6 for kind, number in flops.items()}
    us = statistics.median(times[1:]) * 1e6
    result = {
        "what": "prefill",
        "tokens": calls.tokens,
        "chunk": calls.chunk,
        "variant": variant,
        "made_by": compiled.result().reductions,
        "us": us,
        "floor": sum(floors.values()),
        "floors": floors,
        "compile_s": compiled.result().seconds,
    }
    print(
        f"prefill {calls.tokens} in {calls.chunk}s {variant:8} {us / 1e3:8.1f} ms, floor "
        f"{result['floor'] / 1e3:8.1f}, reaches {result['floor'] / us:.0%}, compile {result['compile_s']:.1f} s "
        f"{result['made_by']}",
        flush=True,
    )
    return result


@contextlib.contextmanager
def turn(file: Path | None, processes: int) -> Iterator[None]:
    """Where several processes share the GPUs: waits until all have compiled, then holds a lock."""
    if file is None:
        yield
        return
    with file.open("a+") as handle:
        handle.write("compiled\n")
        handle.flush()
        while file.read_text().count("compiled") < processes:
            time.sleep(0.1)
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def measure(
    config: M3Config,
    sizes: dict[str, int],
    *,
    batches: Sequence[int],
    context: int,
    prefill_tokens: int = 0,
    chunk: int = 8192,
    variants: Sequence[str] = tuple(VARIANTS),
    rows: Sequence[int] = ROWS,
    loops: bool = False,
    profile: bool = False,
    alone: Any = None,
) -> dict[str, Any]:
    """All figures of one mesh."""
    mesh = make_mesh(data=sizes["data"], expert=sizes["expert"], tensor=sizes["tensor"])
    name = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
    started = time.perf_counter()
    model = jax.block_until_ready(random_model(config, mesh=mesh if mesh.size > 1 else None))
    draw_s = time.perf_counter() - started
    print(f"{name}: {config.num_hidden_layers} layers drawn in {draw_s:.1f} s", flush=True)
    started = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        measures = list(steps(model, batches, context, variants, loops, profile, pool))
        if mesh.size > 1:
            measures += sums(mesh, config.hidden_size, rows, variants, pool)
        if prefill_tokens:
            measures += prefill(model, prefill_tokens, chunk, variants, pool)
    compile_s = time.perf_counter() - started
    print(f"{name}: compiled in {compile_s:.1f} s", flush=True)
    with alone or contextlib.nullcontext():
        results = [measured() for measured in measures]
        del measures
    return {
        "mesh": name,
        "devices": mesh.size,
        "layers": config.num_hidden_layers,
        "draw_s": draw_s,
        "compile_s": compile_s,
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=["tensor=4", "expert=2,tensor=2"], metavar="AXIS=SIZE,...")
    parser.add_argument("--config", default="m3", help="m3, tiny, or the path of a config.json")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=8192, help="tokens of each sequence, the new one included")
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prompt; 0: no prefill")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a pass of the prefill")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="rows of the sums")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--loop", action="store_true", help="also a step of the compiled loop")
    parser.add_argument("--profile", action="store_true", help="also the longest kernels of a step")
    parser.add_argument("--turns", type=Path, help="a new file by which several processes measure in turns")
    parser.add_argument("--processes", type=int, default=1, help="how many they are")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    config = named_config(args.config)
    if not 1 <= args.layers <= config.num_hidden_layers:
        parser.error(f"--layers {args.layers}: must be 1 to {config.num_hidden_layers}, as the model has")
    config = dataclasses.replace(config.with_layers(config.layer_kinds[: args.layers]), vision=None)
    known = environment("flax") | {"devices": len(jax.devices()), "xla_flags": os.environ.get("XLA_FLAGS", "")}
    record: dict[str, Any] = {"meshes": []}
    for text in args.meshes:
        measured = measure(
            config,
            parse_mesh(text),
            batches=args.batches,
            context=args.context,
            prefill_tokens=args.prefill,
            chunk=args.chunk,
            variants=args.variants,
            rows=args.rows,
            loops=args.loop,
            profile=args.profile,
            alone=turn(args.turns, args.processes),
        )
        record["meshes"].append({"environment": known} | measured)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
