"""`m3-generate`: text from a checkpoint, on the command line.

Only click is imported here; everything else when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from m3_jax.config import M3Config
    from m3_jax.model import M3ForCausalLM
    from m3_jax.sampling import TokenSampler
    from m3_jax.text import Text


def _mesh_sizes(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, int] | None:
    del context, parameter
    from m3_jax.mesh_option import parse_mesh

    try:
        return None if value is None else parse_mesh(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--checkpoint", metavar="DIR", help="Converted checkpoint, or a Hugging Face folder.")
@click.option(
    "--random-weights",
    metavar="CONFIG",
    help="Instead: random weights, made on the devices. CONFIG is m3, tiny or a config.json; prompts are token ids.",
)
@click.option("--weights-seed", type=click.IntRange(min=0, max=2**32 - 1), help="Of --random-weights; default 0.")
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
@click.option(
    "--mesh",
    metavar="AXIS=SIZE,...",
    callback=_mesh_sizes,
    help="Devices along the axes data, expert and tensor, such as tensor=4,data=2; default: one device.",
)
@click.option(
    "--coordinator",
    metavar="HOST:PORT",
    help="Of process 0, where several processes run this command together; auto: as Slurm or Open MPI say.",
)
@click.option("--num-processes", type=click.IntRange(min=1), help="With --coordinator HOST:PORT.")
@click.option("--process-id", type=click.IntRange(min=0), help="With --coordinator HOST:PORT. Process 0 prints.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text as it comes.")
def main(
    checkpoint: str | None,
    random_weights: str | None,
    weights_seed: int | None,
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
    mesh: dict[str, int] | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    as_json: bool,
) -> None:
    """Continue a prompt with MiniMax-M3 and print the text as it comes.

    The prompt is --prompt TEXT, --prompt-tokens FILE, or "-" for standard input, taken as it is. A checkpoint without
    tokenizer.json takes and prints token ids. Generation stops at the checkpoint's end-of-text tokens.
    """
    if (checkpoint is None) == (random_weights is None):
        raise click.UsageError("give one of --checkpoint DIR and --random-weights CONFIG")
    if weights_seed is not None and random_weights is None:
        raise click.UsageError("--weights-seed has no effect without --random-weights")
    if random_weights is not None and (chat or prompt is not None):
        raise click.UsageError("--random-weights has no tokenizer: give token ids, by --prompt-tokens FILE or -")
    if sum(given is not None for given in (prompt, prompt_tokens, dash)) != 1:
        raise click.UsageError("give one of --prompt TEXT, --prompt-tokens FILE and - (standard input)")
    if chat and prompt_tokens is not None:
        raise click.UsageError("--chat takes text: it does not go with --prompt-tokens")
    processes = (num_processes, process_id)
    if (None in processes) if coordinator not in (None, "auto") else (processes != (None, None)):
        raise click.UsageError("--coordinator HOST:PORT, --num-processes and --process-id go together")
    filters = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p}
    if not temperature and any(value is not None for value in filters.values()):
        unused = ", ".join(name for name, value in filters.items() if value is not None)
        raise click.UsageError(f"{unused} has no effect on greedy generation: give a --temperature above 0")
    try:
        if coordinator is not None:
            from m3_jax.distributed import initialize

            initialize(None if coordinator == "auto" else coordinator, *processes)
        if random_weights is not None:
            source = _random(random_weights, weights_seed or 0)
        else:
            assert checkpoint is not None
            source = _stored(Path(checkpoint))
        _run(
            source,
            lambda text: _prompt_ids(text, checkpoint, prompt, prompt_tokens, chat),
            lambda: _sampler(temperature, top_k, top_p, min_p),
            max_new_tokens=max_new_tokens,
            seed=seed,
            dtype=dtype,
            mesh_sizes=mesh,
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
    if "jax" in sys.modules:
        import jax

        if jax.distributed.is_initialized():
            # An orderly end would wait for the other processes, of which one may be why this one ends.
            sys.stderr.flush()
            os._exit(1)
    sys.exit(1)


class _Source(NamedTuple):
    """Where a model comes from; `load` takes a mesh and a dtype, None for what is natural."""

    text: Text | None
    load: Callable[[Mesh | None, str | None], M3ForCausalLM]
    stop_token_ids: Callable[[M3Config], tuple[int, ...]]


def _stored(folder: Path) -> _Source:
    from m3_jax.text import Text, stop_token_ids

    if not folder.is_dir():
        raise NotADirectoryError(f"--checkpoint {folder}: no such folder")

    def load_stored(mesh: Mesh | None, dtype: str | None) -> M3ForCausalLM:
        from m3_jax import load

        return load(folder, mesh=mesh, dtype=dtype)

    return _Source(Text.open(folder), load_stored, lambda config: stop_token_ids(folder, config.eos_token_ids))


def _random(name: str, seed: int) -> _Source:
    from m3_jax import random_model
    from m3_jax.random_weights import named_config

    config = named_config(name)
    return _Source(
        None,
        lambda mesh, dtype: random_model(config, mesh=mesh, dtype=dtype or "bfloat16", seed=seed),
        lambda config: config.eos_token_ids,
    )


def _run(
    source: _Source,
    prompt_ids: Callable[[Text | None], list[int]],
    sampler: Callable[[], TokenSampler],
    *,
    max_new_tokens: int,
    seed: int,
    dtype: str | None,
    mesh_sizes: dict[str, int] | None,
    as_json: bool,
) -> None:
    """Generates and prints. What is cheap to check comes before the weights are loaded."""
    text = source.text
    ids = prompt_ids(text)

    import jax

    from m3_jax import generate, make_mesh

    mesh = None
    if mesh_sizes is not None:
        mesh = make_mesh(data=mesh_sizes["data"], expert=mesh_sizes["expert"], tensor=mesh_sizes["tensor"])
    model = source.load(mesh, dtype)
    prints = jax.process_index() == 0
    stream = None if as_json else _Printer(text, prints)
    output = generate(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        sampler=sampler(),
        seed=seed,
        stop_token_ids=source.stop_token_ids(model.config),
        stream=stream,
    )
    if stream is not None:
        stream.end()
        return
    if not prints:
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
    text: Text | None, checkpoint: str | None, prompt: str | None, prompt_tokens: str | None, chat: bool
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

    def __init__(self, text: Text | None, prints: bool):
        self._prints = prints
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
        if piece and self._prints:
            sys.stdout.write(piece)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
