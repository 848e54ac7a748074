"""`load`: the released layout and ours give the same model; what is not whole gives an error."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import models
import numpy as np
import pytest
from releases import LM, config_with_vision, converted, random_tensors, write_release

from m3_jax import M3Config, load
from m3_jax.checkpoint.errors import CheckpointError

CONFIG = config_with_vision()
MANIFEST = "m3_checkpoint.json"


def expected_weights(tensors: dict[str, np.ndarray], config: M3Config) -> dict[str, np.ndarray]:
    """The model's weights by path, put together by hand."""
    out = {"embed_tokens.weight": tensors[f"{LM}embed_tokens.weight"], "norm.weight": tensors[f"{LM}norm.weight"]}
    out["lm_head.weight"] = tensors["language_model.lm_head.weight"]
    split = {"q_proj": 6, "k_proj": 2, "v_proj": 2}
    for n in range(config.num_hidden_layers):
        layer, path = f"{LM}layers.{n}.", f"layers.{n}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            out[f"{path}{name}.weight"] = tensors[f"{layer}{name}.weight"]
        for name, heads in split.items():
            out[f"{path}self_attn.{name}.weight"] = tensors[f"{layer}self_attn.{name}.weight"].reshape(heads, 16, 48)
        out[f"{path}self_attn.o_proj.weight"] = tensors[f"{layer}self_attn.o_proj.weight"].reshape(48, 6, 16)
        if config.sparse_attention_layers[n]:
            for name, shape in {"q_proj": (2, 12, 48), "k_proj": (12, 48), "q_norm": (12,), "k_norm": (12,)}.items():
                index = tensors[f"{layer}self_attn.index_{name}.weight"].reshape(shape)
                out[f"{path}self_attn.indexer.{name}.weight"] = index

        def stack(prefix: str, *names: str) -> np.ndarray:
            return np.stack([tensors[f"{prefix}{name}.weight"] for name in names])

        mlp = f"{layer}mlp."
        if config.moe_layers[n]:
            moe = f"{layer}block_sparse_moe."
            out[f"{path}mlp.gate.weight"] = tensors[f"{moe}gate.weight"]
            out[f"{path}mlp.gate.e_score_correction_bias"] = tensors[f"{moe}e_score_correction_bias"]
            experts = [stack(f"{moe}experts.{e}.", "w1", "w3") for e in range(config.num_experts)]
            out[f"{path}mlp.experts.gate_up_proj.weight"] = np.stack(experts)
            down = [tensors[f"{moe}experts.{e}.w2.weight"] for e in range(config.num_experts)]
            out[f"{path}mlp.experts.down_proj.weight"] = np.stack(down)
            mlp, path = f"{moe}shared_experts.", f"{path}mlp.shared_experts."
        else:
            path = f"{path}mlp."
        out[f"{path}gate_up_proj.weight"] = stack(mlp, "gate_proj", "up_proj")
        out[f"{path}down_proj.weight"] = tensors[f"{mlp}down_proj.weight"]
    return out


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_weights(tmp_path: Path, stored: type, dtype: str | None) -> None:
    tensors = random_tensors(CONFIG, stored)
    src = write_release(tmp_path / "src", CONFIG, tensors, shards=2)
    expected = expected_weights(tensors, CONFIG)
    natural = "bfloat16" if stored is ml_dtypes.bfloat16 else "float32"
    for folder in (src, converted(src, tmp_path / "dst")):
        model = load(folder, dtype=dtype)
        assert model.dtype.name == (dtype or natural)
        assert model.config == CONFIG
        weights = models.weights_by_path(model)
        assert weights.keys() == expected.keys()
        for path, weight in weights.items():
            router = path.endswith(("mlp.gate.weight", "e_score_correction_bias"))
            assert weight.dtype == ("float32" if router else dtype or natural), path
            np.testing.assert_array_equal(weight, expected[path].astype(weight.dtype), err_msg=path)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loading")
    return converted(write_release(root / "src", CONFIG, random_tensors(CONFIG)), root / "dst")


def test_the_loaded_model_computes(template: Path) -> None:
    tokens = models.random_tokens(CONFIG, 2, 37)
    logits = load(template)(tokens)
    np.testing.assert_array_equal(logits, load(template.with_name("src"))(tokens))
    assert np.isfinite(logits).all()


def test_inside_a_running_event_loop(template: Path) -> None:
    """As in a notebook."""

    async def cell() -> int:
        return len(jax.tree.leaves(load(template)))

    assert asyncio.run(cell()) == 63


SHARDED = """
import jax, numpy as np, sys
from m3_jax import load, make_mesh
assert len(jax.devices()) == 4
whole = load(sys.argv[1])
for folder in sys.argv[1:]:
    for sizes in (dict(tensor=2), dict(expert=2, tensor=2), dict(data=2, tensor=2), dict(data=4)):
        model = load(folder, mesh=make_mesh(**sizes), dtype="float32")
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), b)
        experts = model.layers[3].mlp.experts.gate_up_proj.weight[...]
        local = experts.addressable_shards[0].data.shape
        e, t = sizes.get("expert", 1), sizes.get("tensor", 1)
        assert local == (12 // e, 2, 20 // t, 48), (sizes, local)
"""


def test_a_mesh_of_four(tmp_path: Path) -> None:
    config = config_with_vision(num_experts=12)
    src = write_release(tmp_path / "src", config, random_tensors(config))
    dst = converted(src, tmp_path / "dst")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", SHARDED, str(dst), str(src)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def weight(part: str, path: str) -> Callable[[Path], Path]:
    return lambda folder: folder / "parts" / part / path


EMBED = weight("embed", "embed_tokens.weight")


def edit_json(name: str, edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        edit(value)
        (folder / name).write_text(json.dumps(value))

    return damage


def entry(part: str, path: str, **changes: object) -> Callable[[Path], None]:
    return edit_json(MANIFEST, lambda manifest: manifest["parts"][part][path].update(changes))


def array_shape(folder: Path) -> None:
    """A part that was exchanged for one of another model."""
    path = EMBED(folder) / "zarr.json"
    value = json.loads(path.read_text())
    value["shape"] = [321, 48]
    path.write_text(json.dumps(value))


def link_out(folder: Path) -> None:
    (folder / "parts" / "head").rename(folder.parent / "elsewhere")
    (folder / "parts" / "head").symlink_to(folder.parent / "elsewhere")


DAMAGES = [
    (lambda folder: (folder / MANIFEST).unlink(), "m3_checkpoint.json: file not found"),
    (lambda folder: (folder / MANIFEST).write_text("{}"), "format None version None; supported: 'm3-jax' version 1"),
    (lambda folder: (folder / MANIFEST).write_text("{"), "m3_checkpoint.json: not valid JSON"),
    (edit_json(MANIFEST, lambda m: m.update(version=2)), "format 'm3-jax' version 2"),
    (edit_json(MANIFEST, lambda m: m.update(parts=[])), "parts must map names to weights"),
    (edit_json(MANIFEST, lambda m: m["parts"].pop("layers.00002")), "18 weights missing: layers.2.input_layernorm"),
    (edit_json(MANIFEST, lambda m: m["parts"]["head"].update(more={})), "1 weights with no place in the model: more"),
    (edit_json(MANIFEST, lambda m: m["parts"]["head"].update({"norm.weight": 3})), "'norm.weight' is 3, shape .48."),
    (entry("embed", "embed_tokens.weight", shape=[48, 320]), "'embed_tokens.weight' is .* shape .320, 48. expected"),
    (entry("embed", "embed_tokens.weight", dtype="int8"), "'embed_tokens.weight' has dtype 'int8'"),
    (lambda folder: (folder / "config.json").unlink(), "config.json: file not found"),
    (edit_json("config.json", lambda c: c["text_config"].update(vocab_size=321)), "shape .321, 48. expected"),
    (edit_json("config.json", lambda c: c["text_config"].update(num_local_experts=10**12)), "shape .* expected"),
    (edit_json("config.json", lambda c: c["vision_config"].update(num_hidden_layers=10**12)), "num_hidden_layers"),
    (lambda folder: shutil.rmtree(folder / "parts" / "layers.00003"), "layers.00003: folder not found"),
    (lambda folder: shutil.rmtree(folder / "parts"), "parts/embed: folder not found"),
    (link_out, "parts/head: links to .*elsewhere, outside the checkpoint"),
    (lambda folder: shutil.rmtree(EMBED(folder)), "parts/embed: cannot be restored"),
    (lambda folder: shutil.rmtree(EMBED(folder) / "c"), "parts/embed: cannot be restored"),
    (lambda folder: os.truncate(EMBED(folder) / "c" / "0" / "0", 100), "parts/embed: cannot be restored"),
    (lambda folder: (folder / "parts" / "embed" / "_METADATA").write_text("{"), "parts/embed: cannot be restored"),
    (lambda folder: (EMBED(folder) / "zarr.json").write_text("{}"), "parts/embed: cannot be restored"),
    (array_shape, "'embed_tokens.weight' has shape .321, 48., .320, 48. expected"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_folders(template: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = Path(shutil.copytree(template, tmp_path / "dst"))
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_other_folders(template: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: folder not found"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: file not found"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: must be a folder"):
        load(template / "config.json")
    with pytest.raises(CheckpointError, match=r"embed/config\.json: file not found"):
        load(template / "parts" / "embed")
    with pytest.raises(ValueError, match="dtype=float16: must be one of float32, bfloat16"):
        load(template, dtype="float16")


def test_the_default_device_holds_it(template: Path) -> None:
    devices = {device for leaf in jax.tree.leaves(load(template)) for device in leaf.devices()}
    assert devices == {jax.devices()[0]}
