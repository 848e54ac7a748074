"""Measures which configurations of the kernels are fastest on this GPU, and writes the file that they are read from.

    python -m pallas_kernels.tuning [--operations TEXT ...] [--output FILE]

An operation is compiled and timed with its kernels' heuristics, and then, one of its kernels after the other, with
every combination of the values that the kernel's configuration lists as CANDIDATES. What takes part is whatever asks
`pallas_kernels.tuned.config` while an operation is traced: a new kernel joins by asking, and a new operation by a
line in `problems`. A candidate with another result than the heuristic's is refused. The default output is where the
kernels look; it is written after each operation.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels
from pallas_kernels import hopper, tuned

TOP_K = 16
EXPERTS, EXPERTS_A_TOKEN, MODEL_WIDTH, EXPERT_WIDTH = 128, 4, 6144, 3072
# A heuristic is left only for what is faster by more than the noise.
GAIN = 0.02
# Several block tables take turns, together larger than any L2 cache, unless that takes too many.
ROTATED_BYTES, MOST_TABLES = 2**28, 16
# Relative, of a whole result in bfloat16.
TOLERANCE = 4e-3
COMPILERS = 8


@dataclass(frozen=True)
class Problem:
    """A call of a public operation: `tokens` new ones in each of `sequences`, at the end of `context` tokens.

    A matmul knows no context: the tokens' experts, or the tokens themselves, take the place of the block tables.
    """

    operation: str
    sequences: int
    context: int = 0
    tokens: int = 1
    kv_heads: int = 4

    def __str__(self) -> str:
        if not self.context:
            heads = f", {self.kv_heads} KV heads" if "skinny" in self.operation else ""
            return f"{self.operation}, {self.sequences} x {self.tokens} tokens{heads}"
        sizes = f"{self.sequences} x {self.tokens} of {self.context}"
        return f"{self.operation}, {sizes}, {self.kv_heads} KV heads"

    @property
    def pages(self) -> int:
        """Pages of a sequence."""
        return -(-self.context // hopper.PAGE_SIZE)

    @property
    def num_tables(self) -> int:
        """Block tables, sizes of groups, or rows that take turns."""
        if "prefill" in self.operation:
            return 1
        if not self.context:
            return 4
        pages = self.sequences * self.pages
        if "attention" in self.operation:
            pages = self.sequences * self.tokens * self.kv_heads * min(TOP_K, self.pages) * 2
        return max(2, min(MOST_TABLES, ROTATED_BYTES // (pages * hopper.PAGE_SIZE * hopper.DIM * 2)))


def problems() -> Iterator[Problem]:
    """The calls that are measured, with the released model's heads and experts: about a hundred configurations."""
    for sequences, context in (
        (1, 8192),
        (1, 131_072),
        (1, 1_048_576),
        (16, 32_768),
        (64, 32_768),
    ):
        yield Problem("index_topk_decode", sequences, context)
    for sequences in (1, 4, 16, 64):
        yield Problem("sparse_attention_decode", sequences, 8192)
    for context in (8192, 131_072):
        yield Problem("index_topk_prefill", 1, context, 8192)
        yield Problem("sparse_attention_prefill", 1, context, 8192)
    for operation in ("grouped_swiglu", "grouped_matmul"):
        for tokens in (1, 64, 8192):
            yield Problem(operation, 1, tokens=tokens)
    for tokens in (1, 16, 64):
        # On one device, and on each of four.
        for kv_heads in (4, 1):
            yield Problem("skinny_matmul", 1, tokens=tokens, kv_heads=kv_heads)


def skinny_arrays(problem: Problem) -> tuple[jax.Array, ...]:
    """Rows [n, T, I], and the matrices of a sparse layer's queries, keys, values, index queries and index keys."""
    heads = (hopper.GROUP * problem.kv_heads, *[problem.kv_heads] * 3, 1)
    keys = jax.random.split(jax.random.key(0), len(heads) + 1)
    rows = (problem.num_tables, problem.sequences * problem.tokens, MODEL_WIDTH)
    shapes = [(count * hopper.DIM, MODEL_WIDTH) for count in heads]
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, (rows, *shapes), strict=True))


def grouped_arrays(problem: Problem) -> tuple[jax.Array, ...]:
    """Sizes of groups i32[n, E], rows and weights, as the released model's experts have them: drawn evenly."""
    rows = problem.sequences * problem.tokens * EXPERTS_A_TOKEN
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(rows, np.full(EXPERTS, 1 / EXPERTS), size=problem.num_tables)
    shape = (2, EXPERT_WIDTH, MODEL_WIDTH) if problem.operation == "grouped_swiglu" else (MODEL_WIDTH, EXPERT_WIDTH)
    keys = jax.random.split(jax.random.key(0))
    # Numbers of one expert serve all, since what they are takes no time.
    weights = jax.random.normal(keys[0], shape, jnp.bfloat16) / shape[-1] ** 0.5
    return (
        jnp.asarray(sizes, jnp.int32),
        jax.random.normal(keys[1], (rows, shape[-1]), jnp.bfloat16),
        jnp.tile(weights, (EXPERTS, *[1] * len(shape))),
    )


def arrays(problem: Problem) -> tuple[Any, ...]:
    """What takes turns, as a rule block tables i32[n, B, M], and the operation's other arguments, in its order: random.

    Pages are permuted.
    """
    if "grouped" in problem.operation:
        return grouped_arrays(problem)
    if "skinny" in problem.operation:
        return skinny_arrays(problem)
    keys = iter(jax.random.split(jax.random.key(0), 6))
    sequences, tokens, kv_heads = problem.sequences, problem.tokens, problem.kv_heads
    rows, pages = sequences * tokens, sequences * problem.pages
    num_pages = min(problem.num_tables * pages, max(pages, 2**14))
    rng = np.random.default_rng(0)
    tables = np.stack([rng.permutation(num_pages)[:pages] for _ in range(problem.num_tables)])
    tables = jnp.asarray(tables.reshape(-1, sequences, problem.pages), jnp.int32)

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    seq_lens = jnp.full(sequences, problem.context, jnp.int32)
    lengths = (seq_lens,)
    if "prefill" in problem.operation:
        lengths = (jnp.arange(sequences + 1, dtype=jnp.int32) * tokens, seq_lens, seq_lens - tokens)
    index = (normal(rows, kv_heads, hopper.DIM), normal(num_pages, hopper.PAGE_SIZE, hopper.DIM))
    if "index" in problem.operation:
        return (tables, *index, *lengths)
    choose = getattr(pallas_kernels, problem.operation.replace("sparse_attention", "index_topk"))
    block_ids = jax.jit(functools.partial(choose, top_k=TOP_K))(*index, tables[0], *lengths)
    cache = (num_pages, kv_heads, hopper.PAGE_SIZE, hopper.DIM)
    return (
        tables,
        normal(rows, hopper.GROUP * kv_heads, hopper.DIM),
        normal(*cache),
        normal(*cache),
        block_ids,
        *lengths,
    )


def on_every_table(problem: Problem) -> Callable[..., Any]:
    """A new function of `arrays`, which jax therefore traces anew."""
    operation = getattr(pallas_kernels, problem.operation)
    num_lengths = 0 if not problem.context else 3 if "prefill" in problem.operation else 1
    if "topk" in problem.operation:
        operation = functools.partial(operation, top_k=TOP_K)
    if "swiglu" in problem.operation:
        operation = functools.partial(operation, alpha=1.702, limit=7.0, beta=1.0)
    if "skinny" in problem.operation:
        operation = _side_by_side

    def run(tables: jax.Array, *rest: jax.Array) -> jax.Array:
        before, lengths = rest[: len(rest) - num_lengths], rest[len(rest) - num_lengths :]
        return lax.map(lambda table: operation(*before, table, *lengths), tables)

    return run


def _side_by_side(*arrays: jax.Array) -> jax.Array:
    """Products of the rows, the last array, with all others, which are matrices."""
    return jnp.concatenate(pallas_kernels.skinny_matmul(arrays[-1], arrays[:-1]), axis=1)


Chosen = dict[tuple[str, tuned.Bucket], Any]


def compiled(problem: Problem, args: tuple[Any, ...], chosen: Chosen) -> tuple[Any, Chosen]:
    """The operation with the chosen configurations, and every configuration that it asked for."""
    asked: Chosen = {}

    def choose(kernel: str, bucket: tuned.Bucket, heuristic: Any) -> Any:
        return asked.setdefault((kernel, bucket), chosen.get((kernel, bucket), heuristic))

    with tuned.choosing(choose):
        return jax.jit(on_every_table(problem)).lower(*args).compile(), asked


def microseconds(function: Any, args: tuple[Any, ...]) -> float:
    """Time of one call of the operation on the GPU: the sum of its kernels, since a command buffer leaves no gaps."""
    from jax.experimental.mosaic.gpu import profiler

    iterations: Any
    _, iterations = profiler.Cupti(finalize=False).measure(function, aggregate=False, iterations=5)(*args)
    if not iterations:
        raise RuntimeError("CUPTI saw no kernel: another profiler may be attached")
    times = [sum(duration for _, duration in kernels) for kernels in iterations]
    return statistics.median(times) * 1e3 / args[0].shape[0]


def candidates(config: Any) -> list[Any]:
    """Other configurations: all combinations of what the class lists as CANDIDATES and accepts."""
    values = type(config).CANDIDATES
    found = []
    for combination in itertools.product(*values.values()):
        try:
            found.append(dataclasses.replace(config, **dict(zip(values, combination, strict=True))))
        except ValueError:
            continue
    return [each for each in found if each != config]


def same(result: jax.Array, expected: jax.Array) -> bool:
    """Whether two configurations' results are equal: exactly, or for floats up to their rounding."""
    if jnp.issubdtype(result.dtype, jnp.integer):
        return bool(jnp.array_equal(result, expected))
    result, expected = result.astype(jnp.float32), expected.astype(jnp.float32)
    difference = jnp.where(result == expected, 0, result - expected)  # equal infinities differ by nothing
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(expected), expected, 0))
    return bool(jnp.linalg.norm(difference) <= TOLERANCE * size)


def tune(problem: Problem, known: Chosen) -> list[tuned.Measured]:
    """Measures the kernels of an operation that are not known yet; adds the best configurations to `known`."""
    with tuned.choosing(lambda kernel, bucket, heuristic: heuristic):  # and not what an old file says
        args = arrays(problem)
    function, asked = compiled(problem, args, known)
    expected, best_us = function(*args), microseconds(function, args)
    heuristic_us = best_us
    measured = []
    for key, heuristic in asked.items():
        if key in known:
            continue
        best = heuristic

        def attempt(config: Any, key: Any = key) -> Any:
            try:
                return compiled(problem, args, {**known, key: config})[0]
            except Exception as error:  # of any kind: too much shared memory, sizes that do not divide
                print(f"    {config} cannot be compiled: {str(error).splitlines()[0][:90]}")
                return None

        others = candidates(heuristic)
        with ThreadPoolExecutor(COMPILERS) as pool:
            functions = list(pool.map(attempt, others))
        for config, function in zip(others, functions, strict=True):
            if function is None:
                continue
            if not same(function(*args), expected):
                print(f"    {config} gives another result than {heuristic}: refused")
                continue
            us = microseconds(function, args)
            if us < best_us * (1 - GAIN if best == heuristic else 1):
                best, best_us = config, us
        known[key] = best
        fields = {name: getattr(best, name) for name in type(best).CANDIDATES}
        measured.append(tuned.Measured(*key, config=fields, us=best_us, heuristic_us=heuristic_us))
        print(f"  {key[0]} {dict(key[1])}: {best}, {heuristic_us:.1f} -> {best_us:.1f} us, {len(others) + 1} tried")
    return measured


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tuning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--operations",
        nargs="*",
        default=[""],
        help="measure those whose names contain one of these, and keep the others in the file",
    )
    parser.add_argument("--output", type=Path, help="where to write, by default where the kernels look")
    arguments = parser.parse_args()
    if reason := hopper.why_not_here():
        raise SystemExit(f"nothing to tune here: {reason}")
    device = hopper.default_device().device_kind
    started = time.perf_counter()
    path = arguments.output or tuned.path_of(device)
    about = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "pallas_kernels.tuning", *sys.argv[1:]]),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    known: Chosen = {}
    measured: list[tuned.Measured] = []
    for problem in problems():
        if any(part in problem.operation for part in arguments.operations):
            print(f"{problem}, after {time.perf_counter() - started:.0f} s", flush=True)
            measured += tune(problem, known)
            # Each time, so that what is measured is kept whatever happens to the next.
            others = tuned.load(path, device) if path.exists() and arguments.operations != [""] else []
            others = [each for each in others if (each.kernel, each.bucket) not in known]
            tuned.save(path, device, others + measured, **about)
    print(f"{len(measured)} configurations in {path}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
