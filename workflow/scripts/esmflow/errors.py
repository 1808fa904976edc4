"""The root of the errors that are written for the user."""


class EsmflowError(Exception):
    """An error whose message is a sentence for the user: what is wrong, where, and what to do.

    mendable: whether another attempt of the same job may go better, without anybody doing something.
    """

    mendable = True
