# `make demo` and `make test` start from a fresh clone: each creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test check lint format docs bench compare clean

demo: $(VENV)/.installed
	$(BIN)/lightlm prepare-data pydocs --tokenizer train:8192
	$(BIN)/lightlm train recipes/demo.yaml
	$(BIN)/lightlm eval --tasks heldout
	$(BIN)/lightlm generate "Return a new" --num-samples 2 --max-new-tokens 80
	$(BIN)/lightlm convert

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2

check: lint
	$(BIN)/mypy
	$(BIN)/lint-imports

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, into site/index.html.
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --strict

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/train.py

# Train the demos with the code of BASE and with this tree: losses and gradient norms must be identical.
compare: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/compare_commits.py $(BASE)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# pip is not silenced: on Linux the first installation may bring gigabytes of CUDA libraries, and should show it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP_INSTALL) ".[dev]"
	touch $@ $(VENV)/.installed
