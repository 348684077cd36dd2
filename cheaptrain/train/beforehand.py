"""What would end a launch hours from now, looked for before the first step of its first stage.

A stage's own set-up refuses what it cannot do, but for the third stage that is at three in the morning. Whatever can be
known of all stages at the start is refused here, for all of them at once.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.write import unsafe_files
from cheaptrain.data.tokenizer import TextTokenizer, open_tokenizer
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.build import meta_model, refuse_other_shapes
from cheaptrain.model.config import checkpoint_config, vocabulary_growth
from cheaptrain.model.context import check_context
from cheaptrain.parallel.tensor import check_tensor_parallel, tensor_plan
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.parents import PARENT_KEYS, parents, written_in
from cheaptrain.recipe.schema import Eval
from cheaptrain.train.aligned import refuse_layout
from cheaptrain.train.cached_teacher import cache_of
from cheaptrain.train.evaluating import wrong_tasks
from cheaptrain.train.lineage import changed_since
from cheaptrain.train.metrics import refuse_missing_trackers
from cheaptrain.train.probing import wrong_questions
from cheaptrain.train.samples import check_prompts
from cheaptrain.train.space import StageSpace, checkpoint_bytes, checkpoints_at_once, checkpoints_left, most_at_once
from cheaptrain.train.survey import Survey, written_by
from cheaptrain.train.taught import other_template
from cheaptrain.train.teacher import refuse_top_k, speaking_of_the_teacher, teacher_config
from cheaptrain.units import size


def refuse_disorder(recipes: Sequence[LoadedRecipe]) -> None:
    """Raise RecipeError for stages that stand in each other's way: two in one folder, one before what it starts from,
    or one whose data cannot be prepared before another is trained."""
    problems = [*_shared_folders(recipes), *_wrong_order(recipes), *_coming_tokenizers(recipes)]
    if problems:
        raise RecipeError("\n".join(problems))


def refuse_later_failures(surveys: Sequence[Survey], report: Callable[[str], None]) -> None:
    """Raise PreflightError for prompts, trackers, tokenizers, templates, layouts, changed ancestors and full disks that
    a stage would only stumble over once it runs. What is odd and meant goes to `report`."""
    problems, seen, asked = list(changed_since(surveys)), set[str](), list[tuple[Eval, str]]()
    for number, survey in enumerate(surveys):
        recipe, tokenizer = survey.loaded.recipe, survey.tokenizer
        found = check_prompts(tokenizer.hf, recipe.samples.prompts, survey.positions)
        problems += [f"{survey.loaded.path}: {problem}" for problem in found]
        problems += [f"{survey.loaded.path}: {problem}" for problem in _cannot_be_laid_out(survey)]
        problems += [f"{survey.loaded.path}: {problem}" for problem in _adapters_alone(survey, surveys[:number])]
        problems += [f"{survey.loaded.path}: {problem}" for problem in _other_shapes(survey, surveys[:number])]
        problems += [f"{survey.loaded.path}: {problem}" for problem in wrong_questions(survey, surveys[:number])]
        examined = (recipe.eval, tokenizer.fingerprint)
        if examined not in asked:
            asked.append(examined)
            problems += [f"{survey.loaded.path}: {problem}" for problem in wrong_tasks(recipe, tokenizer)]
        if other := other_template(survey, surveys[:number]):
            if other.meant:
                report(other.text)
            else:
                problems.append(other.text)
        refuse_missing_trackers(recipe.log)
        if tokenizer.fingerprint not in seen:
            seen.add(tokenizer.fingerprint)
            problems += _lost_in_saving(tokenizer)
    problems += _full_disks(surveys)
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
        for name, model in parents(loaded.recipe).items():
            folder = str(model.init_from)
            if Path(folder).exists():
                continue
            writer = next((later for later in recipes[number + 1 :] if written_in(folder, later)), None)
            if writer is not None:
                does = "starts from" if name == "init_from" else "learns from"
                yield (
                    f"{PARENT_KEYS[name]}: {loaded.path} {does} {folder}, which {writer.path} has yet to write; name "
                    f"{writer.path} first"
                )


def _coming_tokenizers(recipes: Sequence[LoadedRecipe]) -> Iterator[str]:
    for loaded in recipes:
        path = loaded.recipe.tokenizer.path
        writer = next((other for other in recipes if written_in(path, other)), None)
        if writer is not None and path is not None and not Path(path).exists():
            yield (
                f"tokenizer.path: {loaded.path} takes its tokenizer from {path}, which {writer.path} has yet to write, "
                f"so its data cannot be prepared and checked before; give it the [tokenizer] of {writer.path}"
            )


def _cannot_be_laid_out(survey: Survey) -> Iterator[str]:
    """Heads, or a class of model, that the processes cannot share as the recipe says."""
    seq_len, layout = survey.resolved.seq_len, survey.resolved.layout
    try:
        _lay_out(survey.config, seq_len, layout)
    except PreflightError as error:
        yield str(error)
    if survey.loaded.recipe.train.neftune_alpha and layout.tp > 1:
        yield (
            f"train.neftune_alpha: each of the {layout.tp} processes of parallel.tp would draw noise of its own for "
            "the same embeddings; set parallel.tp = 1 or train.neftune_alpha = 0"
        )
    try:
        if (distill := survey.loaded.recipe.distill) is not None:
            refuse_top_k(distill, layout.tp)
            refuse_layout(distill, layout)
            if distill.cache is not None:
                cache_of(survey)
    except (PreflightError, RecipeError) as error:
        yield str(error)
    if (teacher := survey.teacher) is None:
        return
    try:
        with speaking_of_the_teacher():
            row = teacher.row(seq_len)
            vocab_size = teacher.vocab_size or survey.tokenizer.size
            _lay_out(teacher_config(teacher.model, vocab_size=vocab_size, seq_len=row), row, layout)
    except (PreflightError, RecipeError) as error:
        yield str(error)


def _adapters_alone(survey: Survey, earlier: Sequence[Survey]) -> Iterator[str]:
    """What [lora] does not go together with."""
    recipe, layout = survey.loaded.recipe, survey.resolved.layout
    if recipe.lora is None:
        return
    if _meets_new_tokens(survey, earlier):
        yield (
            "[lora] trains no embedding, and all tokens that are new to the model would stay alike: train without "
            "[lora], or take a chat.template whose markers the model's tokenizer has"
        )
    if layout.tp > 1:
        yield f"[lora] does not work with parallel.tp = {layout.tp}: adapters are not split; set parallel.tp = 1"
    if recipe.train.compile == "layers":
        yield 'train.compile: layers with adapters are not compiled; set "auto" or "off"'


def _meets_new_tokens(survey: Survey, earlier: Sequence[Survey]) -> bool:
    """Whether the tokenizer has tokens that the model does not know, be it written already or not."""
    spec = survey.loaded.recipe.model
    writer = written_by(spec.init_from, earlier)
    if writer is not None and not Path(str(spec.init_from)).exists():
        return survey.tokenizer.size > writer.tokenizer.size
    return vocabulary_growth(spec, survey.tokenizer.size) is not None


def _lay_out(config: PreTrainedConfig, seq_len: int, layout: Layout) -> None:
    check_tensor_parallel(config, layout.tp)
    check_context(config, seq_len=seq_len, cp=layout.cp, tp=layout.tp)
    if layout.tp > 1:
        tensor_plan(meta_model(config))


def _other_shapes(survey: Survey, earlier: Sequence[Survey]) -> Iterator[str]:
    """Overrides with which the weights of a checkpoint, written or not, would no longer fit. Tokens may be added."""
    spec, config = survey.loaded.recipe.model, copy.deepcopy(survey.config)
    if spec.init_from is None or not spec.overrides:
        return
    writer = written_by(spec.init_from, earlier)
    there = Path(spec.init_from).exists()
    if writer is None and not there:
        return  # a hub id: its config is read where it is loaded
    try:
        before = checkpoint_config(spec) if there or writer is None else writer.config
        if "vocab_size" not in spec.overrides:
            config.vocab_size = before.vocab_size
        refuse_other_shapes(spec, before, config)
    except RecipeError as error:
        yield str(error)


def _full_disks(surveys: Sequence[Survey]) -> Iterator[str]:
    """File systems that the checkpoints of all stages together would fill. A finished stage takes no more."""
    stages: dict[int, list[StageSpace]] = {}
    folders: dict[int, Path] = {}
    for survey in surveys:
        recipe, resolved = survey.loaded.recipe, survey.resolved
        run = RunDirectory(Path(recipe.run.dir))
        if run.step(resolved.steps).is_dir():
            continue
        folder = next(parent for parent in (run.path, *run.path.absolute().parents) if parent.is_dir())
        disk = folder.stat().st_dev
        folders.setdefault(disk, folder)
        of_stage = StageSpace(
            survey.loaded.name,
            each=checkpoint_bytes(survey.facts, recipe.train),
            at_once=checkpoints_at_once(resolved, recipe.checkpoint),
            left=checkpoints_left(resolved, recipe.checkpoint),
            there=len(run.steps()),
        )
        stages.setdefault(disk, []).append(of_stage)
    for disk, of_disk in stages.items():
        needed, worst = most_at_once(of_disk)
        free = shutil.disk_usage(folders[disk]).free
        if free < needed:
            each = ", ".join(f"{stage.name}: {stage.at_once} of {size(stage.each)}" for stage in of_disk)
            yield (
                f"{folders[disk]}: {size(free)} free, and checkpoints take {size(needed)} at the worst moment, in "
                f"{worst}, when those of earlier stages still lie there ({each}). Free space, give another run.dir, or "
                "keep fewer (checkpoint.keep_last, checkpoint.keep_every)"
            )


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
