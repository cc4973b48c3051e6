# All that a developer does, on a machine with only Python 3.11 (or newer) and make. Every target first installs what it
# needs: into .venv; for the protos into .venv-protoc, whose protoc wants an older protobuf; for clients that others wrote
# into .venv-compat. pip's environment variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) choose where from. BUILD_FLAGS
# are more arguments for the build of the image by `make containers`.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
RUN := build/runs/vowels
MODEL := build/repository/vowels/1/model.onnx
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
BIN := .venv/bin
PIP := -m pip --disable-pip-version-check install --quiet

# onnxruntime's builds for Linux send usage data to their maker unless this is set when it is imported.
export ORT_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help demo test test-full test-compat check format protos settings options bench soak containers hooks clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo: .venv/.installed $(MODEL) ## train, export, serve, and stream real utterances frame by frame
	@$(BIN)/python scripts/demo.py build/repository

test: .venv/.installed ## run the tests, of large grids a sample
	@$(BIN)/python -m pytest -m "not compat and not full"

test-full: .venv/.installed ## run the tests, every case of the grids too
	@$(BIN)/python -m pytest -m "not compat"

test-compat: .venv/.installed .venv-compat/.installed ## run clients that others wrote, a browser, Prometheus, and examples in other languages
	@$(BIN)/python scripts/clients.py
	@$(BIN)/python -m pytest -m compat

check: .venv/.installed .venv-protoc/.installed ## lint, types, import rules, protos, generated code, compose file
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	.venv-protoc/bin/python scripts/protos.py --check
	$(BIN)/python -m pytest --quiet tests/test_project.py -k compose

format: .venv/.installed ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: .venv-protoc/.installed ## generate service/pb from protos/
	.venv-protoc/bin/python scripts/protos.py

settings: .venv/.installed ## list every setting of the server in docs/configuration.md
	@$(BIN)/python -m scripts.settings

options: .venv/.installed ## compare every option of layers with Keras; writes docs/options.md
	@KERAS_BACKEND=torch $(BIN)/python -m tests.options_table

bench: .venv/.installed ## measure every budget in one run; writes benchmarks/results.json and results.png
	@$(BIN)/python -m benchmarks

soak: .venv/.installed ## load a server for ten minutes; fails unless memory stays flat; writes docs/soak.png
	@$(BIN)/python -m benchmarks.soak

containers: .venv/.installed $(MODEL) ## build the serving image, run it beside Prometheus, stream through it
	@$(BIN)/python scripts/containers.py build/repository

hooks: .venv/.installed ## run ruff and mypy before every commit
	$(BIN)/pre-commit install

clean: ## remove what the other targets made
	rm -rf .venv .venv-protoc .venv-compat build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Order-only: a newer environment is no reason to train again. Remove build/ to do so.
$(MODEL): | .venv/.installed $(RUN)/metrics.json
	$(BIN)/rnnserve export $(RUN) --repository build/repository --version 1

# Written last, so one that was interrupted starts afresh.
$(RUN)/metrics.json: | .venv/.installed
	@rm -rf $(RUN)
	$(BIN)/rnnserve train vowels --cell gru --hidden 64 --out $(RUN)

# PyTorch first and by its exact name, so that nothing else that is installed can choose another build.
.venv/.installed: pyproject.toml
	$(call environment,.venv)
	@echo "Installing into .venv; PyTorch makes this take minutes the first time."
	@$(BIN)/python $(PIP) '$(TORCH)'
	@$(BIN)/python $(PIP) --editable '.[train,cpu,dev]'
	@touch $@

.venv-protoc/.installed: scripts/protos.txt
	$(call environment,.venv-protoc)
	@.venv-protoc/bin/python $(PIP) --requirement scripts/protos.txt
	@touch $@

.venv-compat/.installed: scripts/compat.txt scripts/compat.py scripts/compat_browser.py scripts/compat_prometheus.py scripts/debian.py
	$(call environment,.venv-compat)
	@.venv-compat/bin/python $(PIP) --requirement scripts/compat.txt
	@.venv-compat/bin/python scripts/compat.py
	@.venv-compat/bin/python scripts/compat_browser.py
	@.venv-compat/bin/python scripts/compat_prometheus.py
	@touch $@

# $(call environment,FOLDER): an empty environment, unless there is one.
define environment
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "$(PYTHON) is not Python 3.11 or newer: install it, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
@test -x $(1)/bin/python || "$(PYTHON)" -m venv $(1) || \
	{ rm -rf $(1); echo "$(PYTHON) has no venv module (Debian: apt install python3-venv)"; exit 1; }
endef
