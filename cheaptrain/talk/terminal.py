"""`cheaptrain chat`: a conversation in the terminal, with one checkpoint or with two beside each other.

A line is a turn; a line that begins with / is a command. When the input is not a terminal it is read the same way, so
a file of questions can be piped in. The trap is the terminal itself: it obeys control characters, and rich reads
markup, so what a model says is printed as plain text with such characters shown by their codes.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from cheaptrain.errors import RecipeError
from cheaptrain.say import say
from cheaptrain.talk.answer import Sampling
from cheaptrain.talk.display import ask_shown
from cheaptrain.talk.session import Session, Side
from cheaptrain.talk.talker import load_talkers
from cheaptrain.talk.visible import visible

_HELP = """\
/retry              ask the last question again (another draw, unless the temperature is 0)
/reset              begin a new conversation
/system [TEXT]      the system turn from now on; without TEXT none
/temperature T      0: the likeliest token each time
/save FILE          write the conversation as JSON
/quit               leave, as Ctrl-D does; Ctrl-C ends an answer
A line that is to begin with / begins with //."""


@dataclass(frozen=True)
class Settings:
    """What `cheaptrain chat` is told on its command line."""

    system: str | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None
    save: Path | None = None


def chat(path: str, against: str | None, settings: Settings, console: Console) -> None:
    """Talk to the checkpoint at `path`, and to `against` beside it, until the input ends.

    Raises RecipeError or PreflightError when a checkpoint cannot be talked to, or `settings.save` is there already.
    """
    if settings.save is not None and settings.save.exists():
        raise RecipeError(f"--save {settings.save}: this file is there already; choose another name")
    talkers = load_talkers(path, against, lambda text: say(console, visible(text)))
    sampling = Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, settings.seed)
    session = Session([Side(talker) for talker in talkers], sampling, settings.system)
    say(console, "/help lists what can be typed besides text")
    for line in _lines(console):
        if line.startswith("/") and not line.startswith("//"):
            if not _command(session, line, console):
                break
        else:
            ask_shown(session, line.removeprefix("/") if line.startswith("//") else line, console)
        if settings.save is not None:
            _save(session, settings.save, console)


def _lines(console: Console) -> Iterator[str]:
    """What is typed, line by line, without empty lines; ends with the input."""
    by_hand = sys.stdin.isatty()
    if by_hand:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrows and history in `input`
    while True:
        try:
            line = input("you> ") if by_hand else sys.stdin.readline()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            if not by_hand:
                raise
            say(console, "\n/quit or Ctrl-D leaves")
            continue
        if not line and not by_hand:
            return
        line = line.rstrip("\r\n")
        if not by_hand:
            say(console, f"you> {visible(line)}")
        if line.strip():
            clean = line.encode("utf-8", "replace").decode()
            if clean != line:  # what is not UTF-8 arrives as lone surrogates, which no tokenizer takes
                say(console, "not all of this line is UTF-8; read as: " + visible(clean))
            yield clean


def _command(session: Session, line: str, console: Console) -> bool:
    """Do what the line says; False when it says to leave."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/quit":
        return False
    if name == "/help":
        say(console, _HELP)
    elif name == "/reset":
        session.reset()
        say(console, "a new conversation")
    elif name == "/system":
        session.system = rest or None
        say(console, "system turn from now on: " + (visible(rest) if rest else "none"))
    elif name == "/temperature":
        _set_temperature(session, rest, console)
    elif name == "/retry":
        question = session.take_back()
        if question is None:
            say(console, "nothing was asked yet")
        else:
            ask_shown(session, question, console)
    elif name == "/save":
        if not rest:
            say(console, "/save FILE: name the file")
        elif _save(session, Path(rest).expanduser(), console):
            say(console, f"saved to {visible(rest)}")
    else:
        say(console, f"there is no {visible(name)}; /help lists what there is, and // begins a line with /")
    return True


def _set_temperature(session: Session, text: str, console: Console) -> None:
    try:
        temperature = float(text)
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature < float("inf"):
        say(console, f"/temperature {visible(text)}: give a number from 0, e.g. /temperature 0.7")
        return
    session.sampling = replace(session.sampling, temperature=temperature)
    say(console, f"temperature {temperature:g}")


def _save(session: Session, path: Path, console: Console) -> bool:
    try:
        session.save(path)
    except RecipeError as error:
        say(console, visible(str(error)))
        return False
    return True
