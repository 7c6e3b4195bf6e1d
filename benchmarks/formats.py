"""What each format costs in accuracy, with and without rotation, on four kinds of data.

`python -m benchmarks.formats --out benchmarks/results/formats.json`, on a CPU, in seconds.

Errors are relative L2 errors. The product x @ w.T is taken with the exact weight, which shows what the activation
costs, and with the weight as that route would read it from NVFP4 storage, which is what runs.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from benchmarks import record
from pallas_kernels.common.xla import dequantize
from pallas_kernels.nvfp4_cast import cast
from pallas_kernels.rotate_quantize import reference, rotate_quantize

NVFP4: dict[str, Any] = {"format": "nvfp4"}
FOUR_OVER_SIX: dict[str, Any] = {"format": "nvfp4", "four_over_six": True}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "nvfp4": NVFP4,
    "nvfp4, tensor scale a row": {**NVFP4, "scale_dims": 1},
    "nvfp4 4/6": FOUR_OVER_SIX,
    "int8": {"format": "int8"},
}
WEIGHTS = {"nvfp4": NVFP4, "nvfp4 4/6": FOUR_OVER_SIX}
OUTLIER = 30
HEADINGS = {
    "data": "data",
    "hadamard": "rotation",
    "activation": "activation",
    "x_error": "x",
    "product_error_exact_weight": "x @ w.T, w exact",
    "product_error": "w stored as nvfp4",
    "product_error_four_over_six": "w stored as nvfp4 4/6",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One activation format on one kind of data.

    Attributes:
        data: kind of x and w.
        hadamard: block of the rotation of x and w; 0 for none.
        activation: format of x.
        x_error: of the quantised x.
        product_error_exact_weight: of the product of the quantised x and the exact weight.
        product_error, product_error_four_over_six: of its product with the stored weight, which an INT8 activation
            reads cast to INT8.
    """

    data: str
    hadamard: int
    activation: str
    x_error: float
    product_error_exact_weight: float
    product_error: float
    product_error_four_over_six: float


def draw(rows: int, size: int, out: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Float32 x [rows, size] and w [out, size] by name.

    One channel of x in 64, at random, is an outlier. In "balanced outliers" the weight of such a channel is smaller by
    the same factor, as training tends to leave it, so that all channels matter equally to the product.
    """
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((rows, size))
    laplace = rng.laplace(size=(rows, size))
    weight = rng.standard_normal((out, size)) / np.sqrt(size)
    channels = np.ones(size)
    channels[rng.choice(size, max(size // 64, 1), replace=False)] = OUTLIER
    data = {
        "normal": (normal, weight),
        "laplace": (laplace, weight),
        "outliers": (normal * channels, weight),
        "balanced outliers": (normal * channels, weight / channels),
    }
    return {name: (x.astype(np.float32), w.astype(np.float32)) for name, (x, w) in data.items()}


def relative_error(found: ArrayLike, exact: ArrayLike) -> float:
    found, exact = (np.asarray(a, np.float64) for a in (found, exact))
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def measure(rows: int, size: int, out: int) -> list[Row]:
    """All rows of the table."""
    measured = []
    for name, (x, weight) in draw(rows, size, out).items():
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
        for hadamard in (0, 128):
            rotated_x, rotated_weight = (reference.rotate(a, hadamard) for a in (x, weight))
            stored = [
                rotate_quantize(jnp.asarray(weight), hadamard=hadamard, **options)[0] for options in WEIGHTS.values()
            ]
            for activation, options in ACTIVATIONS.items():
                array, _ = rotate_quantize(jnp.asarray(x), hadamard=hadamard, **options)
                values = np.asarray(dequantize(array), np.float64)
                read = [dequantize(cast(s, to="int8") if options["format"] == "int8" else s) for s in stored]
                errors = [relative_error(values @ np.asarray(w, np.float64).T, exact) for w in (rotated_weight, *read)]
                measured.append(
                    Row(
                        data=name,
                        hadamard=hadamard,
                        activation=activation,
                        x_error=relative_error(values, rotated_x),
                        product_error_exact_weight=errors[0],
                        product_error=errors[1],
                        product_error_four_over_six=errors[2],
                    )
                )
    return measured


def weight_errors(size: int, out: int) -> dict[str, float]:
    """Relative error of a rotated normal weight in each format; "cast" is NVFP4 storage cast to INT8."""
    weight = np.random.default_rng(1).standard_normal((out, size)).astype(np.float32)
    exact = reference.rotate(weight, 128)
    errors = {}
    for name, options in WEIGHTS.items():
        stored, _ = rotate_quantize(jnp.asarray(weight), hadamard=128, **options)
        as_int8 = dequantize(cast(stored, to="int8"))
        errors[name] = relative_error(dequantize(stored), exact)
        errors[f"{name} cast to int8"] = relative_error(as_int8, exact)
        errors[f"{name} cast to int8, against {name}"] = relative_error(as_int8, dequantize(stored))
    direct, _ = rotate_quantize(jnp.asarray(weight), hadamard=128, format="int8")
    return errors | {"int8, not through nvfp4": relative_error(dequantize(direct), exact)}


def markdown(result: dict) -> str:
    """The result as a page."""
    shape = result["shape"]
    lines = [
        "# Accuracy of the formats",
        "",
        f"`{result['command']}`, on {result['device']['kind']}, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ".",
        "",
        f"x is [{shape['rows']}, {shape['size']}] and w is [{shape['out']}, {shape['size']}], normal but for what the"
        " first column says. Relative L2 errors in percent. Outliers: 1 channel of x in 64, at random,"
        f" is {OUTLIER} times as large; balanced: and its weights as many times smaller. INT8 reads the stored NVFP4"
        " weight cast to INT8.",
        "",
        "| " + " | ".join(HEADINGS.values()) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    for row in result["rows"]:
        cells = (row[name] for name in HEADINGS)
        lines.append("| " + " | ".join(f"{100 * c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    lines += ["", "The weight alone, rotated:", "", "| weight | error |", "|---|---|"]
    lines += [f"| {name} | {100 * error:.2f} |" for name, error in result["weights"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--size", type=int, default=3072, help="contracting axis, a multiple of 128")
    parser.add_argument("--out-channels", type=int, default=768)
    parser.add_argument("--out", type=Path, help="JSON to write; the table goes beside it as .md")
    options = parser.parse_args(arguments)
    result = record.describe(
        program="benchmarks.formats",
        argv=arguments,
        rows=measure(options.rows, options.size, options.out_channels),
        shape={"rows": options.rows, "size": options.size, "out": options.out_channels},
        weights=weight_errors(options.size, options.out_channels),
    )
    text = markdown(result)
    print(text, end="")
    record.save(options.out, result, text)


if __name__ == "__main__":
    main()
