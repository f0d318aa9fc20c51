# make demo   set up .venv and show, on real photographs, that ResNet-50 is one function in three frameworks
# make test   set up .venv and run the suite but for what follows
# make test-long  every named variant at its own depth and width, and more random networks
# make test-mutants  the planted defects: that a check finds each, at its place
# make test-training  whole trainings: three seeds in three frameworks, kills, several processes
# make fast   the tests worth running after each edit
# make test-peers  set up .venv-peers, with torchvision, timm and transformers (5 GB on x86-64), and compare with them:
#                  every naming, container and convention once
# make test-peers-all  the same with every model that they have of the families here
# make lint   formatter, linter, types
# make bench  the measurements behind the figures in the README
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers/bin

# Hundreds of processes start below: our modules are compiled for the first of them, whatever the machine's habit.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long test-mutants test-training test-peers test-peers-all fast lint bench clean

demo: .venv/installed
	$(BIN)/resnet-parity check resnet50 --timings

test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not mutants and not training and not long"

test-long: .venv/installed
	$(BIN)/pytest -n 2 --dist load -m long

# The defects of a kind of network share what its reference computed: as many in a row as there are go to one process.
test-mutants: .venv/installed
	$(BIN)/pytest -n 2 --dist load --maxschedchunk 16 -m "mutants and not long"

test-training: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m training

# What other libraries warn of is theirs.
test-peers: .venv-peers/installed
	$(PEERS)/pytest -n 2 tests/peers -W default -m "not long"

test-peers-all: .venv-peers/installed
	$(PEERS)/pytest -n 2 tests/peers -W default

fast: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not mutants and not training and not long"

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/port.py
	$(BIN)/python benchmarks/check.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/train_keras.py
	$(BIN)/python benchmarks/train_flax.py
	$(BIN)/python benchmarks/scaling.py
	@echo "benchmarks/train_torch.py and families.py compare with torchvision: run them with $(PEERS)/python after make test-peers"

# constraints.txt pins torch to a release whose CPU build is small; a range could take a CUDA build of several GB.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	@echo "setting up .venv (about two minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

# torchvision does not load beside the small CPU build of torch, so the peers live elsewhere, with a torch of their own.
.venv-peers/installed: pyproject.toml constraints-peers.txt
	@echo "setting up .venv-peers (several minutes and about 6 GB, once)"
	@test -x $(PEERS)/python || $(PYTHON) -m venv .venv-peers
	@$(PEERS)/python -m pip install -qq --disable-pip-version-check -c constraints-peers.txt torchvision timm transformers -e '.[all,dev]'
	@touch $@

clean:
	rm -rf .venv .venv-peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
