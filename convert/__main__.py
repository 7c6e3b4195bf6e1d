"""`python -m convert SRC DST`."""

from typing import Annotated

import typer

from sixbit_jax.command import run, shows_user_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@shows_user_errors
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
    from convert.command import convert

    names = None if components is None else [name.strip() for name in components.split(",")]
    typer.echo(f"wrote {convert(src, dst, components=names, dtype=dtype, progress=not quiet, overwrite=overwrite)}")


if __name__ == "__main__":
    run(app)
