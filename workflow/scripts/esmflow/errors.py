"""The root of the errors that are written for the user."""


class EsmflowError(Exception):
    """An error whose message is a sentence for the user: what is wrong, where, and what to do."""
