"""`random_model`: the declared distribution, the same on every mesh, each device drawing its own shards."""

import dataclasses
import zlib

import meshes
import models
import numpy as np
import pytest

from m3_jax import M3Config, random_model
from m3_jax.abstract_model import abstract_model
from m3_jax.layers import INIT_STDDEV
from m3_jax.model import weights_by_path
from m3_jax.random_weights import _draw, named_config

CONFIG = dataclasses.replace(
    meshes.CONFIG, num_hidden_layers=1, sparse_attention_layers=(True,), moe_layers=(True,), vocab_size=640
)


def test_any_mesh_gives_the_same_model() -> None:
    expected = random_model(CONFIG, dtype="float32")
    mesh = meshes.mesh({"data": 2, "expert": 2, "tensor": 2})
    over_mesh = random_model(CONFIG, dtype="float32", mesh=mesh)
    expected_weights, weights = models.weights_by_path(expected), models.weights_by_path(over_mesh)
    assert weights.keys() == expected_weights.keys()
    for path, weight in weights.items():
        np.testing.assert_array_equal(weight, expected_weights[path], err_msg=path)
    targets = weights_by_path(abstract_model(CONFIG, dtype="float32", mesh=mesh))
    for path, weight in weights_by_path(over_mesh).items():
        assert weight.sharding == targets[path].sharding

    # Normal with the declared deviation, but for norms and the router's bias.
    for path, weight in expected_weights.items():
        if weight.ndim == 1:
            assert not weight.any(), path
        else:
            error = INIT_STDDEV / np.sqrt(2 * weight.size)
            assert abs(weight.std() - INIT_STDDEV) < 5 * error, path
            assert abs(weight.mean()) < 5 * INIT_STDDEV / np.sqrt(weight.size), path
    drawn = [weight.reshape(-1)[:8].tobytes() for weight in expected_weights.values() if weight.ndim > 1]
    assert len(set(drawn)) == len(drawn)

    # bfloat16 is the same model, rounded.
    rounded = models.weights_by_path(random_model(CONFIG))
    for path, weight in rounded.items():
        np.testing.assert_array_equal(weight, expected_weights[path].astype(weight.dtype), err_msg=path)


def test_no_device_draws_more_than_its_shard() -> None:
    """By XLA's account: an eighth of what one device alone takes, and that a small multiple of the weight."""
    path, shape = "layers.0.mlp.experts.gate_up_proj.weight", (16, 2, 24, 40)
    reserved = []
    for mesh in (None, meshes.mesh({"expert": 4, "tensor": 2})):
        target = weights_by_path(abstract_model(CONFIG, dtype="float32", mesh=mesh))[path]
        assert target.shape == shape
        draw = _draw(target.shape, target.dtype, target.sharding, INIT_STDDEV)
        stats = draw.lower(np.uint32(0), np.uint32(1)).compile().memory_analysis()  # pyright: ignore[reportFunctionMemberAccess]
        reserved.append(stats.output_size_in_bytes + stats.temp_size_in_bytes)
    assert reserved[1] < reserved[0] / 8 * 1.05
    assert reserved[0] < 12 * 4 * np.prod(shape)


def test_every_weight_of_the_released_model_has_its_own_stream() -> None:
    names = weights_by_path(abstract_model(M3Config.m3()))
    assert len({zlib.crc32(name.encode()) for name in names}) == len(names) > 1000


def test_other_seeds_and_bad_arguments() -> None:
    small = dataclasses.replace(CONFIG, vocab_size=16, num_hidden_layers=1)
    target = weights_by_path(abstract_model(small))["embed_tokens.weight"]
    draw = _draw(target.shape, target.dtype, target.sharding, INIT_STDDEV)
    assert (np.asarray(draw(np.uint32(1), np.uint32(7))) != np.asarray(draw(np.uint32(2), np.uint32(7)))).any()
    with pytest.raises(ValueError, match="seed=-1: must be between 0"):
        random_model(small, seed=-1)
    with pytest.raises(ValueError, match="dtype=float16"):
        random_model(small, dtype="float16")
    assert named_config("m3") == M3Config.m3()
