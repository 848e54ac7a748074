"""Makes examples/tiny-m3: a MiniMax-M3 with random weights and a tokenizer, in the released layout, under 2 MB.

    python scripts/make_tiny_checkpoint.py [OUT [GOLDEN.json]]

Needs torch, transformers 5.23, tokenizers and NumPy, none of which the package itself asks for but the last two.
The weights come from `np.random.RandomState`, a frozen stream, and are written by transformers' `save_pretrained`;
the tokenizer is a byte-level BPE trained on the text below. The same files come out on every run.

Beside the checkpoint goes a file of prompts and of the tokens with which transformers itself continues them, greedily
and in float32. The seed is one of few for which no choice on the way is close, so that rounding cannot turn it.

Sizes that coincide in M3 (head and index dimension, block size and experts; KV heads and experts a token) differ here.
"""

# The interpreter that runs this file is not the one that is type-checked against: it alone has torch.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MiniMaxM3VLConfig
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

ROOT = Path(__file__).resolve().parent.parent
SEED = 54
NEW_TOKENS = 32
LEAST_MARGIN = 0.05

TEXT = """\
A library keeps its books on shelves, and nobody reads every book to answer one question. A good librarian walks along
the catalogue, picks the few shelves that may hold the answer, and reads there with care. Block-sparse attention works
in the same way. The keys of a long text are put on shelves of equal length, called blocks. A small network, the
indexer, looks at each block and gives it a score: the largest product of the question with any key on that shelf. The
blocks with the highest scores are kept, and the attention proper reads those alone, key by key, as if nothing else had
ever been written. The block in which the question itself stands is always kept, because what was said a moment ago is
nearly always of use.

Choosing costs little. The indexer has few heads, it needs no values, and all its heads share one key for a token.
Reading costs much, and reading everything costs more with every page that is added. With a fixed number of blocks the
price of a new word no longer grows with the length of the book, and a million words can be held open at once.

The rest of the model is made of parts that are well known. A norm makes each vector the same length before it is used.
A rotation tells the heads how far apart two words are. A router sends each word to a few experts out of many, and one
shared expert sees them all. Their answers are weighed, added up, and passed on to the next layer, sixty times over.
Then the last layer compares what it holds with every word that it knows, and the nearest one is written down.

def choose(scores, count):
    order = sorted(range(len(scores)), key=lambda block: (-scores[block], block))
    return order[:count]

Numbers have to be read too: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 32, 64, 128, 256, 1024, 4096, 65536, 1048576.
Ein Buch hat viele Seiten, und jede Seite hat viele Wörter. Un libro tiene muchas páginas. Une page a beaucoup de mots.
本は多くのページを持ち、ページは多くの言葉を持つ。一本书有很多页。 Ελληνικά, русский, עברית, العربية, हिन्दी. 🙂🚀
"""

# M3's special tokens, in the order of their ids there (200019 ... 200060).
SPECIAL_TOKENS = (
    *("]~b]", "[e~[", "]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["),
    *("]<]start of video[>[", "]<]end of video[>[", "]~!b[", "]<]minimax[>[", "<mm:think>", "</mm:think>"),
)
VOCAB_SIZE = 448
LEARNED_TOKENS = VOCAB_SIZE - len(SPECIAL_TOKENS) - 4  # a few rows at the end belong to no token, as in M3
SPECIAL_IDS = {token: LEARNED_TOKENS + number for number, token in enumerate(SPECIAL_TOKENS)}

# M3's turns: system text of the model's own, the caller's system text as "developer", then user and ai in turn.
CHAT_TEMPLATE = """\
{%- set mode = thinking_mode | default("adaptive") -%}
{{- "]~!b[]~b]system\\nYou are a tiny model with random weights.\\nThinking: " ~ mode ~ "[e~[\\n" -}}
{%- for message in messages -%}
  {%- if message.role == "system" -%}
    {{- "]~b]developer\\n" ~ message.content ~ "[e~[\\n" -}}
  {%- elif message.role == "user" -%}
    {{- "]~b]user\\n" ~ message.content ~ "[e~[\\n" -}}
  {%- elif message.role == "assistant" -%}
    {{- "]~b]ai\\n" -}}
    {%- if message.reasoning_content -%}{{- "<mm:think>" ~ message.reasoning_content ~ "</mm:think>" -}}{%- endif -%}
    {{- message.content ~ "[e~[\\n" -}}
  {%- else -%}
    {{- raise_exception("unknown role: " ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "]~b]ai\\n" -}}
  {%- if mode == "enabled" -%}{{- "<mm:think>" -}}{%- elif mode == "disabled" -%}{{- "</mm:think>" -}}{%- endif -%}
{%- endif -%}
"""

ATTENTION, MOE = [0, 1, 1, 1], [0, 0, 1, 1]
PATCH_MERGE = {"image_token_compression_method": "patch_merge", "spatial_merge_size": 2, "temporal_patch_size": 2}
CONFIG: dict[str, Any] = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
    "text_config": {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "hidden_size": 72,
        "intermediate_size": 36,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-06,
        "use_gemma_norm": True,
        "attention_output_gate": False,
        "rope_theta": 5000000,
        "rotary_dim": 10,
        "partial_rotary_factor": 10 / 24,
        "hidden_act": "swigluoai",
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "tie_word_embeddings": False,
        "dense_intermediate_size": 100,
        "shared_intermediate_size": 44,
        "num_local_experts": 9,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "moe_layer_freq": MOE,
        "num_mtp_modules": 7,
        "num_nextn_predict_layers": 1,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "routed_scaling_factor": 2.0,
        "bos_token_id": SPECIAL_IDS["]~b]"],
        "eos_token_id": SPECIAL_IDS["[e~["],
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": 20,
            "sparse_num_index_heads": 2,
            "sparse_topk_blocks": 4,
            "sparse_block_size": 16,
            "sparse_disable_index_value": ATTENTION,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_attention_freq": ATTENTION,
        },
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 40,
        "patch_size": 6,
        "image_size": 48,
        "projection_dim": 72,
        "position_embedding_type": "rope",
        "rope_mode": "3d",
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "num_channels": 3,
        "img_token_compression_config": PATCH_MERGE,
        "vision_segment_max_frames": 4,
    },
    "img_token_compression_config": PATCH_MERGE,
    "image_token_index": SPECIAL_IDS["]<]image[>["],
    "video_token_index": SPECIAL_IDS["]<]video[>["],
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "projector_hidden_size": 52,
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG = {
    "bos_token_id": SPECIAL_IDS["]~b]"],
    "eos_token_id": SPECIAL_IDS["[e~["],
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 40,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "]~b]",
    "eos_token": "[e~[",
    "model_max_length": 65536,
    "clean_up_tokenization_spaces": False,
}


def main() -> None:
    """The command line."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "tiny-m3"
    golden = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "tests" / "parity" / "goldens" / "tiny_m3.json"
    torch.set_num_threads(1)
    shutil.rmtree(out, ignore_errors=True)
    tokenizer = train_tokenizer()
    save_model(out, SEED, tokenizer)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", GENERATION_CONFIG)
    write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    continuations = continue_prompts(out, tokenizer)
    write_json(golden, {"new_tokens": NEW_TOKENS, "continuations": continuations})
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size:,} bytes")
    for entry in continuations:
        print(f"{len(entry['prompt'])} tokens, smallest margin {entry['least_margin']:.3f}: {entry['text']!r}")
    if size > 2_000_000:
        sys.exit(f"{out} is larger than 2 MB")
    if min(entry["least_margin"] for entry in continuations) < LEAST_MARGIN:
        sys.exit(f"a greedy choice is closer than {LEAST_MARGIN}: try another seed")


def write_json(path: Path, value: Any) -> None:
    """JSON as the released files are laid out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE with M3's special tokens behind the learned ones."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\S\n]?\p{L}+|\p{N}{1,3}|[^\S\n]?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    for token in SPECIAL_TOKENS:
        # Thinking is part of the text: its markers are single tokens that decoding does not leave out.
        tokenizer.add_tokens([AddedToken(token, special=not token.endswith("mm:think>"), normalized=False)])
    for token, number in SPECIAL_IDS.items():
        if tokenizer.token_to_id(token) != number:
            sys.exit(f"{token} has id {tokenizer.token_to_id(token)}, the config says {number}")
    return tokenizer


def save_model(out: Path, seed: int, tokenizer: Tokenizer) -> None:
    """Random weights in bfloat16, router and patch embedding in float32 as released, by `save_pretrained`."""
    model = m3.MiniMaxM3SparseForConditionalGeneration(MiniMaxM3VLConfig(**CONFIG))
    state = np.random.RandomState(seed)
    tensors = model.state_dict()
    for name in sorted(tensors):
        values = state.standard_normal(tensors[name].shape) * scale(name, tensors[name].shape)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) and "vision" in name:
            values += 1  # a LayerNorm, whose weight is not an offset from one
        if name == "lm_head.weight":
            values[unreadable(tokenizer)] *= 0.25
        tensors[name].copy_(torch.from_numpy(values.astype(np.float32)))
    model.to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, m3.MiniMaxM3VLTopKRouter | m3.MiniMaxM3VLVisionEmbeddings):
            module.float()
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def unreadable(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are no readable text by themselves: made unlikely, so that what is generated can be printed."""
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(VOCAB_SIZE)]
    readable = [bool(text.strip()) and text.isprintable() and text.isascii() for text in texts[:LEARNED_TOKENS]]
    return [token for token in range(VOCAB_SIZE) if token >= LEARNED_TOKENS or not readable[token]]


def scale(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviations at which every part of the model shows in the logits."""
    if len(shape) == 1:
        return 0.1 if name.endswith("bias") else 0.2
    if "embed_tokens" in name:
        return 1.0
    gains = {"lm_head": 4.0, "v_proj": 2.0, "o_proj": 2.0, "gate_up_proj": 1.5}
    fan_in = math.prod(shape[1:]) if "experts." not in name or len(shape) == 2 else shape[-1]
    return next((gain for part, gain in gains.items() if part in name), 1.0) / math.sqrt(fan_in)


def continue_prompts(folder: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """transformers' greedy continuations of a short and of a long prompt, in float32."""
    model = m3.MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    entries = []
    for text in ("A library keeps its books on shelves", TEXT[: TEXT.index("The rest of the model")]):
        prompt = tokenizer.encode(text).ids
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[0, len(prompt) :].tolist()
        best = torch.stack([step[0] for step in output.logits]).topk(2).values
        entries.append(
            {
                "prompt": prompt,
                "tokens": tokens,
                "text": tokenizer.decode(tokens),
                "least_margin": round(float((best[:, 0] - best[:, 1]).min()), 4),
            }
        )
    return entries


if __name__ == "__main__":
    main()
