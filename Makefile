# Everything a developer or a user runs. Set-up needs Python >= 3.11, pip, make and a C toolchain; a second run skips it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python -P
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: chaos bench-elastic bench-zipf demo test test-gpu sanitize-gpu lint format parity bench bench-serve memory prefix preemption bit-flips epochs idle eval-demo \
  death-drill served-equals-offline contract conversation-cost gateway-kills redis-faults fuzz slow-readers proto setup clean ray-up-test wheel

setup: $(VENV)/.runtime

# .link/expertmesh -> .. makes the checkout importable as `expertmesh` under any folder name (mypy, tests, GPU hosts).
.link/expertmesh:
	mkdir -p .link && ln -sfn .. .link/expertmesh

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expertmesh needs Python >= 3.11, this is %d.%d" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python .link/expertmesh
	@echo "setting up: runtime packages (once, a few minutes)"
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	$(PIP) transformers
	$(PIP) --no-deps xgrammar apache-tvm-ffi  # the extra `structured` less triton
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@echo "setting up: test packages (once)"
	$(PIP) --editable '.[test,lint,kernel-checks]'
	@touch $@

demo: $(VENV)/.runtime
	$(PY) -m expertmesh.deploy.demo

test: $(VENV)/.test
	$(PY) -m pytest -m "not gpu"

# `ray up` on three pseudo-hosts, load until the expert tier grows, `ray down`; needs root. `make test` has a short form.
ray-up-test: $(VENV)/.test
	RAY_UP_TEST=whole RAY_UP_LOG=$(RAY_UP_LOG) $(PY) -m pytest -s tests/test_deploy_ray_up.py

# What `ray up deploy/cluster.yaml` installs on every host.
wheel: $(VENV)/.runtime
	rm -rf dist && $(VENV)/bin/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	cp constraints.txt dist/

# On a GPU host with torch, CuPy and pytest of its own: no set-up, the checkout is used in place.
# Tests of exchanges between processes have deadlines: they get the GPUs for themselves; the others share them where
# pytest-xdist is installed.
GPU_ALONE := $(patsubst %,tests/test_%_gpu.py,exchange exchange_pair nccl_pack mesh layouts prompt_steps device_engine kv_fp8 expert_work)
GPU_SHARED := $(filter-out $(GPU_ALONE),$(wildcard tests/*_gpu.py))
test-gpu: | .link/expertmesh
	PYTHONPATH=.link python3 -P -m pytest -m gpu $$(python3 -c "import xdist" 2> /dev/null && echo -n10) $(GPU_SHARED)
	PYTHONPATH=.link python3 -P -m pytest -m gpu $(GPU_ALONE)

# On a host with two GPUs: a process is killed in a captured step; streams go on, no token is another one. DRILL="--only a"
death-drill: | .link/expertmesh
	PYTHONPATH=.link python3 -P -m expertmesh.bench.death_drill $(DRILL)

# The ugly shapes under compute-sanitizer; every tensor an allocation of its own, so that a read past its end shows.
sanitize-gpu: | .link/expertmesh
	PYTHONPATH=.link PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	  python3 -P -m pytest -m gpu tests/test_kernels_sanitize_gpu.py
	PYTHONPATH=.link RACECHECK=1 compute-sanitizer --tool racecheck --error-exitcode 1 \
	  python3 -P -m pytest -m gpu tests/test_kernels_sanitize_gpu.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(MYPY_BASIC)
	$(VENV)/bin/mypy --strict $(MYPY_STRICT)
	@files=$$(git ls-files '*.cu' '*.cuh'); test -z "$$files" || $(VENV)/bin/clang-format --dry-run --Werror $$files
	@$(PY) -m expertmesh.proto.generate --check

# The pure cores are held to --strict, everything else to the defaults.
MYPY_STRICT := -m expertmesh.errors -m expertmesh.config -m expertmesh.request -m expertmesh.model_config \
  -m expertmesh.router.epoch -m expertmesh.router.placement -m expertmesh.router.dispatch -m expertmesh.router.control \
  -m expertmesh.router.gateway.balancer -m expertmesh.router.gateway.conversation \
  -m expertmesh.router.gateway.fair_queue \
  -m expertmesh.router.gateway.json_schema -m expertmesh.router.gateway.regex_limits \
  -m expertmesh.router.leader -m expertmesh.experts.eplb -m expertmesh.experts.eplb_search -m expertmesh.experts.eplb_tables \
  -m expertmesh.experts.placing -m expertmesh.cluster.autoscale -m expertmesh.telemetry \
  -m expertmesh.cluster.membership -m expertmesh.cluster.membership_messages \
  -m expertmesh.cluster.attention.scheduler -m expertmesh.cluster.attention.kv_cache -m expertmesh.cluster.sizing
MYPY_BASIC := -p expertmesh.cluster -p expertmesh.experts -p expertmesh.router -m expertmesh.client -m expertmesh.cli \
  -m expertmesh.model_source -m expertmesh.remote_file -m expertmesh.deploy.host \
  -m expertmesh.dummy_checkpoint -m expertmesh.parallel_reads

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	@files=$$(git ls-files '*.cu' '*.cuh'); test -z "$$files" || $(VENV)/bin/clang-format -i $$files

proto: $(VENV)/.test
	$(PY) -m expertmesh.proto.generate

parity preemption prefix memory: $(VENV)/.test
	$(PY) -m expertmesh.bench.$@

# Bits turned over in exchanged rows and in expert weights: none silent, no token changed.
bit-flips: $(VENV)/.test
	$(PY) -m expertmesh.bench.bit_flips

# Every interleaving of joins, leaves, deaths and messages of a small cluster, as far as the time goes.
epochs: $(VENV)/.test
	$(PY) -m expertmesh.bench.explore_epochs

bench: $(VENV)/.test
	$(PY) -m expertmesh.bench.serve_transformers
	$(PY) -m expertmesh.bench.gateway

# Loads in open and closed loop: fixed batches, Poisson, think-heavy, conversations; LOAD="--address HOST:PORT ..." names others.
bench-serve: $(VENV)/.test
	$(PY) -m expertmesh.bench.serve --mix fixed poisson thinking turns --streams 8 $(LOAD)

# The demo model's held-out set through a running cluster, and by the token against transformers.
eval-demo: $(VENV)/.runtime
	$(PY) -m expertmesh.deploy.demo_model.served_evaluate

# What clients are promised, through grpcurl or buf and our clients; buf comes from npm where neither is installed.
contract: $(VENV)/.runtime
	@command -v grpcurl || command -v buf || test -x .cache/buf/node_modules/.bin/buf || \
	  npm install --no-audit --no-fund --ignore-scripts --prefix .cache/buf @bufbuild/buf@1.75.0 || \
	  echo "neither grpcurl, buf nor npm is here: the same calls go through generic reflection"
	$(PY) -m expertmesh.bench.contract

# A token between link and wire: state machine, detokenizer, deltas, event bytes; goal 20 us.
conversation-cost: $(VENV)/.runtime
	$(PY) -m expertmesh.bench.conversation_cost

# Faults under running streams and conversations, 100 runs each.
gateway-kills: $(VENV)/.test
	$(PY) -m expertmesh.bench.gateway_kills

redis-faults: $(VENV)/.test
	$(PY) -m expertmesh.bench.redis_faults

# Ten minutes of hostile bytes, metadata, requests and cancels at a gateway with the demo model; seeds in bench/fuzz_seeds.txt.
fuzz: $(VENV)/.test
	$(PY) -m expertmesh.bench.fuzz $(if $(MINUTES),--minutes $(MINUTES))

slow-readers: $(VENV)/.test
	$(PY) -m expertmesh.bench.slow_readers

served-equals-offline: $(VENV)/.test
	$(PY) -m expertmesh.deploy.demo_model.served_equals_offline

idle: $(VENV)/.runtime
	$(PY) -m expertmesh.bench.idle

clean:
	rm -rf $(VENV) .link .cache build *.egg-info

# Elasticity: faults under streams (about 10 minutes), load up and down, hot experts placed anew.
chaos: $(VENV)/.test
	$(PY) -m expertmesh.bench.chaos

bench-elastic: $(VENV)/.test
	$(PY) -m expertmesh.bench.elastic --out docs/elastic.svg

bench-zipf: $(VENV)/.test
	$(PY) -m expertmesh.bench.zipf
