"""`python -m convert SRC DST`."""

import signal
import sys
from typing import Annotated

import typer

from convert import convert
from convert.errors import CheckpointError

app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[str, typer.Argument(help="A diffusers folder, or a hub id org/name.")],
    dst: Annotated[str, typer.Argument(help="The checkpoint folder to write.")],
    components: Annotated[
        str | None,
        typer.Option(help="Comma-separated subset of transformer,vae,text_encoder,tokenizer,scheduler."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it, the published dtype is kept.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace DST if it is a checkpoint.")] = False,
    quiet: Annotated[bool, typer.Option(help="Show no progress bar.")] = False,
) -> None:
    """Converts a diffusers folder to a sixbit checkpoint, one parameter at a time."""
    names = None if components is None else [name.strip() for name in components.split(",")]
    try:
        done = convert(src, dst, components=names, dtype=dtype, progress=not quiet, overwrite=overwrite)
    except CheckpointError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"wrote {done}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as Ctrl-C: clean up, then go
    app()
