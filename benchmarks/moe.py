"""Times of a mixture of experts at the released model's sizes, beside the floor and `torch._grouped_mm`.

    python benchmarks/moe.py [--tokens 1 16 64 256 8192] [--torch] [--output benchmarks/results/moe.json]

Each token goes to 4 of 128 experts at random, one block's choice independent of another's. What is measured is all
that happens behind the router: sorting the pairs of a token and an expert, gathering their rows, both grouped matmuls
with the activation, and each token's weighted sum. The router and the shared expert are not in it.
Several blocks run one after the other in one jitted call, as the layers of a model do, each on the result of the one
before, all with the same weights (14.5 GB, many times the L2 cache). `call` is the time of the call over the number of
blocks, gaps between kernels included, `kernels` the sum of the kernels' durations as CUPTI gives them, and `matmuls`
that of the two grouped matmuls. Medians, in microseconds. The floor is the bytes of the chosen experts' weights at
the card's measured copy rate or the FLOPs at its measured bfloat16 rate, whichever is longer.
torch, in a process of its own: `matmuls` is the two calls of `torch._grouped_mm` alone, in one CUDA graph, on rows that
are sorted already, and `activated` the same with the activation between them; sorting and summing are not in it.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from kernels import BYTES_PER_S, FLOPS_PER_S, environment, time_graph, time_jitted  # pyright: ignore

EXPERTS, PER_TOKEN, SIZE, WIDTH = 128, 4, 6144, 3072
ALPHA, LIMIT, BETA = 1.702, 7.0, 1.0
TOKENS = (1, 16, 64, 256, 8192)
# Microseconds, or times the floor.
GOALS = {8192: 6700.0}
GOAL_FLOORS = 1.3


def num_blocks(tokens: int) -> int:
    """Blocks in a call: as many as the model has, where a call of fewer would wait for the host."""
    if tokens > 1024:
        return 1
    return 4 if tokens > 16 else 57


def choices(tokens: int) -> np.ndarray:
    """Experts [blocks, tokens, 4] of each token of each block."""
    rng = np.random.default_rng(tokens)
    scores = rng.random((num_blocks(tokens), tokens, EXPERTS))
    return np.argsort(scores, axis=-1)[..., :PER_TOKEN].astype(np.int32)


def floors(tokens: int) -> dict[str, float]:
    """Microseconds that the mean block's weights take to be read, and its products to be computed."""
    used = np.mean([len(np.unique(chosen)) for chosen in choices(tokens)])
    matrices = 3 * SIZE * WIDTH
    return {
        "experts": float(used),
        "bytes": float(used) * matrices * 2 / BYTES_PER_S * 1e6,
        "flops": tokens * PER_TOKEN * matrices * 2 / FLOPS_PER_S * 1e6,
    }


def ours() -> Any:
    """A function of the number of tokens that gives the block's times."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from m3_jax.config import M3Config
    from m3_jax.moe import Experts

    config = M3Config.m3()
    sizes = (config.num_experts, config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size)
    assert sizes == (EXPERTS, PER_TOKEN, SIZE, WIDTH)
    abstract = nnx.eval_shape(lambda: Experts(config, dtype=jnp.dtype(jnp.bfloat16), rngs=nnx.Rngs(0)))
    definition, state = nnx.split(abstract)
    leaves, tree = jax.tree.flatten(state)

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        # One expert at a time: random bits are twice as large as what they become.
        each = jax.lax.map(
            lambda key: 0.02 * jax.random.normal(key, shape[1:], jnp.bfloat16), jax.random.split(key, shape[0])
        )
        return each.astype(jnp.bfloat16)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    state = tree.unflatten([normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])

    @jax.jit
    def blocks(state: nnx.State, x: jax.Array, weights: jax.Array, chosen: list[jax.Array]) -> jax.Array:
        experts = nnx.merge(definition, state)
        for expert_ids in chosen:
            x = experts(x, weights, expert_ids).astype(x.dtype)
        return x

    def measure(tokens: int) -> dict[str, Any]:
        x = jax.random.normal(jax.random.key(1), (tokens, SIZE), jnp.bfloat16)
        weights = jnp.full((tokens, PER_TOKEN), 1 / PER_TOKEN, jnp.float32)
        chosen = [jnp.asarray(ids) for ids in choices(tokens)]
        times = time_jitted(blocks, len(chosen), state, x, weights, chosen)
        matmuls = [us for name, us in times["by_kernel"].items() if name.startswith("multiply_groups")]
        return times | {"matmuls": sum(matmuls)}

    return measure


def with_torch(tokens: int) -> dict[str, float]:
    """Times of `torch._grouped_mm` on the same choices: {"matmuls": us, "activated": us}."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(0.02)

    gate_up, down = normal(EXPERTS, 2 * WIDTH, SIZE), normal(EXPERTS, SIZE, WIDTH)
    rows = normal(tokens * PER_TOKEN, SIZE)
    hidden = normal(tokens * PER_TOKEN, WIDTH)
    ends = [
        torch.tensor(np.cumsum(np.bincount(chosen.reshape(-1), minlength=EXPERTS)), device="cuda", dtype=torch.int32)
        for chosen in choices(tokens)
    ]

    def first(end: Any) -> Any:
        return torch._grouped_mm(rows, gate_up.transpose(-2, -1), offs=end)

    def second(hidden: Any, end: Any) -> Any:
        return torch._grouped_mm(hidden, down.transpose(-2, -1), offs=end)

    def activated(end: Any) -> Any:
        gate, up = first(end).chunk(2, dim=-1)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return second((up + BETA) * (gate * torch.sigmoid(ALPHA * gate)), end)

    calls = {
        "matmuls": lambda: [(first(end), second(hidden, end)) for end in ends],
        "activated": lambda: [activated(end) for end in ends],
    }
    return {name: time_graph(call) / len(ends) for name, call in calls.items()}


def torch_times(tokens: list[int]) -> dict[str, Any]:
    """torch's times, in a process of its own: two frameworks do not share a GPU's memory well."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "torch.json"
        command = [sys.executable, __file__, "--only-torch", "--output", str(path), "--tokens", *map(str, tokens)]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise SystemExit(f"torch ended with {done.returncode}")
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--torch", action="store_true", help="also time torch._grouped_mm")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only-torch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_torch:
        import torch  # pyright: ignore[reportMissingImports]

        times = {tokens: with_torch(tokens) for tokens in args.tokens}
        args.output.write_text(json.dumps({"version": torch.__version__, "times": times}))
        return
    peer = torch_times(args.tokens) if args.torch else {"version": None, "times": {}}
    # jax takes most of the memory when it starts: after torch's process has ended.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    measure = ours()
    results = []
    print(
        f"{'tokens':>6} {'floor':>8} {'torch':>8} {'activated':>9} {'call':>8} {'kernels':>8} {'matmuls':>8} launches"
    )
    for tokens in args.tokens:
        bounds = floors(tokens)
        floor = max(bounds["bytes"], bounds["flops"])
        theirs = peer["times"].get(str(tokens), {})
        measured = measure(tokens)
        known = {"tokens": tokens, "floor": floor, "bounds": bounds, "goal": GOALS.get(tokens, GOAL_FLOORS * floor)}
        results.append(known | {"torch": theirs or None} | measured)
        nan = float("nan")
        print(
            f"{tokens:6} {floor:8.1f} {theirs.get('matmuls', nan):8.1f} {theirs.get('activated', nan):9.1f} "
            f"{measured['call']:8.1f} {measured['kernels']:8.1f} {measured['matmuls']:8.1f} "
            f"{measured['launches']:5.1f} {measured['by_kernel']}",
            flush=True,
        )
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            record = {"environment": environment() | {"torch": peer["version"]}, "results": results}
            args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
