"""The kernels against kernels that nobody here wrote: vLLM's, on the same inputs.

M3_VLLM_OPS names the folder with index_topk.py and sparse_attn.py (see benchmarks/vllm_ops.py); torch and triton must
be installed beside jax. vLLM's run in a process of their own, once for all the cases.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops

FOLDER = os.environ.get("M3_VLLM_OPS", "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not FOLDER, reason="M3_VLLM_OPS names no folder with vLLM's index_topk.py and sparse_attn.py"),
]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vllm_ops.py"
PAGE, DIM, GROUP, TOP_K = 128, 128, 16, 16


@dataclass(frozen=True)
class Case:
    """lens: (tokens cached before, new tokens) of each sequence; as a decode call, the same number of new ones."""

    name: str
    kind: str
    lens: tuple[tuple[int, int], ...]
    kv_heads: int = 4

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every argument of both operations, by name; block_ids are the own block and any others that are visible."""
        rng = np.random.default_rng(len(self.name))
        context, new = (np.array(column, np.int32) for column in zip(*self.lens, strict=True))
        rows, width = int(new.sum()), -(-int((context + new).max()) // PAGE)
        num_pages = len(self.lens) * width + 5
        table = rng.permutation(num_pages)[: len(self.lens) * width].reshape(-1, width).astype(np.int32)

        def normal(*shape: int) -> np.ndarray:
            return np.asarray(jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16))

        position = np.concatenate([before + np.arange(count) for before, count in self.lens])
        rank = rng.random((rows, self.kv_heads, width))
        block, own = np.arange(width), (position // PAGE)[:, None, None]
        rank = np.where(block == own, -1, np.where(block < own, rank, np.inf))
        block_ids = np.pad(np.argsort(rank, axis=-1)[..., :TOP_K], ((0, 0), (0, 0), (0, max(0, TOP_K - width))))
        block_ids = np.where(np.arange(TOP_K) <= own, block_ids, -1).astype(np.int32)
        cu_seqlens = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        lengths = {"seq_lens": context + new}
        if self.kind == "prefill":
            lengths = {"cu_seqlens": cu_seqlens, **lengths, "context_lens": context}
        return {
            "index_q": normal(rows, self.kv_heads, DIM),
            "index_k": normal(num_pages, PAGE, DIM),
            "q": normal(rows, GROUP * self.kv_heads, DIM),
            "k": normal(num_pages, self.kv_heads, PAGE, DIM),
            "v": normal(num_pages, self.kv_heads, PAGE, DIM),
            "block_ids": block_ids,
            "block_table": table,
            **lengths,
        }


CASES = (
    Case("decode-one-long", "decode", ((65_535, 1),)),
    Case("decode-one-head", "decode", ((20_000, 1), (8191, 1), (127, 1), (0, 1), (5000, 1)), kv_heads=1),
    Case("decode-four-tokens", "decode", ((9000, 4), (8188, 4), (0, 4), (2050, 4), (30_000, 4))),
    Case("prefill-ragged", "prefill", ((5000, 700), (0, 1300), (127, 1), (0, 129), (2048, 300))),
    Case("prefill-one-head", "prefill", ((30_000, 1000), (0, 2500)), kv_heads=1),
)


def run_ours(case: Case, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our kernels' choice and attention, and the reference's scores."""
    named = {name: jnp.asarray(array) for name, array in given.items()}
    lengths = [named[name] for name in ("cu_seqlens", "seq_lens", "context_lens") if name in named]
    index = (named["index_q"], named["index_k"], named["block_table"], *lengths)
    choose = jax.jit(getattr(ops, f"index_topk_{case.kind}"), static_argnames=("top_k", "impl"))
    attend = jax.jit(getattr(ops, f"sparse_attention_{case.kind}"), static_argnames="impl")
    cache = (named["q"], named["k"], named["v"], named["block_ids"], named["block_table"])
    results = {
        "ids": choose(*index, top_k=TOP_K, impl="mosaic_gpu"),
        "attention": attend(*cache, *lengths, impl="mosaic_gpu").astype(jnp.float32),
        "scores": getattr(ops, f"index_score_{case.kind}")(*index, impl="reference"),
    }
    return {name: np.asarray(array) for name, array in results.items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, np.ndarray], ...]]:
    """Our results and vLLM's of every case."""
    folder = tmp_path_factory.mktemp("vllm")
    given = {case.name: case.arrays for case in CASES}
    for name, arrays in given.items():
        bits = {key: a if a.dtype == np.int32 else a.view(np.int16) for key, a in arrays.items()}
        np.savez(folder / f"{name}.in.npz", allow_pickle=False, **bits)
    # Triton compiles and tunes theirs for a minute or two: meanwhile ours.
    command = [sys.executable, str(SCRIPT), FOLDER, str(folder)]
    with open(folder / "errors", "w") as errors, subprocess.Popen(command, stderr=errors) as theirs:
        ours = {case.name: run_ours(case, given[case.name]) for case in CASES}
    assert theirs.returncode == 0, (folder / "errors").read_text()[-3000:]
    result = {}
    for case in CASES:
        with np.load(folder / f"{case.name}.out.npz") as arrays:
            result[case.name] = (ours[case.name], dict(arrays))
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_blocks(case: Case, answers: dict[str, tuple[dict[str, np.ndarray], ...]]) -> None:
    """The sets are equal but for blocks whose scores differ by no more than rounding."""
    ours, theirs = answers[case.name]
    a, b = (np.sort(each["ids"], axis=-1) for each in (ours, theirs))
    assert ((a >= 0) == (b >= 0)).all()
    assert (a == b).all(axis=-1).mean() > 0.999
    scores = ours["scores"]
    largest = np.abs(scores[np.isfinite(scores)]).max()

    def of(ids: np.ndarray) -> np.ndarray:
        chosen = np.take_along_axis(scores, np.maximum(ids, 0), axis=-1)
        return np.sort(np.where(ids >= 0, chosen, 0), axis=-1)

    assert np.abs(of(a) - of(b)).max() <= 2e-6 * largest


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_attention(case: Case, answers: dict[str, tuple[dict[str, np.ndarray], ...]]) -> None:
    ours, theirs = answers[case.name]
    a, b = ours["attention"], theirs["attention"]
    assert np.isfinite(a).all()
    assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b)
    # No single row is far off either: both round their results and weights to bfloat16.
    assert np.abs(a - b).max() <= 2.0**-6 * np.abs(b).max()
