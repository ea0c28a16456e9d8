test:
	pytest

lint:
	ruff check .
	ruff format --check .

type:
	mypy

format:
	ruff check --fix .
	ruff format .

.PHONY: test lint type format
