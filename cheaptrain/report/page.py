"""The page of a report: one HTML file that asks nobody for anything.

Text of recipes, prompts and samples is anybody's, so the template escapes everything that is put into it; only the
pictures, which are drawn here, go in as they are. Numbers are those of report.json, written for people by the filters
below.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cheaptrain.report.pictures import COLOURS
from cheaptrain.units import duration, human, size

TEMPLATE = "report.html.jinja"
NOTHING = "–"


@dataclass(frozen=True)
class Drawn:
    """A picture as it stands in the page. `wide`: for screens that have room; else `narrow` is shown everywhere.
    `legend`: labels and names of colours, where they are not those of the stages."""

    name: str
    title: str
    caption: str
    narrow: str
    wide: str | None = None
    legend: tuple[tuple[str, str], ...] = ()


def render(content: Mapping[str, Any], drawn: Sequence[Drawn], folder: Path) -> str:
    """The page for `content` (report.json) with its pictures, to be written into `folder`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "human": _known(human),
        "size": _known(size),
        "duration": _known(duration),
        "whole": _known("{:,.0f}".format),
        "loss": _known("{:.4f}".format),
        "share": _known("{:.1%}".format),
        "percent": _known("{:.0%}".format),
        "short": _known("{:.4g}".format),
        "dollars": _known("${:,.2f}".format),
        "time": _known(_time),
        "written": _known(_written),
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True),
        "one_line": lambda value: json.dumps(value, ensure_ascii=False),
        "colour": lambda number: f"c{number % len(COLOURS)}",
        "drawing": lambda text: Markup(text),  # from pictures.py, whose labels are escaped
    }
    environment.globals["other_report"] = lambda stage: _other_report(stage, folder)
    text = (files("cheaptrain.report") / TEMPLATE).read_text(encoding="utf-8")
    scores = [one for one in drawn if one.name.startswith("eval-")]
    curves = [one for one in drawn if one not in scores]
    return environment.from_string(text).render(report=content, curves=curves, scores=scores)


def _known(shown: Any) -> Any:
    return lambda value: NOTHING if value is None else shown(value)


def _written(text: str) -> str:
    """What a model or a person wrote: empty lines around it as marks, and what is no character as its number."""
    inner = text.strip("\n")
    before = len(text) - len(text.lstrip("\n"))
    marked = "⏎" * before + inner + "⏎" * (len(text) - len(inner) - before if inner else 0)
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in marked) or "(nothing)"


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _other_report(stage: Mapping[str, Any], folder: Path) -> str | None:
    """Where the report of a single stage lies, as a link from this one; None without one."""
    other = Path(stage["run"]) / "report" / "report.html"
    if not other.is_file() or other.parent.absolute() == folder.absolute():
        return None
    return Path(os.path.relpath(other.absolute(), folder.absolute())).as_posix()
