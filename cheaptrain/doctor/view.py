"""Findings as text, at most 100 columns wide, the same on a terminal, in a pipe and in a log.

Colour only repeats the mark.
"""

import textwrap
from collections.abc import Iterable, Iterator

from rich.console import Console

from cheaptrain.doctor.findings import Finding
from cheaptrain.say import say

WIDTH = 100
_INDENT = 2 + 7 + 15  # the mark and the subject
_STYLES = {"ok": None, "note": "cyan", "doubt": "yellow", "FAIL": "bold red"}


def print_section(title: str, findings: Iterable[Finding], console: Console) -> None:
    """Print a heading, then each finding as soon as it is there."""
    say(console, title, "bold")
    for finding in findings:
        for line in finding_lines(finding):
            say(console, line, _STYLES[finding.mark])


def finding_lines(finding: Finding) -> Iterator[str]:
    """Mark, subject and text; then the table; then what to do, whose own line breaks are kept."""
    head = f"  {finding.mark:<6} {finding.subject:<14} "
    for number, line in enumerate(_wrapped(finding.says)):
        yield (head if number == 0 else " " * _INDENT) + line
    yield from (f"{'':{_INDENT}}{line}" for line in finding.table)
    for number, line in enumerate(_wrapped(finding.do)):
        yield f"{'':{_INDENT}}{'-> ' if number == 0 else '   '}{line}"


def _wrapped(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from textwrap.wrap(
            line, WIDTH - _INDENT - 3, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
        ) or [""]
