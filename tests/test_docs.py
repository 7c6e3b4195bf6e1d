"""Every ```python fence of docs/*.md runs, those of one page in order and in one namespace."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


def test_there_are_pages():
    assert PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    # As a reader would run them, without the tests' strict promotion.
    with contextlib.redirect_stdout(io.StringIO()), jax.numpy_dtype_promotion("standard"):
        for fence in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            # Blank lines in front, so that a traceback has the line of the page.
            before = "\n" * (text.count("\n", 0, fence.start()) + 1)
            exec(compile(before + fence[1], str(page), "exec"), namespace)
