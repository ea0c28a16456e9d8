"""Worker processes of this machine: starts, watches, replaces and stops them, and receives what they send."""

from collections.abc import Callable, Sequence
from typing import Any

from sb3_a3c.processes.process_group import ProcessGroup
from sb3_a3c.processes.receiver import EventReceiver


class Supervisor(ProcessGroup, EventReceiver):
    """
    A :class:`ProcessGroup` that runs ``target(channel, *arguments[i])``, and the receiver of its events.

    :param arguments: one tuple for each process; shared tensors stay shared
    :param kwargs: as for :class:`ProcessGroup`
    """

    def __init__(self, target: Callable[..., None], arguments: Sequence[tuple[Any, ...]], *args: Any, **kwargs: Any) -> None:
        ProcessGroup.__init__(self, target, len(arguments), *args, **kwargs)
        EventReceiver.__init__(self, len(arguments), self._name)
        self._arguments = list(arguments)

    def start(self) -> None:
        """Start all processes. If one can't be started, stop the others."""
        try:
            for index in range(len(self._arguments)):
                self.start_one(index, self._arguments.pop(0))  # not kept, they may be large
        except BaseException:
            self.stop()
            raise

    def replace(self, index: int, arguments: tuple[Any, ...]) -> None:
        """Start a process in place of worker ``index``, whose :class:`WorkerDiedError` was raised."""
        self.start_one(index, arguments)
        self.replaced([index])
