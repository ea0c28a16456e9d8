#!/usr/bin/env bash
# A small hyper-parameter search with RL Zoo and Optuna, then a training with the best hyper-parameters.
#
#   bash examples/zoo_search.sh [environment] [trials] [timesteps of a trial] [timesteps of the training]
#
# Needs `pip install -c constraints.txt -e ".[zoo]"`. The search space is in sb3_a3c/zoo/hyperparams_opt.py. Other
# hyper-parameters are those of sb3_a3c/zoo/hyperparams/a3c.yml, but `policy_kwargs` are replaced. Two trials run at a time,
# each with one worker. Trials are saved in a journal: run the script again to add more.
set -euo pipefail

env=${1:-CartPole-v1}
trials=${2:-20}
trial_timesteps=${3:-50000}
timesteps=${4:-200000}
journal=logs/a3c/search.log
search=(--storage "$journal" --study-name "a3c_$env")

python -m sb3_a3c.zoo train --algo a3c --env "$env" -n "$trial_timesteps" -params n_workers:1 "${search[@]}" \
    -optimize --n-trials "$trials" --n-jobs 2 --n-startup-trials 5 --n-evaluations 4 --eval-episodes 10 --no-optim-plots

best=$(python - "$journal" "a3c_$env" <<'PY'
import sys

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.load_study(study_name=sys.argv[2], storage=JournalStorage(JournalFileBackend(sys.argv[1])))
print(study.best_trial.number or -len(study.trials))  # RL Zoo ignores --trial-id 0; -n is the first of n trials
PY
)
python -m sb3_a3c.zoo train --algo a3c --env "$env" -n "$timesteps" "${search[@]}" --trial-id="$best" -P
