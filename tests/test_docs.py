"""The pages say what is so: snippets run, commands parse, links lead somewhere, and docstrings fit signatures."""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import calibrated
import huggingface_hub
import jax
import pytest
import typer
from flax import nnx
from typer.testing import CliRunner

from sixbit_jax import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*sorted(ROOT.glob("*.md")), *PAGES[1:], *sorted((ROOT / "benchmarks").rglob("*.md"))]


def of_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line before, and content, of every fence of a language."""
    text = page.read_text(encoding="utf-8")
    for fence in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, fence.start()) + 1, fence[1]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", [page for page in PAGES if any(fences(page, "python"))], ids=of_page)
def test_snippets_run(page, tmp_path, monkeypatch):
    """Those of one page in order and in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    # As a reader would run them, without the tests' strict promotion.
    with contextlib.redirect_stdout(io.StringIO()), jax.numpy_dtype_promotion("standard"):
        for line, code in fences(page, "python"):
            # README.md's video in two steps, not fifty: a minute less.
            code = code.replace("seed=1)", "seed=1, num_inference_steps=2)")
            # Blank lines in front, so that a traceback has the line of the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


COMMANDS = [
    pytest.param(command, id=f"{page.name}-{command}")
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
    for _, text in fences(page, "sh")
    for command in text.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    program, name, *arguments = shlex.split(command, comments=True)
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert program == "sixbit"
        typer.main.get_command(cli.app).commands[name].make_context(name, arguments)


@pytest.mark.slow
def test_readme_commands_run(tmp_path, monkeypatch):
    """In order and in one folder; the hub has a tiny model in the place of CogVideoX-5B."""
    published = calibrated.write(tmp_path / "published")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(published))
    (folder := tmp_path / "folder").mkdir()
    monkeypatch.chdir(folder)
    Path("prompts.txt").write_text("\n".join(calibrated.PROMPTS), encoding="utf-8")
    for _, text in fences(ROOT / "README.md", "sh"):
        for program, *arguments in (shlex.split(command, comments=True) for command in text.splitlines()):
            if program == "sixbit":
                with jax.numpy_dtype_promotion("standard"):
                    done = CliRunner().invoke(cli.app, arguments)
                assert done.exit_code == 0, done.output
    assert {path.name for path in folder.glob("*.mp4")} == {"panda.mp4", "three.mp4"}
    assert (folder / "cogvideox-5b-nvfp4" / "calibration.safetensors").is_file()


PROGRAMS = sorted(
    {
        command
        for page in LINKING
        for quoted in re.findall(r"`(python -m [^`]+)`", page.read_text(encoding="utf-8"))
        for command in quoted.split("; ")
    }
)


@pytest.mark.parametrize("command", [c for c in PROGRAMS if "benchmarks.rivals" not in c])  # which needs torch
def test_programs_take_their_arguments(command, monkeypatch):
    _, _, name, *arguments = shlex.split(command)
    if name == "sixbit_jax.training":
        typer.main.get_command(lookup(f"{name}.__main__.app")).commands[arguments[0]].make_context(name, arguments[1:])
        return
    parse = argparse.ArgumentParser.parse_args
    parsed = []

    def stop_behind(parser: argparse.ArgumentParser, argv: list[str]) -> None:
        parsed.append(parse(parser, argv))
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_behind)
    with pytest.raises(InterruptedError):
        lookup(name).main(arguments)
    assert parsed


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=of_page)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
        target, _, anchor = "".join(link).partition("#")
        if target.startswith(("http:", "https:")):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), link


def lookup(name: str) -> Any:
    """The object of a dotted name, its modules imported."""
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        if inspect.ismodule(found) and not hasattr(found, part):
            importlib.import_module(path)
        found = getattr(found, part)
    return found


def documented(page: Path) -> Iterator[str]:
    """Names of what a page of the API describes from docstrings, members included."""
    for block in re.split(r"^(?= *\.\. )", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if entry := re.match(r" *\.\. auto(?!data)\w+:: (\S+)", block):
            yield entry[1]
            members = re.search(r"^ +:members: (.+)$", block, re.MULTILINE)
            yield from (f"{entry[1]}.{member}" for member in (members[1].split(", ") if members else []))


API = [name for page in sorted((ROOT / "docs/api").glob("*.rst")) for name in documented(page)]


def described(docstring: str, section: str) -> list[str]:
    """Names in a section of a Google-style docstring; one entry can be of several."""
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    entries = re.findall(r"^    ([*\w]+(?:, [*\w]+)*):", found[1], re.MULTILINE) if found else []
    return [name.strip("*") for entry in entries for name in entry.split(", ")]


@pytest.mark.parametrize("name", API)
def test_docstrings_fit_signatures(name):
    """Attributes are the fields of a dataclass, Args the parameters; where there is only one, the text may do."""
    subject = lookup(name)
    docstring = inspect.getdoc(subject)
    assert docstring
    if dataclasses.is_dataclass(subject):
        if subject.__module__ != "sixbit_jax.config":  # whose fields are the published ones
            assert described(docstring, "Attributes") == [field.name for field in dataclasses.fields(subject)]
    elif inspect.isclass(subject) and issubclass(subject, nnx.Module):
        assert described(docstring, "Args") == list(inspect.signature(subject.__init__).parameters)[1:]
    elif callable(subject) and not (inspect.isclass(subject) and issubclass(subject, Exception | Protocol)):
        parameters = [parameter for parameter in inspect.signature(subject).parameters if parameter != "self"]
        assert described(docstring, "Args") in ([parameters, []] if len(parameters) == 1 else [parameters])


def test_sections_are_read():
    assert described("Does.\n\nArgs:\n    a, b: two\n        c: no\n    *d: rest\n\nReturns:\n    e: no", "Args") == [
        "a",
        "b",
        "d",
    ]


OPERATIONS = [f"pallas_kernels.{api.parent.name}" for api in sorted((ROOT / "pallas_kernels").glob("*/api.py"))]


@pytest.mark.parametrize("package", ["sixbit_jax", "sixbit_jax.precision", "convert", *OPERATIONS])
def test_what_packages_export_is_described(package):
    subjects = [lookup(name) for name in API]
    exported = lookup(package).__all__
    assert exported
    assert [name for name in exported if lookup(f"{package}.{name}") not in subjects] == []


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs/api").glob("*.rst"))], ids=of_page)
def test_names_in_backticks_exist(page):
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".rst":
        text += "\n".join(inspect.getdoc(lookup(name)) for name in documented(page))
    packages = "(?:sixbit_jax|convert|pallas_kernels)"
    for name in re.findall(rf"`({packages}(?:\.\w+)+)`", text):
        if not (ROOT / name).exists():
            lookup(name)
    for path in re.findall(rf"`((?:{packages}|docs|tests|benchmarks)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
