.PHONY: docs lint tables test

docs: ## the site, in site/
	mkdocs build

lint: ## what .ci/run checks beside the tests
	ruff check .
	ruff format --check .
	mypy
	python -m repvgg_zoo.tools.tables --check

tables: ## write the generated tables and counted fields again
	python -m repvgg_zoo.tools.tables

test: ## the tests that take seconds
	OMP_NUM_THREADS=1 pytest -n 2 -m 'not slow and not exhaustive'
