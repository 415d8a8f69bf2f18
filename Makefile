# Every target starts from a fresh clone: it creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable

# Tests without training or a model: coverage costs little here.
UNIT_TESTS := $(wildcard tests/test_*.py tests/recipe tests/report)

.PHONY: demo test test-floors coverage check lint format bench gpu-check compare docs docs-serve clean

# On a slow machine, --max-minutes trains on fewer tokens, and says so.
demo: $(VENV)/.installed
	$(BIN)/lightlm prepare-data pydocs --tokenizer train:8192
	$(BIN)/lightlm train recipes/demo.yaml --max-minutes 4
	$(BIN)/lightlm eval --tasks heldout
	$(BIN)/lightlm generate "Return a new" --num-samples 2 --max-new-tokens 80
	$(BIN)/lightlm convert

# Two workers with one thread each: more threads than cores wait for each other.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(addprefix --ignore=,$(UNIT_TESTS))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(UNIT_TESTS) --cov=lightlm.recipe --cov=lightlm.report --cov-report=term:skip-covered

# Coverage of the whole package takes 70% longer than the tests; on Python 3.12 and later it is almost free.
coverage: $(VENV)/.installed-dev
	COVERAGE_CORE=$$($(BIN)/python -c "import sys; print('sysmon' if sys.version_info >= (3, 12) else 'ctrace')") \
		$(BIN)/python -m pytest --numprocesses 2 --cov=lightlm --cov-report=term:skip-covered

check: lint
	$(BIN)/mypy
	$(BIN)/lint-imports

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Build the documentation in site/. A broken link or a missing page is an error.
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --strict

docs-serve: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py
	$(BIN)/zensical serve

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/train.py

# At most 8 minutes on a machine with a GPU; writes benchmarks/results/gpu-check-NAME.json and .md.
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/gpu_check.py

# Run the tests with the lowest version of every dependency that pyproject.toml allows, in an environment of their own.
test-floors: $(VENV)/.installed-dev
	$(PYTHON) -m venv .venv-floors
	$(BIN)/python tests/floors.py > .venv-floors/floors.txt
	.venv-floors/bin/python -m pip install --disable-pip-version-check --constraint .venv-floors/floors.txt --editable ".[dev]"
	OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest --numprocesses 2

# Train the demos with the code of BASE and of this tree. Losses and gradient norms must be identical.
compare: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/compare_commits.py $(BASE)

clean:
	rm -rf $(VENV) .venv-floors site .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.created:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'LightLM needs Python 3.11 or later, this is ' + sys.version.split()[0] + '; for example: make demo PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	touch $@

# transformers ([hf]) loads what the demo exports. pip shows its progress: on Linux the first installation may download gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) ".[hf]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) ".[dev]"
	touch $@ $(VENV)/.installed
