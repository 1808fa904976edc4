"""What a run that ends with an error says last: who failed or died, and the next thing to do."""

from __future__ import annotations

from pathlib import Path

from esmflow.status import StatusError, read_status, trouble_lines

_LINES = 6


def unfinished_lines(results: str, logs: str, command: str) -> list[str]:
    """At most ten lines, the last of them with the command to go on with."""
    summary, plan = Path(results, "summary.json"), Path(results, "plan", "plan.json")
    if summary.exists() and plan.exists() and summary.stat().st_mtime > plan.stat().st_mtime:
        return [
            "The run ended with an error, after everything that could be done was done. What is wrong and what to do",
            f"is above, and in {logs}/finish.log.",
        ]
    try:
        trouble = trouble_lines(read_status(results))
    except StatusError:
        trouble = []
    more = [f"and {(len(trouble) - _LINES) // 2} more groups"] if len(trouble) > _LINES else []
    return [
        f"The run did not finish. What went wrong is above and in {logs}/.",
        *trouble[:_LINES],
        *more,
        f"next       go on from here, finished shards are kept: {command}",
        "           If it says that the directory is locked, the last run was killed: once with --unlock first.",
    ]
