"""The page of a comparison: one HTML file that asks nobody for anything.

Names of runs and values of recipes are anybody's, so the template escapes all that is put into it; only the pictures,
which are drawn here, go in as they are. Each interval is also drawn, all of one pair and unit on one scale, so that
a difference that is shown is seen to stay clear of zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cheaptrain.compare.statistics import LEVEL
from cheaptrain.compare.tasks import BETTER, WORSE, digits_for, shown_p
from cheaptrain.report.pictures import COLOURS, Picture, svg
from cheaptrain.units import duration, human

TEMPLATE = "compare.html.jinja"
NOTHING = "–"
_HALF = 100.0  # of the width of a drawn interval, in its own units


@dataclass(frozen=True)
class Bar:
    """An interval on a scale from -`_HALF` to `_HALF`, grown so that better is on the right."""

    low: float
    high: float
    middle: float


def render(content: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The page for `content` (compare.json) with its pictures."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "human": _known(human),
        "duration": _known(duration),
        "whole": _known("{:,.0f}".format),
        "loss": _known("{:.4f}".format),
        "p": _known(shown_p),
        "colour": lambda number: f"c{number % len(COLOURS)}",
        "score": _score,
        "difference": _difference,
        "drawing": lambda text: Markup(text),  # from pictures.py, whose labels are escaped
    }
    environment.tests["holds"] = environment.globals["holds"] = _holds
    text = (files("cheaptrain.compare") / TEMPLATE).read_text(encoding="utf-8")
    drawn = [{"title": picture.title, "caption": picture.caption, "svg": svg(picture)} for picture in pictures]
    bars = [_bars([*pair["tasks"], *pair["held_out"]]) for pair in content["pairs"]]
    return environment.from_string(text).render(report=content, drawn=drawn, bars=bars)


def _holds(row: Mapping[str, Any]) -> bool:
    """Whether a difference that was shown is still shown when it is corrected for the other tasks; else True."""
    claimed, corrected = row["outcome"] in (BETTER, WORSE), row["p_corrected"]
    return not claimed or corrected is None or corrected < 1 - LEVEL


def _bars(rows: Sequence[Mapping[str, Any]]) -> dict[str, Bar]:
    """Task → its interval as it is drawn; none for what has no interval."""
    with_interval = [row for row in rows if row["estimate"]]
    reach: dict[str, float] = {}
    for row in with_interval:
        ends = (abs(row["estimate"]["low"]), abs(row["estimate"]["high"]))
        reach[row["unit"]] = max(reach.get(row["unit"], 0.0), *ends)
    found = {}
    for row in with_interval:
        scale = (_HALF / reach[row["unit"]] if reach[row["unit"]] else 0.0) * (1 if row["higher_is_better"] else -1)
        low, high = sorted((row["estimate"]["low"] * scale, row["estimate"]["high"] * scale))
        found[row["task"]] = Bar(low, high, row["estimate"]["difference"] * scale)
    return found


def _known(shown: Any) -> Any:
    return lambda value: NOTHING if value is None else shown(value)


def _score(row: Mapping[str, Any], which: str) -> str:
    value = row[which]
    if value is None:
        return NOTHING
    return f"{value * row['scale']:.1f}" if row["scale"] == 100 else f"{value:.4f}"


def _difference(row: Mapping[str, Any], key: str) -> str:
    """A number of the estimate, as it is shown."""
    estimate, scale = row["estimate"], row["scale"]
    digits = digits_for((estimate["high"] - estimate["low"]) / 2 * scale or estimate["difference"] * scale)
    return f"{estimate[key] * scale:+.{digits}f}".replace("-", "−")
