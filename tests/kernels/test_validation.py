"""Arguments that do not fit: one clear error each, naming the argument, its value and what is required."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels

B, T, M, P, S, K, G, H, I, C = 3, 12, 7, 22, 8, 2, 4, 16, 10, 5  # noqa: E741
F32, I32 = jnp.float32, jnp.int32


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


LENGTHS = {"seq_lens": array(I32, B), "cu_seqlens": array(I32, B + 1), "context_lens": array(I32, B)}
INDEX = {"index_q": array(F32, T, K, I), "index_k": array(F32, P, S, I), "block_table": array(I32, B, M)}
ATTENTION = {
    "q": array(F32, T, K * G, H),
    "k": array(F32, P, K, S, H),
    "v": array(F32, P, K, S, H),
    "block_ids": array(I32, T, K, C),
    "block_table": array(I32, B, M),
}
CHOICE = {"top_k": C, "init_blocks": 0, "local_blocks": 1}
STATIC = {*CHOICE, "scale", "impl"}


def call(name: str, **changed):
    """Trace the operation with valid arguments, but for those that are changed."""
    arguments = (INDEX if name.startswith("index") else {}) | (ATTENTION if "attention" in name else {})
    if not name.startswith("sparse"):
        arguments.pop("block_ids", None)
    if name in TOPK_OPS:
        arguments |= CHOICE
    arguments |= LENGTHS if name.endswith("prefill") else {"seq_lens": LENGTHS["seq_lens"]}
    arguments |= changed
    static = {key: value for key, value in arguments.items() if key in STATIC}
    traced = {key: value for key, value in arguments.items() if key not in STATIC}
    return jax.eval_shape(lambda traced: getattr(pallas_kernels, name)(**traced, **static), traced)


# Those over pages with the arguments above; the others' are beside the tests of their results.
OPS = [name for name in pallas_kernels.__all__ if name.startswith(("index", "sparse", "paged"))]
INDEX_OPS = [name for name in OPS if name.startswith("index")]
TOPK_OPS = [name for name in INDEX_OPS if "score" not in name]
SPARSE_OPS = [name for name in OPS if name.startswith("sparse")]
ATTENTION_OPS = [name for name in OPS if "attention" in name]
PREFILL_OPS = [name for name in OPS if name.endswith("prefill")]
DECODE_OPS = [name for name in OPS if name.endswith("decode")]


@pytest.mark.parametrize("name", OPS)
def test_valid_arguments_are_accepted(name: str):
    scores, choice, attention = array(F32, T, K, M), array(I32, T, K, C), array(F32, T, K * G, H)
    assert (
        call(name)
        == {
            "index_score": scores,
            "index_topk": choice,
            "index_sparse_attention": (attention, choice),
            "sparse_attention": attention,
            "paged_attention": attention,
        }[name.rsplit("_", 1)[0]]
    )


BAD = [
    (INDEX_OPS, "index_q", array(F32, T, I), ValueError, r"index_q has shape \(12, 10\).*3 axes: \[T K I\]"),
    (INDEX_OPS, "index_q", array(F32, T, K, I + 1), ValueError, r"index_k .* I .* must be 11, as in index_q"),
    (INDEX_OPS, "index_q", array(jnp.bfloat16, T, K, I), TypeError, r"index_q .* bfloat16, .* be float32"),
    (INDEX_OPS, "index_k", array(F32, P, S, 0), ValueError, r"index_k .* I in .* must be at least 1"),
    (INDEX_OPS, "index_k", array(jnp.int8, P, S, I), TypeError, r"index_k .* int8, .* one of bfloat16, float16"),
    (ATTENTION_OPS, "q", array(F32, T, K * G + 1, H), ValueError, r"q has N=9 heads, .* multiple of the K=2"),
    (ATTENTION_OPS, "q", array(jnp.float16, T, K * G, H), TypeError, r"q has dtype float16, which must be float32"),
    (ATTENTION_OPS, "q", array(F32, T, K * G, H + 1), ValueError, r"k has shape .* H .* must be 17, as in q"),
    (ATTENTION_OPS, "k", array(jnp.float8_e4m3fn, P, K, S, H), TypeError, r"k has dtype float8_e4m3fn"),
    (ATTENTION_OPS, "v", array(F32, P, S, K, H), ValueError, r"v has shape .* K .* must be 2, as in k"),
    (ATTENTION_OPS, "v", array(jnp.bfloat16, P, K, S, H), TypeError, r"q has dtype float32.* that of v"),
    (SPARSE_OPS, "block_ids", array(I32, T, K + 1, C), ValueError, r"block_ids .* K .* must be 2"),
    (SPARSE_OPS, "block_ids", array(I32, T + 1, K, C), ValueError, r"block_ids .* T .* must be 12, as in q"),
    (SPARSE_OPS, "block_ids", array(jnp.uint32, T, K, C), TypeError, r"block_ids .* uint32, .* int32"),
    (OPS, "block_table", array(I32, B + 1, M), ValueError, r"seq_lens .* B .* must be 4"),
    (OPS, "block_table", array(I32, B), ValueError, r"block_table .* 2 axes: \[B M\]"),
    (OPS, "block_table", array(jnp.int16, B, M), TypeError, r"block_table .* int16, .* int32"),
    (OPS, "seq_lens", array(F32, B), TypeError, r"seq_lens .* float32, which must be int32"),
    (OPS, "impl", "fast", ValueError, r"impl='fast' must be None or one of .*reference"),
    (PREFILL_OPS, "cu_seqlens", array(I32, B), ValueError, r"cu_seqlens .* B\+1 .* must be 4"),
    (PREFILL_OPS, "cu_seqlens", array(jnp.uint8, B + 1), TypeError, r"cu_seqlens .* uint8"),
    (PREFILL_OPS, "context_lens", array(I32, B + 1), ValueError, r"context_lens .* B .* must be 3"),
    (PREFILL_OPS, "context_lens", array(F32, B), TypeError, r"context_lens .* float32"),
    (TOPK_OPS, "top_k", 0, ValueError, r"top_k=0 must be at least 1"),
    (TOPK_OPS, "top_k", 2.0, TypeError, r"top_k=2.0 must be a Python int, not float"),
    (TOPK_OPS, "top_k", True, TypeError, r"top_k=True must be a Python int, not bool"),
    (TOPK_OPS, "init_blocks", -1, ValueError, r"init_blocks=-1 must be at least 0"),
    (TOPK_OPS, "local_blocks", -2, ValueError, r"local_blocks=-2 must be at least 0"),
    (TOPK_OPS, "init_blocks", C, ValueError, r"init_blocks=5 \+ local_blocks=1 must be at most top_k=5"),
    (ATTENTION_OPS, "scale", 0.0, ValueError, r"scale=0.0 must be positive and finite"),
    (ATTENTION_OPS, "scale", float("nan"), ValueError, r"scale=nan must be positive and finite"),
    (ATTENTION_OPS, "scale", "1", TypeError, r"scale='1' must be a Python float or None, not str"),
]


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "message"),
    [(name, *rest) for names, *rest in BAD for name in names],
)
def test_bad_arguments_are_refused(name: str, argument: str, value, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call(name, **{argument: value})


@pytest.mark.parametrize("name", DECODE_OPS)
def test_rows_of_a_decode_call_are_a_multiple_of_sequences(name: str):
    changed = {"q": array(F32, T + 1, K * G, H)} if name in ATTENTION_OPS else {}
    if name in INDEX_OPS:
        changed["index_q"] = array(F32, T + 1, K, I)
    if name in SPARSE_OPS:
        changed["block_ids"] = array(I32, T + 1, K, C)
    with pytest.raises(ValueError, match=r"q has T=13 rows, which must be a multiple of B=3 sequences"):
        call(name, **changed)


@pytest.mark.parametrize("scale", [1, np.float64(0.25)])
def test_any_real_number_is_a_scale(scale):
    assert call("sparse_attention_decode", scale=scale).shape == (T, K * G, H)


def test_what_is_no_array_is_refused():
    with pytest.raises(TypeError, match=r"block_table must be an array of shape \[B M\], not list"):
        pallas_kernels.index_score_decode(
            jnp.zeros((T, K, I)),
            jnp.zeros((P, S, I)),
            [[0] * M] * B,  # pyright: ignore[reportArgumentType]
            jnp.zeros((B,), I32),
        )
