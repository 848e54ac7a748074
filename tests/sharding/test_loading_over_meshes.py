"""Loading onto meshes: every mesh gets the same values, whatever wrote the files, and the host holds little of them."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints.releases import converted, random_tensors, write_release
from jax.sharding import Mesh

from m3_jax import M3Config, M3ForCausalLM, load, make_mesh
from m3_jax.checkpoint.orbax_parts import tree_of
from m3_jax.model import weights_by_path

# Everything divides by eight but the KV heads, of which tensor=8 repeats each.
CONFIG = dataclasses.replace(
    M3Config.tiny(),
    num_attention_heads=16,
    num_key_value_heads=4,
    moe_intermediate_size=24,
    shared_intermediate_size=40,
    num_experts=16,
    sparse_attention=dataclasses.replace(M3Config.tiny().sparse_attention, num_index_heads=4),
)
MESHES = [
    *({"tensor": size} for size in (2, 4, 8)),
    *({"expert": size} for size in (2, 4, 8)),
    {"data": 2, "tensor": 4},
    {"data": 4, "expert": 2},
    {"data": 2, "expert": 2, "tensor": 2},
]


def name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def mesh_of(sizes: dict[str, int]) -> Mesh:
    return make_mesh(data=sizes.get("data", 1), expert=sizes.get("expert", 1), tensor=sizes.get("tensor", 1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release; beside it "dst", what the converter makes of it."""
    root = tmp_path_factory.mktemp("meshes")
    converted(write_release(root / "src", CONFIG, random_tensors(CONFIG), shards=2), root / "dst")
    return root / "src"


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, np.ndarray]:
    return models.weights_by_path(load(source))


def assert_same(model: M3ForCausalLM, expected: dict[str, np.ndarray]) -> None:
    weights = models.weights_by_path(model)
    assert weights.keys() == expected.keys()
    for path, weight in weights.items():
        assert weight.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(weight, expected[path], err_msg=path)


def shards_of(model: M3ForCausalLM, path: str) -> list[tuple[int, ...]]:
    """Shapes of a weight's shards, one for each device."""
    return [shard.data.shape for shard in weights_by_path(model)[path].addressable_shards]


# The released layout takes the same way to the devices: three meshes suffice for it.
@pytest.mark.parametrize(
    ("layout", "sizes"),
    [("dst", sizes) for sizes in MESHES] + [("src", MESHES[i]) for i in (2, 5, 8)],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_every_mesh_gets_the_same_values(
    source: Path, expected: dict[str, np.ndarray], layout: str, sizes: dict[str, int]
) -> None:
    model = load(source.with_name(layout), mesh=mesh_of(sizes))
    assert_same(model, expected)
    expert, tensor = sizes.get("expert", 1), sizes.get("tensor", 1)
    devices = expert * tensor * sizes.get("data", 1)
    experts = (16 // expert, 2, 24 // tensor, 48)
    assert shards_of(model, "layers.3.mlp.experts.gate_up_proj.weight") == [experts] * devices
    assert shards_of(model, "layers.3.self_attn.q_proj.weight") == [(16 // tensor, 16, 48)] * devices
    assert shards_of(model, "layers.3.self_attn.k_proj.weight") == [(max(1, 4 // tensor), 16, 48)] * devices
    assert shards_of(model, "embed_tokens.weight") == [(320 // tensor, 48)] * devices


CONVERT = """
import jax, sys
from checkpoints_convert.cli import main
assert len(jax.devices()) == 3
main(["convert", *sys.argv[1:]])
"""


def test_converted_with_other_devices(source: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    """The files do not depend on the devices of the process that converted."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    command = [sys.executable, "-c", CONVERT, str(source), str(tmp_path / "dst")]
    subprocess.run(command, env=environment, check=True, capture_output=True)

    def files(folder: Path) -> dict[Path, bytes]:
        """The arrays; the metadata beside them holds times."""
        return {p.relative_to(folder): p.read_bytes() for p in (folder / "parts").rglob("c/**/*") if p.is_file()}

    assert files(tmp_path / "dst") == files(source.with_name("dst"))
    assert_same(load(tmp_path / "dst", mesh=make_mesh(expert=2, tensor=4)), expected)


@pytest.mark.parametrize("writer", [{"tensor": 8}, {"expert": 4}, {"data": 2, "expert": 2, "tensor": 2}], ids=name)
def test_parts_that_plain_orbax_wrote_from_a_mesh(
    source: Path, expected: dict[str, np.ndarray], tmp_path: Path, writer: dict[str, int]
) -> None:
    """Orbax cuts files as the writing mesh cut the arrays; any other mesh, and one device, reads them."""
    folder = Path(shutil.copytree(source.with_name("dst"), tmp_path / "dst"))
    model = load(folder, mesh=mesh_of(writer))
    weights = weights_by_path(model)
    shutil.rmtree(folder / "parts" / "layers.00003")
    part = {path: weight for path, weight in weights.items() if path.startswith("layers.3.")}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
        checkpointer.save(folder / "parts" / "layers.00003", args=ocp.args.PyTreeSave(tree_of(part)))
    pieces = [p for p in (folder / "parts/layers.00003/layers.3.mlp.experts.gate_up_proj.weight/c").rglob("*")]
    # One file a shard, and smaller ones where copies of a shard were written together.
    assert len([p for p in pieces if p.is_file()]) >= writer.get("expert", 1) * writer.get("tensor", 1)
    for sizes in ({"tensor": 2}, {"expert": 8}, {"data": 2, "tensor": 4}):
        assert_same(load(folder, mesh=mesh_of(sizes)), expected)
    assert_same(load(folder), expected)


def test_what_does_not_divide_is_refused(source: Path) -> None:
    mesh = make_mesh(tensor=7)
    with pytest.raises(ValueError, match=r"vocab=320 does not divide over the 7 devices of mesh axis 'tensor'"):
        load(source, mesh=mesh)


MEMORY = """
import re, sys, threading
import jax, numpy as np
from m3_jax import load, make_mesh
from m3_jax.checkpoint import orbax_parts
import m3_jax.loading

# Off by 16 bytes: XLA copies what it gets, as every GPU does, where it would share aligned memory with the host.
aligned = orbax_parts.empty_aligned
def misaligned(shape, dtype):
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return aligned((nbytes + 16,), np.dtype(np.uint8))[16:].view(dtype).reshape(shape)
orbax_parts.empty_aligned = m3_jax.loading.empty_aligned = misaligned
orbax_parts.RESTORE_BYTES = int(sys.argv[2])

def resident():
    # Without the files' pages that a memory map shows for a moment: they are the page cache's.
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) * 1024

jax.block_until_ready(jax.numpy.ones(3) + 1)
load(sys.argv[3])
before, peak, done = resident(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1], mesh=make_mesh(**eval(sys.argv[4])))
done.set()
thread.join()
print(peak - before, sum(s.data.nbytes for x in jax.tree.leaves(model) for s in x.addressable_shards))
"""


@pytest.mark.parametrize("layout", ["src", "dst"])
def test_host_memory(source: Path, tmp_path: Path, layout: str) -> None:
    """Beyond the devices' shards, the host holds a few of them (Orbax) or one weight (Hugging Face), never a layer."""
    moe = (False, True, True, True)
    config = dataclasses.replace(
        CONFIG, hidden_size=512, moe_intermediate_size=1024, sparse_attention_layers=moe, moe_layers=moe
    )
    tensors = random_tensors(config)
    layer_bytes = sum(value.nbytes for key, value in tensors.items() if ".layers.3." in key)
    folder = write_release(tmp_path / "src", config, tensors)
    if layout == "dst":
        folder = converted(folder, tmp_path / "dst")
    weight_bytes = 16 * 2 * 1024 * 512 * 2
    budget = weight_bytes // 8
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    sizes = {"expert": 2, "tensor": 4}
    command = [sys.executable, "-c", MEMORY, str(folder), str(budget), str(source.with_name(layout)), repr(sizes)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    grown, on_devices = map(int, done.stdout.split())
    assert on_devices >= 3 * layer_bytes
    allowed = budget if layout == "dst" else weight_bytes
    assert grown - on_devices < allowed + 12e6 < layer_bytes
