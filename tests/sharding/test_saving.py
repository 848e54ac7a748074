"""Saving: from any mesh the same files, which are the converter's; whole or not there."""

import shutil
from pathlib import Path

import jax
import meshes
import models
import numpy as np
import pytest
from checkpoints.releases import converted, random_tensors, write_release
from test_loading_over_meshes import CONFIG, assert_same, mesh_of

from m3_jax import load, random_model, save, saving
from m3_jax.checkpoint.errors import CheckpointError


@pytest.fixture(scope="module")
def converter_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saving")
    return converted(write_release(root / "src", CONFIG, random_tensors(CONFIG)), root / "dst")


def files(folder: Path) -> dict[Path, bytes]:
    """The arrays; the metadata beside them holds times."""
    return {p.relative_to(folder): p.read_bytes() for p in (folder / "parts").rglob("c/**/*") if p.is_file()}


@pytest.mark.parametrize("sizes", [{}, {"tensor": 8}, {"data": 2, "expert": 2, "tensor": 2}], ids=meshes.name)
def test_the_converters_files(converter_output: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    save(load(converter_output, mesh=mesh_of(sizes) if sizes else None), tmp_path / "saved")
    expected = {path: data for path, data in files(converter_output).items() if path.parts[1] != "vision"}
    assert expected
    assert files(tmp_path / "saved") == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]


def test_written_over_one_mesh_and_restored_over_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that end within shards, too."""
    monkeypatch.setattr("m3_jax.checkpoint.orbax_parts.CHUNK_BYTES", 20_000)
    model = random_model(meshes.CONFIG, mesh=meshes.mesh({"tensor": 4}), seed=3)
    expected = models.weights_by_path(model)
    save(model, tmp_path / "saved")
    for sizes in ({"expert": 2, "tensor": 2}, {"expert": 8}):
        assert_same(load(tmp_path / "saved", mesh=meshes.mesh(sizes)), expected)
    restored = load(tmp_path / "saved")
    assert_same(restored, expected)
    assert restored.config == model.config


def test_rows_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut along both dimensions and repeated: every range of rows."""
    value = np.arange(16 * 24).reshape(16, 24)
    mesh = meshes.mesh({"data": 2, "expert": 2, "tensor": 2})
    spec = jax.sharding.PartitionSpec("expert", "tensor")
    array = jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
    for start, stop in ((0, 16), (3, 9), (8, 16), (7, 8)):
        out = np.full((stop - start, 24), -1, array.dtype)
        saving.read_rows(array, out, start)
        np.testing.assert_array_equal(out, value[start:stop])


def test_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dst = meshes.REFERENCE, tmp_path / "saved"
    write_part = saving.write_part

    def fails_late(folder: Path, *arguments: object) -> None:
        if folder.name == "head":
            raise CheckpointError("the disk is full")
        write_part(folder, *arguments)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_part", fails_late)
        with pytest.raises(CheckpointError, match="the disk is full"):
            save(model, dst)
        assert not list(tmp_path.iterdir())
        # A kill runs no handler.
        patch.setattr(saving.Partial, "discard", lambda self: None)
        with pytest.raises(CheckpointError, match="the disk is full"):
            save(model, dst)
    left = tmp_path / "saved.partial"
    assert list(tmp_path.iterdir()) == [left]
    with pytest.raises(CheckpointError, match="an incomplete conversion"):
        load(left)
    shutil.rmtree(left / "parts" / "embed")
    save(model, dst)
    assert list(tmp_path.iterdir()) == [dst]
    assert_same(load(dst), models.weights_by_path(model))
    with pytest.raises(CheckpointError, match="already exists"):
        save(model, dst)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match="save is for one process that sees all weights, there are 2 processes"):
        save(meshes.REFERENCE, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
