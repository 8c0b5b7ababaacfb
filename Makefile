# Every target is safe to run again; `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
EXPERIMENT ?= ablation
RECORDS ?= results/records

export TOKENIZERS_PARALLELISM = false
# Where this variable is set, every process compiles torch and transformers again.
export PYTHONDONTWRITEBYTECODE =

BIN := $(VENV)/bin
RUN := $(BIN)/python -m experiments.run
EXPERIMENTS := $(basename $(notdir $(wildcard conf/experiment/*.yaml)))
LATEX := latexmk texlive-latex-base texlive-latex-recommended texlive-fonts-recommended texlive-pictures \
         texlive-latex-extra poppler-utils

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-types test-quick test-slow test-engines test-all sanitize docs family sweep derive pages latex paper arxiv \
        reproduce clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

ifneq ($(origin PYTHON),file)  # an environment keeps the version that it was made with
VERSION_OF = $(shell $(1) -c 'import sys; print(sys.version_info[:2])')
ifneq ($(wildcard $(BIN)/python),)
ifneq ($(call VERSION_OF,$(PYTHON)),$(call VERSION_OF,$(BIN)/python))
$(error $(VENV) has another version than $(PYTHON): name a new folder, for example VENV=$(VENV)-other)
endif
endif
endif

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

SPHINX := $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --doctree-dir build/docs/doctrees
KERNELS := nashswarm/kernels/csrc
SANITIZED := build/sanitize
# Python itself is not built with the sanitizers, so their libraries are loaded before the kernels.
SANITIZER = SANITIZED=$(SANITIZED)/nashswarm_kernels.so ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
            LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"

# Python compiles each module when it is first imported. Compiling every installed module would take a minute.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

SOURCES := pyproject.toml constraints.txt $(wildcard $(KERNELS)/*.cpp $(KERNELS)/*.h) $(KERNELS)/CMakeLists.txt

$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/tested: $(SOURCES) | $(BIN)/python  # one installation with the tools, for it builds the kernels
	$(PIP) -e '.[dev]'
	@touch $(VENV)/installed $@

$(VENV)/documented: $(VENV)/installed
	$(PIP) -e '.[docs]'
	@touch $@

install: $(VENV)/installed  ## make .venv with the tested versions

quickstart: install  ## run the ablation on the embedded model, to a table, a figure and a page; no download
	@$(BIN)/nashswarm quickstart --out results/quickstart

test: $(VENV)/tested  ## lint, format, types, import contracts and the quick tests: minutes on two cores
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(MAKE) --no-print-directory --jobs 2 --keep-going test-types test-quick

test-types:
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy --no-error-summary

test-quick:
	@$(BIN)/pytest -n 2 --quiet

docs: $(VENV)/documented  ## build the documentation, run its examples; a warning is an error
	@$(SPHINX) --fresh-env -b doctest docs build/docs/doctest
	@$(SPHINX) -b html docs build/docs/html
	@ls build/docs/html/index.html

sanitize: $(VENV)/tested  ## the tests of the kernels under sanitizers of memory and undefined behaviour
	@cmake -S $(KERNELS) -B $(SANITIZED) -DSANITIZE=ON > /dev/null
	@cmake --build $(SANITIZED) > /dev/null
	@$(SANITIZER) $(BIN)/python -m pytest --quiet -p tests.sanitized tests/kernels/test_kernels.py tests/kernels/test_trellis_native.py \
		tests/experiment/test_certify_tiles.py::test_best_values_of_the_library_are_those_of_numpy -k "not compiled and not triton"

ENGINES := slurm-wlm munge chromium

test-engines: $(VENV)/tested  ## sweeps on a real Ray and a real Slurm of this machine, with faults; needs root
	@for command in munged slurmctld slurmd sbatch chromium; do command -v $$command > /dev/null \
		|| { echo "make test-engines needs Debian packages: apt-get install $(ENGINES)" >&2; exit 1; }; done
	@$(PIP) -e '.[ray,slurm,search]'
	@$(BIN)/pytest --quiet -m engines tests

test-slow: $(VENV)/tested  ## the slow tests: notebooks, whole derivations, long trainings, commands of the guides
	@$(PIP) -e '.[fuzz]'
	@$(BIN)/pytest --quiet -m slow

test-all: test docs sanitize test-slow test-engines  ## every check there is

sweep: install  ## run one experiment, make sweep EXPERIMENT=main; runs with a record are skipped
	$(RUN) experiment=$(EXPERIMENT) records=$(RECORDS)

FAMILY := xs s m l
NASHSWARM_FAMILY ?= results/family

family: install  ## train the models of experiment=scaling into results/family; existing ones are kept
	@for size in $(FAMILY); do \
		$(BIN)/python scripts/train_default_model.py --size $$size --steps 1000 --keep \
			--out $(NASHSWARM_FAMILY)/default_$$size || exit 1; \
	done

derive: install  ## tables and figures of the committed records, into results/tables and results/figures
	$(BIN)/python scripts/tables.py --records $(RECORDS)
	$(BIN)/python scripts/figures.py --records $(RECORDS)
	$(BIN)/python scripts/audit.py --records $(RECORDS)
	$(BIN)/python scripts/resources.py --records $(RECORDS)

pages: install  ## one self-contained HTML page per experiment, into results/pages
	$(BIN)/python scripts/page.py --records $(RECORDS)

latex:
	@command -v latexmk > /dev/null || { echo "make paper needs LaTeX: apt-get install $(LATEX)" >&2; exit 1; }

paper: latex install  ## build the paper, every number from committed records
	$(BIN)/python scripts/tables.py --records $(RECORDS) --paper paper/generated
	$(BIN)/python scripts/figures.py --records $(RECORDS) --paper paper/generated
	$(BIN)/python scripts/audit.py --records $(RECORDS) --paper paper/generated
	latexmk -cd -pdf -interaction=nonstopmode -halt-on-error paper/main.tex
	$(BIN)/python scripts/arxiv.py --check

arxiv: paper  ## package the sources of the paper into build/arxiv
	$(BIN)/python scripts/arxiv.py

reproduce: export OMP_NUM_THREADS = 1  # as the records were made
reproduce: family  ## run every experiment again and compare with the records; continues where it stopped
	@$(PIP) -e '.[peers,eval,serve,search]'
	@status=0; for experiment in $(EXPERIMENTS); do \
		$(RUN) experiment=$$experiment records=results/reproduced/records || status=1; \
	done; $(BIN)/python scripts/reproduced.py || status=1; exit $$status

clean:  ## remove generated files; environments, the records and the trained family are kept
	rm -rf results/logs results/cache results/studies results/pages results/quickstart results/reproduced wandb multirun outputs build dist
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
	rm -rf docs/generated paper/generated $(addprefix paper/main.,aux bbl blg fdb_latexmk fls log out pdf toc)
