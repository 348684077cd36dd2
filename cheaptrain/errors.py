"""What can go wrong, and the exit code that says so.

Every error a user can cause or meet is one of these. The message names what, where (file, line, key) and what to do;
the command line prints it without a traceback and exits with `exit_code`. Anything else that escapes is a bug, and
keeps its traceback.
"""

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_RECIPE = 2
EXIT_PREFLIGHT = 3
EXIT_DIVERGED = 4
EXIT_STOPPED = 75


class CheaptrainError(Exception):
    """A failure with a message meant for the user. Exit code 1."""

    exit_code = EXIT_FAILURE


class RecipeError(CheaptrainError):
    """The recipe or the command line asks for something that does not exist or does not add up. Exit code 2."""

    exit_code = EXIT_RECIPE


class PreflightError(CheaptrainError):
    """Nothing was started because it could not end well: missing data, no space, another run in the way. Exit code
    3."""

    exit_code = EXIT_PREFLIGHT


class DivergedError(CheaptrainError):
    """The loss or the gradients stopped being finite. Exit code 4."""

    exit_code = EXIT_DIVERGED


class StoppedError(CheaptrainError):
    """Stopped by a signal, with a checkpoint to go on from. Exit code 75 (EX_TEMPFAIL: run the same command again)."""

    exit_code = EXIT_STOPPED
