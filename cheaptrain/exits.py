"""From an exception to a message and an exit code, in one place for every way in."""

import sys
from collections.abc import Callable

from cheaptrain.console import flush_streams, lasting_console
from cheaptrain.errors import EXIT_FAILURE, CheaptrainError


def guarded(main: Callable[[], None]) -> None:
    """Run `main`; a CheaptrainError becomes its message on stderr and its exit code, a full disk or a refused
    permission becomes exit 1 with the file named. Anything else is a bug and keeps its traceback.
    """
    errors = lasting_console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    try:
        main()
    except CheaptrainError as error:
        errors.print(f"[bold red]{_title(error)}[/bold red]", end=" ")
        errors.print(str(error), markup=False)
        errors.print(f"[dim]exit code {error.exit_code}[/dim]")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        errors.print("[bold red]failed[/bold red]", end=" ")
        errors.print(f"{error.strerror}: {error.filename or ''}", markup=False)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        errors.print("interrupted; what was finished is kept")
        sys.exit(130)
    finally:
        flush_streams()


def _title(error: CheaptrainError) -> str:
    return {2: "recipe", 3: "refused", 4: "diverged", 75: "stopped"}.get(error.exit_code, "failed")
