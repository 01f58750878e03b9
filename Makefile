# `make demo` and `make test` do all the set-up themselves. PYTHON chooses the interpreter, ARGS goes to the command:
#   make demo ARGS="train.steps=400"      make test ARGS="tests/configs -k include"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test style test-all schema clean life slurm monitor faults matrix matrix-zero bench bench-against bench-checkpoint bench-zero gpu tutorial picture slurm-deps
help:
	@echo "make demo    set up, then train the demo on this machine"
	@echo "make test    set up, then check style, types, imports and run the tests (ARGS: only these tests)"
	@echo "make style   check style, types and imports alone"
	@echo "make test-all   every test there is (hours), with a table; goes on where it was stopped"
	@echo "make schema  write configs/schema.json and docs/reference.md from configs/schema/"
	@echo "make life    every phase of a run with every cause of stopping and killing, under both engines"
	@echo "make faults  every crash point and every kind of fault in every file of a checkpoint (3 minutes)"
	@echo "make matrix  every layout's checkpoint read under every layout, whatever is frozen, and every layout's losses"
	@echo "make matrix-zero  the same with DeepSpeed ZeRO writing or reading, and all that is tried of ZeRO; goes on where it ended"
	@echo "make bench   tokens/s against a bare PyTorch loop, and what logging and saving cost"
	@echo "make bench-against ARGS=\"bits OTHER\" (or speed)   this checkout against another one: the same bits, the same speed"
	@echo "make bench-checkpoint   saving and loading against plain reads and writes; a thousand ranks, simulated"
	@echo "make bench-zero   FSDP2 against ZeRO 1, 2 and 3, and our ZeRO against bare DeepSpeed"
	@echo "make gpu     the speed table and the tests that need an NVIDIA GPU: ten minutes, by whatever Python is here"
	@echo "make tutorial, make picture   run docs/tutorial.md as written; draw the pictures of the docs"
	@echo "make slurm   every fault of a Slurm job, on a cluster of this machine"
	@echo "make monitor every cause seeded in real runs and named by the monitor, and what the monitor costs (10 minutes)"
	@echo "make slurm-deps   install a Slurm to rehearse on (apt; then: python -m slurm cluster up)"
	@echo "make clean   remove the environment and every cache (runs stay)"

demo: $(VENV)/.demo
	@$(BIN)/python -m launch run demo $(ARGS) || [ $$? -eq 3 ]  # 3: stopped as asked

# Style is checked beside the tests and yields to them: they wait for processes that they started half of their time.
test: $(VENV)/.test
	@[ -z "$(ARGS)" ] || exec $(BIN)/python -m pytest -n 2 $(ARGS); \
	nice $(MAKE) -s style > $(VENV)/style.log 2>&1 & style=$$!; \
	$(BIN)/python -m pytest -n 2; tests=$$?; \
	wait $$style || { cat $(VENV)/style.log; exit 1; }; \
	exit $$tests

style: $(VENV)/.test
	@status=0; for tool in "ruff check ." "ruff format --check ." mypy lint-imports; do \
	    $(BIN)/$$tool || { echo "$$tool: found what is above" >&2; status=1; }; \
	done; exit $$status

# Everything, file by file; goes on where it was stopped.
test-all: $(VENV)/.test
	@nice $(MAKE) -s style
	@$(BIN)/python -m tests.everything

schema: $(VENV)/.demo
	@$(BIN)/python -m configs.reference

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second start fast; a changed pyproject.toml installs again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Muster needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "$(PYTHON) cannot make environments: install python3-venv (or conda's python)"; exit 1; }

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing Muster and PyTorch into $(VENV); this takes minutes once"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing Muster, PyTorch and the test tools into $(VENV); this takes minutes once"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[test]'
	@touch $(VENV)/.demo $@

# Longer than `make test`; each is run by hand before its result is claimed.
life: $(VENV)/.test
	@$(BIN)/python -m pytest tests/life --full $(ARGS)

monitor: $(VENV)/.test
	@$(BIN)/python -m pytest tests/launch/monitor tests/launch/test_goodput.py tests/launch/test_watch.py --full $(ARGS)
	@$(BIN)/python benchmarks/monitor.py

slurm: $(VENV)/.test
	@MUSTER_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm --full $(ARGS)

faults: $(VENV)/.test
	@$(BIN)/python -m pytest tests/trainer/checkpoint tests/fuzz --full $(ARGS)

LAYOUTS := tests/test_train.py tests/trainer/test_tensor.py
matrix: $(VENV)/.test
	@$(BIN)/python -m pytest tests/matrix $(LAYOUTS) --full --ignore tests/matrix/test_matrix_zero.py $(ARGS)

ZERO := tests/trainer/test_zero.py tests/trainer/test_zero_nvme.py tests/trainer/test_debug.py tests/test_begin.py \
    tests/trainer/test_heartbeat.py tests/trainer/test_profiling.py tests/trainer/test_series.py
matrix-zero: $(VENV)/.test
	@$(BIN)/python -m pytest tests/matrix/test_matrix_zero.py $(ZERO) --full $(ARGS)

bench: $(VENV)/.test
	@$(BIN)/python benchmarks/speed.py --processes 1 --saving
	@$(BIN)/python benchmarks/speed.py --processes 2 --saving

bench-against: $(VENV)/.test
	@$(BIN)/python benchmarks/against.py $(ARGS)

bench-checkpoint: $(VENV)/.test
	@$(BIN)/python benchmarks/checkpoint.py $(ARGS)
	@$(BIN)/python benchmarks/simulate.py

# Saving and memory are of a model of 25 million parameters: with the demo's they are all fixed costs.
LARGER := model.dim=512 model.mlp_dim=1536 model.layers=8 train.global_batch=4 train.micro_batch=2 data.seq_len=64
bench-zero: $(VENV)/.test
	@$(BIN)/python benchmarks/zero.py engines --pairs 8 model.dim=256 model.mlp_dim=704 train.global_batch=8
	@$(BIN)/python benchmarks/zero.py bare --pairs 15
	@$(BIN)/python benchmarks/zero.py saving --pairs 11 $(LARGER)
	@$(BIN)/python benchmarks/zero.py memory $(LARGER)

# Figures first: a lent GPU may be gone before the tests end. A machine without a way to the registries has no $(VENV).
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	@$(GPU_PYTHON) benchmarks/packages.py
	@$(GPU_PYTHON) benchmarks/gpu_speed.py $(ARGS); figures=$$?; \
	    $(GPU_PYTHON) -m pytest -m gpu tests/gpu && exit $$figures

tutorial: $(VENV)/.test
	@$(BIN)/python benchmarks/tutorial.py

picture: $(VENV)/.test
	@$(BIN)/python benchmarks/picture.py
	@$(BIN)/python benchmarks/watch_picture.py

# A real Slurm for `python -m slurm cluster up`, and a database for its accounting; no service of them is of use, or needed.
slurm-deps:
	@command -v apt-get >/dev/null || { echo "no apt-get here: install slurmctld, slurmd, Slurm's clients and munge"; exit 1; }
	@sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); export DEBIAN_FRONTEND=noninteractive; \
	    get() { $$sudo apt-get install -y -qq --no-install-recommends "$$@" >/dev/null; }; \
	    $$sudo apt-get update -qq && get slurmctld slurmd slurm-client munge iproute2 && \
	    { get slurmdbd mariadb-server-core mariadb-client-core || \
	        echo "no accounting: slurmdbd, mariadb-server-core and mariadb-client-core were not found"; }
