"""RL Zoo with A3C among its algorithms: ``python -m sb3_a3c.zoo``, and :func:`register` for scripts."""

from sb3_a3c.zoo.cli import main, register

__all__ = ["main", "register"]
