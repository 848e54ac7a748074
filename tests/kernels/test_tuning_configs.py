"""Configurations that a kernel cannot run with are refused where they are made, with the value and what is wanted."""

from typing import Any

import pytest

from pallas_kernels import hopper
from pallas_kernels.index_topk import mosaic_gpu_choose, mosaic_gpu_choose_prefill
from pallas_kernels.index_topk import mosaic_gpu_score_prefill as score_prefill
from pallas_kernels.sparse_attention import mosaic_gpu_decode, mosaic_gpu_merge, mosaic_gpu_prefill


@pytest.mark.parametrize(
    ("module", "values", "message"),
    [
        (mosaic_gpu_choose, {"chunk": 48}, "chunk=48 must be 8, 16, or a multiple of 32 up to 256"),
        (mosaic_gpu_choose, {"chunk": 512}, "chunk=512 must be"),
        (mosaic_gpu_choose_prefill, {"stages": 4}, "stages=4 must be 1 to 3"),
        (mosaic_gpu_choose_prefill, {"piece_cost": 0}, "piece_cost=0 must be at least 1"),
        (mosaic_gpu_choose_prefill, {"ctas": 0}, "ctas=0 must be at least 1"),
        (score_prefill, {"shares": 0}, "shares=0 must be at least 1"),
        (mosaic_gpu_decode, {"shares": 0, "stages": 1}, "shares=0 must be at least 1"),
        (mosaic_gpu_decode, {"shares": 1, "stages": 4}, "stages=4 must be 1, 2 or 3"),
        (mosaic_gpu_decode, {"shares": 16, "stages": 2}, "stages=2 must be 1 with more than 8 shares"),
        (mosaic_gpu_merge, {"stages": 9}, "stages=9 must be 1 to 6"),
        (mosaic_gpu_prefill, {"chunk": 16}, "chunk=16 must be a multiple of 3"),
        (mosaic_gpu_prefill, {"chunk": 0}, "chunk=0 must be a multiple of 3"),
        (mosaic_gpu_prefill, {"chunk": 3}, "chunk=3 must be a multiple of 3 from 6 on"),
        (mosaic_gpu_prefill, {"window": 0}, "window=0 must be at least 1"),
        (mosaic_gpu_prefill, {"ctas": 0}, "ctas=0 must be at least 1"),
    ],
)
def test_refused(module: Any, values: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        module.TuningConfig(**values)


@pytest.mark.parametrize("table_width", [1, 32, 33, 64, 65, 256, 1000, 1024, 8192, 9000])
@pytest.mark.parametrize("chunk", [32, 96, 256])
def test_a_choice_fits_its_table(chunk: int, table_width: int):
    """One CTA where it can see all; beyond that no more than a cluster, while a cluster can."""
    config = mosaic_gpu_choose.TuningConfig(chunk).fitted(table_width)
    ctas = -(-table_width // config.blocks)
    assert ctas == 1 or config.blocks >= 4 * chunk
    assert ctas <= 8 or table_width > 8192


@pytest.mark.parametrize("group", [8, 16])
@pytest.mark.parametrize("top_k", [4, 8, 16, 32])
def test_shares_of_a_decode(top_k: int, group: int):
    """Of few units many, as far as there are blocks and queries to share; of many none."""
    heuristic = mosaic_gpu_decode.TuningConfig.heuristic
    assert heuristic(1, top_k, group).shares == min(top_k, group, 16)
    assert heuristic(4, top_k, group).shares == min(top_k, group, 16)
    assert heuristic(8, top_k, group).shares == min(top_k, 8)
    assert heuristic(64, top_k, group).shares == 2
    assert heuristic(256, top_k, group).shares == 1
    for units in range(1, 300):
        config = heuristic(units, top_k, group)
        assert config.shares == 1 or config.shares * units <= hopper.NUM_SMS
