# `make run` and `make test` work on a machine that has only Python >= 3.11, make and a C++ compiler: they set up .venv
# first. What is set up is recorded in stamp files inside .venv, so that the next call reuses it.

# The first of these that is new enough; `make PYTHON=/path/to/python3 ...` chooses another one.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$python -c '$(NEW_ENOUGH)' 2>/dev/null; then echo $$python; exit; fi; done; echo python3)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

MODEL ?= smollm2-135m
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
IN_VENV := $(VENV)/bin/python
PEERS := .venv-peers
BENCH := .venv-bench
CLIENTS := .venv-clients
BENCH_PEERS := $(basename $(notdir $(wildcard requirements-bench/*.txt)))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup model run test test-slow test-browser test-gpu test-peers test-clients sanitize emulate emulate-arm lint format docs clean FORCE
.PHONY: bench bench-peers bench-linear bench-embed table-1

help: ## List the targets
	@awk 'BEGIN {FS = ":[^#]*## "} /^[a-z0-9-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: setup model ## Answer 64 questions about one document (the example)
	$(IN_VENV) examples/shared_document.py

# Two processes of one thread each: most tests are too small for more threads, and a file's fixtures stay in its process.
# tests/conftest.py has the longest files begin first.
TEST_PROCESSES ?= 2
test: setup model ## Run the tests and doctests; PYTEST_ARGS="-k tree"
	OMP_NUM_THREADS=1 $(IN_VENV) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: setup model ## Run the tests that take minutes
	$(IN_VENV) -m pytest -m "slow and not peers" $(PYTEST_ARGS)
	GOSSAMER_SCHEMA_CASES=115 $(IN_VENV) -m pytest tests/test_server_schema.py -s

test-browser: setup ## Run only the tests of the page at /, in chromium
	$(IN_VENV) -m pytest -m browser $(PYTEST_ARGS)

test-gpu: setup ## Run only the tests that need a GPU
	$(IN_VENV) -m pytest -m gpu $(PYTEST_ARGS)

test-peers: model $(PEERS)/.installed ## Check that other projects read what we write
	$(PEERS)/bin/python -m pytest -m peers $(PYTEST_ARGS)

test-clients: model $(CLIENTS)/.installed ## Try other projects' clients on our server, and write docs/reference/clients.md
	PYTHONPATH=scripts/clients $(IN_VENV) scripts/clients/table.py $(CLIENTS_ARGS)

SANITIZED := build/sanitize
INSTRUCTION_SETS = $(IN_VENV) -c "from gossamer.kernels.library import instruction_sets; print(*instruction_sets())"
SANITIZED_PYTEST = LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 GOSSAMER_NATIVE="$$(ls $(SANITIZED)/_native*.so)" \
	$(IN_VENV) -m pytest -p no:cacheprovider -k "native or block or sparse or prefix or invarian" $(PYTEST_ARGS)

sanitize: setup model ## Run the tests of the native kernels with address and undefined-behaviour checks
	@# of the instruction sets that this processor has: the others would take minutes to compile, and could not run;
	@# the real model's test would take longer than all others together
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DGOSSAMER_SANITIZE=ON \
		-DGOSSAMER_SETS="$$($(INSTRUCTION_SETS) | tr ' ' ';')" -DPython_EXECUTABLE=$(CURDIR)/$(IN_VENV)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build $(SANITIZED)
	$(SANITIZED_PYTEST) $(addprefix tests/test_,native_kernels.py block_kernels.py native_sampling.py native_gradients.py sparse_int8.py)
	for isa in $$($(INSTRUCTION_SETS)); do \
		GOSSAMER_ISA=$$isa $(SANITIZED_PYTEST) $(addprefix tests/test_,exactness.py sparse_int8_engine.py prefix_means.py \
			batch_invariance.py) --deselect tests/test_prefix_means.py::TestEvaluation || exit 1; \
	done

EMULATED := build/emulated

emulate: setup ## Run the tests of the AVX-512 and AMX kernels on a processor that has only AVX2
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B $(EMULATED) -G Ninja -DGOSSAMER_EMULATE=ON \
		-DGOSSAMER_SETS="avx512_emulated;amx_emulated;avx2;portable" \
		-DPython_EXECUTABLE=$(CURDIR)/$(IN_VENV)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build $(EMULATED)
	GOSSAMER_NATIVE="$$(ls $(EMULATED)/_native*.so)" $(IN_VENV) -m pytest -p no:cacheprovider \
		tests/test_native_kernels.py tests/test_block_kernels.py tests/test_native_sampling.py tests/test_native_gradients.py \
		tests/test_native_runner.py \
		tests/test_sparse_int8.py tests/test_sparse_int8_engine.py tests/test_prefix_means.py \
		tests/test_batch_invariance.py $(PYTEST_ARGS)

ARM := build/arm
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_EMULATOR ?= qemu-aarch64-static
ARM_FLAGS := -std=c++20 -O3 -fno-math-errno -fopenmp -Icsrc

emulate-arm: ## Check products with quantized blocks on an emulated Arm processor; needs g++-aarch64-linux-gnu, qemu-user-static
	mkdir -p $(ARM)
	for file in kernels blocks; do \
		$(ARM_CXX) $(ARM_FLAGS) -march=armv8.2-a+dotprod -DGOSSAMER_NS=neon_dot -c csrc/kernels/$$file.cpp -o $(ARM)/$$file.o || exit 1; \
	done
	$(ARM_CXX) $(ARM_FLAGS) -ffp-contract=off -c csrc/runtime/dequantize.cpp -o $(ARM)/dequantize.o
	$(ARM_CXX) $(ARM_FLAGS) -DGOSSAMER_HAS_neon_dot -static -o $(ARM)/block_products tests/native/block_products.cpp \
		$(addprefix csrc/runtime/,weight.cpp workspace.cpp cpu.cpp) $(addprefix $(ARM)/,kernels.o blocks.o dequantize.o)
	$(ARM_EMULATOR) -cpu max $(ARM)/block_products

lint: setup ## Check style and types, change nothing
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy

format: setup ## Sort imports, apply safe fixes, format
	$(IN_VENV) -m ruff check --fix .
	$(IN_VENV) -m ruff format .

bench: setup model ## Measure decoding with and without sharing; BENCH_ARGS="..."
	$(VENV)/bin/gossamer bench decode --model $(MODEL) $(BENCH_ARGS)

# A peer that cannot be installed stops nobody else; its rows say that it is missing.
bench-peers: setup model ## Measure decoding beside other projects, each installed first; BENCH_ARGS="..."
	@for peer in $(BENCH_PEERS); do \
		$(MAKE) --no-print-directory $(BENCH)/$$peer/.installed || failed="$$failed $$peer"; \
	done; test -z "$$failed" || echo "These could not be installed and are left out:$$failed" >&2
	$(VENV)/bin/gossamer bench decode --model $(MODEL) --peers all $(BENCH_ARGS)

bench-embed: setup $(BENCH)/sentence-transformers/.installed ## Measure embeddings beside sentence-transformers; BENCH_ARGS="..."
	$(VENV)/bin/gossamer bench embed --peers sentence-transformers $(BENCH_ARGS)

bench-linear: $(PEERS)/.installed ## Measure int8 layers beside other projects'; BENCH_ARGS="..."
	$(PEERS)/bin/gossamer bench linear $(BENCH_ARGS)

table-1: setup model ## Print Table 1 of the LLM.int8() paper for real models (half an hour)
	$(IN_VENV) scripts/table1.py

docs: setup $(VENV)/.docs-installed ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(IN_VENV) -m mkdocs build --strict

clean: ## Remove build output and caches; keeps .venv and pulled models
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

setup: $(VENV)/.package-installed ## Only set up .venv

# Not a stamp: the model lives outside of .venv, and `pull` returns at once when it is there.
model: setup
	@$(VENV)/bin/gossamer pull $(MODEL)

# --- .venv -----------------------------------------------------------------------------------------------------------
# Each stamp is written last. pip cannot be trusted to repair a package whose installation was cut short, so a marker
# stands while it works; a marker that is still there means that the environment is made again from nothing.

UNFINISHED := $(VENV)/.unfinished
NATIVE := build/native

# The environment is also checked again when its interpreter is gone or the checkout has moved.
USABLE := test -x $(IN_VENV) && test ! -e $(UNFINISHED) && test "$$(cat $(VENV)/.created 2>/dev/null)" = "$(CURDIR)"

$(VENV)/.created: $(shell { $(USABLE); } || echo FORCE)
	@if test -e $(UNFINISHED) || ! $(IN_VENV) -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null; then \
		$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
			echo "Gossamer needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
			echo "Install a newer one and name it: make PYTHON=/path/to/python3 ..."; exit 1; } >&2; \
		$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
			echo "'$(PYTHON)' has no 'venv' module with pip, which Gossamer needs for its environment in $(VENV)."; \
			echo "Install it (Debian, Ubuntu: apt install python3-venv) or name another Python: make PYTHON=..."; \
			exit 1; } >&2; \
		echo "Creating $(VENV) with $(PYTHON)"; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "$(CURDIR)" > $@

$(VENV)/.requirements-installed: requirements.txt $(VENV)/.created
	@touch $(UNFINISHED)
	$(IN_VENV) -m pip install -r requirements.txt
	@rm $(UNFINISHED)
	@touch $@

$(VENV)/.package-installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*.* csrc/*/*/*.*) $(VENV)/.requirements-installed
	@# the assembly is kept: a test reads it
	$(IN_VENV) -m pip install --quiet --no-build-isolation -C build-dir=$(NATIVE) \
		-C cmake.define.CMAKE_CXX_FLAGS=-save-temps=obj -e .
	@touch $@

$(VENV)/.docs-installed: requirements-docs.txt $(VENV)/.package-installed
	@touch $(UNFINISHED)
	$(IN_VENV) -m pip install -r requirements-docs.txt
	@rm $(UNFINISHED)
	@touch $@

# Other projects have an environment of their own: some of them change what transformers does when it finds them.
$(PEERS)/.installed: requirements.txt requirements-peers.txt $(VENV)/.package-installed
	$(IN_VENV) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install -r requirements.txt
	$(PEERS)/bin/python -m pip install -r requirements-peers.txt -c requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-build-isolation -e .
	@touch $@

$(CLIENTS)/.installed: $(wildcard requirements-clients/*) scripts/clients/node/package.json | $(VENV)/.package-installed
	for kind in python instructor; do \
		$(IN_VENV) -m venv --clear $(CLIENTS)/$$kind && \
		$(CLIENTS)/$$kind/bin/python -m pip install -r requirements-clients/$$kind.txt || exit 1; \
	done
	cd scripts/clients/node && npm install --no-audit --no-fund --no-package-lock
	@touch $@

# In the benchmark every project has its own versions of PyTorch and transformers. PyPI's torchvision, torchaudio and
# torchcodec, which some of them require, do not work with the CPU build of PyTorch, and nothing here needs them.
$(BENCH)/%/.installed: requirements-bench/%.txt | $(VENV)/.package-installed
	$(IN_VENV) -m venv --clear $(BENCH)/$*
	CMAKE_ARGS="-DGGML_NATIVE=ON $$CMAKE_ARGS" $(BENCH)/$*/bin/python -m pip install -r $<
	$(BENCH)/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
