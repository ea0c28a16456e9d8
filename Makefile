test:
	pytest

faults:
	pytest -m "slow or not slow" tests/processes tests/envs/test_subproc.py tests/actor_learner/test_update_guard.py tests/store \
		tests/behaviour/test_stopping.py tests/behaviour/test_restarts.py tests/test_save_util.py tests/test_arguments.py \
		tests/test_resume.py

lint:
	ruff check .
	ruff format --check .

type:
	mypy

docs:
	python -m sphinx -W --keep-going -q -b html docs docs/_build/html

format:
	ruff check --fix .
	ruff format .

.PHONY: test faults lint type docs format
