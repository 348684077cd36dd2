"""What would end a launch hours from now, looked for before the first step of its first stage.

A stage's own set-up refuses what it cannot do, but for the third stage that is at three in the morning. Whatever can be
known of all stages at the start is refused here, for all of them at once.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from cheaptrain.checkpoint.write import unsafe_files
from cheaptrain.data.tokenizer import TextTokenizer, open_tokenizer
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.build import meta_model
from cheaptrain.model.context import check_context
from cheaptrain.parallel.tensor import check_tensor_parallel, tensor_plan
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.train.metrics import refuse_missing_trackers
from cheaptrain.train.samples import check_prompts
from cheaptrain.train.survey import Survey, written_in


def refuse_disorder(recipes: Sequence[LoadedRecipe]) -> None:
    """Raise RecipeError for stages that stand in each other's way: two in one folder, or one before what it starts
    from."""
    problems = [*_shared_folders(recipes), *_wrong_order(recipes)]
    if problems:
        raise RecipeError("\n".join(problems))


def refuse_later_failures(surveys: Sequence[Survey]) -> None:
    """Raise PreflightError for prompts, trackers, tokenizers and layouts that a stage would only stumble over once it
    runs."""
    problems, seen = [], set[str]()
    for survey in surveys:
        recipe, tokenizer = survey.loaded.recipe, survey.tokenizer
        found = check_prompts(tokenizer.hf, recipe.samples.prompts, survey.positions)
        problems += [f"{survey.loaded.path}: {problem}" for problem in found]
        problems += [f"{survey.loaded.path}: {problem}" for problem in _cannot_be_laid_out(survey)]
        refuse_missing_trackers(recipe.log)
        if tokenizer.fingerprint not in seen:
            seen.add(tokenizer.fingerprint)
            problems += _lost_in_saving(tokenizer)
    if problems:
        raise PreflightError("\n".join(problems))


def _shared_folders(recipes: Sequence[LoadedRecipe]) -> Iterator[str]:
    taken: dict[Path, LoadedRecipe] = {}
    for loaded in recipes:
        first = taken.setdefault(Path(loaded.recipe.run.dir).resolve(), loaded)
        if identity(first.recipe) != identity(loaded.recipe):
            yield (
                f"run.dir: {first.path} and {loaded.path} would both train in {loaded.recipe.run.dir}; give one of "
                "them another run.dir"
            )


def _wrong_order(recipes: Sequence[LoadedRecipe]) -> Iterator[str]:
    for number, loaded in enumerate(recipes):
        start = loaded.recipe.model.init_from
        if start is None or Path(start).expanduser().exists():
            continue
        writer = next((later for later in recipes[number + 1 :] if written_in(start, later)), None)
        if writer is not None:
            yield (
                f"model.init_from: {loaded.path} starts from {start}, which {writer.path} has yet to write; name "
                f"{writer.path} first"
            )


def _cannot_be_laid_out(survey: Survey) -> Iterator[str]:
    """Heads, or a class of model, that the processes cannot share as the recipe says."""
    config, layout = survey.config, survey.resolved.layout
    try:
        check_tensor_parallel(config, layout.tp)
        check_context(config, seq_len=survey.resolved.seq_len, cp=layout.cp, tp=layout.tp)
        if layout.tp > 1:
            tensor_plan(meta_model(config))
    except PreflightError as error:
        yield str(error)


def _lost_in_saving(tokenizer: TextTokenizer) -> Iterator[str]:
    """A checkpoint carries the tokenizer: it has to come back from a folder as it is here."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.hf.save_pretrained(folder)
        unsafe = unsafe_files(Path(folder))
        again = open_tokenizer(folder)
    if unsafe:
        yield f"tokenizer: it saves {', '.join(unsafe)}, and a checkpoint holds nothing that could be pickled"
    if again.fingerprint != tokenizer.fingerprint:
        token = tokenizer.hf.convert_ids_to_tokens(tokenizer.eot_id)
        yield (
            f"tokenizer: saved and loaded again it gives other ids, so no checkpoint could carry it. If {token!r}, its "
            "end-of-text, is an ordinary word of its vocabulary: set tokenizer.end_of_text to a special token"
        )
