"""Errors that are meant for the person who started the program.

Each carries one line that quotes both sides (what was asked, what there is) and says what to do. The command line
prints that line and leaves with `exit_code`; a traceback is shown only when asked for. Anything else that escapes is
a bug.
"""


class UserError(Exception):
    """Something the user can act on. The message is one line."""

    exit_code = 1


class UsageError(UserError):
    """What was asked for cannot be: a wrong configuration, argument or combination. Nothing was started."""

    exit_code = 2


class RunError(UserError):
    """What was asked for is sound but failed: a full disk, a corrupt file, a run folder in use, a loss not finite."""

    exit_code = 1
