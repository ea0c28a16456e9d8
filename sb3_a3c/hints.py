"""What to tell a user whose settings waste the machine: pure, from what workers measure."""

from sb3_a3c.reports import RolloutStatistics

#: Seconds of the workers' time that are enough to judge from.
ENOUGH_SECONDS = 10.0
#: Workers that could use so many times the cores are worth a hint.
TOO_MANY = 1.25
#: Workers that compute for less than this share of their time are there to wait: it is right to have many.
COMPUTE_BOUND = 0.5


def hint(pool: RolloutStatistics, n_workers: int, n_cores: int) -> str | None:
    """
    :param pool: statistics of all workers' rollouts in some time
    :param n_workers: number of worker processes
    :param n_cores: cores that they may use
    :return: what to change, if it is clear that something should be
    """
    if sum(pool.seconds.values()) < ENOUGH_SECONDS:
        return None
    if pool.n_threads > 1 and pool.n_threads * n_workers > n_cores:
        return (
            f"torch uses {pool.n_threads} threads in each of {n_workers} workers, and they compete for {n_cores} cores: an "
            "environment or the policy has called `torch.set_num_threads`. Workers are fastest with one."
        )
    share = computing_share(pool)
    if share > COMPUTE_BOUND and n_workers * share > TOO_MANY * n_cores:
        return (
            f"n_workers={n_workers} on {n_cores} cores: more workers than keep the cores busy only compete for them. Try "
            f"n_workers={int(n_cores / share)}."
        )
    return None


def computing_share(pool: RolloutStatistics) -> float:
    """
    :param pool: statistics of all workers' rollouts in some time
    :return: the share of its time in which a worker would compute if it had a core of its own. The rest of the time it
        waits for what needs no core of it: a robot, a server, the process of a ``SubprocVecEnv``. 0 if not known
    """
    waited = max(0.0, sum(pool.seconds.values()) - pool.core_seconds - pool.queue_seconds)
    return pool.core_seconds / (pool.core_seconds + waited)
