# Two commands matter: `make demo` answers a prompt with a real model, `make test` runs the tests.
# Each does its own set-up in .venv, once. PYTHON picks the interpreter, MODEL the demo's model.

PYTHON ?= python3
MODEL ?= smollm2
PROMPT ?= Tell me a very short story about a lighthouse keeper.
PY := .venv/bin/python
# Without an NVIDIA GPU, PyTorch comes from its index of CPU builds: the one on PyPI would bring
# gigabytes of CUDA libraries on Linux. The constraints file then keeps pip from replacing it.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CPU_INDEX := https://download.pytorch.org/whl/cpu
# A shell may forbid compiled Python files (containers often do); without them every test process
# compiles all tests anew, and every core that a test starts all of the engine.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-clients lint types bench mutants sanitize clean setup setup-dev

demo: setup
	.venv/bin/nanovllm generate --model $(MODEL) "$(PROMPT)"
	@echo "Go on with .venv/bin/nanovllm chat, or serve --open; source .venv/bin/activate puts it on your path."

# As many test processes as tests/conftest.py says; JOBS=0 runs all in one, as a debugger wants it.
JOBS ?= auto

test: setup-dev
	$(PY) -m pytest -n $(JOBS) --dist worksteal

# What is quick: no processes to start, no kernels in an interpreter, no real models.
test-fast: setup-dev
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

# Agent frameworks bring hundreds of megabytes that nothing else here needs, and wishes of their own
# about versions: they get an environment that sees the packages of the other one.
test-clients: setup-dev .venv/clients/installed
	.venv/clients/bin/python -m pytest tests/frontend/server/test_agents.py

.venv/clients/installed: .venv/installed-dev
	@$(PYTHON) -m venv .venv/clients
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$(.venv/clients/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of-tests.pth
	.venv/clients/bin/python -m pip install -q 'nanovllm[clients]'
	@touch $@

lint: setup-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Of benchmarks only whether what they call is there, and called as it can be.
types: setup-dev
	$(PY) -m mypy
	MYPYPATH=benchmarks $(PY) -m mypy --config-file benchmarks/mypy.ini benchmarks

bench: setup-dev
	$(PY) benchmarks/core.py
	$(PY) benchmarks/frontend.py
	$(PY) benchmarks/http_server.py
	$(PY) benchmarks/faults.py
	$(PY) benchmarks/offline_vs_transformers.py

# Whether tests hold what the code does: small mutations, drawn at random, in copies of this tree. An
# hour or more on two cores; MUTANTS says how many, and a second run goes on where the first one was.
MUTANTS ?= 300
mutants: setup-dev
	$(PY) tests/mutants.py --num $(MUTANTS) --results build/mutants.jsonl --processes $$(nproc)

# The tests of the C++ kernels, built with the address and undefined-behaviour sanitizers in a copy of
# this tree; with -O3 that takes a compiler a quarter of an hour. What Python itself leaves at its end is
# no leak of the kernels, so leaks are not looked for.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: setup-dev
	rm -rf build/sanitized
	mkdir -p build/sanitized
	git ls-files -z | xargs -0 cp --parents -t build/sanitized
	sed -i 's/"-O3"/"-O1"/' build/sanitized/pyproject.toml
	cd build/sanitized && CFLAGS="$(SANITIZERS)" CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
		$(abspath $(PY)) -c 'from setuptools import setup; setup()' build_ext --inplace
	cd build/sanitized && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(abspath $(PY)) -m pytest -m "not model" tests/worker/kernels/native tests/worker/models/test_native.py

# What running needs; `setup-dev` adds what tests need.
setup: .venv/installed
setup-dev: .venv/installed-dev

.venv/installed: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "nanovllm needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Setting up .venv (once; minutes: packages to fetch, C++ kernels to compile)"
	@$(PYTHON) -m venv .venv
ifeq ($(HAS_GPU),yes)
	@$(PY) -m pip install -q -e '.[shell]'
else
	@echo "No NVIDIA GPU found: taking a CPU build of PyTorch"
	@$(PY) -m pip install --no-deps --timeout 15 --retries 1 --index-url $(CPU_INDEX) \
		-r constraints-cpu.txt || echo "$(CPU_INDEX) is out of reach: trying the ordinary index"
	@$(PY) -m pip install -qq -c constraints-cpu.txt -e '.[shell]'
endif
	@touch $@

# The package is there already: only what its extra `dev` names is fetched.
.venv/installed-dev: .venv/installed
	@echo "Adding what tests need to .venv (once)"
	@$(PY) -m pip install -qq $(if $(HAS_GPU),,-c constraints-cpu.txt) 'nanovllm[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
