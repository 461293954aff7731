# Two commands do everything: `make demo` and `make test`. Both set up .venv first (python3, pip and make are enough).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

# Ends well where there is no triton, as on anything but Linux on x86.
TRITON := ! $(BIN)/python -c "import triton" 2>/dev/null
# GPU kernels in Triton's interpreter, on the CPU.
KERNELS := CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/triton

.PHONY: demo test test-long zoo accuracy lint clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

# Threads that wait must not keep the processor busy: several test processes share it.
test test-long: export OMP_WAIT_POLICY = passive

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not long"
	$(TRITON) || $(KERNELS) -m "not long"

test-long: lint zoo
	$(BIN)/python -m pytest -n auto --dist loadfile --hypothesis-profile=long
	$(TRITON) || $(KERNELS)

# Every architecture of transformers, in about ten minutes; writes docs/architectures.md.
zoo: $(VENV)/.installed
	$(BIN)/python -m tests.zoo --page docs/architectures.md

# KL, perplexity, top-1 of every algorithm on the shipped model, in about ten minutes; writes docs/accuracy.md.
accuracy: $(VENV)/.installed
	$(BIN)/python benchmarks/accuracy_page.py --page docs/accuracy.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch by itself and first: left to a resolver, other packages pull its CUDA build in, several gigabytes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
