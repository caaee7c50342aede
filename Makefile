# make demo   install, run the pipeline on the embedded sample, print Dice per label
# make test   install, lint, types, all tests with coverage
# make docs   write the reference of parameters and commands to build/docs
# make audit  check constraints.txt against the databases of known vulnerabilities (SECURITY.md)
# make viewer build the viewer's script after a change of viewer/package-lock.json (docs/viewer.md)
# make images build distilldsm/{data,train,export}:VERSION; ENGINE=podman, WHEELHOUSE=dir, PIP_CONFIG=file, ... (docs/images.md)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

.PHONY: demo test lint unit docs audit install images viewer clean

demo: install
	dvc repro
	@distilldsm summary
	@echo
	@echo "Report:       evaluation/fold0/report.html"
	@echo "Validation:   data/validation/report.html"
	@echo "Model:        export/fold0  (distilldsm predict export/fold0 SCAN.nii.gz -o MASK.nii.gz)"
	@echo "MLflow:       $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db"

test: install lint unit

lint: install
	ruff check .
	ruff format --check .
	mypy
	lint-imports

unit: install
	OMP_NUM_THREADS=1 python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 --cov --cov-report=term:skip-covered --cov-report=json:build/coverage.json

docs: install
	python docs/reference.py build/docs

audit:
	$(PYTHON) .ci/audit.py

install: $(VENV)/.installed

# PyTorch first and alone: pip then takes the build that this machine is set up for, and no package pulls in another build.
# Python compiles a module when it first imports it: compiling all of them takes longer than the half that is used.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) found, Python 3.11 or newer is needed; run make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
		-e '.[data,train,export,pipeline,dev]'
	touch $@

ENGINE ?= docker
images:
	$(PYTHON) docker/build.py --engine $(ENGINE) $(if $(BASE_IMAGE),--base-image $(BASE_IMAGE)) \
		$(if $(TORCH_BUILD),--torch-build=$(TORCH_BUILD)) $(if $(WHEELHOUSE),--wheelhouse $(WHEELHOUSE)) \
		$(if $(PIP_CONFIG),--pip-config $(PIP_CONFIG)) $(if $(CA_BUNDLE),--ca-bundle $(CA_BUNDLE)) \
		$(if $(BUILD_NETWORK),--network $(BUILD_NETWORK)) $(ROLES)

# Builds NiiVue into distilldsm/report/viewer/niivue.*; needs Node.js and npm (docs/viewer.md).
viewer:
	cd viewer && npm ci --ignore-scripts && npm run build

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
