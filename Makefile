# Every target sets up what it needs, from a fresh clone on:
#   make test bench demo lint     in .venv, with the pinned PyTorch
#   make cuda-check               CUDA build and Triton kernels against a CUDA build of PyTorch; needs nvcc, no GPU
#   make gpu-check OUT=results    everything on a machine with an NVIDIA GPU, with the Python that is installed
#
# PYTHON   the interpreter that makes the environments
# TORCH    the PyTorch of .venv, read when .venv is made; on a GPU machine the same version is the CUDA build
# ARGS     arguments for pytest (make test), the bench (make bench) or the demo (make demo)

PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.11.0
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
OUT ?= bench/out/gpu

PY := $(VENV)/bin/python
CUDA_PY := $(abspath $(CUDA_VENV))/bin/python
BUILD_TOOLS := "setuptools>=77" wheel ninja "pybind11>=2.13"
TRITON_TESTS := tests/test_attention.py tests/test_attention_with_scores.py tests/test_pair_losses.py \
	tests/test_attention_kl.py tests/test_relation_kl.py tests/test_attention_score_mse.py \
	tests/test_factorized_embedding.py tests/test_row_pairs.py tests/test_row_pair_losses.py \
	tests/test_kl_div_logits.py tests/test_linear_kl_div.py tests/test_projected_mse.py
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

# pytest's exit 5: nothing was collected, which a selection may rightly do; pytest says so itself.
or_fail := || [ $$? -eq 5 ] || failed=1

.PHONY: test bench demo lint cuda-check gpu-check clean
.DELETE_ON_ERROR:

# Both runs at once: most of either keeps one core busy.
test: $(VENV)/.built
	@log=$$(mktemp); \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -k triton -m "not long" $(TRITON_TESTS) $(ARGS) > $$log 2>&1 & \
	interpreted=$$!; \
	$(PY) -m pytest $(ARGS) $(or_fail); \
	echo "== Triton kernels under the interpreter"; \
	wait $$interpreted $(or_fail); \
	cat $$log; rm $$log; \
	exit $${failed:-0}

bench: ARGS ?= --quick
bench: $(VENV)/.built
	$(PY) -m bertops bench $(ARGS)

demo: $(VENV)/.built
	$(PY) -m bertops info
	$(PY) -m bench.demo $(ARGS)

lint: $(VENV)/.built
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(filter-out setup.py,$(SOURCES))

# The tree of build/cuda is a package of its own: the extension in bertops/ stays the one of .venv, which the
# second check loads under the other PyTorch.
cuda-check: $(VENV)/.built $(CUDA_VENV)/.dependencies
	rm -rf build/cuda/lib
	BERTOPS_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0" $(CUDA_PY) setup.py -q build --build-base build/cuda --build-lib build/cuda/lib
	PYTHONPATH=build/cuda/lib $(CUDA_PY) tests/extension_check.py --cuda
	PYTHONPATH=. $(CUDA_PY) tests/extension_check.py
	PYTHONPATH=. $(CUDA_PY) tests/offline_triton.py

gpu-check:
	$(PYTHON) tests/gpu_check.py $(OUT)

clean:
	rm -rf build dist *.egg-info bertops/*.so .venv .venv-cuda
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks bench/out
	find . -name __pycache__ -prune -exec rm -rf {} +

# PyTorch comes first and by itself, and is named again in every later install, which can then neither replace
# it by another build nor break what it requires.
%/.torch:
	@echo "== $*: making the environment with $(if $(filter $(CUDA_VENV),$*),$(CUDA_TORCH),$(TORCH))"
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install $(if $(filter $(CUDA_VENV),$*),$(CUDA_TORCH),$(TORCH))
	$*/bin/python -m pip freeze | grep '^torch==' > $*/torch.txt
	$*/bin/python -m pip install -q -r $*/torch.txt $(BUILD_TOOLS)
	touch $@

$(VENV)/.dependencies: pyproject.toml | $(VENV)/.torch
	@echo "== $(VENV): installing what the tests and the bench need, building bertops"
	$(PY) -m pip install -q -r $(VENV)/torch.txt --no-build-isolation -e ".[dev]"
	touch $@

$(CUDA_VENV)/.dependencies: pyproject.toml | $(CUDA_VENV)/.torch
	$(CUDA_PY) -m pip install -q -r $(CUDA_VENV)/torch.txt numpy pytest hypothesis
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	touch $@
