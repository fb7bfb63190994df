"""The one exception that stands for a mistake in what the user gave us."""


class UserError(Exception):
    """Bad input. The message is one line: which file, record or key, and what was expected.

    Commands print it as `error: MESSAGE` on standard error and exit with status 2.
    """
