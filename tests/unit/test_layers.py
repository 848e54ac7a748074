"""Layers against the oracle's formulas."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import oracle
import pytest
from flax import nnx

from m3_jax import M3Config, M3ForCausalLM
from m3_jax.layers import FEW_ROWS, Projection, SwiGLUOAI, project, rotary_tables, rotate
from m3_jax.moe import SparseMoeBlock
from pallas_kernels import grouped_matmul

TINY = M3Config.tiny()
RNG = np.random.RandomState(3)


def test_rms_norm(tiny: M3ForCausalLM) -> None:
    x = 40 * RNG.standard_normal((5, 7, TINY.hidden_size)).astype(np.float32)
    weight = np.asarray(tiny.norm.weight[...])
    np.testing.assert_allclose(
        tiny.norm(jnp.asarray(x)), oracle.rms_norm(x, weight, TINY.rms_norm_eps), rtol=2e-6, atol=1e-7
    )


def test_rms_norm_is_computed_in_float32(tiny: M3ForCausalLM) -> None:
    """In bf16 the square of 1e20 overflows nothing and the result is rounded once."""
    x = (1e18 * RNG.standard_normal((3, TINY.hidden_size))).astype(jnp.bfloat16)
    weight = np.asarray(tiny.norm.weight[...])
    out = tiny.norm(jnp.asarray(x))
    assert out.dtype == jnp.bfloat16
    expected = oracle.rms_norm(np.asarray(x, np.float64), weight, TINY.rms_norm_eps)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8)


@pytest.mark.parametrize("start", [0, 1_000_000])
def test_rotation(start: int) -> None:
    x = RNG.standard_normal((2, 9, 3, 16)).astype(np.float32)
    positions = start + np.arange(9)
    tables = rotary_tables(jnp.asarray(np.stack([positions, positions + 4])), 10, 5e6)
    out = rotate(jnp.asarray(x), tables)
    # An angle of a million radians in float32 is off by up to 2^-5.
    atol = 1e-6 if start == 0 else 0.1
    for row, shift in enumerate((0, 4)):
        np.testing.assert_allclose(out[row], oracle.rope(x[row], positions + shift, 10, 5e6), atol=atol)
    np.testing.assert_array_equal(out[..., 10:], x[..., 10:])


def test_swiglu_oai_clamps_gate_from_above_alone() -> None:
    gate, up = 30 * RNG.standard_normal((2, 500)).astype(np.float32)
    constants = {"alpha": 1.3, "limit": 6.0, "beta": 0.8}
    out = SwiGLUOAI(**constants)(gate, up)
    np.testing.assert_allclose(out, oracle.swiglu_oai(gate, up, **constants), rtol=1e-5, atol=1e-6)
    assert out[np.argmin(gate)] == pytest.approx(0, abs=1e-6)  # a clamp from below would give about -6 here


def test_grouped_matmul_reads_and_multiplies_what_has_rows() -> None:
    """Compiled work for few rows must not grow with the number of experts, nor may a matrix without rows be read."""

    def flops(groups: int) -> float:
        x, w = jnp.ones((6, 512)), jnp.ones((groups, 384, 512))
        compiled = jax.jit(grouped_matmul).lower(x, w, jnp.zeros(groups, jnp.int32)).compile()
        cost = compiled.cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert flops(128) < 1.1 * flops(16)
    weights = jnp.full((16, 48, 64), jnp.nan).at[jnp.array([3, 9])].set(1.0)
    sizes = jnp.zeros(16, jnp.int32).at[jnp.array([3, 9])].set(jnp.array([2, 4]))
    np.testing.assert_array_equal(grouped_matmul(jnp.ones((6, 64)), weights, sizes), 64.0)


@pytest.mark.parametrize("bias", ["none", "random", "one expert for all"])
def test_moe_equals_the_oracle(tiny: M3ForCausalLM, bias: str) -> None:
    block = tiny.layers[2].mlp
    assert isinstance(block, SparseMoeBlock)
    weights = {path: value for path, value in models.weights_by_path(tiny).items() if path.startswith("layers.2.mlp")}
    correction = {
        "none": np.zeros(TINY.num_experts),
        "random": RNG.standard_normal(TINY.num_experts),
        "one expert for all": np.where(np.arange(TINY.num_experts) == 7, 100.0, 0.0),
    }[bias].astype(np.float32)
    before = block.gate.e_score_correction_bias[...]
    block.gate.e_score_correction_bias[...] = jnp.asarray(correction)
    x = RNG.standard_normal((3, 11, TINY.hidden_size)).astype(np.float32)
    out = block(jnp.asarray(x))
    block.gate.e_score_correction_bias[...] = before
    name = "layers.2.mlp."
    expected = oracle.moe(
        x.reshape(-1, TINY.hidden_size),
        gate=weights[name + "gate.weight"],
        bias=correction,
        experts_gate_up=weights[name + "experts.gate_up_proj.weight"],
        experts_down=weights[name + "experts.down_proj.weight"],
        shared_gate_up=weights[name + "shared_experts.gate_up_proj.weight"],
        shared_down=weights[name + "shared_experts.down_proj.weight"],
        num_chosen=TINY.num_experts_per_tok,
        scaling=TINY.routed_scaling_factor,
        alpha=TINY.swiglu_alpha,
        limit=TINY.swiglu_limit,
        beta=TINY.swiglu_beta,
    )
    np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("equation", "x", "weight"),
    [
        ("btd,nhd->btnh", (6,), (3, 4, 6)),
        ("btnh,dnh->btd", (3, 4), (6, 3, 4)),
        ("btd,gfd->gbtf", (6,), (2, 5, 6)),
        ("btd,id->bti", (6,), (4, 6)),
    ],
)
@pytest.mark.parametrize("rows", [(1, 1), (3, 2), (5, 13)])
def test_projections_of_few_rows_are_the_einsum(equation, x, weight, rows):
    """Up to FEW_ROWS in an operation of their own, with other dimensions; of the same rows, several at once."""
    assert 6 <= FEW_ROWS < 65
    names = tuple("abcdefgh"[: len(weight)])
    first, second = (
        Projection(equation, weight, names, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(seed)) for seed in range(2)
    )
    rows = jax.random.normal(jax.random.key(0), (*rows, *x))
    for projection, output in zip((first, second), project(rows, first, second), strict=True):
        expected = jnp.einsum(equation, rows, projection.weight[...])
        assert expected.shape == output.shape
        np.testing.assert_allclose(output, expected, atol=1e-6)
        np.testing.assert_allclose(projection(rows), expected, atol=1e-6)
