"""Sphinx: README.md, these pages, the committed reports, and the docstrings of what `api/` names, as one site."""

import inspect
import re

from flax import nnx
from sphinx.util.inspect import stringify_signature

import sixbit_jax

project = "sixbit_jax"
version = release = sixbit_jax.__version__
copyright = f"{project} contributors, Apache-2.0"

# The whole repository is the source folder: a relative link leads to the same place on the site and in the files.
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "docs/**.rst", "benchmarks/**.md", "notebooks/*"]
exclude_patterns = [".*", "out", "build", "dist", "tests", "**/__pycache__"]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
highlight_language = "none"
smartquotes = False
html_theme = "furo"
html_title = project
html_show_sourcelink = False

myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# Single results are reached from benchmarks/results/README.md.
suppress_warnings = ["toc.not_included"]
# A broken reference is a warning, and `make docs` makes it an error. Left alone are types of other packages.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!(sixbit_jax|convert|pallas_kernels)\.).*")]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
# `x` in a docstring is a name: a link if it is one of these pages', else code.
default_role = "py:obj"

napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
# As a list, like arguments: one line can then be of several fields.
napoleon_custom_sections = [("Attributes", "params_style")]

CONTENTS = """
```{toctree}
:hidden:
:caption: Guide

docs/method
docs/formats
docs/kernels
docs/calibration
docs/fidelity
docs/performance
docs/adding_a_model
docs/errors
```

```{toctree}
:hidden:
:caption: Notebooks
:glob:

notebooks/*
```

```{toctree}
:hidden:
:caption: Reference

docs/api/index
```

```{toctree}
:hidden:
:caption: Records

benchmarks/parity
benchmarks/mini_model/report
benchmarks/results/README
CHANGELOG
CONTRIBUTING
```
"""


def add_contents(app, docname, source):
    """README.md is the front page, and stays free of directives that other readers of it would see as text."""
    if docname == root_doc:
        source[0] += CONTENTS


def escape(app, what, name, obj, options, lines):
    """Bars and stars outside of backticks and of blocks behind "::" are mathematics, not markup."""
    text = "\n".join(lines)
    verbatim = r"`[^`]*`|::\n(?:\n|    .*\n)+"
    lines[:] = re.sub(rf"({verbatim})|([|*])", lambda m: m[1] or "\\" + m[2], text).split("\n")


# What Python makes of an annotation or a default, and how it is written.
WRITTEN = (
    (r"str \| type\[\S+\] \| \S*dtype \| \S*SupportsDType", "DTypeLike"),
    (r"<class 'jax\.numpy\.(\w+)'>", r"jnp.\1"),
    (r"<(factory|function [^>]*)>", "..."),
)


def signature(app, what, name, obj, options, arguments, returns):
    """The metaclass of NNX modules hides what their constructors take; a protocol has none."""
    if getattr(obj, "_is_protocol", False) and inspect.isclass(obj):
        return "", None
    if inspect.isclass(obj) and issubclass(obj, nnx.Module):
        _, *parameters = inspect.signature(obj.__init__).parameters.values()
        arguments = stringify_signature(inspect.Signature(parameters), unqualified_typehints=True)
    for made, written in WRITTEN:
        arguments = arguments and re.sub(made, written, arguments)
    return arguments, returns


def find_by_last_names(app, env, node, contnode):
    """A name in backticks that another module's page describes, where it is plainly one: `Split`, `schedulers.step`."""
    name = node.get("reftarget", "")
    if node.get("reftype") != "obj" or not re.search("[A-Z._]", name):
        return None
    domain = env.domains["py"]
    found = [full for full in domain.objects if full.endswith(f".{name}") and not domain.objects[full].aliased]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, contnode)


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", find_by_last_names)
