# `make train` and `make test` do all of their own set-up, in .venv; the second time they start at
# once. Variables:
#   ARGS="..."        passed to `python -m vgkern train`, or to pytest
#   PYTHON=python3.12 the interpreter of .venv (default: the first of 3.11 or newer)
#   TORCH_INDEX=URL   where torch's wheel comes from, for example
#                     https://download.pytorch.org/whl/cu130; `pip` for pip's own index.
#                     Default: the CPU wheels on Linux without an NVIDIA GPU, else pip's own index.
#   CI_OLDEST=1       `make test` makes the environment of `make oldest` and runs that too

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PYTHON ?=
ARGS ?=
CSRC := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh)

INTERPRETED := $(addprefix tests/test_,$(addsuffix .py,parity interpreter autograd compile \
  gpu_loss linear_grad packed nan messages reliability regressions truncated_logprobs gaussian_action costate_scan \
  linear_rollout noisy_embedding linear_divergence linear_quadratic costate_term traffic_models))
# What torch and Triton themselves can break, in the oldest that pyproject.toml allows.
OLDEST := $(addprefix tests/test_,$(addsuffix .py,compile autograd reliability regressions \
  oldest_torch autocast errors refusals check_values nn interpreter_shipped))
OLDEST_INTERPRETED := tests/test_interpreter.py tests/test_linear_grad.py tests/test_parity.py
OLDEST_SELECTED := not parity or float32 and (h7 or n4 or ragged) or bfloat16 and full
# What a change most often breaks, in under two minutes (`make check`).
CHECKED := $(addprefix tests/test_,$(addsuffix .py,layering packaging objectives policy_loss \
  linear_policy_loss linear_token_logprobs token_logprobs group_advantages noise messages train \
  train_config train_faults resume state tasks own_tasks rewards scorers use page readme docs doctor))
GATES := tests/test_gate_triton.py tests/test_gate_cuda.py

# A stamp is named by what it stands for, so that a change of content, and only that, makes it old.
hash = $(shell (echo '$(CURDIR)'; cat $(1)) | cksum | cut -d' ' -f1)
SETUP := $(call hash,pyproject.toml constraints.txt)
TRAIN_STAMP := $(VENV)/.vgkern-train-$(SETUP)
TEST_STAMP := $(VENV)/.vgkern-test-$(SETUP)
OLD_VENV := .venv-oldest
OLD_PY := $(OLD_VENV)/bin/python
OLD_PIP := $(OLD_PY) -m pip --disable-pip-version-check install --quiet \
  -c $(OLD_VENV)/constraints.txt
OLD_TORCH := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1.0/p' pyproject.toml)
OLD_TRITON := $(shell sed -n 's/.*"triton>=\([0-9.]*\);.*/\1.0/p' pyproject.toml)
OLD_STAMP := $(OLD_VENV)/.vgkern-oldest-$(SETUP)
NATIVE_STAMP := $(VENV)/.vgkern-native-$(SETUP)-$(call hash,$(CSRC) vgkern/ops/_compile.py)

# Without native kernels everything still runs: the reason is said here, once.
native = test -e $(NATIVE_STAMP) || { echo '== native kernels'; \
  $(PY) -m vgkern build && touch $(NATIVE_STAMP); } || \
  { echo '== so the torch backend runs: slower, same results'; false; }

.PHONY: help train test check oldest lint build wheel docs bench gpu gpu-dry clean
.DEFAULT_GOAL := help

help:
	@echo 'make train   train a small language model with RL        (ARGS="--help": every setting)'
	@echo 'make test    ruff, mypy, clang-format, then pytest       (20 minutes on two cores)'
	@echo 'make check   the same lint, and the tests that a change most often breaks    (2 minutes)'
	@echo '             ARGS="-k sample": some of the tests, with either'
	@echo 'make oldest  pytest on torch $(OLD_TORCH), Triton $(OLD_TRITON): the oldest allowed (.venv-oldest)'
	@echo 'make lint    ruff, mypy, clang-format'
	@echo 'make build   compile the native kernels now'
	@echo 'make wheel   dist/vgkern-VERSION-py3-none-any.whl, to install elsewhere'
	@echo 'make docs    the site of docs/, with the API reference, in build/site'
ifneq ($(wildcard benchmarks/run.py),)
	@echo 'make bench   time every op against the others'
endif
	@echo 'make gpu     all that only a GPU can say, in 9 minutes  (OUT=folder; BUDGET=200: half)'
	@echo 'make gpu-dry the same run at toy size, without a GPU'
	@echo 'make clean   remove .venv*, build/, dist/ and tool caches (runs/ stays)'

train: $(TRAIN_STAMP)
	@$(native) || export VGKERN_BACKEND="$${VGKERN_BACKEND:-torch}"; \
	exec $(PY) -m vgkern train $(ARGS)

check: lint
	@$(native) || true
	@$(PY) -m pytest -q $(CHECKED) $(ARGS)

# Triton's interpreter needs a process of its own, and so do the gate's compilers. Both run beside the
# first and are shown last.
test: lint
	@$(native) || true
	@echo '== pytest: torch, cpu, cuda emulated; beside it Triton, interpreted, and the gates'
	@logs=$$(mktemp -d); pytest='$(PY) -m pytest'; none=5; failed=0; \
	TRITON_INTERPRET=1 $$pytest -p no:cacheprovider $(INTERPRETED) $(ARGS) >$$logs/2 2>&1 & two=$$!; \
	$$pytest -p no:cacheprovider $(GATES) $(ARGS) >$$logs/3 2>&1 & three=$$!; \
	$$pytest $(addprefix --ignore=,$(GATES)) $(ARGS); \
	status=$$?; test $$status = 0 -o $$status = $$none || failed=1; \
	echo '== pytest: Triton, interpreted'; \
	wait $$two; status=$$?; test $$status = 0 -o $$status = $$none || failed=1; cat $$logs/2; \
	echo '== pytest: every kernel compiled for four architectures'; \
	wait $$three; status=$$?; test $$status = 0 -o $$status = $$none || failed=1; cat $$logs/3; \
	rm -r $$logs; exit $$failed
ifneq ($(or $(CI_OLDEST),$(wildcard $(OLD_VENV)/.vgkern-oldest-*)),)
	@$(MAKE) --no-print-directory oldest
else
	@echo '== torch $(OLD_TORCH), the oldest allowed: not run; make oldest, or CI_OLDEST=1 make test'
endif

# torch's native library is built once more, against its headers.
oldest: $(OLD_STAMP)
	@none=5; failed=0; \
	echo '== pytest on torch $(OLD_TORCH)'; \
	$(OLD_PY) -m pytest -p no:cacheprovider $(OLDEST) $(ARGS); \
	status=$$?; test $$status = 0 -o $$status = $$none || failed=1; \
	echo '== pytest on Triton $(OLD_TRITON), interpreted'; \
	TRITON_INTERPRET=1 $(OLD_PY) -m pytest -p no:cacheprovider $(OLDEST_INTERPRETED) \
	  $(if $(ARGS),$(ARGS),-k '$(OLDEST_SELECTED)'); \
	status=$$?; test $$status = 0 -o $$status = $$none || failed=1; exit $$failed

lint: $(TEST_STAMP)
	@echo '== ruff'
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check . || { $(PY) -m ruff format --check .; exit 1; }
	@echo '== mypy'
	@$(PY) -m mypy --no-error-summary
ifneq ($(CSRC),)
	@echo '== clang-format'
	@$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)
endif

build: $(TRAIN_STAMP)
	@$(PY) -m vgkern build && touch $(NATIVE_STAMP)

# From a copy: setuptools leaves build/ and *.egg-info where it builds, and takes what build/ had.
wheel: $(TRAIN_STAMP)
	@copy=$$(mktemp -d) && cp -RP pyproject.toml README.md LICENSE vgkern kernels csrc $$copy && \
	  $(PY) -m pip wheel -q --disable-pip-version-check --no-deps -w dist $$copy; \
	status=$$?; rm -rf $$copy; test $$status != 0 || ls dist/*.whl; exit $$status

docs: $(TEST_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict && echo build/site/index.html

ifneq ($(wildcard benchmarks/run.py),)
bench: $(TRAIN_STAMP)
	@$(native) || true
	@$(PY) benchmarks/run.py $(ARGS)
endif

# On a machine with a GPU: its own python3 and torch, no .venv, no network.
gpu:
	@if [ -z '$(OUT)' ]; then echo 'make gpu: say where the results go: make gpu OUT=folder'; exit 2; fi
	@$(or $(PYTHON),python3) benchmarks/gpu.py --out '$(OUT)' --budget $(or $(BUDGET),540) $(ARGS)

gpu-dry: $(TEST_STAMP)
	@$(native) || true
	@$(PY) benchmarks/gpu.py --dry --out '$(or $(OUT),build/gpu-dry)' $(ARGS)

clean:
	rm -rf $(VENV) $(OLD_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(TRAIN_STAMP): | $(VENV)/.vgkern-torch-$(SETUP)
	@echo '== the packages for training (pyproject.toml, constraints.txt)'
	@$(PIP) -e '.[train]'
	@touch $@

$(TEST_STAMP): | $(VENV)/.vgkern-torch-$(SETUP)
	@echo '== the packages for training and tests (pyproject.toml, constraints.txt)'
	@$(PIP) -e '.[train,dev,docs]'
	@touch $@ $(TRAIN_STAMP)

# torch comes first and alone: only it is looked for on its index. pip waits minutes for an index
# that does not answer, so one question is asked first. $(call torch,PYTHON,PIP,PACKAGE)
torch = index='$(TORCH_INDEX)'; \
	if [ -z "$$index" ] && [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia ] \
	    && ! command -v nvidia-smi >/dev/null; then \
	  if $(1) -c 'import sys, urllib.request as u; \
u.urlopen(u.Request(sys.argv[1] + "/torch/", method="HEAD"), timeout=3)' $(CPU_INDEX) 2>/dev/null; \
	  then index=$(CPU_INDEX); \
	  else echo '== $(CPU_INDEX) does not answer: torch comes from the index of pip'; fi; \
	fi; \
	if [ -z "$$index" ] || [ "$$index" = pip ]; then \
	  echo '== $(3) (a CUDA wheel is several GB)'; $(2) $(3); \
	else \
	  echo "== $(3) from $$index (a CPU wheel is about 200 MB)"; \
	  $(2) --extra-index-url "$$index" $(3); \
	fi

$(VENV)/.vgkern-torch-$(SETUP): | $(PY)
	@$(call torch,$(PY),$(PIP),torch)
	@touch $@

# A CUDA wheel does not load without its libraries, so all that torch asks for comes with it. The
# constraints without what the oldest torch has its own versions of.
$(OLD_STAMP): | $(OLD_PY)
	@grep -vE '^(torch|setuptools)==' constraints.txt >$(OLD_VENV)/constraints.txt
	@$(call torch,$(OLD_PY),$(OLD_PIP),torch==$(OLD_TORCH))
	@$(OLD_PIP) torch==$(OLD_TORCH) triton==$(OLD_TRITON) numpy pytest pytest-timeout hypothesis -e .
	@rm -f $(OLD_VENV)/.vgkern-oldest-*
	@touch $@

$(OLD_PY): | $(PY)
	@echo '== $(OLD_VENV)'
	@$(PY) -m venv --clear $(OLD_VENV)

$(PY):
	@for p in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "== $(VENV) by $$p"; \
	    $$p -m venv --clear $(VENV) && exit 0; \
	    echo "make: '$$p -m venv' failed. On Debian and Ubuntu: apt install python3-venv"; \
	    rm -rf $(VENV); exit 1; \
	  fi; \
	  if [ "$$p" = "$(PYTHON)" ]; then break; fi; \
	done; echo 'make: Python 3.11 or newer is needed, and is not on the PATH as python3 or' \
	  'python3.11 ... python3.14; install it or name one: make PYTHON=/path/to/python'; exit 1
