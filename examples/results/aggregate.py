"""
Median and interquartile mean over the seeds of each row of results, with 95 % intervals (bootstrap), by rliable (Agarwal et
al. 2021, https://arxiv.org/abs/2108.13264). It needs an older pandas than the other examples, so it has a virtual
environment of its own:

    python -m venv venv-rliable
    venv-rliable/bin/pip install rliable "pandas<3"
    venv-rliable/bin/python examples/results/aggregate.py

Reads ``evaluations.csv`` of ``reproduce.py``, whose scores are the mean returns of final models, and prints a table.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from rliable import library, metrics  # type: ignore[import-not-found]


def estimates(scores: np.ndarray, n_samples: int) -> list[str]:
    """Median and interquartile mean of the seeds, each as "estimate (interval)"."""
    # (n_seeds,) -> (n_seeds, 1), one task
    points, intervals = library.get_interval_estimates(
        {"": scores[:, None]}, lambda x: np.array([np.median(x), metrics.aggregate_iqm(x)]), reps=n_samples
    )
    return [f"{point:.1f} ({low:.1f} to {high:.1f})" for point, low, high in zip(points[""], *intervals[""], strict=True)]


def main() -> None:
    """Print a line for each environment, algorithm and kind of actions that has at least three seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--samples", type=int, default=50_000, help="of the bootstrap")
    args = parser.parse_args()
    np.random.seed(0)  # rliable's samples
    print("| environment | algorithm | actions | seeds | median | interquartile mean |\n|---|---|---|---|---|---|")
    for path in sorted(args.folder.glob("*/evaluations.csv")):
        for (algo, actions), runs in pd.read_csv(path).groupby(["algo", "actions"]):
            if len(runs) >= 3:
                told = " | ".join(estimates(runs["mean"].to_numpy(), args.samples))
                print(f"| {path.parent.name} | {algo} | {actions} | {len(runs)} | {told} |")


if __name__ == "__main__":
    main()
