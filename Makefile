test:
	pytest

faults:
	pytest -m "slow or not slow" $(addprefix tests/test_,stopping.py restarts.py supervisor.py interrupts.py subproc.py guard.py \
		archive.py arguments.py resume.py)

lint:
	ruff check .
	ruff format --check .

type:
	mypy

format:
	ruff check --fix .
	ruff format .

.PHONY: test faults lint type format
