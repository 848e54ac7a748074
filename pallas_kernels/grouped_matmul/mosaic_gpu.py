"""The grouped matmul as Pallas:Mosaic GPU kernels for Hopper: what they serve, and how they are put together."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import hopper, tuned
from pallas_kernels.derivatives import with_derivative_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_matmul import mosaic_gpu_plan as planning
from pallas_kernels.grouped_matmul import reference

# Of two warpgroups: 64 output channels each in both halves, or gate and up of 64.
_OUT, _WIDTH, _DEPTH = 256, 128, 64


def _why_not(rows, out_name: str, out_channels: int, multiple: int) -> str | None:
    if str(rows.dtype) not in hopper.DTYPES:
        return f"the dtype is {rows.dtype}, not one of {', '.join(hopper.DTYPES)}"
    for name, channels, least in (("in", rows.shape[1], _DEPTH), (out_name, out_channels, multiple)):
        if channels % least:
            return f"there are {channels} channels {name}, not a multiple of {least}"
    return hopper.why_not_here()


def _matmul_supported(rows, weights, _group_sizes) -> str | None:
    return _why_not(rows, "out", weights.shape[1], _OUT)


def _swiglu_supported(rows, gate_up, _group_sizes, *, alpha, limit, beta) -> str | None:
    return _why_not(rows, "of the activation", gate_up.shape[2], _WIDTH)


def _matmul(rows, weights, group_sizes, *, config=None, interpret=None):
    config = config or _config("grouped_matmul", rows, weights)
    return _jitted_matmul(rows, weights, group_sizes, config=config, interpret=interpret)


def _swiglu(rows, gate_up, group_sizes, *, alpha, limit, beta, config=None, interpret=None):
    constants = {"alpha": alpha, "limit": limit, "beta": beta}
    config = config or _config("grouped_swiglu", rows, gate_up)
    return _jitted_swiglu(rows, gate_up, group_sizes, **constants, config=config, interpret=interpret)


def _config(name, rows, weights):
    """Outside of what is jitted, which would keep the configuration that it was traced with first."""
    from pallas_kernels.grouped_matmul import mosaic_gpu_multiply as multiplying

    num_rows = rows.shape[0]
    num_groups, *channels, depth = weights.shape
    sizes = {"channels": math.prod(channels), "depth": depth}
    heuristic = multiplying.TuningConfig.heuristic(num_rows, num_groups, **sizes)
    return tuned.config(name, heuristic, rows=max(1, num_rows), groups=num_groups, **sizes).fitted(depth)


# Jitted, so that a model's layers have one lowering in common.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _jitted_matmul(rows, weights, group_sizes, *, config, interpret):
    return _multiply(rows, weights, group_sizes, None, config, interpret)


@functools.partial(jax.jit, static_argnames=("alpha", "limit", "beta", "config", "interpret"))
def _jitted_swiglu(rows, gate_up, group_sizes, *, alpha, limit, beta, config, interpret):
    def activation(gate, up):
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + beta) * (gate * jax.nn.sigmoid(alpha * gate))

    return _multiply(rows, gate_up, group_sizes, activation, config, interpret)


def _multiply(rows, weights, group_sizes, activation, config, interpret):
    from pallas_kernels.grouped_matmul import mosaic_gpu_multiply as multiplying

    num_rows = rows.shape[0]
    # Copies into shared memory take tiles of as many rows, or all that there are.
    padding = -num_rows % planning.ALIGNMENT if num_rows > planning.ALIGNMENT else 0
    if padding:
        rows = jnp.pad(rows, ((0, padding), (0, 0)))
    plan = planning.plan(group_sizes, num_rows=num_rows + padding, widest=config.widths[-1], tiles=config.tiles)
    out = multiplying.multiply(rows, weights, plan, activation=activation, config=config, interpret=interpret)
    return out[:num_rows]


grouped_matmul = Implementation(_matmul_supported, with_derivative_of(reference.grouped_matmul.run, _matmul))
grouped_swiglu = Implementation(_swiglu_supported, with_derivative_of(reference.grouped_swiglu.run, _swiglu))
