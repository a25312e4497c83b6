# make demo | train-demo | test | lint | clean | distclean      needs: Python >= 3.11 with venv, and a package index for pip
#
#   PYTHON=python3.12      the interpreter to make the environment with
#   VENV=.venv             where it lies
#   TORCH_ARGS="--index-url URL"    where to take torch from, such as PyTorch's own index of small CPU builds
#   DEMO_RANKS=1           processes that share each prompt of the demo; 2 if not given
#   PYTEST_ARGS="-k budget"    instead of: all tests, on as many processes as there are cores

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
PYTEST_ARGS ?= -n auto --dist worksteal

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DEMO_RANKS ?= 2
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# The cores shared among the ranks; at least one each.
DEMO_THREADS = $(shell threads=$$(($(CORES) / $(DEMO_RANKS))); echo $$((threads > 0 ? threads : 1)))
hash = $(shell cat requirements/torch.txt $(1) setup.py pyproject.toml | sha256sum | cut -c1-16)
DEMO_STAMP := $(VENV)/.installed-demo-$(call hash,requirements/demo.txt)
TRAIN_STAMP := $(VENV)/.installed-train-$(call hash,requirements/demo.txt requirements/train.txt)
DEV_STAMP := $(VENV)/.installed-dev-$(call hash,$(addprefix requirements/,demo.txt eval.txt train.txt dev.txt))

.PHONY: demo train-demo test lint clean distclean
.DELETE_ON_ERROR:

demo: $(DEMO_STAMP)
	OMP_NUM_THREADS=$(DEMO_THREADS) $(PY) -m torch.distributed.run --standalone --nproc-per-node $(DEMO_RANKS) \
	  -m launch.demo

# Distils the demo's model under compression, on a CPU; figures in docs/training.md.
train-demo: $(TRAIN_STAMP)
	$(PY) -m launch.demo.corpus
	$(PY) launch/train.py --config configs/train_distill_smollm2.yaml

test: lint
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(DEV_STAMP)
	$(PY) -m ruff check .

$(DEMO_STAMP): $(VENV)/.usable
	$(call install,requirements/demo.txt)
	touch $@

$(TRAIN_STAMP): $(VENV)/.usable
	$(call install,requirements/train.txt)
	touch $@

$(DEV_STAMP): $(VENV)/.usable
	$(call install,requirements/dev.txt)
	touch $@

# torch first and alone; as a constraint afterwards, so that nothing replaces it; then this package, without the network.
define install
	$(PIP) install $(TORCH_ARGS) -r requirements/torch.txt
	$(PIP) install -c requirements/torch.txt -r $(1)
	$(PIP) install --quiet --no-index --no-deps --no-build-isolation -e .
endef

$(VENV)/.usable:
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "error: Python >= 3.11 is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	           "Name another: make PYTHON=python3.12"; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "error: '$(PYTHON)' cannot make virtual environments." \
	           "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }; \
	  echo "$(PYTHON) -m venv $(VENV)"; $(PYTHON) -m venv $(VENV); \
	fi
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find d2o_dist benchmarks launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Also the environment and what the demo downloaded.
distclean: clean
	rm -rf $(VENV) .cache/d2o_dist
