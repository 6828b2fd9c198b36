# Everything runs in a virtual environment of its own, with the versions that constraints.txt pins.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := flexsparse masks compile_passes tests bench docs/conf.py
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile  # a file stays in one process: its fixtures are made once
QUANTISED := torchao==0.18.0 optimum-quanto==0.2.7 bitsandbytes==0.50.2 gguf==0.19.0  # beside them diffusers and peft import slower

# Most of what is installed is never imported: Python compiles what is, once, a minute less than pip takes to compile it all.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test quick-tests test-full lint typecheck docs bench bench-report study study-report kernels clean

help:
	@echo "make demo       train a small video transformer on a real clip: dense, VSA, BSA; writes runs/demo/report.html (ten minutes on 2 cores)"
	@echo "make test       lint, types, tests (under 15 minutes on 2 cores)"
	@echo "make test-full  the above, slow tests and mutations of the code"
	@echo "make docs       renders docs/ into docs/_build/index.html"
	@echo "make study      trains dense, VSA, BSA and others side by side on the sample clips: runs/study; hours, goes on where it stopped"
	@echo "make study-report  renders bench/results/study/: bench/STUDY.md, bench/plots/study/, the README's table"
	@echo "make kernels    compiles the Triton templates for sm_90a, no GPU needed; registers, spills, wgmma"
	@echo "make bench      CPU benchmark; writes bench/results/ and the README's table"
	@echo "make bench-report  renders bench/results/ of GPU runs: bench/REPORT.md, bench/plots/, the README's GPU table"
	@echo "with a GPU:     python -m bench.gpu_suite --out bench/results/NAME, then make bench-report"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable ".[demo,dev,diffusers,docs]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/flexsparse demo $(DEMO)

test: lint  # mypy takes one core: beside the tests
	$(MAKE) --no-print-directory --jobs=2 typecheck quick-tests

quick-tests: $(VENV)/.installed
	$(PYTEST) -m "not slow" $(TESTS)

test-full: lint typecheck
	$(PYTEST) $(TESTS)
	$(BIN)/python -m tests.mutations
	$(BIN)/python -m pip install --quiet --no-deps --target build/triton-3.6 triton==3.6.0
	PYTHONPATH=build/triton-3.6 $(BIN)/python -m bench.kernels --offline
	$(BIN)/python -m pip install --quiet --no-deps --target build/quantised $(QUANTISED)
	PYTHONPATH=build/quantised $(PYTEST) tests/models/test_quantised.py

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# masks/ and compile_passes/ become sub-packages when installed, so it is the installed tree that is type-checked
typecheck: $(VENV)/.installed
	rm -rf build/typecheck build/lib
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy --config-file pyproject.toml --cache-dir .mypy_cache -p flexsparse

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

bench: $(VENV)/.installed
	$(BIN)/python -m bench.cpu --profile
	$(BIN)/python -m bench.table
	$(BIN)/python -m bench.passes
	$(BIN)/python -m bench.saved
	$(BIN)/python -m bench.plan_check

bench-report: $(VENV)/.installed
	$(BIN)/python -m bench.report

study: $(VENV)/.installed
	$(BIN)/python -m bench.study --preset cpu --out runs/study $(STUDY)

study-report: $(VENV)/.installed
	$(BIN)/python -m bench.study.report --readme README.md

kernels: $(VENV)/.installed
	$(BIN)/python -m bench.kernels --offline

clean:
	rm -rf $(VENV) build docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
