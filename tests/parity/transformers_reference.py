"""Runs MiniMax-M3 in transformers on random checkpoints and stores what it says.

    python transformers_reference.py CASES.json OUT

CASES.json is a list of cases (`parity_cases.cases()`). For each case OUT/NAME/checkpoint is a folder that
`save_pretrained` wrote in the released layout, and OUT/NAME/result.npz holds

- `logits_I`: float32 [T, V], all positions of prompt I, for the prompts that the case lists in `logits_of`,
- `tokens`, `margins`: int32 and float32 [prompts, new tokens], the greedy continuation of every prompt and, for
  each of its steps, the largest logit less the second largest,
- `ablation_NAME`: how far the logits of the first prompt move, as a fraction of the largest, once a part of the
  model is switched off; a part that moves nothing would not be tested by the case.

Everything is computed in float32 with eager attention, one prompt at a time, bfloat16 files included: their weights
are rounded, the arithmetic is not. Needs torch, transformers 5.23, safetensors and NumPy; imports nothing of this
repository but the two NumPy modules beside it.
"""

# The interpreter that runs this file is not the one that is type-checked against: it alone has torch.
# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import parity_checkpoint
import torch
from safetensors import safe_open
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3


def main() -> None:
    """The command line."""
    cases_file, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    # One thread: sums in one order on every machine, and the models are too small for more.
    torch.set_num_threads(1)
    for case in json.loads(cases_file.read_text()):
        run_case(case, out / case["name"])


def run_case(case: dict[str, Any], folder: Path) -> None:
    """Builds, saves and runs the model of one case."""
    parity_checkpoint.write_checkpoint(folder / "drawn", case)
    model = load(folder / "drawn")
    save(model, case, folder / "checkpoint")
    result: dict[str, Any] = {}
    for number in case["logits_of"]:
        result[f"logits_{number}"] = forward(model, case["prompts"][number])
    tokens, margins = zip(*(greedy(model, prompt, case["new_tokens"]) for prompt in case["prompts"]), strict=True)
    result["tokens"], result["margins"] = np.stack(tokens), np.stack(margins)
    whole = result[f"logits_{case['logits_of'][0]}"]
    for name, ablated in ablations(model):
        moved = np.abs(forward(ablated, case["prompts"][case["logits_of"][0]]) - whole).max() / np.abs(whole).max()
        result[f"ablation_{name}"] = np.float32(moved)
    np.savez(folder / "result.npz", **result)


def load(folder: Path) -> Any:
    """`from_pretrained` in float32, refusing any tensor that is left over or missing."""
    model, report = m3.MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    problems = {key: value for key, value in report.items() if value}
    if problems:
        raise SystemExit(f"{folder}: transformers loaded it with {problems}")
    model.generation_config.eos_token_id = None  # every continuation has its full length
    return model.eval()


def save(model: Any, case: dict[str, Any], folder: Path) -> None:
    """`save_pretrained` in the case's dtypes, and a check that the files hold exactly what was drawn."""
    saved = copy.deepcopy(model)
    if case["dtype"] == "bfloat16":
        saved.to(torch.bfloat16)
        for module in saved.modules():
            if isinstance(module, m3.MiniMaxM3VLTopKRouter) and case["float32_router"]:
                # Not from the rounded copy: float() of bfloat16 has lost the bits that float32 files keep.
                original = dict(model.named_modules())[next(n for n, m in saved.named_modules() if m is module)]
                module.load_state_dict(original.float().state_dict(), assign=True)
    saved.save_pretrained(folder, max_shard_size="100KB" if case["sharded"] else "5GB")
    if case["form"] == "released":
        (folder / "config.json").write_text(json.dumps(parity_checkpoint.released_config(case), indent=2))
    drawn = parity_checkpoint.draw(case)
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    if found.keys() != drawn.keys():
        raise SystemExit(f"{folder}: save_pretrained wrote other names: {sorted(found.keys() ^ drawn.keys())}")
    for name, tensor in found.items():
        wanted = parity_checkpoint.file_dtype(name, case)
        if str(tensor.dtype) != f"torch.{wanted}":
            raise SystemExit(f"{folder}: {name} was written as {tensor.dtype}, the case says {wanted}")
        if not np.array_equal(tensor.float().numpy(), drawn[name]):
            raise SystemExit(f"{folder}: {name} was not written as it was drawn")


@torch.no_grad()
def forward(model: Any, prompt: list[int]) -> np.ndarray:
    """Logits at every position, float32 [T, V], no cache."""
    return model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` greedy tokens by transformers' own `generate`, and the margin of each."""
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, len(prompt) :].numpy().astype(np.int32)
    best = torch.stack([step[0].float() for step in output.logits]).topk(2).values
    return tokens, (best[:, 0] - best[:, 1]).numpy()


def ablations(model: Any) -> list[tuple[str, Any]]:
    """Copies of the model, each with one part switched off."""
    dense, no_local, no_limit, no_bias = (copy.deepcopy(model) for _ in range(4))
    for module in dense.modules():
        if isinstance(module, m3.MiniMaxM3VLIndexer):
            module.topk_blocks = 1 << 30
    for module in no_local.modules():
        if isinstance(module, m3.MiniMaxM3VLIndexer):
            module.local_blocks = 0
    for module in no_limit.modules():
        if hasattr(module, "swiglu_limit"):
            module.swiglu_limit = 1e30
    for module in no_bias.modules():
        if isinstance(module, m3.MiniMaxM3VLTopKRouter):
            module.e_score_correction_bias.zero_()
    return [("dense", dense), ("no_local", no_local), ("no_limit", no_limit), ("no_bias", no_bias)]


if __name__ == "__main__":
    main()
