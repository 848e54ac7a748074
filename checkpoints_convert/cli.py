"""The command `m3-convert`. Nothing heavy is imported until a command runs."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Size(click.ParamType):
    """A number of bytes such as 5GB, 500MB or 1000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of the text; `BadParameter` where it is no size."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", str(value).strip().upper())
        if not match or (nbytes := int(float(match[1]) * UNITS[match[2] or ""])) < 1:
            self.fail(f"{value!r}: must be a size such as 5GB, 500MB or 1000", param, ctx)
        return nbytes


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the command with `error: ...` and status 1 where a checkpoint, or the disk, is not as it must be."""
    from m3_jax.checkpoint.errors import CheckpointError, one_line

    try:
        yield
    except CheckpointError as error:
        click.echo(f"error: {one_line(error, 2000)}", err=True)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror or one_line(error)}", err=True)
        sys.exit(1)


def _quiet_host_only_jax() -> None:
    """Orbax asks JAX for its devices; a conversion must neither wait for a GPU nor take its memory."""
    os.environ["JAX_PLATFORMS"] = "cpu"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="m3-jax")
def main() -> None:
    """Converts MiniMax-M3 checkpoints between the released layout and m3-jax's."""


@main.command()
@click.argument("src", type=FOLDER)
@click.argument("dst", type=FOLDER)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "keep"]),
    default="keep",
    show_default=True,
    help="Dtype of the weights; a cast leaves the router and the patch embedding in float32.",
)
def convert(src: Path, dst: Path, dtype: str) -> None:
    """Converts the released layout in SRC to DST, which must not exist.

    Stopped at any moment and run again, it goes on where it was.
    """
    _quiet_host_only_jax()
    from checkpoints_convert import convert as module

    with _one_line_errors():
        existed = dst.exists()
        source = module.convert(src, dst, dtype)
        if existed:
            click.echo(f"{dst}: this conversion is there already", err=True)
        if source.skipped:
            click.echo(f"note: {len(source.skipped)} tensors of multi-token prediction (mtp.*) were left out", err=True)


@main.command()
@click.argument("src", type=FOLDER)
@click.argument("dst", type=FOLDER)
@click.option(
    "--max-shard-size", type=Size(), default="5GB", show_default=True, help="Most data that a file is to hold."
)
def export(src: Path, dst: Path, max_shard_size: int) -> None:
    """Writes the converted checkpoint SRC in the released layout to DST, which must not exist."""
    _quiet_host_only_jax()
    from checkpoints_convert import export as module

    with _one_line_errors():
        module.export(src, dst, max_shard_size)


@main.command()
@click.argument("src", type=FOLDER)
@click.argument("dst", type=FOLDER)
def verify(src: Path, dst: Path) -> None:
    """Compares every weight of two checkpoints, each in either layout; status 1 where they differ."""
    _quiet_host_only_jax()
    from checkpoints_convert import inspect
    from checkpoints_convert import verify as module

    with _one_line_errors():
        result = module.verify(src, dst)
        casts = f", {result.cast} of them after a cast to the second one's dtype" if result.cast else ""
        click.echo(f"{result.weights} weights, {inspect.size_text(result.nbytes)}: equal{casts}")


@main.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
def inspect(folder: Path) -> None:
    """Prints config, tensors, shapes, dtypes and sizes of a checkpoint in either layout, reading no weight."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from checkpoints_convert import inspect as module

    with _one_line_errors():
        report = module.inspect(folder)
    # A pipe has no width: names must not be cut to that of a terminal that is not there.
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(f"{report.folder}: {report.layout} layout", markup=False)
    config = Table(title=module.CONFIG_TITLE, title_justify="left", box=None, show_header=False)
    for key, value in module.config_rows(report.config):
        config.add_row(key, Text(value))
    console.print(config)
    tensors = Table("tensor", "dtype", "shape", title="tensors", title_justify="left", box=None)
    tensors.add_column("count", justify="right")
    tensors.add_column("size", justify="right")
    for row in report.rows:
        shape = " x ".join(map(str, row.shape))
        tensors.add_row(Text(row.name), row.dtype, shape, str(row.count), module.size_text(row.nbytes))
    console.print(tensors)
    count, nbytes = sum(row.count for row in report.rows), sum(row.nbytes for row in report.rows)
    console.print(f"{count} tensors, {module.size_text(nbytes)} ({nbytes} bytes)")
    if report.problem:
        console.print(f"not usable as it is: {report.problem}", markup=False)


if __name__ == "__main__":
    main()
