"""Runs the notebooks as a reader would: each from top to bottom, in a fresh kernel, in an empty folder.

`python notebooks/run.py` checks all of them, or those named, and fails if one raises, takes longer than the limit, or
was committed with outputs that are missing, too large, of other code, or not for others to see. `--write` runs them and
saves the outputs.
"""

import argparse
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
LIMIT_SECONDS = 240.0
LIMIT_BYTES = 400_000
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
MADE_BY = "outputs_of"
"""Metadata: digest of the code that the outputs are of."""
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|var|Users|content)/\S+|" + re.escape(str(FOLDER.parent))
)
EMBEDDED = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]+")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def execute(notebook: NotebookNode, limit: float) -> list[float]:
    """Runs all cells, their outputs into the notebook; -> seconds of each code cell.

    Raises:
        CellExecutionError: if a cell raises.
        CellTimeoutError: if all of it takes longer than `limit` seconds.
        DeadKernelError: if the kernel ends.
    """
    start, began, seconds = time.monotonic(), 0.0, []

    def starts(cell: NotebookNode, cell_index: int) -> None:
        nonlocal began
        began = time.monotonic()

    def ends(cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        seconds.append(time.monotonic() - began)

    with tempfile.TemporaryDirectory() as scratch:
        client = NotebookClient(
            notebook,
            kernel_name=KERNEL["name"],
            resources={"metadata": {"path": scratch}},
            timeout_func=lambda cell: max(1, round(limit - (time.monotonic() - start))),
            coalesce_streams=True,
            record_timing=False,
            on_cell_execute=starts,
            on_cell_executed=ends,
        )
        manager = client.create_kernel_manager()
        manager.kernel_spec_manager.kernel_dirs = []  # the kernel of this Python, whatever others are installed
        manager.transport, manager.ip = "ipc", str(Path(scratch, "kernel"))  # no port that others could reach
        # What tqdm says where there are no widgets to draw its bars with, as there are none here.
        client.execute(env=os.environ | {"PYTHONWARNINGS": "ignore:IProgress not found"})
    return seconds


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Those that hold code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def digest(notebook: NotebookNode) -> str:
    """Of the code."""
    code = "\0".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def settle(notebook: NotebookNode) -> None:
    """Takes out of an executed notebook what differs from run to run and from machine to machine."""
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"}, **{MADE_BY: digest(notebook)})
    for cell in notebook.cells:
        cell.metadata = NotebookNode({name: value for name, value in cell.metadata.items() if name == "tags"})


def problems(path: Path) -> Iterator[str]:
    """What is wrong with a notebook as it lies on disk."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    if (size := path.stat().st_size) > LIMIT_BYTES:
        yield f"{size / 1000:.0f} kB; at most {LIMIT_BYTES / 1000:.0f} kB are wanted"
    cells = code_cells(notebook)
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        yield "its outputs are not of one run from top to bottom: run with --write"
    elif not any(cell.outputs for cell in cells):
        yield "it has no outputs: run with --write"
    elif notebook.metadata.get(MADE_BY) != digest(notebook):
        yield "its code has changed since its outputs were made: run with --write"
    for number, cell in enumerate(cells, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {number} holds an error: {output.ename}"
            if output.get("name") == "stderr":
                yield f"cell {number} wrote to stderr: {output.text.strip().splitlines()[-1]}"
            for found in sorted(set(MACHINE_PATH.findall(shown(output)))):
                yield f"cell {number} shows a path of this machine: {found}"


def shown(output: NotebookNode) -> str:
    """The text of an output, without embedded pictures and videos."""
    texts = [output.get("text", ""), *output.get("traceback", [])]
    texts += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return EMBEDDED.sub("", "\n".join(texts))


def run(path: Path, limit: float, *, write: bool) -> list[str]:
    """Runs one notebook; -> what is wrong with it."""
    found = [] if write else list(problems(path))
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    try:
        seconds = execute(notebook, limit)
    except CellTimeoutError:
        return [*found, f"not finished within {limit:g} s"]
    except DeadKernelError as error:
        return [*found, f"its kernel died: {error}"]
    except CellExecutionError as error:
        return [*found, ESCAPES.sub("", str(error)).strip()]
    took = time.monotonic() - start
    slowest = max(range(len(seconds)), key=seconds.__getitem__, default=0)
    print(f"{path.name}: {took:.0f} s; of its {len(seconds)} cells, cell {slowest + 1} took {seconds[slowest]:.0f} s")
    if took > limit:
        found.append(f"took {took:.0f} s, more than the limit of {limit:g} s")
    if write:
        settle(notebook)
        nbformat.write(notebook, path)
        found += problems(path)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all in this folder")
    parser.add_argument("--write", action="store_true", help="save the outputs")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="of each, default 240")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks that run at once; their timings then mean less")
    arguments = parser.parse_args(argv)
    paths = arguments.notebooks or sorted(FOLDER.glob("*.ipynb"))
    if missing := [str(path) for path in paths if not path.is_file()]:
        parser.error(f"no such notebook: {', '.join(missing)}")
    failed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = pool.map(lambda path: run(path, arguments.limit, write=arguments.write), paths)
        for path, found in zip(paths, runs, strict=True):
            failed += bool(found)
            for problem in found:
                print(f"{path.name}: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
