# make demo | test | bench | format | lint | gpu-check | clean
#
# Everything runs in $(VENV), made on first use; the package is installed there in editable mode and rebuilt when a
# source changes. ARGS goes to the demo or the bench: make demo ARGS='--context 1024'.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Installed only where there is no torch yet. Pinned, because a bare `torch` takes the newest build with gigabytes of
# CUDA packages: 2.13.0 is the CPU build that the figures here were measured with, and 2.10.0 the last one for ARM64
# without CUDA. Which index serves CPU builds is pip's configuration; any torch >= 2.10 will do: make TORCH=torch==2.11.0
TORCH ?= $(if $(filter aarch64,$(shell uname -m)),torch==2.10.0,torch==2.13.0)

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check
build_inputs := $(shell find csrc build_tools -type f -not -name '*.py[cod]') \
    CMakeLists.txt $(wildcard third_party/*.cmake) setup.py pyproject.toml
# One stamp for each value of DHSA_BUILD, and only the last one built exists: changing the value rebuilds.
native := $(VENV)/.dhsa-native-$(or $(DHSA_BUILD),auto)
cpp_files = find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

.PHONY: demo test bench format lint gpu-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.dhsa-demo $(native)
	$(python) -m dhsa_ext.demo $(ARGS)

test: $(VENV)/.dhsa-test $(native)
	VENV=$(VENV) build_tools/test.sh

bench: $(VENV)/.dhsa-bench $(native)
	VENV=$(VENV) build_tools/bench.sh $(ARGS)

format: $(VENV)/.dhsa-lint
	$(VENV)/bin/ruff check --fix python tests bench examples build_tools setup.py
	$(VENV)/bin/ruff format python tests bench examples build_tools setup.py
	$(cpp_files) | xargs -r $(VENV)/bin/clang-format -i

lint: $(VENV)/.dhsa-lint
	$(VENV)/bin/ruff check python tests bench examples build_tools setup.py
	$(VENV)/bin/ruff format --check python tests bench examples build_tools setup.py
	$(VENV)/bin/mypy
	$(cpp_files) | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

# On a machine with a GPU: build, test and bench there, with a Python that has what it takes, or else with $(VENV)'s.
needed := torch pytest hypothesis transformers
gpu_python := $(if $(shell $(PYTHON) -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
    $(needed) 2>/dev/null && echo yes),$(PYTHON),$(python))
gpu-check: $(if $(filter $(python),$(gpu_python)),$(VENV)/.dhsa-test $(native))
	PYTHON=$(gpu_python) PATH="$(abspath $(VENV))/bin:$$PATH" tests/gpu_check.sh

clean:
	rm -rf build dist python/*.egg-info python/dhsa_ext/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.dhsa-*

# A torch of the machine's own, a CUDA build perhaps, is used through the system's site-packages.
$(python):
	@if $(PYTHON) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi \
	|| { echo "make: no virtual environment without Python's venv module: apt-get install python3-venv" >&2; \
	     rm -rf $(VENV); exit 1; }

$(native): $(build_inputs) | $(python)
	@$(python) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || $(pip) install '$(TORCH)'
	$(pip) install -e .
	@rm -f $(VENV)/.dhsa-native-* && touch $@

# The package is there already, so this adds the extra's packages and builds nothing.
$(VENV)/.dhsa-%: pyproject.toml | $(native)
	$(pip) install 'dhsa_ext[$*]'
	@touch $@
