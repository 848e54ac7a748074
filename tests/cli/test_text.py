"""Tokenizer, incremental decoding, chat templates: `m3_jax.text`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3_jax.text import REPLACEMENT, Text, TextError, parse_token_ids, stop_token_ids

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-m3"
SAMPLES = ("plain text, 1234 words", "日本は 本🙂", "Ελληνικά עברית हिन्दी\n\ttabs", "👩‍👩‍👧 e\u0301 \ufffd!")


def _open(folder: Path) -> Text:
    text = Text.open(folder)
    assert text is not None
    return text


@pytest.fixture(scope="module")
def text() -> Text:
    return _open(TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's text files, to be spoilt."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TINY / name, tmp_path)
    return tmp_path


def _streamed(text: Text, ids: list[int]) -> list[str]:
    stream = text.stream()
    return [*(stream.push(token) for token in ids), stream.end()]


@pytest.mark.parametrize("sample", SAMPLES)
def test_characters_come_whole(text: Text, sample: str) -> None:
    ids = text.encode(sample)
    assert text.decode(ids) == sample
    pieces = _streamed(text, ids)
    assert "".join(pieces) == sample
    if REPLACEMENT not in sample:
        assert not any(REPLACEMENT in piece for piece in pieces)
        assert pieces[-1] == ""


def test_the_samples_have_characters_of_several_tokens(text: Text) -> None:
    assert any(text.stream().push(token) == "" for token in text.encode("🙂")[:1])
    assert len(text.encode("🙂")) > 1


@given(st.data())
def test_any_ids_stream_to_what_they_decode_to(text: Text, data: st.DataObject) -> None:
    """Random ids are mostly no UTF-8 at all: invalid bytes come out as U+FFFD, nothing twice, nothing lost."""
    ids = data.draw(st.lists(st.integers(0, text.tokenizer.get_vocab_size() - 1), max_size=40))
    pieces = _streamed(text, ids)
    assert "".join(pieces) == text.decode(ids)
    assert not any(piece.endswith(REPLACEMENT) for piece in pieces[:-1])


def test_a_character_cut_off_at_the_end_is_one_replacement(text: Text) -> None:
    ids = text.encode("a🙂")
    assert "".join(_streamed(text, ids[:-1])) == "a" + REPLACEMENT


def test_special_tokens_are_read_and_left_out(text: Text) -> None:
    ids = text.encode("one[e~[two")
    assert text.tokenizer.token_to_id("[e~[") in ids
    assert text.decode(ids) == "onetwo"
    assert "".join(_streamed(text, ids)) == "onetwo"


def test_thinking_markers_are_kept(text: Text) -> None:
    assert text.decode(text.encode("<mm:think>hm</mm:think>so")) == "<mm:think>hm</mm:think>so"


def test_no_tokenizer_is_no_error(tmp_path: Path) -> None:
    assert Text.open(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"model": {"type": "none"}}', "\x80"])
def test_a_broken_tokenizer_is_named(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(TextError, match=r"tokenizer\.json") as error:
        Text.open(folder)
    assert "\n" not in str(error.value)


def test_chat_turns(text: Text) -> None:
    rendered = text.render_chat(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi", "reasoning_content": "greet"},
            {"role": "user", "content": "{{ 1 + 1 }}"},
        ],
        thinking_mode="enabled",
    )
    assert rendered == (
        "]~!b[]~b]system\nYou are a tiny model with random weights.\nThinking: enabled[e~[\n"
        "]~b]developer\nBe brief.[e~[\n"
        "]~b]user\nHello[e~[\n"
        "]~b]ai\n<mm:think>greet</mm:think>Hi[e~[\n"
        "]~b]user\n{{ 1 + 1 }}[e~[\n"
        "]~b]ai\n<mm:think>"
    )
    ids = text.encode_chat([{"role": "user", "content": "Hello"}])
    assert ids[:2] == [text.tokenizer.token_to_id("]~!b["), text.tokenizer.token_to_id("]~b]")]
    assert text.decode(ids).endswith("ai\n")


def test_the_template_may_stand_in_the_tokenizer_config(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    messages = [{"role": "user", "content": "x"}]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{{ messages[0].content }}{{ messages | tojson }}"
    for value in (template, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))
        assert _open(folder).render_chat(messages) == ']~b]x[{"role": "user", "content": "x"}]'
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TextError, match="no chat template"):
        _open(folder).render_chat(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ raise_exception('not today') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages[7].content.upper() }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ range(10**9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_bad_template_is_one_clear_error(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(TextError, match=r"chat_template\.jinja: .") as error:
        _open(folder).render_chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "ids"), [({"eos_token_id": 5}, (5,)), ({"eos_token_id": [5, 7]}, (5, 7)), ({}, (2,)), (None, (2,))]
)
def test_stop_tokens(tmp_path: Path, value: dict[str, object] | None, ids: tuple[int, ...]) -> None:
    if value is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(value))
    assert stop_token_ids(tmp_path, [2]) == ids


@pytest.mark.parametrize("content", ['{"eos_token_id": "x"}', '{"eos_token_id": [true]}', "{", "[]"])
def test_a_broken_generation_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(TextError, match=r"generation_config\.json"):
        stop_token_ids(tmp_path, [2])


def test_token_ids_from_text() -> None:
    for source in ("1 22 3", "1,22,3\n", "[1, 22, 3]", " 1\n22\n3 "):
        assert parse_token_ids(source, "f") == [1, 22, 3]
    assert parse_token_ids(" \n", "f") == []
    for source in ("1 x", "-1", "1.5", "[[1]]", "²"):
        with pytest.raises(TextError, match=r"ids\.txt: .* is not a token id"):
            parse_token_ids(source, "ids.txt")
