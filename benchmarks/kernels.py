"""Times of the kernels at the released model's sizes, beside the floor and, if given, vLLM's Triton kernels.

    python benchmarks/kernels.py [--vllm FOLDER] [--cases TEXT] [--implementation triton] [--output FILE]

FOLDER holds index_topk.py and sparse_attn.py out of a vLLM wheel (vllm/models/minimax_m3/common/ops of 0.33.0).
Of decode, choice and attention are one operation, as the model calls it; of prefill they are timed apart.
A case is run over several block tables of one pool of pages, together larger than the L2 cache, in one jitted call
(ours) and in one CUDA graph (vLLM's). `call` is the time of the whole call over the number of tables, the host's work
included, and `kernels` the sum of the kernels' durations as CUPTI gives them. Medians, in microseconds.
The floor is the bytes at the card's measured copy rate or the FLOPs at its measured bfloat16 rate, whichever is longer.
"""

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from vllm_ops import VllmOps

PAGE, DIM, GROUP, TOP_K = 128, 128, 16, 16
BYTES_PER_S, FLOPS_PER_S = 4.3e12, 790e12
# More than the L2 cache of 60 MB, several times over, unless that takes more tables than MOST_TABLES.
ROTATED_BYTES = 512e6
MOST_TABLES = 32
PACKAGES = ("jax", "jaxlib", "numpy")


@dataclass(frozen=True)
class Decode:
    batch: int
    context: int
    kv_heads: int = 4
    queries: int = 1

    @property
    def name(self) -> str:
        queries = f" x {self.queries} tokens" if self.queries > 1 else ""
        return f"decode {self.batch} x {self.context // 1024} K{queries}, {GROUP * self.kv_heads}/{self.kv_heads}"

    @property
    def pages(self) -> int:
        return -(-self.context // PAGE)

    @property
    def rows(self) -> int:
        return self.batch * self.queries

    def floors(self) -> dict[str, float]:
        index = self.batch * self.pages * PAGE * DIM * 2
        chosen = min(TOP_K, self.pages)
        attention = self.batch * self.queries * self.kv_heads * chosen * PAGE * 2 * DIM * 2
        return {"both": (index + attention) / BYTES_PER_S * 1e6}

    def goals(self) -> dict[str, float]:
        """Microseconds that were aimed at."""
        goals = {
            (1, 8192, 1): 11,
            (1, 131_072, 1): 17,
            (1, 1_048_576, 1): 74,
            (16, 32_768, 1): 54,
            (64, 8192, 1): 108,
            (64, 32_768, 1): 200,
            (128, 8192, 1): 205,
            (16, 32_768, 4): 105,
        }
        goal = goals.get((self.batch, self.context, self.queries))
        return {"both": goal} if goal is not None and self.kv_heads == 4 else {}

    def num_tables(self) -> int:
        per_call = self.floors()["both"] * 1e-6 * BYTES_PER_S
        return int(max(2, min(MOST_TABLES, ROTATED_BYTES // per_call + 1)))


@dataclass(frozen=True)
class Prefill:
    tokens: int
    prefix: int
    kv_heads: int = 4
    pattern: str = "random"

    @property
    def name(self) -> str:
        heads = f"{GROUP * self.kv_heads}/{self.kv_heads}"
        return f"prefill {self.tokens // 1024} K after {self.prefix // 1024} K, {heads}, {self.pattern}"

    @property
    def pages(self) -> int:
        return (self.tokens + self.prefix) // PAGE

    @property
    def rows(self) -> int:
        return self.tokens

    def floors(self) -> dict[str, float]:
        position = np.arange(self.prefix, self.prefix + self.tokens, dtype=np.int64)
        scores = (position + 1).sum() * self.kv_heads * DIM * 2
        chosen = np.minimum(TOP_K, position // PAGE + 1).sum()
        attention = chosen * PAGE * GROUP * self.kv_heads * DIM * 4
        table = self.tokens * self.kv_heads * self.pages / 2 * 4
        index = float(scores) / FLOPS_PER_S + table / BYTES_PER_S
        attention = float(attention) / FLOPS_PER_S
        return {"index": index * 1e6, "attention": attention * 1e6}

    def goals(self) -> dict[str, float]:
        """Microseconds that were aimed at: for 8 K queries of 64 heads, and in proportion to the floor for others."""
        basis = Prefill(8192, 122_880 if self.prefix else 0)
        random, smooth, index = (1500, 1250, 1350) if self.prefix else (1280, 1100, 60)
        attention = smooth if self.pattern == "smooth" else random
        goals = {"attention": attention * self.floors()["attention"] / basis.floors()["attention"]}
        if (self.tokens, self.kv_heads) == (8192, 4) and self.prefix in (0, 122_880):
            goals["index"] = index
        return goals


CASES: tuple[Decode | Prefill, ...] = (
    Decode(1, 8192),
    Decode(1, 32_768),
    Decode(1, 131_072),
    Decode(1, 1_048_576),
    Decode(16, 32_768),
    Decode(64, 8192),
    Decode(64, 32_768),
    Decode(128, 8192),
    Decode(16, 32_768, queries=4),
    Decode(1, 131_072, kv_heads=1),
    Decode(64, 32_768, kv_heads=1),
    Prefill(8192, 0),
    Prefill(8192, 24_576),
    Prefill(8192, 122_880),
    Prefill(32_768, 0),
    Prefill(8192, 0, pattern="smooth"),
    Prefill(8192, 122_880, pattern="smooth"),
    Prefill(32_768, 0, pattern="smooth"),
    Prefill(8192, 0, kv_heads=1),
    Prefill(8192, 122_880, kv_heads=1),
    Prefill(32_768, 0, kv_heads=1),
    Prefill(8192, 0, kv_heads=1, pattern="smooth"),
    Prefill(8192, 122_880, kv_heads=1, pattern="smooth"),
    Prefill(32_768, 0, kv_heads=1, pattern="smooth"),
)
# Shapes of which nothing was compiled before: each is compiled for all four operations. With as few blocks as the last
# ones have, prefill's attention has one kernel more.
COMPILED = (
    (Decode(32, 16_384), Prefill(4096, 12_288)),
    (Decode(8, 65_536), Prefill(2048, 30_720)),
    (Decode(48, 4096), Prefill(4096, 0)),
)
MOST_COMPILE_S = 5.0
COMPILE_RUNS = 5
COMPILERS = 8
MOSAIC_GPU = "mosaic_gpu"
# What the process with vLLM's kernels says when they are compiled.
READY = "ready"


def index_queries(case: Decode | Prefill) -> np.ndarray:
    """Standard normal; "smooth" ones agree with their 63 neighbours up to noise, as a trained model's do."""
    rng = np.random.default_rng(1)
    rows = case.rows
    queries = rng.standard_normal((rows, case.kv_heads, DIM), np.float32)
    if isinstance(case, Prefill) and case.pattern == "smooth":
        base = rng.standard_normal((-(-rows // 64), case.kv_heads, DIM), np.float32)
        queries = np.repeat(base, 64, axis=0)[:rows] + 0.35 * queries
    return queries


def tables(case: Decode | Prefill) -> tuple[int, np.ndarray]:
    """Pages of the pool, and block tables [n, B, M] of it."""
    batch = case.batch if isinstance(case, Decode) else 1
    count = case.num_tables() if isinstance(case, Decode) else 1
    rng = np.random.default_rng(0)
    num_pages = max(batch * case.pages + 7, min(count * batch * case.pages, 16_384))
    each = [rng.permutation(num_pages)[: batch * case.pages].reshape(batch, case.pages) for _ in range(count)]
    return num_pages, np.stack(each).astype(np.int32)


def inputs(case: Decode | Prefill) -> dict[str, Any]:
    """The arrays of a case, by name: one pool of pages, its block tables, and everything else but the chosen blocks."""
    import jax
    import jax.numpy as jnp

    (num_pages, table), rows = tables(case), case.rows
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.bfloat16)

    if isinstance(case, Decode):
        lengths = ([case.context] * case.batch,)
    else:
        lengths = ([0, rows], [rows + case.prefix], [case.prefix])
    return {
        "index_q": jnp.asarray(index_queries(case), jnp.bfloat16),
        "index_k": normal(keys[0], num_pages, PAGE, DIM),
        "k": normal(keys[1], num_pages, case.kv_heads, PAGE, DIM),
        "v": normal(keys[2], num_pages, case.kv_heads, PAGE, DIM),
        "q": normal(keys[3], rows, GROUP * case.kv_heads, DIM),
        "tables": [jnp.asarray(t) for t in table],
        "lengths": tuple(jnp.asarray(x, jnp.int32) for x in lengths),
    }


def operations(case: Decode | Prefill, implementation: str = MOSAIC_GPU) -> tuple[Any, Any]:
    """The choice of blocks and the attention."""
    import pallas_kernels as ops

    if isinstance(case, Decode):
        topk, attend = ops.index_topk_decode, ops.sparse_attention_decode
    else:
        topk, attend = ops.index_topk_prefill, ops.sparse_attention_prefill
    return functools.partial(topk, top_k=TOP_K, impl=implementation), functools.partial(attend, impl=implementation)


def calls(case: Decode | Prefill, implementation: str = MOSAIC_GPU) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What is timed, as functions of `inputs` and, for the attention alone, of "ids": the chosen blocks."""
    import jax

    import pallas_kernels as ops

    topk, attend = operations(case, implementation)
    topk_and_attend = functools.partial(ops.index_sparse_attention_decode, top_k=TOP_K, impl=implementation)

    def index(a):
        return topk(a["index_q"], a["index_k"], a["tables"][0], *a["lengths"])

    def attention(a):
        return attend(a["q"], a["k"], a["v"], a["ids"], a["tables"][0], *a["lengths"])

    def both(a):
        q, index_q = a["q"], a["index_q"]
        # Each table's call waits for the one before, as the layers of a model do.
        for table in a["tables"]:
            q, _ = topk_and_attend(index_q, a["index_k"], q, a["k"], a["v"], table, *a["lengths"])
            index_q, q = jax.lax.optimization_barrier((index_q, q))
        return q

    return {"both": both} if isinstance(case, Decode) else {"index": index, "attention": attention}


def shapes(case: Decode | Prefill) -> dict[str, Any]:
    """Shapes of `inputs`, with the chosen blocks."""
    import jax
    import jax.numpy as jnp

    ids = jax.ShapeDtypeStruct((case.rows, case.kv_heads, TOP_K), jnp.int32)
    return jax.eval_shape(functools.partial(inputs, case)) | {"ids": ids}


def compile_all(cases: list[Decode | Prefill], implementation: str) -> dict[tuple[Decode | Prefill, str], Any]:
    """Every call of the cases, compiled beside one another; cases that differ in nothing but values share theirs."""
    import jax

    alike = {case: replace(case, pattern="random") if isinstance(case, Prefill) else case for case in cases}

    def compiled(case: Decode | Prefill, call: Callable[[dict[str, Any]], Any]) -> Any:
        return jax.jit(call, keep_unused=True).lower(shapes(case)).compile()

    # What launches Triton's kernels is not made for several threads.
    with ThreadPoolExecutor(COMPILERS if implementation == MOSAIC_GPU else 1) as pool:
        futures = {
            (case, op): pool.submit(compiled, case, call)
            for case in dict.fromkeys(alike.values())
            for op, call in calls(case, implementation).items()
        }
    return {(case, op): futures[alike[case], op].result() for case in cases for op in calls(case)}


def ours(case: Decode | Prefill, compiled: dict[tuple[Decode | Prefill, str], Any]) -> dict[str, dict[str, float]]:
    """Times of each operation: {"index": {"call": us, "kernels": us, ...}, ...}."""
    import jax.numpy as jnp

    arrays = inputs(case)
    count = len(arrays["tables"])
    arrays["ids"] = jnp.zeros((case.rows, case.kv_heads, TOP_K), jnp.int32)
    if isinstance(case, Prefill):
        arrays["ids"] = compiled[case, "index"](arrays)
    return {op: time_jitted(compiled[case, op], count, arrays) for op in calls(case)}


def time_jitted(function: Any, count: int, *args: Any) -> dict[str, Any]:
    """Medians for one of the `count` operations in a jitted call."""
    import jax
    from jax.experimental.mosaic.gpu import profiler

    def seconds(calls: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready([function(*args) for _ in range(calls)])
        return time.perf_counter() - started

    seconds(1)
    calls = [seconds(4) / 4 for _ in range(5)]
    iterations: Any
    _, iterations = profiler.Cupti(finalize=False).measure(function, aggregate=False, iterations=3)(*args)
    assert iterations is not None
    totals = [sum(duration for _, duration in kernels) for kernels in iterations]
    by_name: dict[str, float] = {}
    for name, duration in iterations[-1]:
        by_name[name[:48]] = by_name.get(name[:48], 0) + duration * 1e3 / count
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:8]
    return {
        "call": statistics.median(calls) * 1e6 / count,
        "kernels": statistics.median(totals) * 1e3 / count,
        "launches": len(iterations[0]) / count,
        "by_kernel": {name: round(value, 2) for name, value in largest},
    }


def vllm_calls(case: Decode | Prefill, ops: VllmOps) -> tuple[int, dict[str, Callable[[], Any]]]:
    """Block tables, and vLLM's operations on all of them, on inputs like ours."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    num_pages, table = tables(case)
    count, batch = table.shape[0], table.shape[1]
    kv_heads = case.kv_heads
    rows = case.rows

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def ints(*values: int) -> Any:
        return torch.tensor(values, device="cuda", dtype=torch.int32)

    index_q = torch.tensor(index_queries(case), device="cuda").to(torch.bfloat16)
    index_k, kv = normal(num_pages, PAGE, DIM), normal(num_pages, kv_heads, PAGE, 2 * DIM)
    q = normal(rows, GROUP * kv_heads, DIM)
    out = torch.empty_like(q)
    block_tables = [torch.tensor(t, device="cuda") for t in table]
    if isinstance(case, Decode):
        lengths, tokens, context = (ints(*[case.context] * batch),), case.queries, case.context
    else:
        tokens, context = rows, rows + case.prefix
        lengths = (ints(0, rows), ints(context), ints(case.prefix))

    def choose(t: Any) -> Any:
        return ops.choose(index_q, index_k, t, *lengths, tokens=tokens, context=context, top_k=TOP_K)

    def attend(t: Any, ids: Any) -> None:
        ops.attend(q, kv, ids, t, *lengths, tokens=tokens, out=out)

    if isinstance(case, Decode):
        return count, {"both": lambda: [attend(t, choose(t)) for t in block_tables]}
    ids = choose(block_tables[0])
    return count, {"index": lambda: choose(block_tables[0]), "attention": lambda: attend(block_tables[0], ids)}


def vllm(cases: list[Decode | Prefill], ops: VllmOps) -> dict[str, dict[str, float]]:
    """Microseconds of vLLM's operations, by case and operation.

    Runs everything once, since Triton compiles and tunes on the first call, says "ready" and waits for a line.
    """
    import torch  # pyright: ignore[reportMissingImports]

    for case in cases:
        for call in vllm_calls(case, ops)[1].values():
            call()
    torch.cuda.synchronize()
    print(READY, flush=True)
    sys.stdin.readline()
    times = {}
    for case in cases:
        count, operations = vllm_calls(case, ops)
        times[case.name] = {op: time_graph(call) / count for op, call in operations.items()}
    return times


def time_graph(call: Callable[[], Any]) -> float:
    """Median microseconds of a replay of the CUDA graph of a call."""
    import torch  # pyright: ignore[reportMissingImports]

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    repeats = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        repeats.append(start.elapsed_time(end) * 1e3)
    return statistics.median(repeats)


def compile_times(beside: bool) -> list[dict[str, Any]]:
    """Seconds that tracing, lowering and compiling the operations for each bucket of shapes in COMPILED take.

    beside: in threads beside one another, instead of one after the other. Not among them is the import of modules.
    """
    import jax
    import jax.numpy as jnp

    jax.block_until_ready(jnp.zeros(8) + 1)  # the backend starts
    for operation in ("index_topk", "sparse_attention"):  # which import their kernels when they are first called
        for module in Path(importlib.import_module(f"pallas_kernels.{operation}").__path__[0]).glob("mosaic_gpu_*.py"):
            importlib.import_module(f"pallas_kernels.{operation}.{module.stem}")

    def seconds(call: tuple[Any, tuple[Any, ...]]) -> float:
        operation, args = call
        started = time.perf_counter()
        jax.jit(operation).lower(*args).compile()
        return time.perf_counter() - started

    buckets = []
    for cases in COMPILED:
        calls = []
        for case in cases:
            a = shapes(case)
            choice = (a["index_q"], a["index_k"], a["tables"][0], *a["lengths"])
            attention = (a["q"], a["k"], a["v"], a["ids"], a["tables"][0], *a["lengths"])
            calls += zip(operations(case), (choice, attention), strict=True)
        # The longest first: prefill's.
        calls.reverse()
        started = time.perf_counter()
        with ThreadPoolExecutor(len(calls) if beside else 1) as pool:
            of_each = list(pool.map(seconds, calls))
        total = time.perf_counter() - started
        names = [operation.func.__name__ for operation, _ in calls]
        of_calls = dict(zip(names, of_each, strict=True))
        buckets.append({"cases": [case.name for case in cases], "seconds": of_calls, "total": total})
    return buckets


def compile_medians(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of what `compile_times` returned in each process: medians, and all totals, which the host's other work is in."""
    return [
        {
            "cases": buckets[0]["cases"],
            "seconds": {
                name: statistics.median(bucket["seconds"][name] for bucket in buckets) for name in buckets[0]["seconds"]
            },
            "totals": [bucket["total"] for bucket in buckets],
            "total": statistics.median(bucket["total"] for bucket in buckets),
            "goal": MOST_COMPILE_S,
        }
        for buckets in zip(*runs, strict=True)
    ]


class Part:
    """This script in a process of its own, with `--only` and other arguments, and what it writes."""

    def __init__(self, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "part.json"
        command = [sys.executable, __file__, *arguments, "--output", str(self._path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        """Waits until it says so, or ends; what else it says is printed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == READY:
                return
            print(line, end="", flush=True)

    def result(self) -> Any:
        """Lets it go on, and waits for what it writes; None, with a message, where it failed."""
        self._process.communicate("go\n")
        if self._process.returncode:
            print(f"{self._process.args} ended with {self._process.returncode}", flush=True)
            return None
        return json.loads(self._path.read_text())


def environment(*packages: str) -> dict[str, Any]:
    """Device, date and versions of a benchmark's run, those of `packages` included, and the command as it was given."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)},
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--cases", nargs="*", default=[""], help="parts of the names of the cases to run")
    parser.add_argument("--implementation", choices=(MOSAIC_GPU, "triton"), default=MOSAIC_GPU)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=("vllm", "compile", "compile-beside"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    # Before jax starts, which else takes most of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cases = [case for case in CASES if any(part in case.name for part in args.cases)]
    if args.only in ("compile", "compile-beside"):
        args.output.write_text(json.dumps(compile_times(beside=args.only == "compile-beside")))
        return
    if args.only == "vllm":
        args.output.write_text(json.dumps(vllm(cases, VllmOps(args.vllm))))
        return
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:4.0f} s: {text}", flush=True)

    is_mosaic_gpu = args.implementation == MOSAIC_GPU
    compiles = {}
    for way in ("compile", "compile-beside"):
        # One after the other, each on an idle host.
        runs = [Part("--only", way).result() for _ in range(COMPILE_RUNS if is_mosaic_gpu else 0)]
        compiles[way] = compile_medians([run for run in runs if run])
        for bucket in compiles[way]:
            say(f"{way} {' and '.join(bucket['cases'])}: {bucket['total']:.1f} s of {bucket['totals']}")
    # Two frameworks do not share a GPU's memory well, but both compile for a minute before anything is timed.
    names = [case.name for case in cases]
    peer = Part("--only", "vllm", "--vllm", str(args.vllm), "--cases", *names) if args.vllm else None
    compiled = compile_all(cases, args.implementation)
    say("compiled everything")
    theirs = {}
    if peer:
        peer.ready()
        say("vLLM's kernels are compiled")
        theirs = peer.result() or {}
        say("vLLM's kernels are timed")
    results = []
    columns = ("floor", "vLLM", "goal", "call", "kernels")
    print(f"{'case':46} {'operation':10}" + "".join(f" {column:>8}" for column in columns) + " launches")
    for case in cases:
        times, floors, goals = ours(case, compiled), case.floors(), case.goals() if is_mosaic_gpu else {}
        for op, measured in times.items():
            peers, goal = theirs.get(case.name, {}).get(op), goals.get(op)
            results.append({"case": asdict(case), "name": case.name, "op": op, "floor": floors[op], "vllm": peers})
            results[-1] |= {"goal": goal, **measured}
            print(
                f"{case.name:46} {op:10} {floors[op]:8.1f} {peers or float('nan'):8.1f} {goal or float('nan'):8.1f} "
                f"{measured['call']:8.1f} {measured['kernels']:8.1f} "
                f"{measured['launches']:5.1f} "
                f"{measured['by_kernel']}",
                flush=True,
            )
        if args.output:
            record = {"environment": environment(), **compiles, "results": results}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    say("done")


if __name__ == "__main__":
    main()
