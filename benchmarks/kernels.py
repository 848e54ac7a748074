"""Times of the kernels at the released model's sizes, beside the floor and, if given, vLLM's Triton kernels.

    python benchmarks/kernels.py [--vllm FOLDER] [--cases TEXT] [--output benchmarks/results/kernels.json]

FOLDER holds index_topk.py and sparse_attn.py out of a vLLM wheel (vllm/models/minimax_m3/common/ops of 0.33.0).
A case is run over several block tables of one pool of pages, together larger than the L2 cache, in one jitted call
(ours) and in one CUDA graph (vLLM's); `call` is the time of the whole call over the number of tables, gaps between
kernels included, and `kernels` the sum of the kernels' durations as CUPTI gives them. Medians, in microseconds.
The floor is the bytes at the card's measured copy rate or the FLOPs at its measured bfloat16 rate, whichever is longer.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

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

    def floors(self) -> dict[str, float]:
        index = self.batch * self.pages * PAGE * DIM * 2
        chosen = min(TOP_K, self.pages)
        attention = self.batch * self.queries * self.kv_heads * chosen * PAGE * 2 * DIM * 2
        floors = {"index": index, "attention": attention, "both": index + attention}
        return {op: num_bytes / BYTES_PER_S * 1e6 for op, num_bytes in floors.items()}

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

    def floors(self) -> dict[str, float]:
        position = np.arange(self.prefix, self.prefix + self.tokens, dtype=np.int64)
        scores = (position + 1).sum() * self.kv_heads * DIM * 2
        chosen = np.minimum(TOP_K, position // PAGE + 1).sum()
        attention = chosen * PAGE * GROUP * self.kv_heads * DIM * 4
        table = self.tokens * self.kv_heads * self.pages / 2 * 4
        index = float(scores) / FLOPS_PER_S + table / BYTES_PER_S
        attention = float(attention) / FLOPS_PER_S
        return {"index": index * 1e6, "attention": attention * 1e6}


CASES: tuple[Decode | Prefill, ...] = (
    Decode(1, 8192),
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
    Prefill(8192, 122_880),
    Prefill(32_768, 0),
    Prefill(8192, 0, pattern="smooth"),
    Prefill(8192, 122_880, pattern="smooth"),
    Prefill(8192, 0, kv_heads=1),
    Prefill(8192, 122_880, kv_heads=1),
    Prefill(32_768, 0, kv_heads=1),
)


def index_queries(case: Decode | Prefill, rows: int) -> np.ndarray:
    """Standard normal; "smooth" ones agree with their 63 neighbours up to noise, as a trained model's do."""
    rng = np.random.default_rng(1)
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


def ours(case: Decode | Prefill) -> dict[str, dict[str, float]]:
    """Times of each operation: {"index": {"call": us, "kernels": us, "launches": n}, ...}."""
    import jax
    import jax.numpy as jnp

    import pallas_kernels as ops

    num_pages, table = tables(case)
    count, batch = table.shape[0], table.shape[1]
    rows = case.batch * case.queries if isinstance(case, Decode) else case.tokens
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.bfloat16)

    kv_heads = case.kv_heads
    index_q = jnp.asarray(index_queries(case, rows), jnp.bfloat16)
    index_k = normal(keys[0], num_pages, PAGE, DIM)
    k, v = (normal(key, num_pages, kv_heads, PAGE, DIM) for key in keys[1:3])
    q = normal(keys[3], rows, GROUP * kv_heads, DIM)
    block_tables = [jnp.asarray(t) for t in table]
    if isinstance(case, Decode):
        lengths = (jnp.full((batch,), case.context, jnp.int32),)
        topk, attend = ops.index_topk_decode, ops.sparse_attention_decode
    else:
        lengths = tuple(jnp.asarray(x, jnp.int32) for x in ([0, rows], [rows + case.prefix], [case.prefix]))
        topk, attend = ops.index_topk_prefill, ops.sparse_attention_prefill
    topk = functools.partial(topk, top_k=TOP_K, impl="mosaic_gpu")
    attend = functools.partial(attend, impl="mosaic_gpu")

    def few(results):
        # One number each: a call that returns them whole is busy with its results.
        return results if len(results) == 1 else jnp.stack([result.reshape(-1)[0] for result in results])

    def index(index_q, index_k, lengths, block_tables):
        return few([topk(index_q, index_k, t, *lengths) for t in block_tables])

    def attention(q, k, v, ids, lengths, block_tables):
        return few([attend(q, k, v, i, t, *lengths) for i, t in zip(ids, block_tables, strict=True)])

    def both(index_q, index_k, q, k, v, lengths, block_tables):
        # Each call waits for the one before, as the layers of a model do.
        for t in block_tables:
            q = attend(q, k, v, topk(index_q, index_k, t, *lengths), t, *lengths)
            index_q = q[:, ::GROUP]
        return q

    times = {"index": time_jitted(jax.jit(index), count, index_q, index_k, lengths, block_tables)}
    ids = [jax.jit(topk)(index_q, index_k, t, *lengths) for t in block_tables]
    times["attention"] = time_jitted(jax.jit(attention), count, q, k, v, ids, lengths, block_tables)
    if isinstance(case, Decode):
        times["both"] = time_jitted(jax.jit(both), count, index_q, index_k, q, k, v, lengths, block_tables)
    return times


def time_jitted(function: Any, count: int, *args: Any) -> dict[str, Any]:
    """Medians for one of the `count` operations in a jitted call."""
    import jax
    from jax.experimental.mosaic.gpu import profiler

    started = time.perf_counter()
    jax.block_until_ready(function(*args))
    compile_s = time.perf_counter() - started
    repeats = []
    for _ in range(5):
        started = time.perf_counter()
        results = [function(*args) for _ in range(4)]
        jax.block_until_ready(results)
        repeats.append((time.perf_counter() - started) / 4)
        del results
    iterations: Any
    _, iterations = profiler.Cupti(finalize=False).measure(function, aggregate=False, iterations=3)(*args)
    assert iterations is not None
    totals = [sum(duration for _, duration in kernels) for kernels in iterations]
    by_name: dict[str, float] = {}
    for name, duration in iterations[-1]:
        by_name[name[:48]] = by_name.get(name[:48], 0) + duration * 1e3 / count
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:8]
    return {
        "call": statistics.median(repeats) * 1e6 / count,
        "kernels": statistics.median(totals) * 1e3 / count,
        "launches": len(iterations[0]) / count,
        "compile_s": compile_s,
        "by_kernel": {name: round(value, 2) for name, value in largest},
    }


def load_vllm(folder: Path) -> tuple[Any, Any]:
    """The two modules of a vLLM wheel, with stand-ins for the little of vLLM that they import."""
    import torch  # pyright: ignore[reportMissingImports]
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    def stub(name: str, **attributes: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module

    class CurrentPlatform:
        is_cuda = staticmethod(lambda: True)
        is_rocm = staticmethod(lambda: False)
        is_device_capability = staticmethod(lambda c: torch.cuda.get_device_capability() == c)
        is_arch_support_pdl = staticmethod(lambda: torch.cuda.get_device_capability()[0] >= 9)

    stub("vllm")
    stub("vllm.platforms", current_platform=CurrentPlatform)
    stub("vllm.triton_utils", tl=tl, triton=triton)
    stub("vllm.utils")
    stub("vllm.utils.math_utils", round_up=lambda x, y: (x + y - 1) // y * y)

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load("index_topk"), load("sparse_attn")


def vllm(case: Decode | Prefill, folder: Path) -> dict[str, dict[str, float]]:
    """Times of vLLM's operations on inputs like ours: {"index": {"call": us}, ...}."""
    import torch  # pyright: ignore[reportMissingImports]

    index, attention = load_vllm(folder)
    torch.manual_seed(0)
    num_pages, table = tables(case)
    count, batch = table.shape[0], table.shape[1]
    kv_heads = case.kv_heads
    rows = case.batch * case.queries if isinstance(case, Decode) else case.tokens

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    index_q = torch.tensor(index_queries(case, rows), device="cuda").to(torch.bfloat16)
    index_k, kv = normal(num_pages, PAGE, DIM), normal(num_pages, kv_heads, PAGE, 2 * DIM)
    q = normal(rows, GROUP * kv_heads, DIM)
    out = torch.empty_like(q)
    block_tables = [torch.tensor(t, device="cuda") for t in table]
    scale = DIM**-0.5

    def ints(*values: int) -> Any:
        return torch.tensor(values, device="cuda", dtype=torch.int32)

    if isinstance(case, Decode):
        lens = ints(*[case.context] * batch)
        shape = (case.context, TOP_K, 0, 1, kv_heads, case.queries, case.queries)

        def choose(t: Any) -> Any:
            return index.minimax_m3_index_decode(index_q, index_k, t, lens, *shape)

        def attend(t: Any, ids: Any) -> Any:
            attention.minimax_m3_sparse_attn_decode(q, kv, ids, t, lens, kv_heads, scale, out, case.queries)
    else:
        cu, lens, prefix = ints(0, rows), ints(rows + case.prefix), ints(case.prefix)

        def choose(t: Any) -> Any:
            total = rows + case.prefix
            score = index.minimax_m3_index_score(index_q, index_k, t, cu, lens, prefix, rows, total, kv_heads)
            return index.minimax_m3_index_topk(score, cu, prefix, rows, TOP_K, 0, 1)

        def attend(t: Any, ids: Any) -> Any:
            attention.minimax_m3_sparse_attn(q, kv, ids, t, cu, lens, prefix, rows, kv_heads, scale, out)

    ids = [choose(t) for t in block_tables]
    calls: dict[str, Callable[[], Any]] = {
        "index": lambda: [choose(t) for t in block_tables],
        "attention": lambda: [attend(t, i) for t, i in zip(block_tables, ids, strict=True)],
    }
    if isinstance(case, Decode):
        calls["both"] = lambda: [attend(t, choose(t)) for t in block_tables]
    return {name: {"call": time_graph(call) / count} for name, call in calls.items()}


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


def run_vllm(names: list[str], folder: Path) -> dict[str, Any]:
    """vLLM's times of the named cases, in a process of its own: two frameworks do not share a GPU's memory well."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "vllm.json"
        command = [sys.executable, __file__, "--vllm", str(folder), "--only-vllm", "--output", str(path)]
        done = subprocess.run([*command, "--cases", *names], check=False)
        if done.returncode:
            raise SystemExit(f"vLLM's kernels ended with {done.returncode}")
        return json.loads(path.read_text())


def environment() -> dict[str, Any]:
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "command": "python benchmarks/kernels.py " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--cases", nargs="*", default=[""], help="parts of the names of the cases to run")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only-vllm", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = [case for case in CASES if any(part in case.name for part in args.cases)]
    if args.only_vllm:
        args.output.write_text(json.dumps({case.name: vllm(case, args.vllm) for case in cases}))
        return
    peer = run_vllm([case.name for case in cases], args.vllm) if args.vllm else {}
    # jax takes most of the memory when it starts: after vLLM's process has ended.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results = []
    print(f"{'case':46} {'operation':10} {'floor':>8} {'vLLM':>8} {'call':>8} {'kernels':>8} launches")
    for case in cases:
        times, floors = ours(case), case.floors()
        for op, measured in times.items():
            theirs = peer.get(case.name, {}).get(op, {}).get("call")
            results.append({"case": asdict(case), "name": case.name, "op": op, "floor": floors[op], "vllm": theirs})
            results[-1] |= measured
            print(
                f"{case.name:46} {op:10} {floors[op]:8.1f} {theirs or float('nan'):8.1f} {measured['call']:8.1f} "
                f"{measured['kernels']:8.1f} {measured['launches']:5.1f} {measured['by_kernel']}",
                flush=True,
            )
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
