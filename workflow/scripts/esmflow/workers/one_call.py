"""One call in a process of its own, watched as any worker is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from esmflow.errors import EsmflowError
from esmflow.workers.manager import BatchQueueManager
from esmflow.workers.process import FileSubset
from esmflow.workers.queue import FailedFile


class WorkerError(EsmflowError):
    """The worker of `run_one` ended without a result. The message says how."""


def run_one(
    function: Callable[..., Any],
    *,
    inherited: Sequence[int] = (),
    log_file: str | None = None,
    on_tick: Callable[[], None] = lambda: None,
    **arguments: Any,
) -> Any:
    """Runs `function(**arguments)` in a spawned process and returns what it returns.

    It is watched as any worker is, and tried once more if it ends without a result. Raises WorkerError, saying how it
    ended, if that does not help. The other parameters are as for `BatchQueueManager.process_files`.
    """
    manager = BatchQueueManager(1, _call_function)
    name = function.__name__
    _, failed = manager.process_files(
        [[name]],
        inherited=[inherited],
        log_file=log_file,
        on_tick=on_tick,
        function=function,
        arguments=arguments,
    )
    if failed:
        raise WorkerError(failed[0].detail)
    return manager.results[name]


def _call_function(
    file_subset: FileSubset, device_id: int, *, function: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[list[str], list[FailedFile]]:
    for name in file_subset:
        file_subset.done(name, function(**arguments))
    return [], []
