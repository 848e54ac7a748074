"""The plot of the kernels' times: what it shows, and that it is known whether it is of the present figures."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import plots  # pyright: ignore[reportMissingImports]


def result(op: str, case: dict[str, Any], time: float) -> dict[str, Any]:
    return {"op": op, "case": {"kv_heads": 4} | case, "vllm": 3 * time, "kernels": 2 * time, "floor": time}


DECODE: dict[str, Any] = {"batch": 1, "queries": 1}
RECORD = {
    "results": [
        result("both", DECODE | {"context": 131_072}, 9.0),
        result("both", DECODE | {"context": 8192}, 2.0),
        result("both", DECODE | {"context": 8192, "kv_heads": 1}, 1.0),
        result("both", DECODE | {"context": 8192, "batch": 2}, 1.0),
        result("attention", DECODE | {"context": 8192}, 1.0),
        result("index", {"tokens": 8192, "prefix": 0, "pattern": "random"}, 7.0),
        result("attention", {"tokens": 8192, "prefix": 1024, "pattern": "random"}, 5.0),
        result("attention", {"tokens": 8192, "prefix": 1024, "pattern": "smooth"}, 4.0),
    ]
}


def test_points_are_the_cases_of_a_panel_by_context() -> None:
    decode, blocks, attention = plots.points(RECORD)
    assert decode == {"context": [8192, 131_072], "vllm": [6, 27], "kernels": [4, 18], "floor": [2, 9]}
    assert blocks == {"context": [8192], "vllm": [21], "kernels": [14], "floor": [7]}
    assert attention == {"context": [9216], "vllm": [15], "kernels": [10], "floor": [5]}


def test_the_same_figures_give_the_same_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    assert not plots.is_of(one, RECORD)
    plots.draw(RECORD, one)
    plots.draw(RECORD, two)
    assert one.read_bytes() == two.read_bytes()
    assert len(one.read_bytes()) < 100_000
    assert plots.is_of(one, RECORD)


@pytest.mark.parametrize("line", ["vllm", "kernels", "floor"])
def test_other_figures_make_it_stale(tmp_path: Path, line: str) -> None:
    path = tmp_path / "plot.svg"
    plots.draw(RECORD, path)
    other = copy.deepcopy(RECORD)
    other["results"][0][line] += 0.5
    assert not plots.is_of(path, other)
