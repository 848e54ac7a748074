"""Where the kernels' configurations come from: the file of a device, or the heuristic."""

import dataclasses
import functools
import json
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hopper, tuned, tuning
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped_matmul
from pallas_kernels.index_topk import mosaic_gpu as index_topk
from pallas_kernels.skinny_matmul import mosaic_gpu as skinny_matmul
from pallas_kernels.sparse_attention import mosaic_gpu as sparse_attention
from pallas_kernels.tuned import Measured, bucket_of


@dataclass(frozen=True)
class Config:
    CANDIDATES: ClassVar = {"pages": (1, 2, 4), "stages": (1, 2, 3)}

    pages: int = 2
    stages: int = 1

    def __post_init__(self) -> None:
        if self.stages > self.pages:
            raise ValueError(f"stages={self.stages} must be at most pages={self.pages}")


MEASURED = Measured("score", bucket_of({"entries": 100}), {"pages": 4, "stages": 3}, us=1.5, heuristic_us=2.0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A GPU of the kind "Test GPU 1", and the place of its file."""
    monkeypatch.setattr(
        hopper, "default_device", lambda: types.SimpleNamespace(platform="gpu", device_kind="Test GPU 1")
    )
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.of_device.cache_clear()
    yield tmp_path / "test_gpu_1.json"
    tuned.of_device.cache_clear()


def test_a_measured_bucket_is_used(device: Path) -> None:
    tuned.save(device, "Test GPU 1", [MEASURED], date="today")
    assert tuned.load(device, "Test GPU 1") == [MEASURED]
    assert tuned.config("score", Config(), entries=128) == Config(4, 3)
    assert tuned.config("score", Config(), entries=65) == Config(4, 3)
    for kernel, sizes in (
        ("score", {"entries": 129}),
        ("score", {"entries": 64}),
        ("other", {"entries": 100}),
        ("score", {"entries": 100, "heads": 1}),
    ):
        assert tuned.config(kernel, Config(), **sizes) == Config()


def test_a_device_without_a_file_is_warned_of_once(device: Path) -> None:
    with pytest.warns(UserWarning, match=r"Test GPU 1.*python -m pallas_kernels.tuning.*test_gpu_1.json"):
        assert tuned.config("score", Config(), entries=100) == Config()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.config("other", Config(), entries=7) == Config()


def test_without_a_gpu_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper.default_device().platform != "gpu" or pytest.skip("there is a GPU")
        assert tuned.config("score", Config(), entries=100) == Config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is not JSON"),
        (lambda text: "[]", "is not a file of tuned kernels in format 1"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "is not a file of tuned kernels in format 1"),
        (lambda text: text.replace("Test GPU 1", "Test GPU 2"), "was measured on 'Test GPU 2', not on 'Test GPU 1'"),
        (lambda text: text.replace('"us"', '"time"'), r"has an entry that cannot be read: KeyError\('us'\)"),
        (lambda text: text.replace('"entries": 128', '"entries": 0'), r"cannot be read.*entries=0 must be at least 1"),
        (lambda text: text.replace('"pages": 4', '"pages": "all"'), "cannot be read.*'all'"),
    ],
)
def test_a_corrupt_or_foreign_file_is_refused(device: Path, change: Any, message: str) -> None:
    tuned.save(device, "Test GPU 1", [MEASURED])
    text = change(device.read_text())
    assert text != device.read_text()
    device.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        tuned.config("score", Config(), entries=100)
    assert str(device) in str(refused.value)
    assert "python -m pallas_kernels.tuning" in str(refused.value)


@pytest.mark.parametrize("fields", [{"pages": 1, "stages": 2}, {"rows": 1}], ids=str)
def test_a_configuration_that_the_kernel_refuses_is_an_error(device: Path, fields: dict[str, int]) -> None:
    tuned.save(device, "Test GPU 1", [dataclasses.replace(MEASURED, config=fields)])
    with pytest.raises(ValueError, match=r"test_gpu_1.json: score for \{'entries': 128\} refuses"):
        tuned.config("score", Config(), entries=100)


def test_candidates_are_all_that_the_kernel_accepts() -> None:
    found = [Config(p, s) for p in (1, 2, 4) for s in (1, 2, 3) if s <= p]
    assert tuning.candidates(Config()) == [each for each in found if each != Config()]


def test_results_are_compared() -> None:
    ids, values = jnp.arange(6), jnp.linspace(1, 2, 64, dtype=jnp.bfloat16)
    assert tuning.same(ids, ids)
    assert not tuning.same(ids, ids.at[2].set(7))
    assert tuning.same(values, values.at[3].mul(1.01))
    assert not tuning.same(values, values * 1.01)
    assert not tuning.same(values, values.at[3].set(jnp.nan))


def test_the_fastest_candidate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels of one operation, the second's best depending on the first's."""

    def compiled(problem: Any, args: Any, chosen: Any) -> Any:
        asked = {key: chosen.get(key, Config()) for key in (("a", ()), ("b", ()))}
        config_a, config_b = asked.values()
        return lambda *args: (config_a, config_b), asked

    def microseconds(function: Any, args: Any) -> float:
        a, b = function()
        return 10 - a.pages + abs(b.pages - a.pages) + abs(b.stages - 2)

    monkeypatch.setattr(tuning, "arrays", lambda problem: ())
    monkeypatch.setattr(tuning, "compiled", compiled)
    monkeypatch.setattr(tuning, "microseconds", microseconds)
    monkeypatch.setattr(tuning, "same", lambda result, expected: True)
    known: Any = {}
    problem = tuning.Problem("index_topk_decode", 1, 1024)
    measured = tuning.tune(problem, known)
    assert [(each.kernel, each.config["pages"]) for each in measured] == [("a", 2), ("b", 2)]
    assert known[("b", ())] == Config(2, 2)
    assert measured[1].us == 8
    assert measured[0].heuristic_us == 9
    assert tuning.tune(problem, known) == []


@functools.cache
def asked_by_kernels() -> dict[str, Any]:
    """Every kernel that asks for a configuration, with its heuristic: the operations are traced, not compiled."""
    asked: dict[str, Any] = {}

    def choose(kernel: str, bucket: tuned.Bucket, heuristic: Any) -> Any:
        return asked.setdefault(kernel, heuristic)

    with tuned.choosing(choose):
        for kind, tokens in (("decode", 1), ("prefill", 200)):
            for operation, module in (("index_topk", index_topk), ("sparse_attention", sparse_attention)):
                problem = tuning.Problem(f"{operation}_{kind}", 2, 512, tokens)
                args = tuning.arrays(problem)
                forced = {"top_k": 16, "init_blocks": 0, "local_blocks": 1}
                options = forced if operation == "index_topk" else {"scale": 0.1}
                run = functools.partial(getattr(module, problem.operation).run, **options)
                lengths = 3 if kind == "prefill" else 1
                jax.eval_shape(lambda *a: run(*a[1:-lengths], a[0][0], *a[-lengths:]), *args)  # noqa: B023
        rows, group_sizes = jnp.zeros((8, 128), jnp.bfloat16), jnp.full(2, 4, jnp.int32)
        run = functools.partial(grouped_matmul.grouped_swiglu.run, alpha=1.7, limit=7.0, beta=1.0)
        jax.eval_shape(run, rows, jnp.zeros((2, 2, 128, 128), jnp.bfloat16), group_sizes)
        run = functools.partial(grouped_matmul.grouped_matmul.run)
        jax.eval_shape(run, rows, jnp.zeros((2, 256, 128), jnp.bfloat16), group_sizes)
        run = functools.partial(skinny_matmul.skinny_matmul.run)
        jax.eval_shape(run, rows, jnp.zeros((64, 128), jnp.bfloat16))
    return asked


def test_every_kernel_asks_and_has_candidates() -> None:
    asked = asked_by_kernels()
    known = {"choose_decode", "choose_pieces", "attend_decode", "grouped_matmul", "grouped_swiglu", "skinny_matmul"}
    assert known <= asked.keys()
    # Each time that they are traced: else the first configuration would be measured under the name of another.
    assert asked_by_kernels.__wrapped__() == asked
    for config in asked.values():
        assert len(tuning.candidates(config)) > 1
        assert dataclasses.is_dataclass(config)


def test_the_files_that_ship_fit_the_kernels() -> None:
    """Every entry names a kernel that asks for it, and fields with values that it accepts."""
    asked = asked_by_kernels()
    paths = list(Path(tuned.__file__).parent.glob("*.json"))
    assert paths
    for path in paths:
        kind = json.loads(path.read_text())["device"]
        assert tuned.path_of(kind) == path
        for each in tuned.load(path, kind):
            dataclasses.replace(asked[each.kernel], **each.config)


def test_only_a_gpu_is_tuned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "why_not_here", lambda: "the backend is cpu, not gpu")
    monkeypatch.setattr("sys.argv", ["tuning"])
    with pytest.raises(SystemExit, match="nothing to tune here: the backend is cpu"):
        tuning.main()


def test_what_is_traced_in_the_context_is_chosen() -> None:
    @jax.jit
    def scaled(x: jax.Array) -> jax.Array:
        return x * tuned.config("scale", Config(), rows=x.shape[0]).pages

    with tuned.choosing(lambda kernel, bucket, heuristic: Config(4, 1)):
        assert scaled(jnp.ones(3))[0] == 4
    assert scaled(jnp.ones(3))[0] == 4
    assert scaled(jnp.ones(4))[0] == 2
