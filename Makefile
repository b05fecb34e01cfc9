PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2# test processes side by side, each with eight fake devices and up to 3 GB
# Tests that compile little, of most packages.
QUICK := tests/test_architecture.py tests/test_config.py tests/test_types.py tests/config tests/data tests/parallel \
	tests/nn/test_rope.py::test_tables_equal_those_of_transformers tests/ops/test_project.py tests/objectives/test_value.py \
	tests/observe/test_metrics.py tests/train/test_guard.py tests/sample/test_requests.py tests/roles/test_role.py \
	tests/session/test_inputs.py tests/session/test_lock.py tests/session/test_record.py tests/session/test_report.py \
	tests/rl/test_advantages.py tests/rl/test_algorithms.py tests/rl/test_collect.py tests/rl/test_experience.py \
	tests/rl/test_numbers.py tests/rl/test_rollout_loop.py tests/recipes/test_made_files.py tests/recipes/test_replay.py \
	tests/serve/test_responses.py tests/verify/test_checks.py tests/verify/test_printed.py \
	tests/converters/test_config_types.py tests/converters/test_errors.py tests/converters/test_verify.py
EXTRAS ?= dev# dev,tpu also compiles the step for TPUs, with the compiler that jax[tpu] brings

.PHONY: quickstart quickstart-rl test check quick lint clean

quickstart: .venv/installed
	$(BIN)/jaxtrain quickstart

quickstart-rl: .venv/installed
	$(BIN)/jaxtrain quickstart configs/rl/quickstart.yaml

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The inner loop: lint and the tests that compile little, side by side.
check: .venv/installed-dev
	$(MAKE) -j 2 lint quick

quick: .venv/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(QUICK)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

# torch is a reference for the tests; pip's plain index is asked for the pinned version, so no accelerator build comes.
.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv runs
