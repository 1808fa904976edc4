"""The root of the errors that are written for the user."""

# What a terminal obeys: all control characters but tabs and line ends.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


class EsmflowError(Exception):
    """An error whose message is a sentence for the user: what is wrong, where, and what to do.

    mendable: whether another attempt of the same job may go better, without anybody doing something.
    """

    mendable = True

    def __str__(self) -> str:
        return without_controls(super().__str__())


def without_controls(message: str) -> str:
    """A message as a terminal may show it, whatever names of files, ids and cells of tables are in it."""
    return message.translate(_CONTROLS)
