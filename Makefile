# Everything runs from .venv, which is made by the first target that needs it. Needs Python 3.11 or newer, nothing else.
# Python may write bytecode even if the environment forbids it: a server takes twice as long to start if each of its
# processes compiles vLLM again.
export PYTHONDONTWRITEBYTECODE :=
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo play test test-fast test-processes test-vllm test-vllm-v2 test-v2-wheel test-faults soak fuzz options check format model bench-overhead bench-ahead bench evidence bench-switched bench-emulated bench-emulated-asynchronous bench-timeline bench-messages bench-never-slower bench-micro bench-deciding bench-scheduling bench-sampling bench-sampler bench-drafters bench-beside bench-overload bench-other-tokenizer published clean
help:
	@echo "make demo            plain vLLM, then the same with an edge: MODEL=qwen|smollm2, by default the one that fits"
	@echo "make demo EDGE=ngram the same with prompt lookup as the draft; HUB=1: the Qwen models from the model hub"
	@echo "make play            the demo's server and an edge, kept running: a status page and a chat"
	@echo "make test            every test, including those on a real vLLM (40 minutes once installed; an hour with less than 22 GiB)"
	@echo "make check test-fast format, lint, types and the tests of the decisions: on every save (half a minute)"
	@echo "make test-processes  tests of real gateways, commands and draft models, without vLLM (three minutes)"
	@echo "make test-vllm-v2    tests of vLLM's V2 model runner, in Triton's interpreter (three minutes)"
	@echo "make test-v2-wheel   tests of vllm serve from the CUDA wheel, on a simulated H100 (five minutes)"
	@echo "make test-faults     faults injected around a server under load: a table (ten minutes)"
	@echo "make soak            two hours of load while edges come and go: what grows, what is left behind"
	@echo "make fuzz            a minute of coverage-guided fuzzing of each parser (FUZZ_S=1800: half an hour)"
	@echo "make docs            the documents as a site, .cache/site/index.html"
	@echo "make picture         the README's picture from demo results (yours: RESULTS=.cache/demo.json PICTURE=demo.svg)"
	@echo "make dist            wheel and sdist in dist/, checked (half a minute)"
	@echo "make bench           edges against vLLM, its ngram, its draft_model (hours; ARGS=--quick: a quarter of an hour)"
	@echo "make evidence        a real pair, servers started five times, intervals and verdicts (hours; ARGS='--pair qwen')"
	@echo "make published       rewrites the tables in the documents that come from benchmarks/results"
	@echo "make bench-switched  gain or cost of edges within one server that switches drafts on and off every few seconds"
	@echo "make bench-emulated  server, wire and edges at an accelerator's speed, without one (some minutes)"
	@echo "make bench-emulated-asynchronous the same where vLLM schedules a step while another is computed"
	@echo "make bench-timeline  a second of a real run as a drawing: the server verifies while edges draft (two minutes)"
	@echo "make bench-overload  goodput at 1 to 3 times capacity, by admission policy (an hour; ARGS=--quick)"
	@echo "make bench-messages  frames through a gateway: latency, and the cost of one"
	@echo "make bench-overhead  memory, start-up, latency and parking costs"
	@echo "make bench-ahead     gain of drafting ahead at 0, 5, 20 and 80 ms (half an hour; ARGS=--quick)"
	@echo "make bench-ahead ARGS='--pair qwen' the same with a real pair of models, by kind of question (an hour)"
	@echo "make bench-micro     microseconds of each part of the hot paths"
	@echo "make bench-sampling  how often drafts are right if the target samples, with its noise and without"
	@echo "make bench-sampler   cost of sampling in a step that verifies drafts: by equality, and vLLM's own way"
	@echo "make bench-other-tokenizer how often a draft with another tokenizer is right, and the cost of translating"
	@echo "make bench-beside    what a draft on the other core takes from a server (3 min)"
	@echo "make bench-drafters  forward passes of each drafter that runs here, and what it drafts for 1 and 4 requests"
	@echo "make bench-scheduling cost of a step in vLLM's scheduler, with the plugin and without"
	@echo "make bench-deciding  cost of the policy in the engine, microseconds per request and step"
	@echo "make bench-never-slower whether the plugin slows a server down: a verdict per cell of a grid (2 hours; ARGS=--quick)"

INSTALLED_FROM := pyproject.toml deploy/install $(wildcard deploy/*-metadata/pyproject.toml)
# What the demo needs. Tests, checks and benchmarks need more, which is added later (llama.cpp is compiled for it).
$(VENV)/.installed-demo: $(INSTALLED_FROM)
	@PYTHON="$(PYTHON)" deploy/install $(VENV) cpu,demo
	@touch $@

$(VENV)/.installed: $(VENV)/.installed-demo
	@PYTHON="$(PYTHON)" deploy/install $(VENV) cpu,dev
	@touch $@

model: $(VENV)/.installed
	@$(BIN)/python examples/pairs.py smollm2

demo: $(VENV)/.installed-demo
	@$(BIN)/python examples/demo.py $(if $(MODEL),--pair $(MODEL)) $(if $(EDGE),--draft $(EDGE)) $(if $(HUB),--hub)

play: $(VENV)/.installed-demo
	@$(BIN)/python examples/play.py $(if $(MODEL),--pair $(MODEL))

test: test-fast test-processes test-vllm-v2 test-vllm

# Decisions and data structures, in this process: on every save.
test-fast: $(VENV)/.installed
	$(BIN)/pytest --ignore=tests/vllm --ignore=tests/vllm_v2 --ignore=tests/fake_gpu --ignore=tests/processes --ignore=tests/models -n 2 --dist worksteal --durations=15

# Real gateways, servers and commands as processes, and real draft models; no vLLM.
test-processes: $(VENV)/.installed
	$(BIN)/pytest tests/processes tests/models -n 2 --dist loadfile --durations=15

# Two files at a time where memory allows, each with a core for its servers, gateways and edges
# (tests/vllm/__init__.py). TEST_WORKERS=1: one at a time.
TEST_WORKERS ?= $(shell awk '/MemTotal/ {print ($$2 > 22 * 1024 * 1024) ? 2 : 1}' /proc/meminfo)
test-vllm: $(VENV)/.installed model
	$(BIN)/pytest tests/vllm -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

# vLLM's V2 model runner, in this process: its kernels in Triton's interpreter, a model of some thousand parameters.
TRITON := .cache/triton
$(TRITON)/triton/__init__.py: $(VENV)/.installed-demo
	@echo "  Triton, for its interpreter ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) triton==3.6.0
	@touch $@

VLLM_V2 := .cache/vllm-0.33
$(VLLM_V2): $(VENV)/.installed-demo tests/vllm_v2/unpack_vllm.py
	@echo "  vLLM 0.33, without its libraries ..."
	@$(BIN)/python -m tests.vllm_v2.unpack_vllm $(VLLM_V2)
	@touch $@

test-vllm-v2: $(VENV)/.installed $(TRITON)/triton/__init__.py $(VLLM_V2)
	PYTHONPATH=$(VLLM_V2):$(TRITON) VLLM_LOGGING_LEVEL=ERROR $(BIN)/pytest tests/vllm_v2 -n 2 --dist loadfile --durations=10

bench-scheduling: $(VENV)/.installed $(TRITON)/triton/__init__.py $(VLLM_V2)
	PYTHONPATH=examples:$(VLLM_V2):$(TRITON) VLLM_LOGGING_LEVEL=ERROR $(BIN)/python benchmarks/scheduling.py

# All of `vllm serve` on it, from the command line to answers: one server per test, in its own processes.
test-v2-wheel: $(VENV)/.installed $(TRITON)/triton/__init__.py $(VLLM_V2)
	PYTHONPATH=$(abspath $(VLLM_V2)):$(abspath $(TRITON)) $(BIN)/pytest tests/fake_gpu --durations=10

# docs/options.md, from the models of vllm_specedge/config.py.
options: $(VENV)/.installed
	@$(BIN)/vllm-specedge options > docs/options.md

.PHONY: picture docs dist
# The README's picture. From your own demo: make picture RESULTS=.cache/demo.json PICTURE=demo.svg
RESULTS ?= benchmarks/results/demo.json
PICTURE ?= docs/demo.svg
picture: $(VENV)/.installed
	PYTHONPATH=examples $(BIN)/python benchmarks/demo_picture.py $(RESULTS) $(PICTURE)

# The documents as a site: .cache/site/index.html
docs: $(VENV)/.installed
	$(BIN)/python docs/site/build.py

# Checks what a user gets: the package's description, its files, and its commands in an empty environment.
dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/pytest tests/processes/test_dist.py tests/processes/test_install.py

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Ten minutes, partly as root; ARGS="--only gateway-killed" for one fault.
test-faults: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python -m tests.faults.matrix $(ARGS)

# Two hours; ARGS="--minutes 10 --warm-up 2" for a short run.
soak: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python -m tests.faults.soak $(ARGS)

# Coverage-guided; fix what it finds, and add a test for it. FUZZ_S=1800: half an hour each.
FUZZ_S ?= 60
fuzz: $(VENV)/.installed
	@mkdir -p .cache/fuzz/frames .cache/fuzz/session .cache/fuzz/driver
	for target in frames session driver; do \
		$(BIN)/python -m tests.fuzz.fuzz $$target .cache/fuzz/$$target tests/fuzz/corpus/$$target \
			-max_total_time=$(FUZZ_S) -artifact_prefix=.cache/fuzz/ -print_final_stats=1 || exit 1; \
	done

bench-overhead: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/gateway_load.py overhead $(ARGS)

bench-ahead: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/$(if $(findstring --pair,$(ARGS)),real_pair,ahead).py $(ARGS)

bench-never-slower: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/grid.py $(ARGS)

bench: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/bench.py $(ARGS)

evidence: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/evidence.py $(ARGS)

published: $(VENV)/.installed
	PYTHONPATH=examples $(BIN)/python benchmarks/published.py --write

bench-switched: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/switched.py $(ARGS)

bench-emulated: $(VENV)/.installed model
	PYTHONPATH=examples:. $(BIN)/python benchmarks/emulated.py $(ARGS)

bench-emulated-asynchronous: $(VENV)/.installed model $(TRITON)/triton/__init__.py $(VLLM_V2)
	PYTHONPATH=examples:.:$(abspath $(VLLM_V2)):$(abspath $(TRITON)) $(BIN)/python benchmarks/emulated.py --asynchronous $(ARGS)

bench-timeline: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/timeline.py $(ARGS)

# An hour; ARGS=--quick for a short run. Figures in brackets are the simulator's.
bench-overload: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/overload.py $(ARGS)

bench-messages: $(VENV)/.installed
	PYTHONPATH=examples $(BIN)/python benchmarks/gateway_load.py messages $(ARGS)

bench-micro: $(VENV)/.installed
	$(BIN)/python benchmarks/micro.py pieces $(ARGS)

# ARGS="--pair qwen" for the real pair.
bench-sampling: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/sampling.py $(ARGS)

bench-sampler: $(VENV)/.installed
	$(BIN)/python benchmarks/sampler_cost.py $(ARGS)

bench-beside: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/beside.py $(ARGS)

bench-drafters: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/drafters.py $(ARGS)

bench-other-tokenizer: $(VENV)/.installed model
	PYTHONPATH=examples $(BIN)/python benchmarks/other_tokenizer.py $(ARGS)

bench-deciding: $(VENV)/.installed
	$(BIN)/python benchmarks/micro.py deciding $(ARGS)

clean:
	rm -rf $(VENV) .cache
