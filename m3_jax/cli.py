"""`m3-generate`: text from a checkpoint, on the command line.

Only click is imported here; everything else when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from m3_jax.sampling import TokenSampler
    from m3_jax.text import Text


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--checkpoint", required=True, metavar="DIR", help="Converted checkpoint, or a Hugging Face folder.")
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--prompt-tokens", metavar="FILE", help="Token ids to continue, separated by blanks or commas, or JSON.")
@click.argument("dash", required=False, metavar="[-]", type=click.Choice(["-"]))
@click.option("--chat", is_flag=True, help="Take the text as a user's turn, by the checkpoint's chat template.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the K most likely tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Draw from the fewest tokens that hold this probability.",
)
@click.option(
    "--min-p", type=click.FloatRange(min=0, max=1), help="Draw from tokens this likely beside the most likely one."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0, max=2**32 - 1))
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of weights and arithmetic; default: as stored."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text as it comes.")
def main(
    checkpoint: str,
    prompt: str | None,
    prompt_tokens: str | None,
    dash: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Continue a prompt with MiniMax-M3 and print the text as it comes.

    The prompt is --prompt TEXT, --prompt-tokens FILE, or "-" for standard input, taken as it is. A checkpoint without
    tokenizer.json takes and prints token ids. Generation stops at the checkpoint's end-of-text tokens.
    """
    if sum(given is not None for given in (prompt, prompt_tokens, dash)) != 1:
        raise click.UsageError("give one of --prompt TEXT, --prompt-tokens FILE and - (standard input)")
    if chat and prompt_tokens is not None:
        raise click.UsageError("--chat takes text: it does not go with --prompt-tokens")
    filters = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p}
    if not temperature and any(value is not None for value in filters.values()):
        unused = ", ".join(name for name, value in filters.items() if value is not None)
        raise click.UsageError(f"{unused} has no effect on greedy generation: give a --temperature above 0")
    try:
        _run(
            Path(checkpoint),
            lambda text: _prompt_ids(text, Path(checkpoint), prompt, prompt_tokens, chat),
            lambda: _sampler(temperature, top_k, top_p, min_p),
            max_new_tokens=max_new_tokens,
            seed=seed,
            dtype=dtype,
            as_json=as_json,
        )
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough. Python flushes standard output once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        _fail(error)
    except RuntimeError as error:
        # What XLA raises, out of memory above all; any other RuntimeError is a bug and keeps its traceback.
        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        _fail(error)


def _fail(error: Exception) -> None:
    click.echo(f"m3-generate: error: {' '.join(str(error).split()) or type(error).__name__}", err=True)
    sys.exit(1)


def _run(
    checkpoint: Path,
    prompt_ids: Callable[[Text | None], list[int]],
    sampler: Callable[[], TokenSampler],
    *,
    max_new_tokens: int,
    seed: int,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Generates and prints. What is cheap to check comes before the weights are loaded."""
    from m3_jax.text import Text, stop_token_ids

    if not checkpoint.is_dir():
        raise NotADirectoryError(f"--checkpoint {checkpoint}: no such folder")
    text = Text.open(checkpoint)
    ids = prompt_ids(text)

    from m3_jax import generate, load

    model = load(checkpoint, dtype=dtype)
    stream = None if as_json else _Printer(text)
    output = generate(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        sampler=sampler(),
        seed=seed,
        stop_token_ids=stop_token_ids(checkpoint, model.config.eos_token_ids),
        stream=stream,
    )
    if stream is not None:
        stream.end()
        return
    result: dict[str, Any] = {
        "prompt_tokens": len(ids),
        "tokens": output.tokens[0],
        "text": None if text is None else text.decode(output.tokens[0]),
        "logprobs": output.logprobs[0],
        "finish_reason": output.finish_reasons[0],
    }
    click.echo(json.dumps(result, ensure_ascii=False))


def _prompt_ids(
    text: Text | None, checkpoint: Path, prompt: str | None, prompt_tokens: str | None, chat: bool
) -> list[int]:
    """The prompt's token ids, from wherever the command line says."""
    from m3_jax.text import parse_token_ids

    if prompt_tokens is not None:
        return parse_token_ids(Path(prompt_tokens).read_text(encoding="utf-8"), prompt_tokens)
    if text is None and (chat or prompt is not None):
        raise ValueError(f"{checkpoint} has no tokenizer.json: give token ids, by --prompt-tokens FILE or -")
    source = prompt if prompt is not None else sys.stdin.buffer.read().decode("utf-8")
    if text is None:
        return parse_token_ids(source, "standard input")
    return text.encode_chat([{"role": "user", "content": source}]) if chat else text.encode(source)


def _sampler(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> TokenSampler:
    from m3_jax import Greedy, Sampler

    if not temperature:
        return Greedy()
    return Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


class _Printer:
    """Prints what is generated as it comes: text, or ids where there is no tokenizer."""

    def __init__(self, text: Text | None):
        self._stream = None if text is None else text.stream()
        self._started = False

    def __call__(self, sequence: int, token_id: int, logprob: float) -> None:
        del sequence, logprob
        if self._stream is not None:
            self._write(self._stream.push(token_id))
        else:
            self._write(f" {token_id}" if self._started else str(token_id))
        self._started = True

    def end(self) -> None:
        """The rest, and a line end."""
        self._write(("" if self._stream is None else self._stream.end()) + "\n")

    def _write(self, piece: str) -> None:
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
