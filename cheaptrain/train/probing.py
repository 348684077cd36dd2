"""The sums of `[probe]`, put to a stage's model as it starts and to the checkpoint it ends with.

Done by the main process alone, with plain transformers. What the model could do before is asked of the very weights the
stage starts from, in the chat template the stage teaches; what it can do after, of the files on the disk. The marks lie
in the run folder, so a stage that was stopped and gone on with still knows where it came from.
"""

import json
from collections.abc import Iterator, Sequence

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.data.sources.drills import RESULT, held_out_questions
from cheaptrain.errors import RecipeError
from cheaptrain.evaluate.sums import PROBE, Marks, keep_marks, marks, marks_of_checkpoint, read_marks
from cheaptrain.model.twin import plain_twin
from cheaptrain.recipe.schema import Drills, Recipe
from cheaptrain.train.setup import model_of
from cheaptrain.train.survey import Survey


def probe_before(survey: Survey, run: RunDirectory) -> None:
    """Ask the model that the stage starts from, where the recipe says so and nobody has yet."""
    recipe, tokenizer = survey.loaded.recipe, survey.tokenizer
    if recipe.probe is None or marks_in(run)[0] is not None:
        return
    model = plain_twin(model_of(survey, recipe.model, "cpu"))
    before = marks(model, tokenizer.hf, _questions(recipe), recipe.probe.max_new_tokens)
    keep_marks(run.path, before, None)


def probe_after(survey: Survey, run: RunDirectory) -> None:
    """Ask the checkpoint that the stage ended with, where the recipe says so and nobody has yet."""
    recipe = survey.loaded.recipe
    before, after = marks_in(run)
    if recipe.probe is None or after is not None:
        return
    keep_marks(run.path, before, marks_of_checkpoint(run.final, _questions(recipe), recipe.probe.max_new_tokens))


def marks_in(run: RunDirectory) -> tuple[Marks | None, Marks | None]:
    """What was marked before and after; None where nobody has asked, or it cannot be read (it is asked again then)."""
    try:
        content = json.loads((run.path / PROBE).read_text(encoding="utf-8"))
        return read_marks(content, "before"), read_marks(content, "after")
    except (OSError, ValueError, TypeError, AttributeError):
        return None, None


def wrong_questions(survey: Survey, earlier: Sequence[Survey]) -> Iterator[str]:
    """What is wrong with the questions of a stage: there are none, the model is too short for them, or drills of this
    stage or an `earlier` one contain what is asked."""
    recipe = survey.loaded.recipe
    if recipe.probe is None:
        return
    try:
        questions = _questions(recipe)
    except RecipeError as error:
        yield f"probe.source = {recipe.probe.source!r}: {error}"
        return
    longest = max(len(survey.tokenizer.hf(text)["input_ids"]) for text, _ in questions)
    if longest + recipe.probe.max_new_tokens > survey.positions:
        yield (
            f"probe.max_new_tokens = {recipe.probe.max_new_tokens}: with a question of {longest} tokens that is more "
            f"than the {survey.positions:,} positions of the model; lower it"
        )
    asked = _asked(recipe)
    for other in (*earlier, survey):
        for source in other.loaded.recipe.data.sources:
            read = source.drills
            if not source.weight or read is None or not (read.steps or {*read.operations} & {*asked.operations}):
                continue
            if read.seed != asked.seed or read.held_out < asked.held_out:
                yield (
                    f"probe.source: drills of source {source.name!r} ({other.loaded.path}) contain what "
                    f"{recipe.probe.source!r} holds out, so the model will have seen the sums; give them its seed = "
                    f"{asked.seed} and held_out = {asked.held_out}"
                )


def _questions(recipe: Recipe) -> list[tuple[str, str]]:
    """Each question with the last line of its answer, as the drills of the source have it."""
    assert recipe.probe is not None
    asked = _asked(recipe)
    found = held_out_questions(asked, recipe.probe.questions)
    return [(text, f"{RESULT}{result}" if asked.steps else str(result)) for text, result in found]


def _asked(recipe: Recipe) -> Drills:
    assert recipe.probe is not None
    drills = next(source.drills for source in recipe.data.sources if source.name == recipe.probe.source)
    assert drills is not None
    return drills
