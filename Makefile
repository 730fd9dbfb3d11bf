# Every target sets up what it needs: the environment in .venv, from the lock files, once.
PYTHON ?= python3
VENV   ?= .venv
CORE   ?= small
OUT    ?= build
PY     := $(VENV)/bin/python
LOCKS  := $(VENV)/.locks

export VENV
export PYTHONHASHSEED = 0
.DEFAULT_GOAL := help
.PHONY: help setup cosim test rtl formal mutations synth bench accuracy doctor clean

BASE := $(LOCKS)/requirements.lock
GPU  := $(LOCKS)/requirements-gpu.lock
FPGA := $(LOCKS)/requirements-fpga.lock

$(LOCKS)/%: % sim/setup_venv.py
	@$(PYTHON) sim/setup_venv.py $<
$(GPU) $(FPGA): $(BASE)

help:
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

setup: $(BASE) ## only the environment: .venv, locked packages, Verilator

cosim: $(BASE) ## train a real network on the simulated core, every tensor checked bit for bit
	$(PY) -m sim train --method niti --model mlp --data digits --batch 32 --epochs 10 --core $(CORE) --out $(OUT)/cosim

# The tests simulate few cycles of many cores.
test: export INTRAIN_BUILD = quick
test: $(BASE) $(GPU) ## all tests
	$(PY) -m ruff check .
	$(PY) -m pytest -q -n auto --dist worksteal

rtl: $(BASE) ## Verilog and JSON sidecar of one core (CORE=small) into build/rtl
	$(PY) -m hw rtl --core $(CORE) --out $(OUT)/rtl

formal: $(BASE) $(FPGA) ## proofs of the small units
	$(PY) -m tests.formal --out $(OUT)/formal

mutations: $(BASE) ## break the hardware and its compiler on purpose and name the test that sees it
	$(PY) -m tests.mutations --out $(OUT)

synth: $(BASE) $(FPGA) ## area and clock rate of one core (CORE=small) on ECP5 into build/synth
	$(PY) -m hw synth --core $(CORE) --out $(OUT)/synth

bench: $(BASE) $(GPU) ## all benchmarks beside their references, JSON and table into build/bench
	$(PY) -m sim.bench --out $(OUT)/bench
	$(PY) -m golden bench --out $(OUT)/bench
	$(PY) -m gpu bench --out $(OUT)/bench
	@echo && $(PY) -m sim.bench --table --out $(OUT)/bench

accuracy: $(BASE) ## integer versus float accuracy table
	$(PY) -m golden accuracy --out $(OUT)/accuracy

doctor: ## name what is missing on this machine, and the fix
	@$(PYTHON) -m sim.doctor

clean: ## remove everything made, the environment included
	rm -rf build $(VENV) $(VENV).lock
