# make demo    install into .venv, then train fused and plain units side by side
# make test    install into .venv, then run the tests (PYTEST="-k name" narrows them)
# make emulated tests the AVX-512 and AMX levels of the CPU kernels where the CPU lacks them, emulated, in a copy below build/
# make bench   install into .venv, then time every primitive and unit
# make gpu     on a machine with a GPU, in whose Python torch, triton, numpy and pytest are: tests and measures there
# make build   what the three above do first
# make models  install timm and torchvision too, whose nets some tests fuse; torch stays the version that it is
# make clean   remove what was built; make distclean removes .venv too
# PYTHON, VENV and TORCH choose others, for example: make test VENV=/tmp/venv TORCH="torch==2.13.0"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
PYTEST ?=
GPU ?=

override VENV := $(abspath $(VENV))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
.SHELLFLAGS := -ec

.PHONY: demo test emulated bench gpu build models clean distclean
.DELETE_ON_ERROR:

demo: build
	@$(BIN)/resnet-fused demo

test: build
	@$(BIN)/python -m pytest $(PYTEST)

EMULATED := build/avx512-emulated
emulated: build
	@mkdir -p $(EMULATED)
	@cp -ru --preserve=timestamps csrc resnet_fused tests setup.py pyproject.toml README.md LICENSE $(EMULATED)
	@echo "== Building the AVX-512 and AMX levels on an emulator (minutes)"
	@cd $(EMULATED); RESNET_FUSED_EMULATE_AVX512=1 FORCE_CUDA=0 $(BIN)/python setup.py --quiet build_ext --inplace
	@cd $(EMULATED); PYTHONPATH=$$PWD $(BIN)/python -m pytest -k "not generic and not avx2" $(PYTEST) tests/test_winograd.py \
	    tests/test_cpu_algorithms.py tests/test_matrix_tiles.py tests/test_long_sums.py tests/test_primitive*.py tests/test_max_pool.py tests/test_preact.py

bench: build
	@$(BIN)/python -m pytest bench $(PYTEST)

models: build
	@$(PIP) install timm torchvision "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.split("+")[0])')"

# Runs in the checkout and builds nothing: the Triton kernels need no compiler. GPU="steps --force" are its arguments.
gpu:
	@$(PYTHON) -m bench.gpu $(GPU)

# The compiled parts are ninja's business: it is asked each time and does what has changed.
build: $(VENV)/.installed
	@echo "== Building what has changed"
	@$(BIN)/python setup.py --quiet build_ext --inplace

# What was asked for when $(VENV) was made: another TORCH is installed into it when asked for.
changed := $(if $(filter-out $(file <$(VENV)/.torch),$(TORCH)),again)

$(VENV)/.installed: pyproject.toml resnet_fused/version.py $(changed)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python >= 3.11 is needed, " \
	    + "but got %d.%d from $(PYTHON); set PYTHON=/path/to/python" % v[:2])'
	@test -x $(BIN)/pip || { echo "== Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== Installing $(TORCH) and the build's tools into $(VENV) (the first time takes minutes)"
	@$(PIP) install '$(TORCH)' 'setuptools>=77' ninja 'pybind11>=2.13'
	@printf '%s' '$(TORCH)' > $(VENV)/.torch
	@echo "== Building the operators"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@echo "== Installing resnet_fused and what its demo, tests and benchmarks need"
	@$(PIP) install --no-build-isolation --editable '.[demo,test,bench]'
	@touch $@

.PHONY: again
again:

clean:
	rm -rf build dist *.egg-info .pytest_cache resnet_fused/lib resnet_fused/_C.*.so
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
