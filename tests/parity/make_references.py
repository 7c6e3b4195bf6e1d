"""Writes every reference: runs the `main` of each `ref_*.py` beside this file. Needs torch and diffusers."""

import importlib
from pathlib import Path


def main() -> None:
    for path in sorted(Path(__file__).parent.glob("ref_*.py")):
        print(path.stem, flush=True)
        importlib.import_module(path.stem).main()


if __name__ == "__main__":
    main()
