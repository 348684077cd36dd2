"""From an exception to a message and an exit code, in one place for every way in and for every process of a run.

An error that all processes have is told once, by the main one; a process that fails alone tells its rank. With which
code they end is for the launcher: see `launched`.
"""

import signal
import sys
import traceback
from collections.abc import Callable

from rich.console import Console

from cheaptrain import launched
from cheaptrain.console import flush_streams, lasting_console
from cheaptrain.errors import EXIT_FAILURE, CheaptrainError, StoppedError
from cheaptrain.stopping import SIGNALS


def guarded(main: Callable[[], None]) -> None:
    """Run `main`; a CheaptrainError becomes its message on stderr and its exit code, a full disk or a refused
    permission becomes exit 1 with the file named. Anything else is a bug and keeps its traceback.
    """
    launched.announce(_say_left)
    try:
        main()
    except CheaptrainError as error:
        _end(error.exit_code, _title(error.exit_code), str(error), with_code=True)
    except OSError as error:
        if error.filename is None and error.errno is None:
            _crash()
        where = "" if error.filename is None else f": {error.filename}"
        _end(EXIT_FAILURE, "failed", f"{error.strerror}{where}")
    except KeyboardInterrupt:
        _errors().print("interrupted; what was finished is kept")
        launched.record(130)
        sys.exit(130)
    except SystemExit as request:
        launched.record(request.code if isinstance(request.code, int) else int(request.code is not None))
        raise
    except BaseException:
        _crash()
    else:
        launched.record(0)
    finally:
        flush_streams()


def _end(code: int, title: str, text: str, with_code: bool = False) -> None:
    """Tell what went wrong, once among all processes, and exit."""
    _decided(code)
    if launched.rank() == 0:
        _tell(title, text, code if with_code else None)
    ending = launched.end_together(code, text)
    if launched.rank() > 0 and not (ending.agreed and ending.said):
        _tell(f"rank {launched.rank()}: {title}", text, code if with_code else None)
    if not ending.agreed:
        launched.fail_alone(code)
    sys.exit(0 if launched.launched() else code)


def _crash() -> None:
    """A bug: the traceback, in one piece although several processes may write theirs."""
    _decided(EXIT_FAILURE)
    if launched.size() == 1:
        raise
    _errors().print(f"rank {launched.rank()} of {launched.size()}:\n{traceback.format_exc()}", markup=False)
    launched.fail_alone(EXIT_FAILURE)


def _decided(code: int) -> None:
    """How this process ends. Signals change it no more: as soon as one of many ends, a launcher sends them to all."""
    launched.record(code)
    if launched.launched() or launched.size() > 1:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _say_left(name: str) -> None:
    if launched.rank() == 0:
        text = f"{name}: no training was under way. Run the same command to go on."
        _tell(_title(StoppedError.exit_code), text, StoppedError.exit_code)
        flush_streams()


def _tell(title: str, text: str, code: int | None) -> None:
    errors = _errors()
    errors.print(f"[bold red]{title}[/bold red]", end=" ")
    errors.print(text, markup=False)
    if code is not None:
        errors.print(f"[dim]exit code {code}[/dim]")


def _errors() -> Console:
    return lasting_console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def _title(code: int) -> str:
    return {2: "error", 3: "refused", 4: "diverged", 75: "stopped"}.get(code, "failed")
