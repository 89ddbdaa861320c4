# Two commands set everything up on a fresh machine: `make train` and `make test`. Both make their own .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= configs/metala-quickstart.yml
RUN ?= runs/metala-quickstart
# The exact set of this project's own environments, every package of it; requirements*.txt are the ranges for everybody else.
CONSTRAINTS := requirements/constraints.txt
INSTALL := $(VENV)/bin/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
# Test processes; parallel tests start up to four more of their own, so more than the cores does not help. A file is run by one of
# them, in the order of tests/conftest.py: the dear ones first.
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: gpu-wheels train test test-fast mutation test-oldest test-newest test-serving lock lint format docs docs-site install install-dev clean

# The packages, then this checkout itself (editable): `linear-neox` and `import linear_neox` from any folder.
$(VENV)/.installed: requirements/requirements.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements/requirements.txt
	$(INSTALL) --no-deps -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(wildcard requirements/requirements-*.txt)
	$(INSTALL) -r requirements/requirements.txt -r requirements/requirements-dev.txt
	touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# The main job from nothing: corpus, training, export, a sample, a plot. No download beyond pip packages.
train: $(VENV)/.installed
	$(PY) prepare_data.py pystdlib
	$(PY) deepy.py train.py $(CONFIG)
	rm -rf $(RUN)/hf
	$(PY) tools/convert_to_hf.py --checkpoint $(RUN)/checkpoints/$$(cat $(RUN)/checkpoints/latest) --output $(RUN)/hf
	printf 'def main(\nimport os\nclass Reader:\n' > $(RUN)/prompts.txt
	$(PY) generate.py $(CONFIG) -i $(RUN)/prompts.txt -o $(RUN)/samples.jsonl --set maximum_tokens=48 --set temperature=0.7 --set top_k=40
	@$(PY) tools/summary.py $(RUN)

# An empty PYTHONDONTWRITEBYTECODE: the many processes of the tests read what one of them has compiled.
test: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= $(PY) $(PYTEST)

test-fast: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= $(PY) $(PYTEST) -m "not slow"

# Small mistakes in a copy of the tree, and the tests that must notice them; only what changed since the last results is tried.
mutation: $(VENV)/.installed-dev
	nice -n 10 $(PY) -m tests.mutation

# The compatibility part of the suite at both ends of the ranges, each in an environment of its own; what was proved is written to
# docs/compatibility.md. `python tools/compatibility.py --help` runs one combination, or all.
test-oldest: $(VENV)/.installed-dev
	$(PY) tools/compatibility.py --oldest

test-newest: $(VENV)/.installed-dev
	$(PY) tools/compatibility.py --newest

# Exported folders in vLLM on a CPU, in an environment of its own; kept out of `make test`. SERVING_RESULTS takes the last result.
SERVING := .venv-serving
$(SERVING)/.installed: requirements/requirements-serving.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/pip install --quiet --disable-pip-version-check -r $<
	$(SERVING)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVING)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

SERVING_RESULTS ?= benchmarks/results/serving.json
test-serving: $(SERVING)/.installed
	SERVING_RESULTS=$(SERVING_RESULTS) $(SERVING)/bin/python -m pytest tests/serving

# constraints.txt anew: the newest release of every package that the ranges admit, for Python 3.10 and later; and the lower ends, for
# Python 3.10. See "Raising a version" in CONTRIBUTING.md.
LOCK = $(VENV)/bin/uv pip compile --quiet --no-python-downloads --upgrade --annotation-style line --custom-compile-command "make lock"
lock: $(VENV)/.installed-dev
	$(LOCK) --python-version 3.10 --universal -o $(CONSTRAINTS) requirements/requirements.txt requirements/requirements-dev.txt
	$(LOCK) --python-version 3.10 --python-platform x86_64-manylinux_2_28 --resolution lowest-direct -o requirements/oldest.txt \
		requirements/requirements.txt requirements/requirements-test.txt

# What a GPU machine without internet lacks besides torch, triton, transformers and numpy: see tools/bench/gpu_kit.py
GPU_PYTHON ?= 3.12
gpu-wheels: $(VENV)/.installed
	$(VENV)/bin/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		-c $(CONSTRAINTS) -d wheels -r requirements/requirements-gpu-machine.txt

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# All generated pages: configs/arguments.md and schema.json, docs/reference/, docs/performance.md; a test fails when one is stale
docs: $(VENV)/.installed
	$(PY) -m megatron.config.explain
	$(PY) tools/reference_pages.py

# The documentation site in site/, offline, warnings are errors; `python -m http.server -d site` shows it
docs-site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
