# The two commands: `make demo` and `make test`. Each sets itself up in .venv with nothing but Python 3.12 and make.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
# diffusers and torch, for the references alone, in the Python that torch's CPU build is made for.
PARITY_PYTHON ?= PYENV_VERSION=3.11 python3.11
OUT ?= out

# The oldest JAX that pyproject.toml allows; the newest is what .venv has.
OLDEST_JAX = $(shell sed -n 's/^  "jax>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.PHONY: demo test test-slow test-gpu test-oldest notebooks docs lint format parity references dist clean

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 12), f"Python 3.12 or newer is needed, {sys.executable} is {sys.version.split()[0]}; set PYTHON=..."'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/.installed
	.venv/bin/sixbit generate --model mini --prompt "a red 3 moves left fast" --out $(OUT)/demo.mp4

test: .venv/.installed
	.venv/bin/python -m pytest tests -n 2 --dist worksteal -m "not slow"

# With every case of the interpreted kernels: half an hour more.
test-slow: .venv/.installed
	.venv/bin/python -m pytest tests -n 2 --dist worksteal

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check 'jax==$(OLDEST_JAX)' 'jaxlib==$(OLDEST_JAX)' --editable . beartype pytest pytest-xdist
	touch $@

# On a machine with an NVIDIA GPU; writes benchmarks/results/test_gpu_<device>.json. GPU_PYTHON=... takes a Python that
# has JAX for that GPU, NumPy, jaxtyping and pytest.
GPU_PYTHON ?= .venv-gpu/bin/python
CUDA ?= cuda13

.venv-gpu/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,$(CUDA)]'
	touch $@

test-gpu: $(if $(filter .venv-gpu/%,$(GPU_PYTHON)),.venv-gpu/.installed)
	$(GPU_PYTHON) -m pytest tests/gpu --override-ini addopts= --import-mode=importlib -ra

# What depends most on JAX, with the oldest version of it.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal tests/models tests/sampling/test_sampler.py tests/sampling/test_schedulers.py tests/test_checkpoint.py

# Each notebook from top to bottom; `.venv/bin/python notebooks/run.py --write` saves their outputs.
notebooks: .venv/.installed
	.venv/bin/python notebooks/run.py --jobs 2

# README.md, docs/, the notebooks as they were committed, and the API, as one site.
docs: .venv/.installed
	.venv/bin/sphinx-build --quiet --fail-on-warning --keep-going --conf-dir docs . $(OUT)/docs
	cp $(OUT)/docs/README.html $(OUT)/docs/index.html

.venv-parity/.installed: tests/parity/requirements.txt
	$(PARITY_PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check -r tests/parity/requirements.txt
	touch $@

# Rebuilds every reference from the installed diffusers and transformers in a scratch folder, checks that the committed
# ones agree with it, and compares our models with it live. Prints the table of errors.
parity: .venv/.installed .venv-parity/.installed
	rm -rf $(OUT)/references
	SIXBIT_REFERENCES=$(OUT)/references .venv-parity/bin/python tests/parity/make_references.py
	SIXBIT_REFERENCES=$(OUT)/references .venv/bin/python -m pytest tests/parity -n auto --maxprocesses 8 --dist worksteal

# The same, into the repository.
references: .venv-parity/.installed
	.venv-parity/bin/python tests/parity/make_references.py

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check --output-format min-text

format: .venv/.installed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# The sdist, and the wheel that is built from it.
dist: .venv/.installed
	rm -rf dist
	.venv/bin/python -m build

clean:
	rm -rf .venv .venv-gpu .venv-oldest .venv-parity out build dist *.egg-info
