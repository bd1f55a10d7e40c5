# make reproduce [STUDY=shapes|smoke|…]   install what is missing, run the study, say where the results are
#                [ARGS="-n --forcerun tables"]  any options of Snakemake
# make tables [STUDY=shapes]              every table, figure and verdict of a published study, and the report as a page,
#                                         from its published scores: results/STUDY_from_reference/report.html
#                [ARGS=--publish]         and put what differs in place of what was published
# make plan [STUDY=…] [ARGS="--gpu H100 --gpus 8"]
#                                         say what a study will cost, before anything is fetched or trained
# make test | lint | bench                tests, checks, speed and memory
# make mlflow | report [STUDY=…]          open the runs in MLflow, write Snakemake's own report
# make tune [STUDY=shapes]                the same small grid of learning rate and beta for every method
# make user-study [STUDY=…]               serve the blind study of the images; prints a link to take part with
# make user-study-analysis [STUDY=…]      export the votes and turn them into Table S4

STUDY ?= shapes
UV := $(or $(shell command -v uv),.uv/bin/uv)
# Half of a job's imports is compiling, where Python may not keep what it compiled (PYTHONDONTWRITEBYTECODE).
export UV_COMPILE_BYTECODE := 1
RUN := $(UV) run --frozen --no-dev
DEV := $(UV) run --frozen

.PHONY: reproduce plan tables test lint bench mlflow report tune user-study user-study-analysis

reproduce: $(UV)
	INVDPO_PLACES=later $(RUN) snakemake $(ARGS) --configfile config/$(STUDY).yaml
	@$(RUN) invdpo results --study config/$(STUDY).yaml

tables: $(UV)
	$(RUN) invdpo rebuild $(STUDY) $(ARGS)

plan: $(UV)
	@$(RUN) invdpo plan --study config/$(STUDY).yaml $(ARGS)

test: $(UV)
	OMP_NUM_THREADS=1 $(DEV) pytest -n 2 tests/unit tests/invariant
	OMP_NUM_THREADS=1 $(DEV) --group slurm pytest -n 2 --dist loadfile tests/workflow tests/slurm tests/browser

lint: $(UV)
	$(DEV) ruff check
	$(DEV) ruff format --check
	$(DEV) snakefmt --check Snakefile rules
	$(DEV) pyright
	$(DEV) codespell
	$(DEV) snakemake --lint

bench: $(UV)
	$(RUN) python benchmarks/bench.py $(ARGS)

mlflow: $(UV)
	MLFLOW_DISABLE_TELEMETRY=true $(RUN) mlflow ui --backend-store-uri sqlite:///results/$(STUDY)/mlflow.db

report: $(UV)
	$(RUN) snakemake --configfile config/$(STUDY).yaml --report results/$(STUDY)/snakemake_report.html

tune: $(UV)
	$(RUN) snakemake tune $(ARGS) --configfile config/$(STUDY).yaml

user-study: $(UV)
	$(RUN) invdpo study serve --study config/$(STUDY).yaml $(ARGS)

user-study-analysis: $(UV)
	$(RUN) invdpo study export --study config/$(STUDY).yaml
	$(RUN) snakemake user_study_analysis $(ARGS) --configfile config/$(STUDY).yaml
	@cat results/$(STUDY)/tables/table_s4.md

.uv/bin/uv:
	(python3 -m venv .uv && .uv/bin/pip install --quiet uv) || python3 envs/get_uv.py .uv/bin
