"""Every kind of broken source: one line that names it, status 1, nothing written. And 200 random ones."""

import dataclasses
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from releases import LM, config_with_vision, m3_convert, random_tensors, refused, write_file, write_release

from m3_jax import M3Config, load
from m3_jax.checkpoint.errors import CheckpointError, one_line

CONFIG = config_with_vision()
TENSORS = random_tensors(CONFIG)
Q, NORM, EXPERT = (
    f"{LM}layers.1.self_attn.q_proj.weight",
    f"{LM}norm.weight",
    f"{LM}layers.2.block_sparse_moe.experts.3.w2.weight",
)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("templates")
    return {n: write_release(root / str(n), CONFIG, TENSORS, shards=n) for n in (1, 2)}


@pytest.fixture
def single(templates: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates[1], tmp_path / "src"))


@pytest.fixture
def sharded(templates: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates[2], tmp_path / "src"))


def conversion_is_refused(src: Path, message: str) -> None:
    """By `convert`, by `load` and with nothing left."""
    dst = src.parent / "dst"
    before = sorted(src.parent.iterdir())
    assert re.search(message, refused(m3_convert("convert", src, dst)))
    assert sorted(src.parent.iterdir()) == before
    with pytest.raises(CheckpointError) as caught:
        load(src)
    assert re.search(message, one_line(caught.value, 2000))


def edit_header(path: Path, edit: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    result = edit(header)
    text = json.dumps(result if isinstance(result, list) else header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def entry(**changes: object) -> Callable[[dict], None]:
    return lambda header: header[NORM].update(changes)


HEADERS = [
    (entry(dtype="F4"), "tensor '.*norm.weight': dtype 'F4' is unknown"),
    (entry(dtype=["BF16"]), "dtype .* is unknown"),
    (entry(shape=[-48]), "shape .-48. must be a list of integers >= 0"),
    (entry(shape=[48.0]), "must be a list of integers"),
    (entry(shape=48), "must be a list of integers"),
    (entry(shape=[1 << 62, 1 << 62]), "data_offsets .* hold 96 bytes"),
    (entry(shape=[47]), "hold 96 bytes, BF16.47. has 94"),
    (entry(data_offsets=[0]), "must be two integers"),
    (entry(data_offsets=[True, 97]), "must be two integers"),
    (entry(data_offsets=[0, 96]), "gap or overlap"),
    (entry(data_offsets=[10**12, 10**12 + 96]), "gap or overlap"),
    (entry(data_offsets=[96, 0]), "hold -96 bytes"),
    (lambda h: h.update({NORM: 7}), "must have exactly dtype, shape and data_offsets"),
    (
        lambda h: h.update({NORM: {"dtype": "BF16", "data_offsets": [0, 96]}}),
        "must have exactly dtype, shape and data_offsets",
    ),
    (lambda h: h.pop(NORM), "gap or overlap"),
    (lambda h: [h], "must hold a JSON object"),
    (lambda h: h.update(__metadata__=[1]), "__metadata__ must map strings to strings"),
]


@pytest.mark.parametrize(("edit", "message"), HEADERS)
def test_headers(single: Path, edit: Callable[[dict], object], message: str) -> None:
    edit_header(single / "model.safetensors", edit)
    conversion_is_refused(single, message)


def replace_bytes(old: bytes, new: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        assert data.count(old) >= 1
        path.write_bytes(data.replace(old, new, 1))

    return damage


def header_of(length: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


def sparse_gigabytes(path: Path) -> None:
    """A file that has the gigabytes that its header claims, as far as the file system says."""
    path.write_bytes((3 << 30).to_bytes(8, "little"))
    os.truncate(path, 4 << 30)


def cut(nbytes: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, path.stat().st_size - nbytes)


def two_files(path: Path) -> None:
    shutil.copy(path, path.with_name("other.safetensors"))
    path.rename(path.with_name("a.safetensors"))


FILES = [
    (cut(1), "the tensors end at byte .*, the file has"),
    (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "the tensors end at byte .*, the file has"),
    (lambda path: os.truncate(path, 7), "header of .* bytes does not fit"),
    (lambda path: os.truncate(path, 0), "header of 0 bytes does not fit in a file of 0"),
    (lambda path: os.truncate(path, 100), "does not fit in a file of 100 bytes"),
    (header_of(2**63), "header of 9223372036854775808 bytes does not fit"),
    (sparse_gigabytes, "header of 3221225472 bytes, at most 100000000 are read"),
    (header_of(3), "not valid JSON"),
    (replace_bytes(b'"dtype"', b'"\xff\xfe\xfd\xfc\xfb"'), "not valid JSON"),
    (replace_bytes(b"[48]", b"[ 0x"), "not valid JSON"),
    (replace_bytes(b'"shape": [48]', b'"shape":[NaN]'), "NaN is not JSON"),
    (replace_bytes(b'"shape": [48]', b'"shape":"[48]'), "not valid JSON"),
    (Path.unlink, "no .safetensors file found"),
    (lambda path: path.rename(path.with_name("model.bin")), "model.bin: .*pickles are never read"),
    (lambda path: path.rename(path.with_name("pytorch_model.pt")), "pytorch_model.pt: .*pickles are never read"),
    (lambda path: (path.unlink(), os.mkfifo(path)), "must be a regular file"),
    (lambda path: (path.unlink(), path.mkdir()), "must be a regular file"),
    (two_files, "model.safetensors.index.json: file not found, and there are 2 .safetensors"),
]


@pytest.mark.parametrize(("damage", "message"), FILES)
def test_files(single: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(single / "model.safetensors")
    conversion_is_refused(single, message)


def test_a_key_twice_in_a_header(single: Path) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()[:-1] + b', "%s": {}}' % NORM.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    conversion_is_refused(single, f"key '{NORM}' is there twice")


INDICES = [
    (lambda m: m.update({Q: "../src/" + FIRST}), "must be a plain name inside the folder"),
    (lambda m: m.update({Q: "/etc/model.safetensors"}), "must be a plain name inside the folder"),
    (lambda m: m.update({Q: "sub/model.safetensors"}), "must be a plain name inside the folder"),
    (lambda m: m.update({Q: "sub\\model.safetensors"}), "must be a plain name inside the folder"),
    (lambda m: m.update({Q: "model\0.safetensors"}), "must be a plain name inside the folder"),
    (lambda m: m.update({Q: ".."}), "not a .safetensors file"),
    (lambda m: m.update({Q: "pytorch_model.bin"}), "not a .safetensors file"),
    (lambda m: m.update({Q: 7}), "not a .safetensors file"),
    (lambda m: m.update({Q: "model-00003-of-00003.safetensors"}), "model-00003-of-00003.safetensors: file not found"),
    (lambda m: m.update({Q: SECOND if m[Q] == FIRST else FIRST}), f"tensor '{Q}' of .* is said to be in"),
    (lambda m: m.pop(Q), f"tensor '{Q}' of .* is not named"),
    (lambda m: m.update(more=FIRST), "tensors that no shard has: more"),
    (dict.clear, "weight_map must map tensors to files"),
]


@pytest.mark.parametrize(("edit", "message"), INDICES)
def test_indices(sharded: Path, edit: Callable[[dict], object], message: str) -> None:
    edit_json(sharded / INDEX, lambda index: edit(index["weight_map"]))
    conversion_is_refused(sharded, message)


def test_shards(sharded: Path) -> None:
    (sharded / SECOND).rename(sharded / "away")
    conversion_is_refused(sharded, f"{SECOND}: file not found")
    write_file(sharded / SECOND, {Q: TENSORS[Q], NORM: TENSORS[NORM]})
    conversion_is_refused(sharded, "is both in .* and in|is said to be in")
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("away")  # a link that stays inside is followed
    assert m3_convert("convert", sharded, sharded.parent / "dst").exit_code == 0


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    src = write_release(tmp_path / "src", CONFIG, TENSORS, shards=2)
    index = json.loads((src / INDEX).read_text())
    other = SECOND if index["weight_map"][Q] == FIRST else FIRST
    in_other = {name: TENSORS[name] for name, file in index["weight_map"].items() if file == other}
    write_file(src / other, in_other | {Q: TENSORS[Q]})
    conversion_is_refused(src, f"'{Q}'")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_the_folder(single: Path, name: str) -> None:
    outside = single.parent / "outside"
    (single / name).rename(outside)
    (single / name).symlink_to(Path("..") / "outside")
    message = refused(m3_convert("convert", single, single.parent / "dst"))
    assert re.search("links to .*outside, outside the folder", message)
    assert not (single.parent / "dst").exists()
    assert not (single.parent / "dst.partial").exists()


def test_a_loop_of_links(single: Path) -> None:
    (single / "config.json").unlink()
    (single / "config.json").symlink_to("config.json")
    conversion_is_refused(single, "config.json")


CONFIGS = [
    (lambda path: path.unlink(), "config.json: file not found"),
    (lambda path: path.write_text("{"), "config.json: not valid JSON"),
    (lambda path: path.write_bytes(b"\xff"), "config.json: not valid JSON"),
    (lambda path: path.write_text("[]"), "config.json: must hold a JSON object"),
    (lambda path: path.write_text("[" * 200_000), "config.json: not valid JSON"),
    (lambda path: path.write_text('{"a": 1, "a": 2}'), "config.json: key 'a' is there twice"),
    (lambda path: path.write_text('{"a": NaN}'), "config.json: NaN is not JSON"),
    (lambda path: os.truncate(path, 1 << 40), "at most 100000000 are read"),
    (lambda path: edit_json(path, lambda c: c.pop("text_config")), "config.json: text_config"),
    (lambda path: edit_json(path, lambda c: c["text_config"].update(hidden_act="gelu")), "hidden_act='gelu'"),
    (lambda path: edit_json(path, lambda c: c["text_config"].update(head_dim="16")), "config.json: "),
    (lambda path: edit_json(path, lambda c: c["text_config"].update(vocab_size=321)),
     "embed_tokens.weight' has shape .320, 48., .321, 48. expected from config.json"),
    (lambda path: edit_json(path, lambda c: c["text_config"].update(num_local_experts=12)),
     "6 tensors missing: .*experts.11.w1.weight"),
    (lambda path: edit_json(path, lambda c: c["text_config"].update(num_local_experts=10)),
     "6 tensors with no place in the model: .*experts.10.w1.weight"),
    (lambda path: edit_json(path, lambda c: c["text_config"].update(num_local_experts=10**12)),
     "1000 tensors missing: .* and 992 more"),
    (lambda path: edit_json(path, lambda c: c["vision_config"].update(num_hidden_layers=10**12)),
     "vision_config.num_hidden_layers=1000000000000"),
    (lambda path: edit_json(path, lambda c: c.pop("vision_config")), "tensors with no place in the model: multi_modal"),
    (lambda path: edit_json(path, lambda c: c["text_config"].update(tie_word_embeddings=True)),
     "1 tensors with no place in the model: language_model.lm_head.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), CONFIGS)
def test_configs(single: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(single / "config.json")
    conversion_is_refused(single, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q: None}, f"1 tensors missing: {Q}"),
        ({"surprise": np.zeros(3, np.float32)}, "1 tensors with no place in the model: surprise"),
        ({"\x1b[31m\ud800[/red]": np.zeros(3, np.float32)}, r"no place in the model: \\x1b\[31m\\xd800\[/red\]"),
        ({Q: TENSORS[Q].T.copy()}, f"'{Q}' has shape .48, 96., .96, 48. expected"),
        ({Q: TENSORS[Q].view(np.uint8)}, f"'{Q}' has shape .96, 96., .96, 48. expected"),
        ({Q: np.zeros((96, 48), np.uint8)}, f"'{Q}' has dtype U8; supported: BF16, F16, F32, F8_E4M3"),
        ({EXPERT: TENSORS[EXPERT].astype(np.float32)}, "must have one dtype: .* is bfloat16, .* is float32"),
        ({f"{LM}layers.01.input_layernorm.weight": TENSORS[NORM]}, "no place in the model: .*layers.01"),
    ],
)
def test_tensors(tmp_path: Path, changes: dict, message: str) -> None:
    tensors = {name: a for name, a in (TENSORS | changes).items() if a is not None}
    conversion_is_refused(write_release(tmp_path / "src", CONFIG, tensors), message)


def test_places(single: Path) -> None:
    parent = single.parent
    assert "missing: folder not found" in refused(m3_convert("convert", parent / "missing", parent / "dst"))
    assert "must be a folder" in refused(m3_convert("convert", single / "config.json", parent / "dst"))
    assert "already exists" in refused(m3_convert("convert", single, single))
    assert "nowhere: folder not found" in refused(m3_convert("convert", single, parent / "nowhere" / "dst"))
    (parent / "foreign.partial").mkdir()
    (parent / "foreign.partial" / "thesis.txt").write_text("all of it")
    message = refused(m3_convert("convert", single, parent / "foreign"))
    assert "foreign.partial: exists and was not made by m3-convert" in message
    assert (parent / "foreign.partial" / "thesis.txt").read_text() == "all of it"
    assert m3_convert("convert", single, parent / "dst").exit_code == 0
    assert "is converted already" in refused(m3_convert("convert", parent / "dst", parent / "again"))
    assert "m3_checkpoint.json: file not found" in refused(m3_convert("export", single, parent / "again"))
    assert not (parent / "again").exists()


def corrupt(folder: Path, rng: random.Random) -> str:
    """Damages one file of a release; says how."""
    weights = sorted(folder.glob("*.safetensors"))
    path = rng.choice(weights)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    kind = rng.choice(["header", "header", "length", "data", "cut", "grow", "index", "config", "config", "swap"])
    if kind in ("header", "length", "data"):
        low, high = {"header": (8, header), "length": (0, 8), "data": (header, len(data))}[kind]
        where = rng.randrange(low, high)
        data[where] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        os.truncate(path, rng.randrange(len(data)))
    elif kind == "grow":
        path.write_bytes(data + rng.randbytes(rng.randrange(1, 100)))
    elif kind == "swap":
        path.write_bytes(rng.choice(weights).read_bytes()[: rng.choice([header, len(data), len(data) - 1])])
    else:
        path = folder / (INDEX if kind == "index" else "config.json")
        data = bytearray(path.read_bytes())
        where = rng.randrange(len(data))
        edit = rng.choice(["flip", "delete", "insert"])
        if edit == "flip":
            data[where] ^= 1 << rng.randrange(8)
        else:
            data[where : where + (edit == "delete")] = b"" if edit == "delete" else bytes([rng.randrange(256)])
        path.write_bytes(data)
    return f"{kind} of {path.name}"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few tensors, because every file of a conversion is waited for until it is on the disk."""
    config = dataclasses.replace(
        M3Config.tiny(),
        num_hidden_layers=2,
        sparse_attention_layers=(False, True),
        moe_layers=(False, True),
        num_experts=4,
    )
    return write_release(tmp_path_factory.mktemp("small") / "src", config, random_tensors(config), shards=2)


@pytest.mark.parametrize("group", range(10))
def test_200_random_corruptions(small: Path, tmp_path: Path, group: int) -> None:
    """Each is a clean error, or a checkpoint that differs from its source in nothing."""
    for seed in range(20 * group, 20 * group + 20):
        src, dst = tmp_path / f"src{seed}", tmp_path / f"dst{seed}"
        shutil.copytree(small, src)
        what = corrupt(src, random.Random(seed))
        result = m3_convert("convert", src, dst)
        if result.exit_code == 0:
            assert m3_convert("verify", src, dst).exit_code == 0, (seed, what)
            shutil.rmtree(dst)
        else:
            try:
                refused(result)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {what}") from error
        assert not dst.with_name(dst.name + ".partial").exists(), (seed, what)
        assert not dst.exists()
        shutil.rmtree(src)
