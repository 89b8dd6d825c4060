# Each target does all of its own set-up, on a machine with Python 3.10 or newer and g++.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# Tests run in several processes, each with one thread, or they would wait for each other's threads.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal
PIP := PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/pip
INSTALL := $(PIP) install --quiet --disable-pip-version-check
# The extension compiles while what development needs is installed.
ifeq ($(MAKELEVEL), 0)
MAKEFLAGS += --jobs=2
endif
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
PACKAGE := $(shell find fastmeta -name '*.py')

.PHONY: demo test test-examples test-torch cuda-test lint docs cuda-check bench bench-env gpu clean

demo: $(VENV)/.built
	$(RUN) -m fastmeta demo --out demo

# The tests without the examples, and a fourth of the tests in the emulator. With FULL=1 also what
# the date of the commit leaves to other days, and all of the emulator.
test: $(VENV)/.built lint
	$(if $(FULL),FASTMETA_ALL_TESTS=1) $(PYTEST) --ignore tests/test_examples.py
	@$(MAKE) --no-print-directory cuda-test $(if $(FULL),,SHARE=$(or $(SHARE),4))

# The examples as a user runs them: fastmeta from its wheel, away from the sources, and from C++.
test-examples: .venv-wheel/.installed
	FASTMETA_EXAMPLES_PYTHON=$(CURDIR)/.venv-wheel/bin/python \
		$(PYTEST) tests/test_examples.py tests/packaging/test_wheel.py tests/packaging/test_cpp_install.py

# The tests with a wheel for another torch: make test-torch TORCH=2.15.0
test-torch: $(VENV)/.installed
	$(RUN) -m tools.other_torch $(TORCH)

# The CUDA kernels on the CPU, each test in one of three orders of threads, which the date of the commit
# chooses. A release must pass `make cuda-test FULL=1`: every test in all of them. SHARE=4 runs a fourth.
# Where g++ has no sanitizers it says so and ends with 3.
cuda-test: $(VENV)/.built $(VENV)/.installed
	$(RUN) -m tests.cuda_emulation $(if $(FULL),--full) $(if $(SHARE),--share $(SHARE)) || [ $$? -eq 3 ]

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The documentation, to build/site; a warning is an error. The variable silences an advertisement.
docs: $(VENV)/.built $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Needs nvcc, but neither a GPU nor a torch with CUDA.
cuda-check: $(VENV)/.installed
	$(RUN) -m tools.cuda_check

bench: $(VENV)/.built $(VENV)/.installed
	$(RUN) -m benchmarks

# The environment of the peers that `python -m benchmarks run` compares with.
bench-env: $(VENV)/.built $(VENV)/.installed .venv-bench/.installed

# With the machine's own python and its CUDA torch, not with $(VENV).
gpu:
	$(PYTHON) -m benchmarks.gpu

$(VENV)/.base: requirements.txt
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "fastmeta: $(PYTHON) lacks venv; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.installed: requirements-dev.txt $(VENV)/.base
	$(INSTALL) -r requirements-dev.txt
	@touch $@

# One by one, torch first: a peer that cannot be installed is missing in the tables, the others are not.
.venv-bench/.installed: requirements-bench.txt benchmarks/peers/fetch.py
	$(PYTHON) -m venv .venv-bench
	grep -v '^#' requirements-bench.txt | while read -r peer; do \
		.venv-bench/bin/pip install --quiet --disable-pip-version-check --constraint requirements-bench.txt "$$peer" \
			|| echo "fastmeta: $$peer was not installed"; done
	.venv-bench/bin/python -m benchmarks.peers.fetch || echo "fastmeta: learn2learn was not installed"
	@touch $@

# ninja comes from the environment, so its folder leads PATH.
$(VENV)/.built: $(VENV)/.base $(SOURCES)
	$(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

# The wheel, and beside it the packages of $(VENV); its own fastmeta comes first.
.venv-wheel/.installed: $(VENV)/.built $(VENV)/.installed $(PACKAGE) README.md
	rm -rf .venv-wheel dist build/lib*
	$(PIP) wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --without-pip .venv-wheel
	$(VENV)/bin/pip --python .venv-wheel install --quiet --disable-pip-version-check --no-deps dist/fastmeta-*.whl
	$(RUN) -c "import site; print(site.getsitepackages()[0])" \
		> $$(.venv-wheel/bin/python -c "import site; print(site.getsitepackages()[0])")/packages.pth
	@touch $@

clean:
	rm -rf build dist demo *.egg-info fastmeta/_C*.so $(VENV)/.built .venv-wheel
