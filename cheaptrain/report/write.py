"""`cheaptrain report`: what was asked and what happened, as one page, one JSON file and pictures.

The report of several stages lies in the folder of the last of them. Everything is read and only the report is written,
so that it can be made at any moment, of a run that is going on, was killed, or is years old. At the end of a launch a
report that cannot be made is a warning: the weights are what the run was for.
"""

import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from cheaptrain.durable import replace_json
from cheaptrain.errors import CheaptrainError, RecipeError
from cheaptrain.report.account import Account, account_of, in_line, made_from
from cheaptrain.report.content import report_content
from cheaptrain.report.status import status_of
from cheaptrain.report.subjects import Subject, subjects_of

PAGE, DATA, FOLDER = "report.html", "report.json", "report"


def report_on(what: Sequence[str], output: Path | None = None) -> Path:
    """The report of the stages that `what` names (recipes, run folders, folders with runs) and of those they were made
    from. Returns the page. Raises RecipeError for a path that is not there, CheaptrainError where nothing has run."""
    subjects = subjects_of(what)
    if not subjects:
        raise RecipeError("no run to report on: name a recipe or the folder of a run")
    return write_report(subjects, output)


def write_report(subjects: Sequence[Subject], output: Path | None = None) -> Path:
    """Write page, data and pictures of `subjects`, and of the stages they were made from, into `output`, by default
    `report/` in the folder of the last one that has begun. Returns the page.

    Raises CheaptrainError when none has begun, or the folder cannot be written.
    """
    began = [subject for subject in subjects if subject.run.path.is_dir()]
    if not began:
        names = ", ".join(str(subject.run.path) for subject in subjects)
        raise CheaptrainError(f"nothing to report: no run has begun in {names}")
    accounts = in_line([account_of(status) for status in status_of(subjects)])
    last = _last(accounts, {subject.run.path.absolute() for subject in began})
    accounts.sort(key=lambda account: account is last)  # the others keep their order
    folder = output or last.run.path / FOLDER
    # Here: it takes a second, which nobody should pay who only trains.
    from cheaptrain.report.drawn import LOSS, pictures_of
    from cheaptrain.report.page import Drawn, render
    from cheaptrain.report.pictures import legend, svg, write_png

    content, pictures = report_content(accounts), pictures_of(accounts)
    content["pictures"] = [
        {"name": picture.name, "file": f"{picture.name}.png", "title": picture.title, "caption": picture.caption}
        for picture in pictures
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old_pictures(folder, {f"{picture.name}.png" for picture in pictures})
        for picture in pictures:
            write_png(picture, folder / f"{picture.name}.png")
        stages = {account.name for account in accounts}
        drawn = [
            Drawn(p.name, p.title, p.caption, svg(p), svg(p, wide=True) if p.name == LOSS else None, legend(p, stages))
            for p in pictures
        ]
        replace_json(folder / DATA, content)
        _replace(folder / PAGE, render(content, drawn, folder))
    except OSError as error:
        raise CheaptrainError(f"{folder}: {error.strerror}; name another folder with --output") from error
    return folder / PAGE


def report_at_the_end(subjects: Sequence[Subject], warn: Callable[[str], None]) -> Path | None:
    """`write_report` for the end of a launch: whatever goes wrong is told to `warn`, and the run is as good as before.
    None then."""
    try:
        return write_report(subjects)
    except Exception as error:
        reason = str(error) if isinstance(error, CheaptrainError) else f"{type(error).__name__}: {error}"
        where = " ".join(str(subject.run.path) for subject in subjects)
        warn(f"no report: {reason}. The run itself is as it should be; try: cheaptrain report {where}")
        return None


def _last(accounts: Sequence[Account], asked: Collection[Path]) -> Account:
    """The stage that the report is about: the last one asked for that no other was made from, if only as its teacher;
    in a circle simply the last."""
    ends = [account for account in accounts if account.run.path.absolute() in asked]
    leaves = [account for account in ends if not any(made_from(other, account) for other in accounts)]
    return (leaves or ends)[-1]


def _remove_old_pictures(folder: Path, kept: set[str]) -> None:
    """Of an earlier report in the same place, that this one has not."""
    if (folder / DATA).is_file():
        for file in folder.glob("*.png"):
            if file.name not in kept:
                file.unlink()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
