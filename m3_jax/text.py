"""Text on both sides of the model: the tokenizer and the chat template that lie beside a checkpoint's weights."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextError(ValueError):
    """A tokenizer, a chat template or a file of token ids cannot be used; the message names the file."""


class Text:
    """A checkpoint's tokenizer (`tokenizer.json`) and chat template.

    Attributes:
      folder: the checkpoint.
      tokenizer: of the `tokenizers` library.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder = folder
        self.tokenizer = tokenizer

    @classmethod
    def open(cls, folder: str | Path) -> Text | None:
        """The tokenizer of a checkpoint folder, None where it has no tokenizer.json.

        Raises TextError for a tokenizer.json that the `tokenizers` library refuses.
        """
        from tokenizers import Tokenizer

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            return None
        data = path.read_bytes()
        try:
            tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises Exception itself
            raise TextError(f"{path}: not a tokenizer: {_one_line(error)}") from error
        return cls(Path(folder), tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens that it spells out become single ids.

        Args:
          text: any text.
          add_special_tokens: whether the tokenizer puts its own round it, where it has any (a chat template brings
            its own).
        """
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out, invalid bytes as U+FFFD."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation, ready for the model's next turn.

        Args:
          messages: mappings with `role` ("system", "user", "assistant") and `content`.
          variables: more names for the template, such as `thinking_mode`.

        Raises TextError where the checkpoint has no chat template or the template refuses the messages.
        """
        return self.encode(self.render_chat(messages, **variables), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text that `encode_chat` encodes. The template runs in Jinja's sandbox, on immutable values."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        source, origin = self._chat_template()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_template_error, strftime_now=_strftime_now)
        special = {
            key: value["content"] if isinstance(value, Mapping) else value
            for key, value in _read_object(self.folder / "tokenizer_config.json").items()
            if key in ("bos_token", "eos_token", "unk_token", "pad_token") and value is not None
        }
        try:
            return environment.from_string(source).render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **special, **variables
            )
        # A template is code from a stranger: besides its own errors it may run into any of Python's.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise TextError(f"{origin}: {_one_line(error)}") from error
        except (MemoryError, RecursionError) as error:
            raise TextError(f"{origin}: {type(error).__name__}") from error

    def _chat_template(self) -> tuple[str, Path]:
        """The template's source and the file it stands in; chat_template.jinja goes first."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8"), path
        path = self.folder / "tokenizer_config.json"
        template = _read_object(path).get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
            template = named.get("default")
        if not isinstance(template, str):
            raise TextError(f"{self.folder}: no chat template (chat_template.jinja or tokenizer_config.json)")
        return template, path


class TextStream:
    """Turns token ids into text as they come, and never hands out a part of a character.

    Bytes of one character may be spread over tokens, and some decoders drop a blank at the start of a text: so new
    ids are decoded together with those of the last piece, and what the last piece gave is cut off again.
    """

    def __init__(self, text: Text):
        self._text = text
        self._last: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, empty while a character is unfinished."""
        self._pending.append(token_id)
        piece = self._piece()
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        self._last, self._pending = self._pending, []
        return piece

    def end(self) -> str:
        """What is left: U+FFFD for bytes that never became a character."""
        piece, self._pending = self._piece(), []
        return piece

    def _piece(self) -> str:
        before = self._text.decode(self._last)
        return self._text.decode([*self._last, *self._pending])[len(before) :]


def stop_token_ids(folder: str | Path, default: Sequence[int]) -> tuple[int, ...]:
    """The ids that end a text: those of generation_config.json beside the weights, else `default`.

    Raises TextError where generation_config.json is not JSON or its eos_token_id neither an id nor a list of ids.
    """
    path = Path(folder) / "generation_config.json"
    eos = _read_object(path).get("eos_token_id")
    if eos is None:
        return tuple(default)
    ids = eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise TextError(f"{path}: eos_token_id={eos!r} is neither a token id nor a list of them")
    return tuple(ids)


def parse_token_ids(source: str, name: str) -> list[int]:
    """Token ids from text: separated by blanks, line ends or commas, with or without brackets round them (JSON).

    Raises TextError that names `name` and the first word that is no id.
    """
    words = source.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise TextError(f"{name}: {word[:40]!r} is not a token id")
    return [int(word) for word in words]


def _read_object(path: Path) -> Mapping[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise TextError(f"{path}: not JSON: {_one_line(error)}") from error
    if not isinstance(value, Mapping):
        raise TextError(f"{path}: not a JSON object")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# What chat templates expect of their surroundings, by the convention that transformers set.
def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise_template_error(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
