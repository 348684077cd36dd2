"""One line of what the doctor says: a mark, a subject, what was found, and what to do about it.

    ok      right
    note    worth knowing, nothing to do
    doubt   probably not meant, or slow, or unsafe; the run would go on
    FAIL    a run would stop here, hang, or be wrong

The trap is a diagnosis without a remedy, so nobody can make a doubt or a failure without saying what to do.
"""

from dataclasses import dataclass
from typing import Literal

Mark = Literal["ok", "note", "doubt", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """`table`: lines to print below as they are."""

    mark: Mark
    subject: str
    says: str
    do: str = ""
    table: tuple[str, ...] = ()


def ok(subject: str, says: str, table: tuple[str, ...] = ()) -> Finding:
    """It is right."""
    return Finding("ok", subject, says, table=table)


def note(subject: str, says: str, table: tuple[str, ...] = ()) -> Finding:
    """Worth knowing; nothing to do."""
    return Finding("note", subject, says, table=table)


def doubt(subject: str, says: str, do: str, table: tuple[str, ...] = ()) -> Finding:
    """The run would go on, and probably not as it is meant to."""
    return Finding("doubt", subject, says, do, table)


def fail(subject: str, says: str, do: str, table: tuple[str, ...] = ()) -> Finding:
    """A run would stop, hang or be wrong."""
    return Finding("FAIL", subject, says, do, table)
