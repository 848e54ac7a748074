"""The memory planner against what arrays and executables really take."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import meshes
import models
import numpy as np
import pytest
from click.testing import CliRunner, Result
from jax.sharding import AbstractMesh, AxisType

from m3_jax import M3Config, generation, random_model
from m3_jax.cache import elements_per_token
from m3_jax.model import split
from m3_jax.plan import GB, main, parse_bytes, plan
from m3_jax.sharding import MESH_AXES

CONFIG = dataclasses.replace(
    meshes.CONFIG,
    num_hidden_layers=6,
    sparse_attention_layers=(False, True) * 3,
    moe_layers=(False, True) * 3,
)
CONTEXT, BATCH = 300, 3


def bytes_of_each_device(arrays: Any) -> set[int]:
    """How many bytes of arrays the devices hold: as a set, which has one member where all hold the same."""
    held: Counter[Any] = Counter()
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize("sizes", meshes.SIZES, ids=meshes.name)
def test_weights_and_cache_to_the_byte(sizes: dict[str, int]) -> None:
    mesh = meshes.mesh(sizes) if sizes else None
    model = meshes.REFERENCE if mesh is None else models.placed(meshes.REFERENCE, mesh)
    planned = plan(meshes.CONFIG, context=CONTEXT, batch=BATCH, mesh=mesh, dtype="float32")
    assert bytes_of_each_device(split(model)[1]) == {planned.weights}
    structure, _ = split(model)
    parts = structure.batch_parts
    rows, length = parts * 2 ** math.ceil(math.log2(math.ceil(BATCH / parts))), 320
    state = generation._allocate(structure, rows, length, model.dtype)
    assert bytes_of_each_device(state) == {planned.cache}
    if mesh is not None:
        abstract = AbstractMesh(mesh.axis_sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        assert plan(meshes.CONFIG, context=CONTEXT, batch=BATCH, mesh=abstract, dtype="float32") == planned


def test_what_xla_reserves_for_all_layers() -> None:
    """The plan compiles some layers; the executable that generate runs has all of them."""
    mesh, chunk = meshes.mesh({"tensor": 8}), 32
    model = random_model(CONFIG, mesh=mesh, dtype="float32")
    planned = plan(
        CONFIG, context=CONTEXT, batch=BATCH, mesh=mesh, dtype="float32", prefill_chunk=chunk, source="compiled"
    )
    structure, weights = split(model)
    cache, hidden = generation._allocate(structure, 4, 320, model.dtype)
    tokens, lengths = np.zeros((4, chunk), np.int32), np.full(4, chunk, np.int32)
    program = generation._prefill.lower(structure, weights, cache, hidden, tokens, lengths).compile()
    stats = program.memory_analysis()
    assert stats is not None
    reserved = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    (held,) = bytes_of_each_device((weights, cache, hidden))
    assert planned.activations == planned.passes["prefill"]
    assert reserved > held
    assert planned.total == pytest.approx(held + reserved, rel=0.1)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_the_released_model_on_eight_gpus() -> None:
    result = run("--mesh", "tensor=8", "--context", "131072", "--batch", "4", "--source", "formula")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = {line.split()[0]: line for line in result.stdout.splitlines()[2:]}
    numbers = {name: int(line.split(" bytes")[0].split()[-1].replace(",", "")) for name, line in lines.items()}
    # 427 B parameters without the vision part are 852.4 GB; a KV head is held twice, the router by all.
    assert numbers["weights"] == pytest.approx(852.4 * GB / 8, rel=0.01)
    sparse = M3Config.m3().sparse_attention
    head = 2 * 128 * 60 + sparse.index_dim * 57
    assert elements_per_token(M3Config.m3()) == 4 * 2 * 128 * 60 + sparse.index_dim * 57
    assert numbers["cache"] == pytest.approx(4 * 131072 * head * 2, rel=1e-3)
    assert numbers["total"] == numbers["weights"] + numbers["cache"] + numbers["activations"]
    # Each of 4 x 2,048 rows with its 4 experts' inputs and outputs, of 6,144 channels.
    assert 4 * 2048 * 4 * 2 * 6144 * 2 < numbers["activations"] < 1.2 * GB
    assert numbers["memory"] == 141 * GB


def test_what_does_not_fit_is_refused() -> None:
    arguments = ("--mesh", "tensor=8", "--context", "131072", "--batch", "8")
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("m3_jax.plan: error: does not fit: 156.")
    assert " a device are needed (weights 106.93 GB, cache 47.51 GB, activations 1." in result.stderr
    assert result.stderr.endswith("141.00 GB are there\n")
    assert result.stderr.count("\n") == 1
    assert run(*arguments, "--memory", "150GiB").exit_code == 0
    planned = plan(M3Config.tiny(), context=64, batch=1, dtype="float32")
    planned.check(planned.total)
    with pytest.raises(ValueError, match="does not fit"):
        planned.check(planned.total - 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--context", "2000000"), "context=2000000: the model has max_position_embeddings=1048576"),
        (("--context", "8", "--mesh", "tensors=8"), "mesh 'tensors=8': entry 'tensors=8'"),
        (("--context", "8", "--mesh", "tensor=3"), "kv_heads=4 neither divides over the 3 devices"),
        (("--context", "8", "--memory", "much"), "memory 'much': must be a number above 0 and a unit of B, kB"),
        (("--context", "8", "--config", "m4"), "config 'm4': must be m3, tiny"),
        (("--context", "8", "--mesh", "tensor=16", "--source", "compiled"), "needs a mesh of devices"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("m3_jax.plan: error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="batch=0: must be at least 1"):
        plan(M3Config.tiny(), context=8, batch=0)
    with pytest.raises(ValueError, match="source='guess': must be one of compiled, formula"):
        plan(M3Config.tiny(), context=8, batch=1, source="guess")


def test_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(M3Config.tiny().to_hf()))
    arguments = ("--context", "100", "--dtype", "float32")
    expected = run("--config", "tiny", *arguments)
    assert expected.exit_code == 0
    assert run("--config", str(tmp_path), *arguments).stdout.splitlines()[1:] == expected.stdout.splitlines()[1:]


@pytest.mark.parametrize(
    ("text", "nbytes"), [("141GB", 141 * GB), ("1.5 TiB", 3 * 2**39), ("80 MiB", 80 * 2**20), ("12", 12), ("3kB", 3000)]
)
def test_memory_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "141 gigabytes", "1e9"])
def test_memory_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be a number above 0"):
        parse_bytes(text)
