"""Writes every reference: runs the `main` of each `ref_*.py` beside this file. Needs `requirements.txt`.

Written to another folder than the committed one (SIXBIT_REFERENCES), they are compared with the committed ones too, so
that these stay what the installed diffusers and transformers compute.
"""

import importlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import common
import diffusers
import numpy as np
import torch
import transformers

# Summation order differs between processors and releases of torch: what a test allows us, a reference may move by.
TOLERANCES = {"schedulers": 1e-6, "pipeline": 1e-4, "mini": 1e-4}
OTHERWISE = 1e-5
LIBRARIES = ("torch", "diffusers", "transformers", "compressed-tensors", "nvidia-modelopt", "numpy")
# diffusers' own 16-bit errors are random and depend on the instructions a processor has; a lost digit is a factor of 2.
ERRORS_WITHIN = 1.5


def differences(case: str) -> list[str]:
    """What a fresh reference has otherwise than the committed one of the same name."""
    tolerance = TOLERANCES.get(case.split("_")[0], OTHERWISE)
    headers = [json.loads((folder / f"{case}.json").read_text()) for folder in (common.REFERENCES, common.COMMITTED)]
    fresh, committed = (np.load(folder / f"{case}.npz") for folder in (common.REFERENCES, common.COMMITTED))
    found = [] if headers[0] == headers[1] else ["configuration or weights"]
    found += [f"{name}: in one alone" for name in sorted(set(fresh) ^ set(committed))]
    for name in sorted(set(fresh) & set(committed)):
        a, b = fresh[name], committed[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"{name}: {a.dtype}{list(a.shape)}, committed {b.dtype}{list(b.shape)}")
        elif name.endswith("_error"):
            if not 1 / ERRORS_WITHIN <= a / b <= ERRORS_WITHIN:
                found.append(f"{name}: {a:.3g}, committed {b:.3g}")
        elif a.dtype.kind != "f":
            if not np.array_equal(a, b):
                found.append(f"{name}: other values")
        # A video of float16 is as exact as float16.
        elif not (error := common.relative_l2(a, b)) <= max(tolerance, 2 * np.finfo(a.dtype).eps):
            found.append(f"{name}: relative L2 {error:.2g}, at most {tolerance:.0e}")
    return [f"{case}: {line}" for line in found]


def compare() -> list[str]:
    """What differs between the fresh references and the committed ones."""
    fresh, committed = ({p.stem for p in d.glob("*.npz")} for d in (common.REFERENCES, common.COMMITTED))
    problems = [f"{case}: is not committed" for case in sorted(fresh - committed)]
    problems += [f"{case}: is committed, but no longer written" for case in sorted(committed - fresh)]
    return problems + [line for case in sorted(fresh & committed) for line in differences(case)]


def main() -> None:
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # Models this small gain nothing from threads, and lose much where processors are shared.
    torch.set_num_threads(1)
    for path in sorted(Path(__file__).parent.glob("ref_*.py")):
        start = time.perf_counter()
        importlib.import_module(path.stem).main()
        print(f"{path.stem}: {time.perf_counter() - start:.1f} s", flush=True)
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    (common.REFERENCES / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    if common.REFERENCES != common.COMMITTED and (problems := compare()):
        sys.exit("\n".join(["the committed references differ from fresh ones; see `make references`:", *problems]))


if __name__ == "__main__":
    main()
