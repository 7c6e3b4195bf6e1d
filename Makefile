# The two commands: `make demo` and `make test`. Each sets itself up in .venv with nothing but Python 3.12 and make.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
# diffusers and torch, for the references alone, in the Python that torch's CPU build is made for.
PARITY_PYTHON ?= PYENV_VERSION=3.11 python3.11
OUT ?= out

.PHONY: demo test lint format parity references clean

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 12), f"Python 3.12 or newer is needed, {sys.executable} is {sys.version.split()[0]}; set PYTHON=..."'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/.installed
	.venv/bin/sixbit generate --model mini --prompt "a red 3 moves left slowly" --out $(OUT)/demo.mp4

test: .venv/.installed
	.venv/bin/python -m pytest tests

.venv-parity/.installed: tests/parity/requirements.txt
	$(PARITY_PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check -r tests/parity/requirements.txt
	touch $@

# Rebuilds every reference from the installed diffusers and transformers, in a scratch folder, and compares with it live.
parity: .venv/.installed .venv-parity/.installed
	rm -rf $(OUT)/references
	SIXBIT_REFERENCES=$(OUT)/references .venv-parity/bin/python tests/parity/make_references.py
	SIXBIT_REFERENCES=$(OUT)/references .venv/bin/python -m pytest tests/parity

# The same, into the repository.
references: .venv-parity/.installed
	.venv-parity/bin/python tests/parity/make_references.py

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.installed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv .venv-parity out build dist *.egg-info
