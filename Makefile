# Two commands matter: `make demo` and `make test`. Both set up what they need in .venv first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
ADDRESS ?= localhost

.PHONY: setup demo app browser test test-fast test-weekly test-faults notebooks test-gpu gpu gpu-short lint format bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[test]'
	touch $(STAMP)

demo: setup  ## A student with few labels, alone and taught, on the embedded set; ends with a table and a picture
	$(BIN)/python -m datasets.shapes data/shapes --train 480 --test 120 --image-size 160
	$(BIN)/python compare.py configs/studies/demo.yaml --seeds 1 --submit local --workers 2

app: setup  ## The demo in a browser, at http://localhost:8501, with the models that `make demo` trained
	$(BIN)/python -m streamlit run app.py --server.address $(ADDRESS)

browser: setup  ## The demo's test in headless Chromium, which has to be installed; SCREENSHOTS=. takes the README's
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[browser]'
	$(BIN)/python -m pytest tests/engine/web_demo/test_browser.py $(if $(SCREENSHOTS),-k screenshots)

# A process for each core, at most four, with one thread of torch each: most tests are too small for two threads to help.
# The tests of a file stay together, for the fixtures that they share; tests/conftest.py puts the longest files first.
# pytest keeps the files that it rewrites, even where Python is told to keep none: rewriting takes each process 7 seconds.
IN_PARALLEL = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: lint  ## Everything CI runs
	$(IN_PARALLEL) -m "not weekly"

test-fast: setup  ## Without the slow tests
	$(IN_PARALLEL) -m "not slow and not weekly"

test-weekly: setup  ## What `make test` leaves out: the same as cheaper tests, at a larger scale
	$(IN_PARALLEL) -m weekly

test-faults: setup  ## Every case of tests/faults, and their counts: files, labels, pictures, disks, kills
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults --faults whole

notebooks: setup  ## docs/notebooks as a reader runs them, in about 80 seconds
	NOTEBOOKS=whole $(BIN)/python -m pytest tests/house/test_notebooks.py

# The targets for a machine with a CUDA device use its own Python, PyTorch and Triton: no .venv, and nothing is
# downloaded. What they measure goes to RESULTS, which git ignores: numbers that the README quotes are copied to docs/reports/.
RESULTS ?= benchmarks/results

test-gpu:  ## The kernels on the device: their tests, and again under compute-sanitizer where there is one
	$(PYTHON) -m pytest tests/kernels
	if command -v compute-sanitizer > /dev/null; then PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
		--error-exitcode 1 $(PYTHON) -m pytest tests/kernels/interpreted -o timeout=3600 \
		-m "not slow" -k "not beyond_32_bits and not many_boxes"; fi

gpu-short:  ## Every table of a GPU in nine minutes, what matters most first; REHEARSE=--rehearse tries it on a CPU
	$(PYTHON) benchmarks/gpu.py --output $(RESULTS) $(REHEARSE)

gpu: gpu-short test-gpu  ## The same, then all tests; at last few labels at 320 px and BCCD at 640 px, for the sets in data/
	$(PYTHON) benchmarks/distill_step.py --image-size 640 --batch-size 64 > $(RESULTS)/distill_step.txt
	$(PYTHON) -m pytest -m "not slow" --ignore tests/kernels
	if test -d data/neu_det; then \
		$(PYTHON) compare.py configs/studies/neu_few_labels.yaml --rows labels,pseudo_and_outputs \
			name=neu_320 image_size=320; fi
	if test -d data/bccd; then \
		$(PYTHON) compare.py configs/studies/bccd_yolov8n_from_yolov8s.yaml --seeds 3 name=bccd_640 image_size=640; fi

lint: setup  ## Style, and the types of the product
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy .

format: setup
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: setup  ## Every table of benchmarks/; peers are printed where they are installed
	$(BIN)/python benchmarks/nms.py
	$(BIN)/python benchmarks/augment.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/distill_step.py
	$(BIN)/python benchmarks/evaluator.py
	$(BIN)/python benchmarks/open_set.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python -m benchmarks.frcnn
	$(BIN)/python benchmarks/condense.py
	if [ -d data/bccd ]; then $(BIN)/python benchmarks/gradients.py; fi
	if [ -d data/bccd ]; then $(BIN)/python benchmarks/start.py configs/bccd_yolov8n.yaml; fi

clean:
	rm -rf .venv .pytest_cache .ruff_cache
