# make setup | demo | test | docs | notebook.  PYTHON picks the interpreter that .venv is made with (3.11, 3.12 or 3.13).
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
# The persistent compilation cache makes the second of two runs of the same program compile nothing.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

.PHONY: setup demo test soak lint docs notebook clean

setup: .venv/ready

.venv/ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	$(BIN)/python train.py --config configs/digits.py --workdir $(DEMO)
	$(BIN)/python search.py --workdir $(DEMO) --budget bitops=W3A3
	$(BIN)/python train.py --config configs/digits.py --workdir $(DEMO) --policy $(DEMO)/policy.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without its dependencies: it pins old versions of packages that what we use of it never imports. Where there is no wheel
# for a platform the tests of LiteRT files are skipped, and say so.
.venv/litert: requirements-litert.txt .venv/ready
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-litert.txt
	touch $@

test: lint .venv/litert
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The long forms of tests/test_kills.py, test_parallel.py, test_untrusted.py and test_finite.py: about an hour of one core. Each ends with its
# counts as a line of JSON, and fails where anything was lost.
soak: setup
	$(BIN)/python tests/soak/kills.py --kills 50 --seed 1
	$(BIN)/python tests/soak/kills.py --kills 12 --signal TERM --seed 2
	$(BIN)/python tests/soak/kills.py --kills 8 --signal TWICE --seed 3
	$(BIN)/python tests/soak/hosts.py --kills 6 --seed 4
	$(BIN)/python tests/soak/hosts.py --kills 3 --processes 4 --seed 4
	$(BIN)/python tests/soak/disk.py --sizes 24 --damages 18 --seed 5
	$(BIN)/python tests/soak/untrusted.py --inputs 2500 --seed 7
	$(BIN)/python tests/soak/numerics.py --steps 10000

# The site, with the notebook run and its figures in it: docs/_build/index.html.
docs: setup
	MPQ_DOCS_RUN=1 $(BIN)/python -m sphinx -W --keep-going -n -d docs/_build/.doctrees docs docs/_build

# The whole notebook as a user would run it; what came out is notebooks/_run/mpq_jax_colab.ipynb.
notebook: setup
	mkdir -p notebooks/_run
	$(BIN)/python -m jupyter execute --timeout 900 --output _run/mpq_jax_colab.ipynb notebooks/mpq_jax_colab.ipynb

clean:
	rm -rf .venv .jax_cache runs docs/_build docs/_generated notebooks/_run
