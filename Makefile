# make demo   set up .venv and show, on real photographs, that ResNet-50 is one function in three frameworks
# make test   set up .venv and run the whole suite
# make fast   the tests worth running after each edit
# make lint   formatter, linter, types
# make bench  the measurements behind the figures in the README
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fast lint bench clean

demo: .venv/installed
	$(BIN)/resnet-parity check resnet50 --timings

test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile

fast: .venv/installed
	$(BIN)/pytest -m "not slow"

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/port.py
	$(BIN)/python benchmarks/check.py

# constraints.txt pins torch to a release whose CPU build is small; a range could take a CUDA build of several GB.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	@echo "setting up .venv (about two minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
