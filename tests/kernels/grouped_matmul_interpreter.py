"""Runs the grouped matmul's Mosaic GPU kernels in Pallas' interpreter, with race detection, against the oracle.

    NPROC=16 JAX_PLATFORMS=cpu python tests/kernels/grouped_matmul_interpreter.py

NPROC must be in the environment before jax is imported: the interpreter wants a thread for each warpgroup and warp.
"""

import dataclasses
import functools

import jax
import numpy as np
from grouped_matmul_cases import CASES, CONSTANTS, Case, check, expected_matmul, expected_swiglu, make
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.mosaic_gpu_multiply import TuningConfig

RACES = plgpu.InterpretGPUParams(detect_races=True)
# One warpgroup and width, several of each, more units than CTAs, clusters, and parts of the contracted channels.
CONFIGS = (
    TuningConfig(widths=(8, 24), warpgroups=2, stages=3, ctas=2),
    TuningConfig(widths=(8, 16), warpgroups=2, stages=2, ctas=4, tiles=2),
    TuningConfig(widths=(8,), warpgroups=1, stages=2, ctas=4, parts=2),
)


def run(case: Case, config: TuningConfig) -> None:
    options = {"config": config, "interpret": RACES}
    rows, weights, group_sizes = make(case, fused=False)
    got = jax.jit(functools.partial(mosaic_gpu._matmul, **options))(rows, weights, group_sizes)
    check(got, expected_matmul(rows, weights, group_sizes), case.dtype)
    rows, gate_up, group_sizes = make(case, fused=True)
    got = jax.jit(functools.partial(mosaic_gpu._swiglu, **CONSTANTS, **options))(rows, gate_up, group_sizes)
    check(got, expected_swiglu(rows, gate_up, group_sizes, **CONSTANTS), case.dtype)
    assert np.shape(got) == (rows.shape[0], gate_up.shape[2])


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    cases = {case.name: case for case in CASES}
    # What two bfloat16 numbers lack of a float16 one would show.
    empty = dataclasses.replace(cases["empty groups"], dtype="float16")
    chosen = [cases["at the edges of tiles"], cases["rows that are no multiple of 8"], empty]
    for case, config in zip(chosen, CONFIGS, strict=True):
        run(case, config)
