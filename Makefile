# make demo        set up .venv, train FSG with Mamba on handwritten digits, draw the curves (a few minutes)
# make test        set up .venv, run the tests
# make lint        ruff
# make gpu-check   the tests and benchmarks that need a CUDA GPU
# make gpu-day     all measurements on a GPU, in MINUTES=10, as JSON files in runs/gpu-day (see gpu_day.py)
# make clean       delete .venv and the caches

PYTHON ?= python3
PY := .venv/bin/python
# The versions for the tests. For another build: make clean test TORCH="torch==2.11.0 torchvision==0.26.0"
TORCH ?= torch==2.13.0 torchvision==0.28.0

.PHONY: demo test lint gpu-check gpu-day clean

demo: .venv/ready
	rm -rf runs/demo
	$(PY) train_fsg.py --dataset digits --arch resnet8 --hgs mamba --lr 6e-3 --epochs 12 --batch-size 64 \
		--schedule cosine --name demo
	$(PY) plot.py runs/demo

test: .venv/ready
	$(PY) -m pytest -q -n auto --dist loadgroup tests

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

gpu-check: .venv/ready
	$(PY) -m pytest -q -rs tests/test_gpu.py tests/test_triton.py
	$(PY) bench.py scan --device cuda
	$(PY) bench.py step --device cuda --arch resnet20 resnet32

MINUTES ?= 10
gpu-day: .venv/ready
	$(PY) gpu_day.py --out runs/gpu-day --minutes $(MINUTES)

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__
