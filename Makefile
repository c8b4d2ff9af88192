# make demo | test | check | docs: each sets up .venv first. PYTHON names another interpreter, which gets an environment of its
# own, .venv-3.12: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
ifneq ($(origin PYTHON),file)
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin
LOWEST := build/lowest
MODEL := smollm2-135m
DEMO := runs/demo
PROMPT := "To bake bread, you need"
PROMPTS := $(PROMPT) "The sun rises" "A list in Python is"
# Two workers with one thread each, so that timings and results do not depend on the machine's size.
# Files start in the order of tests/conftest.py: those that take longest first.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder --durations=15
# A room of tests/, a feature or a path: make test FEATURE=gguf
FEATURE :=
CHOSEN = $(firstword $(wildcard tests/features/$(FEATURE) tests/$(FEATURE) $(FEATURE)))
MUTANTS_ARGS ?= --sample 208 --seeds 0,1 --jobs 2 --json benchmarks/results/mutants.json
SOAK_ARGS ?= --minutes 60 --json benchmarks/results/soak.json
CRASH_ARGS ?= --kills 160 --json benchmarks/results/crash.json
FUZZ_ARGS ?= --programs 5000 --modules 400 --edges 400 --jobs 2 --json benchmarks/results/fuzz.json
FUZZ_FILES_ARGS ?= --minutes 30
RELEASE_ARGS ?=
BROKEN_ARGS ?= --json benchmarks/results/broken.json
RUN_TESTS = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest $(PYTEST_ARGS)
.DEFAULT_GOAL := help

.PHONY: help demo demo-one-shot install test chosen-tests test-all test-rest test-network test-core durations check lint types contracts docs format test-lowest fuzz fuzz-files broken crash soak mutants messages release clean

help:
	@echo "make demo         learn to prune SmolLM2-135M by 10 %, prove it, time it and let it write, beside the dense model"
	@echo "make install      the environment of the tests and checks, which they make themselves if it is missing"
	@echo "make test         make check, the quick tests, and one run of each kind; FEATURE=gguf, or a path: all tests of that"
	@echo "make test-all     make check, then every test that needs no network"
	@echo "make test-rest    what make test-all has beside make test"
	@echo "make test-network the tests that need a network"
	@echo "make durations    run all tests, and write which are quick: tests/durations.json"
	@echo "make check        ruff, mypy --strict, import contracts"
	@echo "make docs         the documentation as a site, build/site; a warning is an error"
	@echo "make format       let ruff format and fix what it can"
	@echo "make test-core    the core's tests on a copy without features"
	@echo "make test-lowest  the tests on the oldest dependencies that pyproject.toml allows"
	@echo "make fuzz         5,000 random programs and 800 modules: refused by name, or cut right; FUZZ_ARGS=... for other numbers"
	@echo "make fuzz-files   damaged files for every reader, half an hour: read, or refused in one line; FUZZ_FILES_ARGS=..."
	@echo "make broken       published folders and files with one fault each, which verify must refuse; BROKEN_ARGS=..."
	@echo "make soak         an hour of random commands, a fifth of them killed; SOAK_ARGS=... for other numbers"
	@echo "make crash        160 kills of commands: what the next run makes of them; CRASH_ARGS=... for other numbers"
	@echo "make mutants      a sample of small errors in the code, and which of them the tests notice; MUTANTS_ARGS=..."
	@echo "make messages     tests/messages.txt, which has every sentence that mptk can raise, anew from the source"
	@echo "make release      the wheel, tried in an empty environment, and what the owner types; RELEASE_ARGS='--extras all'"
	@echo "make clean        remove .venv, .venv-*, caches and build files"

# It trains on docs/ and measures on Python's own reference, which comes with Python.
demo: $(VENV)/.installed
	rm -rf $(DEMO) $(DEMO)-dense $(DEMO).run
	mkdir -p $(DEMO)-text
	$(BIN)/python -c 'from pydoc_data.topics import topics; print("\n\n".join(topics.values()))' > $(DEMO)-text/reference.txt
	$(BIN)/mptk fetch $(MODEL)
	$(BIN)/mptk analyze $(MODEL)
	$(BIN)/mptk export $(MODEL) --quantize int8 --out $(DEMO)-dense
	$(BIN)/mptk prune $(MODEL) --sparsity 0.1 --data docs/ --eval-data $(DEMO)-text --eval-windows 8 --minutes 3.5 --quantize int8 --out $(DEMO) || $(MAKE) --no-print-directory demo-one-shot
	$(BIN)/mptk bench $(DEMO)-dense $(DEMO) --lengths 128 --rounds 3
	$(BIN)/mptk generate $(DEMO)-dense $(PROMPTS) --max-new-tokens 24
	$(BIN)/mptk generate $(DEMO) $(PROMPTS) --max-new-tokens 24
	$(BIN)/mptk report $(DEMO) --prompt $(PROMPT) --html $(DEMO).html

# Without fast products in bfloat16 3.5 minutes are too few to learn in, and the run says so in a line.
demo-one-shot: $(VENV)/.installed
	$(BIN)/mptk prune $(MODEL) --sparsity 0.1 --data docs/ --eval-data $(DEMO)-text --eval-windows 8 --method wanda --reconstruct --quantize int8 --out $(DEMO)

install: $(VENV)/.installed-dev

# Types and tests at once: mypy takes a minute of one core in a fresh clone.
test: $(VENV)/.installed-dev lint contracts
	@$(MAKE) --no-print-directory --jobs 2 types chosen-tests

chosen-tests:
ifdef FEATURE
	$(if $(CHOSEN),,$(error there is no tests/features/$(FEATURE), tests/$(FEATURE) or $(FEATURE)))
	$(call RUN_TESTS,$(VENV)) --suite all $(CHOSEN)
else
	$(call RUN_TESTS,$(VENV)) --suite quick
endif

test-all: check
	$(call RUN_TESTS,$(VENV)) --suite all

test-rest: $(VENV)/.installed-dev
	$(call RUN_TESTS,$(VENV)) --suite rest

test-network: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=0 $(call RUN_TESTS,$(VENV)) --suite network

durations: $(VENV)/.installed-dev
	$(call RUN_TESTS,$(VENV)) --suite all --write-durations

test-core: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/core_only.py $(PYTEST_ARGS)

# Both cores: the types take most of it.
check: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory --jobs 2 types lint contracts

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy --strict mptk passes
	$(BIN)/mypy --explicit-package-bases benchmarks

contracts:
	$(BIN)/lint-imports

# sphinx: it reads these pages as they are (myst), and the docstrings are its markup already.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --conf-dir docs . build/site
	@echo "open build/site/index.html"

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST) --resolution lowest-direct --editable '.[dev]'
	$(call RUN_TESTS,$(LOWEST))

fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

fuzz-files: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz_files $(FUZZ_FILES_ARGS)

crash: $(VENV)/.installed-dev
	$(BIN)/python -m tests.crash $(CRASH_ARGS)

broken: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.broken $(BROKEN_ARGS)

soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

mutants: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(MUTANTS_ARGS)

messages: $(VENV)/.installed-dev
	$(BIN)/python -m tests.messages

release: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m tests.release $(RELEASE_ARGS)

clean:
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	"mptk needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --editable '$(1)'
@touch $@
endef

$(VENV)/.installed: pyproject.toml
	$(call install,.)

$(VENV)/.installed-dev: pyproject.toml
	$(call install,.[dev])

$(VENV)/.installed-docs: pyproject.toml
	$(call install,.[docs])
