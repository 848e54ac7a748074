"""vLLM's Triton kernels for the same operations, without the rest of vLLM.

    python benchmarks/vllm_ops.py FOLDER DATA

FOLDER holds index_topk.py and sparse_attn.py out of a vLLM wheel (vllm/models/minimax_m3/common/ops of 0.33.0). For
every DATA/NAME.in.npz with index_q, index_k, q, k, v (bfloat16's bits as int16), block_ids, block_table and lengths of
one of our calls it writes DATA/NAME.out.npz: vLLM's choice `ids` i32[T, K, C], and `attention` f32[T, N, H] to
block_ids.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


class VllmOps:
    """The two modules, with stand-ins for the little of vLLM that they import.

    Arguments are torch tensors on the GPU, of our operations' shapes unless a method says otherwise. `lengths` is
    (seq_lens,) for a decode call and (cu_seqlens, seq_lens, context_lens) for a prefill call, `tokens` the most query
    tokens of a sequence, and `context` the most tokens.
    """

    def __init__(self, folder: Path) -> None:
        import torch  # pyright: ignore[reportMissingImports]
        import triton  # pyright: ignore[reportMissingImports]
        import triton.language as tl  # pyright: ignore[reportMissingImports]

        class CurrentPlatform:
            is_cuda = staticmethod(lambda: True)
            is_rocm = staticmethod(lambda: False)
            is_device_capability = staticmethod(lambda c: torch.cuda.get_device_capability() == c)
            is_arch_support_pdl = staticmethod(lambda: torch.cuda.get_device_capability()[0] >= 9)

        def stub(name: str, **attributes: Any) -> None:
            module = types.ModuleType(name)
            vars(module).update(attributes)
            sys.modules[name] = module

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

        self._index, self._attention = load("index_topk"), load("sparse_attn")

    def choose(
        self, index_q: Any, index_k: Any, block_table: Any, *lengths: Any, tokens: int, context: int, top_k: int
    ) -> Any:
        """Block numbers i32[K, T, C], of which the query's own is forced."""
        heads = index_q.shape[1]
        if len(lengths) == 1:
            shape = (context, top_k, 0, 1, heads, tokens, tokens)
            return self._index.minimax_m3_index_decode(index_q, index_k, block_table, *lengths, *shape)
        score = self._index.minimax_m3_index_score(index_q, index_k, block_table, *lengths, tokens, context, heads)
        return self._index.minimax_m3_index_topk(score, lengths[0], lengths[2], tokens, top_k, 0, 1)

    def attend(self, q: Any, kv: Any, ids: Any, block_table: Any, *lengths: Any, tokens: int, out: Any) -> None:
        """Writes the attention to `out` [T, N, H]; kv [P, K, S, 2 * H], ids i32[K, T, C]."""
        heads, scale = kv.shape[1], q.shape[-1] ** -0.5
        if len(lengths) == 1:
            self._attention.minimax_m3_sparse_attn_decode(q, kv, ids, block_table, *lengths, heads, scale, out, tokens)
        else:
            self._attention.minimax_m3_sparse_attn(q, kv, ids, block_table, *lengths, tokens, heads, scale, out)


def _answer(ops: VllmOps, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch  # pyright: ignore[reportMissingImports]

    def tensor(name: str) -> Any:
        array = torch.from_numpy(given[name]).cuda()
        return array.view(torch.bfloat16) if given[name].dtype == np.int16 else array

    lengths = [tensor(name) for name in ("cu_seqlens", "seq_lens", "context_lens") if name in given]
    new = np.diff(given["cu_seqlens"]) if "cu_seqlens" in given else len(given["q"]) // len(given["seq_lens"])
    tokens = int(np.max(new))
    table, q, block_ids = tensor("block_table"), tensor("q"), tensor("block_ids")
    sizes = {"tokens": tokens, "context": int(given["seq_lens"].max()), "top_k": block_ids.shape[2]}
    ids = ops.choose(tensor("index_q"), tensor("index_k"), table, *lengths, **sizes)
    out = torch.zeros_like(q)
    kv = torch.cat([tensor("k"), tensor("v")], dim=-1)
    ops.attend(q, kv, block_ids.transpose(0, 1).contiguous(), table, *lengths, tokens=tokens, out=out)
    return {"ids": ids.transpose(0, 1).cpu().numpy(), "attention": out.float().cpu().numpy()}


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    ops, data = VllmOps(Path(sys.argv[1])), Path(sys.argv[2])
    for path in sorted(data.glob("*.in.npz")):
        with np.load(path) as given:
            answer = _answer(ops, dict(given))
        np.savez(data / path.name.replace(".in.", ".out."), allow_pickle=False, **answer)


if __name__ == "__main__":
    main()
