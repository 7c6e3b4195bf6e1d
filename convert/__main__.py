"""`python -m convert SRC DST`."""

from pathlib import Path
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
    quantize: Annotated[
        str | None, typer.Option(help='"nvfp4" stores the transformer blocks at 4.5 bits a weight.')
    ] = None,
    quantize_text_encoder: Annotated[str | None, typer.Option(help='"nvfp4" does the same to T5.')] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A text file, one prompt a line: with --quantize, sample these first, and round the weights for what"
            " they make the linears see. Nearer to the original; takes the memory and the time of those runs."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of --prompts; default 50.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace DST if it is a checkpoint.")] = False,
    quiet: Annotated[bool, typer.Option(help="Show no progress bar.")] = False,
) -> None:
    """Converts a diffusers folder to a sixbit checkpoint, one parameter at a time."""
    if steps is not None and prompts is None:
        raise typer.BadParameter("goes with --prompts", param_hint="--steps")
    from convert.command import convert
    from sixbit_jax.calibrate import read_prompts

    names = None if components is None else [name.strip() for name in components.split(",")]
    asked = {"transformer": quantize, "text_encoder": quantize_text_encoder}
    formats = {name: format for name, format in asked.items() if format is not None}
    done = convert(
        src,
        dst,
        components=names,
        dtype=dtype,
        quantize=formats,
        prompts=None if prompts is None else read_prompts(prompts),
        num_inference_steps=50 if steps is None else steps,
        progress=not quiet,
        overwrite=overwrite,
    )
    typer.echo(f"wrote {done}")


if __name__ == "__main__":
    run(app)
