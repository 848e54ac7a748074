"""The sum over devices as XLA computes it: the specification of the other implementation, but for rounding."""

from jax import lax

from pallas_kernels.dispatch import Implementation


def _supported(*_args, **_kwargs) -> str | None:
    return None


def _run(x, _table, *, axes):
    return lax.psum(x, axes)


all_reduce = Implementation(_supported, _run)
