# Everything runs inside .venv, which is made on the first call and again when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?= digits
# Two threads: what CI has, and what keeps results comparable between machines.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test lint types tests docs gpu-check soak test-torch install recipes bench-data bench zoo zoo-channels dist clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,executorch]"
	touch $(STAMP)

# Trains a small network on real data, compresses it, adapts and fine-tunes it, and prints what each step was worth.
demo: $(STAMP)
	$(BIN)/python -m examples.demo --data $(DATA)

# What CI runs.
test: lint types tests docs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

# Two processes of one thread each: the tensors of tests are too small for more threads.
tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The documentation site, into build/docs: open build/docs/index.html. The tutorials run, unless they have not changed since
# the last time. A warning is an error, a link that leads nowhere too.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

# What can only be seen on a GPU: the tests that `make test` skips without one, then what compression costs there. Without
# a GPU it fails: a check that did not run is not passed. COMPRESS_CORE_TEST_DEVICE=cpu checks the tests themselves.
gpu-check: $(STAMP)
ifneq ($(COMPRESS_CORE_TEST_DEVICE),cpu)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-check: torch %s finds no CUDA device here, so nothing was checked" % torch.__version__)'
	$(BIN)/python -m pytest -m cuda
	$(BIN)/python -m benchmarks.sparsity_cost --device cuda
	$(BIN)/python -m benchmarks.quantization_cost --device cuda
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cuda
	@echo "gpu-check: the tests ran on the CPU; this says nothing about a GPU"
endif

# The long forms of tests that kill, interrupt, damage and deal out, with a table at the end. All takes many hours; a share
# of it: make soak SOAK=0.1 KIND="-k states"
SOAK ?= 1
soak: $(STAMP)
	COMPRESS_CORE_SOAK=$(SOAK) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m soak --timeout 0 $(KIND)

# The tests with another version of torch than that of constraints.txt: make test-torch TORCH=2.8.0. No part of CI.
test-torch:
	test -n "$(TORCH)" || { echo "which version? make test-torch TORCH=2.8.0" >&2; exit 2; }
	test -x $(VENV)-torch-$(TORCH)/bin/python || $(PYTHON) -m venv $(VENV)-torch-$(TORCH)
	$(VENV)-torch-$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" -e ".[dev]"
	OMP_NUM_THREADS=1 $(VENV)-torch-$(TORCH)/bin/python -m pytest -n 2

# The programs of docs/recipes with the libraries that they are for, in an environment of its own. No part of CI.
# torchvision and ultralytics would bring another torch and a desktop's OpenCV, so what they need is named here.
recipes:
	test -x $(VENV)-recipes/bin/python || $(PYTHON) -m venv $(VENV)-recipes
	$(VENV)-recipes/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" \
		huggingface_hub safetensors pyyaml pillow requests psutil matplotlib polars opencv-python-headless
	$(VENV)-recipes/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		torchvision==0.28.0 timm ultralytics ultralytics-thop
	OMP_NUM_THREADS=1 $(VENV)-recipes/bin/python -m pytest -v tests/docs/test_recipes.py --durations=0

# Public data and trained networks for the benchmarks: fetched by name and version, checked, kept in a cache.
bench-data: $(STAMP)
	$(BIN)/python -m examples.common.fetch

# The claims, measured. bn_adaptation alone takes hours on two cores; see its --help for a part of it.
bench: bench-data
	$(BIN)/python -m benchmarks.bn_cost
	$(BIN)/python -m benchmarks.sparsity_cost
	$(BIN)/python -m benchmarks.pruned_latency
	$(BIN)/python -m benchmarks.exported_latency
	$(BIN)/python -m benchmarks.quantization_cost
	$(BIN)/python -m benchmarks.creation_cost
	$(BIN)/python -m benchmarks.bn_adaptation

# Models of practitioners under every algorithm; libraries that are not installed are skipped. It takes about an hour of
# CPU time, goes on where it was stopped, and rewrites the table of docs/zoo.md: make zoo ZOO="--library timm --fresh"
zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo --docs docs/zoo.md $(ZOO)

# Channel groups of every network that is installed of torchvision, pytorchcv and transformers.
zoo-channels: $(STAMP)
	$(BIN)/python -m benchmarks.zoo.channels

# What a release uploads: source distribution and wheel, built in an environment of their own, and checked as the index does.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) $(VENV)-recipes $(VENV)-torch-* runs dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
