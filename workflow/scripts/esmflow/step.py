"""What the scripts share: a job's log, sentences instead of tracebacks for foreseeable errors, the run's method."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esmflow.arrays import Outputs, resolve_layers
from esmflow.checkpoint.file import CheckpointError, CheckpointInfo
from esmflow.checkpoint.models import check_method
from esmflow.errors import EsmflowError
from esmflow.files import remove_left_overs
from esmflow.logs import end_logging, start_logging
from esmflow.method import Fingerprint, of_family
from esmflow.workers.lifetime import (
    TERMINATED_EXIT_STATUS,
    Terminated,
    ancestors_running,
    end_with_run,
    raise_when_terminated,
)

log = logging.getLogger(__name__)


@contextmanager
def logged_step(log_file: str, writes: Iterable[str], attempt: int | None = None) -> Iterator[None]:
    """Logs to the job's file, see `start_logging`. writes: the step's files; what a killed one left of them is removed.

    Foreseeable errors become one sentence there and on the terminal, and exit status 1. SIGTERM ends the step with exit
    status 143. Snakemake tries a job again whatever it died of: where that cannot help, a further `attempt` on the same
    machine ends at once, with the same sentence.
    """
    try:
        start_logging(log_file, attempt)
    except OSError as error:
        sys.exit(f"esmflow: the log {log_file} cannot be written: {error}")
    verdict = Path(log_file).with_name(f".{Path(log_file).name}.verdict")
    if attempt is not None and attempt > 1:
        _end_if_hopeless(verdict)
    verdict.unlink(missing_ok=True)
    remove_left_overs(writes)
    _leave_pandas_out()
    # Processes that the step starts look for no modules in the folder of the run, where a user's `select.py` may lie.
    os.environ["PYTHONSAFEPATH"] = "1"
    # A killed run must not leave jobs behind: they would hold GPUs, and write where the next run writes.
    end_with_run(lambda: os._exit(1))
    raise_when_terminated()
    try:
        yield
        end_logging(log_file)
    except (EsmflowError, OSError) as error:
        log.error("%s", error)
        if attempt is not None and not getattr(error, "mendable", True):
            verdict.write_text(f"{socket.gethostname()}\n{error}", encoding="utf-8")
        sys.exit(1)
    except KeyboardInterrupt:
        log.warning("interrupted; what is finished is kept")
        sys.exit(128 + signal.SIGINT)
    except Terminated as error:
        log.warning("%s", error)
        sys.exit(TERMINATED_EXIT_STATUS)
    except Exception:
        log.exception("unexpected error")
        sys.exit(1)


def _leave_pandas_out() -> None:
    """Lets Arrow take pandas for missing: it imports it at its first array, for a third of a second that no step needs.

    Where pandas is asked for in earnest, as in `to_pandas`, Arrow imports it all the same.
    """
    if "pyarrow" in sys.modules and "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas)
        sys.modules["pyarrow"].array([])
        sys.meta_path.remove(_NoPandas)


class _NoPandas:
    """Finds every module but pandas."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ImportError(name)


def _end_if_hopeless(verdict: Path) -> None:
    with suppress(OSError):
        host, _, message = verdict.read_text(encoding="utf-8").partition("\n")
        if host == socket.gethostname():
            log.error("%s (not tried again)", message)
            sys.exit(1)


def run_command_line() -> list[str]:
    """The words of the `snakemake …` command that this step is part of; none where there is no such command."""
    started_by = ancestors_running("snakemake")
    return started_by[-1].cmdline() if started_by else []


def make_fingerprint(model: CheckpointInfo, method: Mapping[str, Any]) -> Fingerprint:
    """The run's fingerprint, from the checkpoint and the configuration's `method` part.

    Raises CheckpointError when the model cannot do what is asked for.
    """
    try:
        check_method(method, model.dimensions)
        layers = resolve_layers(method["layers"], model.dimensions.layers)
        if not Outputs(layers, tuple(method["include"])).arrays():
            raise ValueError("layers: 0 is the token embedding, which has no attention; name another layer")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return Fingerprint(
        checkpoint=model.digest,
        layers=layers,
        include=tuple(sorted(method["include"])),
        per_residue_precision=method["per_residue_precision"] if "per_residue" in method["include"] else None,
        engine=method["engine"],
        arithmetic=of_family(model.dimensions.family.name, method["arithmetic"]),
        precision=method["precision"],
        long_sequences=method["long_sequences"],
        max_residues=method["max_residues"],
        window_overlap=method["window_overlap"],
        invalid_residues=method["invalid_residues"],
        method_version=method["method_version"],
    )
