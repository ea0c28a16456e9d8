"""Pools the statistics of the workers' rollouts for the logger."""

from collections.abc import Mapping

from sb3_a3c.actor_learner.report import RolloutStatistics, added
from sb3_a3c.errors import warn

_SUMS = ("n_transitions", "policy_loss", "value_loss", "entropy", "n_updates", "grad_norm", "staleness")
#: Updates running in which a critic that learns explains some of the variance, or gradients that are not clipped.
PATIENCE = 50


class TrainingStatistics:
    """Pools the statistics of rollouts until the logger asks."""

    def __init__(self) -> None:
        self.pool = RolloutStatistics()
        self.skipped_updates = 0  #: since the start; the other figures cover the time since the last ``pop``
        self.learning_rate: float | None = None  #: of the last rollout that was added
        self._has_warned = False
        self._clipped = RolloutStatistics()  # the latest rollouts, as long as all gradients are clipped
        self._hint = ""
        self._has_hinted = False

    def add(self, new: RolloutStatistics) -> None:
        """Add those of one rollout."""
        pool, self.learning_rate = self.pool, new.learning_rate
        self.skipped_updates += new.skipped_updates
        _add_sums(pool, new)
        self._look_for_large_rewards(new)
        for activity, seconds in new.seconds.items():
            pool.seconds[activity] = pool.seconds.get(activity, 0.0) + seconds

    def _look_for_large_rewards(self, new: RolloutStatistics) -> None:
        if new.clipped_updates < new.n_updates:
            self._clipped = RolloutStatistics()
            return
        clipped = self._clipped
        _add_sums(clipped, new)
        if clipped.n_updates < PATIENCE:
            return
        self._clipped = RolloutStatistics()
        if not self._has_hinted and (explained := _explained_variance(clipped)) < 0:
            self._has_hinted = True
            self._hint = (
                f"The critic does not learn: in {clipped.n_updates} updates running, explained variance is "
                f"{explained:.2g}, and all gradients are clipped (mean norm "
                f"{clipped.grad_norm / clipped.n_updates:.3g}). Probably the rewards are too large: use "
                "VecNormalize(env, norm_obs=False)."
            )

    def pop_hint(self) -> str:
        """What keeps the critic from learning, if that has just been found; once in a training."""
        hint, self._hint = self._hint, ""
        return hint

    def warn_of_skipped(self, new: RolloutStatistics) -> None:
        """Warn of the first update that was dropped in a training; ``train/skipped_updates`` counts all."""
        if new.skipped_updates > 0 and not self._has_warned:
            self._has_warned = True
            warn(f"An update was dropped, as {new.fault}. Further ones are counted in the log.")

    def pop(self) -> Mapping[str, float]:
        """
        :return: logger keys and values: A2C's, means per transition; ours, means per update; shares of the workers' time.
            Empty if no rollout was added since the last call
        """
        pool, self.pool = self.pool, RolloutStatistics()
        if pool.n_transitions == 0 and not pool.seconds:
            return {}
        values: dict[str, float] = {"train/skipped_updates": self.skipped_updates}
        if pool.n_transitions > 0:
            values["train/explained_variance"] = _explained_variance(pool)
            values["train/entropy_loss"] = -pool.entropy / pool.n_transitions
            values["train/policy_loss"] = pool.policy_loss / pool.n_transitions
            values["train/value_loss"] = pool.value_loss / pool.n_transitions
        if pool.n_updates > 0:
            values["train/grad_norm"] = pool.grad_norm / pool.n_updates
            values["train/staleness"] = pool.staleness / pool.n_updates
        busy = sum(pool.seconds.values())
        values.update({f"time/{activity}": seconds / busy for activity, seconds in pool.seconds.items()})
        return values


def _add_sums(pool: RolloutStatistics, new: RolloutStatistics) -> None:
    for name in _SUMS:
        setattr(pool, name, getattr(pool, name) + getattr(new, name))
    pool.return_moments = added(pool.return_moments, new.return_moments)
    pool.error_moments = added(pool.error_moments, new.error_moments)


def _explained_variance(pool: RolloutStatistics) -> float:
    """1 - Var[returns - values] / Var[returns] over all pooled transitions; NaN where the returns do not vary."""

    def variance(moments: tuple[float, float]) -> float:
        mean, mean_square = (moment / pool.n_transitions for moment in moments)
        spread = mean_square - mean**2
        return spread if spread > 1e-12 * mean_square else 0.0  # less is rounding

    var_returns = variance(pool.return_moments)
    return float("nan") if var_returns == 0 else 1 - variance(pool.error_moments) / var_returns
