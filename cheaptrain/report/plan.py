"""What a run would take, said before anything starts: steps, tokens, memory, time, disk, money.

`cheaptrain plan` prints it for any recipe, prepared or not; the same block opens training, so that nobody starts a run
whose numbers they have not seen. The trap: a plan that refuses to speak until everything is prepared comes too late to
plan with.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe.layout import AXES, planned_processes
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.report.advice import impossibilities
from cheaptrain.report.device import device_to_plan_for, this_device
from cheaptrain.report.plan_view import print_report
from cheaptrain.report.planned import plan_figures
from cheaptrain.report.reckon import plan_report
from cheaptrain.train.outlook import Outlook, outlook_of, survey_leniently
from cheaptrain.train.survey import Survey


def print_plan(survey: Survey, console: Console) -> dict[str, Any]:
    """The block that opens training, for this machine. Returns its figures, to be held against what comes of it."""
    report = plan_report(outlook_of(survey), this_device())
    print_report(report, console)
    return plan_figures(report)


def print_plans(
    recipes: Sequence[LoadedRecipe], console: Console, *, gpus: bool = False, propose: bool = False
) -> None:
    """`cheaptrain plan`: a block for each recipe, for `plan.gpus` processes of `plan.gpu`, whatever is prepared.

    `gpus`: it has to be GPUs, whatever this machine has. `propose`: also say which layout is the cheapest that fits.
    Raises RecipeError where the numbers do not add up, and PreflightError, after printing, where the run is impossible.
    """
    outlooks: list[Outlook] = []
    problems = []
    for loaded in recipes:
        outlook = survey_leniently(loaded, planned_processes(loaded.recipe), outlooks)
        outlooks.append(outlook)
        report = plan_report(outlook, device_to_plan_for(loaded.recipe.plan, gpus=gpus), propose=propose)
        print_report(report, console)
        problems += [f"{loaded.path}: {problem}" for problem in impossibilities(report)]
    if problems:
        raise PreflightError("\n".join(problems))


def layout_overrides(gpus: int | None, layout: str | None) -> list[str]:
    """The keys that `--gpus 64` and `--layout dp_shard=8,tp=8` stand for; axes that are not named are not used, and
    dp_shard takes what the others leave. Raises RecipeError for what is no layout."""
    overrides = [f"plan.gpus={gpus}"] if gpus is not None else []
    if layout is None:
        return overrides
    given: dict[str, str] = {}
    for part in layout.split(","):
        axis, equals, size = (text.strip() for text in part.partition("="))
        if axis not in AXES or not equals or axis in given:
            raise RecipeError(f"--layout {layout}: write each of {', '.join(AXES)} at most once, e.g. dp_shard=8,tp=8")
        given[axis] = size
    unused = {axis: "auto" if axis == "dp_shard" else "1" for axis in AXES}
    return overrides + [f"parallel.{axis}={size}" for axis, size in (unused | given).items()]
