"""Tells the process that owns an object from its forked copies, which must leave alone what the object stands for."""

import os


class Owned:
    """An object of the process that has made it."""

    def __init__(self) -> None:
        self._owner = os.getpid()

    @property
    def is_forked(self) -> bool:
        """Whether this is the copy in a forked process, which must leave workers and environments alone."""
        return os.getpid() != self._owner
