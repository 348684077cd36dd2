"""`cheaptrain prepare RECIPE`: text to token shards, once, before any training.

The steps, in order: train the tokenizer if the recipe says so; plan every source into units; lock their folders; see
what is done already; let workers do the rest; write a manifest for each source that is whole; print the table. Several
machines may share the work with `--shard k/n`: unit u belongs to shard k (counted from 1) when u % n == k - 1, and
whichever run finds all units done writes the manifest. The result is the same bytes however the work was divided,
interrupted and restarted.
"""

import errno
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from cheaptrain.chat.proof import prove_template
from cheaptrain.data.display import PrepareProgress, print_table
from cheaptrain.data.encode import EncoderSpec
from cheaptrain.data.files import InputHashes
from cheaptrain.data.interrupt import Interrupted, Interruption, interruptible, same_command
from cheaptrain.data.lock import lock_directory
from cheaptrain.data.manifest import Manifest, describe_others, refusal_of_losses, source_directory, source_settings
from cheaptrain.data.pool import Pool
from cheaptrain.data.sources import plan_source
from cheaptrain.data.tokenizer import TextTokenizer, load_tokenizer
from cheaptrain.data.train_tokenizer import train_tokenizer
from cheaptrain.data.transform import Rewriting, idle_rules
from cheaptrain.data.units import Job
from cheaptrain.data.work import Work
from cheaptrain.data.worker import Setup, Task
from cheaptrain.errors import CheaptrainError, PreflightError, RecipeError, StoppedError
from cheaptrain.hardware import visible_cores
from cheaptrain.recipe.schema import Recipe
from cheaptrain.say import say
from cheaptrain.units import size

_TEXT_BYTES_PER_TOKEN = 5  # more than usual, so that space is refused only when it is surely too little
_TICK_SECONDS = 0.5
_LEAST_UNIT_BYTES = 1000


def prepare_recipe(
    recipe: Recipe, shard: tuple[int, int] | None = None, console: Console | None = None
) -> list[Manifest]:
    """Prepare the tokenizer and every source with a weight. Returns the manifests of the sources that are whole.

    `shard` (k, n): do only part k of n, k from 1. Raises RecipeError (impossible shard), PreflightError (input, space,
    permission, another run), CheaptrainError (a worker died), StoppedError (a signal); finished units are always kept.
    """
    console = console or Console()
    k, n = shard or (1, 1)
    if not 1 <= k <= n:
        raise RecipeError(f"--shard {k}/{n}: the first number runs from 1 to the second, e.g. --shard 1/4")
    if recipe.data.unit_bytes < _LEAST_UNIT_BYTES:
        raise RecipeError(
            f"data.unit_bytes = {recipe.data.unit_bytes}: at least {_LEAST_UNIT_BYTES:,} bytes of text a unit"
        )
    data_dir = Path(recipe.data.dir)
    try:
        with interruptible() as interruption, ExitStack() as locks:
            return _prepare(recipe, (k, n), console, interruption, locks)
    except Interrupted as request:
        raise StoppedError(f"{request}: stopped; finished units are kept: {same_command()}") from None
    except PermissionError as error:
        raise PreflightError(f"{error.filename}: no permission to write; change its owner, or set data.dir") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise PreflightError(f"{error.filename}: a file stands where a folder must; set data.dir to another") from error
    except OSError as error:
        remedy = "; make room, or set data.dir to another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise CheaptrainError(f"{error.filename or data_dir}: {error.strerror or error}{remedy}") from error


def _prepare(
    recipe: Recipe, shard: tuple[int, int], console: Console, interruption: Interruption, locks: ExitStack
) -> list[Manifest]:
    started = time.monotonic()
    data_dir = Path(recipe.data.dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    hashes = InputHashes(data_dir)
    if recipe.tokenizer.train is not None:
        train_tokenizer(recipe.tokenizer.train, recipe.data, hashes, console)
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    if tokenizer.ordinary:
        say(console, f"tokenizer: {len(tokenizer.ordinary):,} tokens of add_tokens, {tokenizer.size:,} in all")
    if tokenizer.template is not None:
        _say_template(tokenizer, console)
    interruption.check()
    works = _plan(recipe, shard, tokenizer, hashes, console, locks)
    encoder = tokenizer.encoder_spec()
    _check_space(works, data_dir, encoder)
    setup = Setup(encoder, tokenizer.token_bytes(), tokenizer.chat_spec(recipe.data.seq_len))
    _do_units(works, recipe.data.workers, setup, console, interruption)
    for work in works:
        work.survey()  # other shards went on meanwhile
    missing = {work.job.source.name: work.missing() for work in works}
    manifests = {work.job.source.name: work.finish(encoder) for work in works if not work.missing()}
    print_table(console, works, manifests, time.monotonic() - started)
    if losses := [problem for manifest in manifests.values() if (problem := refusal_of_losses(manifest, recipe.chat))]:
        raise PreflightError("\n".join(losses))
    if idle := list(idle_rules(recipe.data, {name: manifest.transform for name, manifest in manifests.items()})):
        raise PreflightError("\n".join(idle))
    for name, units in missing.items():
        if units:
            listed = ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")
            say(
                console, f"source {name}: unit {listed} not done yet by the other shards of {shard[1]}: run those again"
            )
    return list(manifests.values())


def _say_template(tokenizer: TextTokenizer, console: Console) -> None:
    """Prove the template on this tokenizer, and say what was added for it."""
    prove_template(tokenizer)
    if tokenizer.added:
        say(console, f"tokenizer: special tokens added for the chat template: {', '.join(tokenizer.added)}")


def _plan(
    recipe: Recipe,
    shard: tuple[int, int],
    tokenizer: TextTokenizer,
    hashes: InputHashes,
    console: Console,
    locks: ExitStack,
) -> list[Work]:
    """Plan and lock every source and find out what is done. Raises PreflightError with the problems of all sources."""
    works, problems = [], []
    for source in recipe.data.sources:
        if source.weight == 0:
            continue
        try:
            plan = plan_source(source, recipe.data.unit_bytes, hashes)
            if not plan.units:
                raise PreflightError(f"source {source.name!r} is empty: its files hold nothing")
        except PreflightError as error:
            problems.append(str(error))
            continue
        for note in plan.notes:
            say(console, f"{source.name}: {note}")
        directory = source_directory(recipe.data, source, tokenizer)
        settings = source_settings(recipe.data, source, tokenizer)
        if not directory.exists() and (others := describe_others(recipe.data, source, settings)):
            say(console, f"{source.name}: prepared anew; it is there{others}")
        directory.mkdir(parents=True, exist_ok=True)
        locks.enter_context(lock_directory(directory, shard))
        rewriting = Rewriting(tuple(recipe.data.rules(source)), tokenizer.ordinary)
        job = Job(source, directory, recipe.data.validation, f"{shard[0]}of{shard[1]}", rewriting)
        work = Work(job, plan, settings, shard)
        work.clear_temporary()
        work.survey()
        for change in work.changes:
            say(console, f"{source.name}: {change}: done again")
        if next(work.wanted(), None):
            work.withdraw_manifest()
        works.append(work)
    hashes.save()
    if problems:
        raise PreflightError("\n".join(problems))
    return works


def _check_space(works: Sequence[Work], data_dir: Path, encoder: EncoderSpec) -> None:
    """Refuse to start what cannot end for want of space."""
    needed = 0.0
    for work in works:
        if work.job.source.kind != "tokens":
            tokens = sum(unit.text_bytes for unit, _ in work.wanted()) / _TEXT_BYTES_PER_TOKEN
            needed += min(tokens, work.max_tokens or tokens) * encoder.dtype.itemsize
    free = shutil.disk_usage(data_dir).free
    if needed > free:
        raise PreflightError(
            f"{data_dir}: {size(free)} free, but the tokens will take at least {size(needed)}; make room, set data.dir "
            "to another disk, or limit sources with max_tokens"
        )


def _do_units(works: Sequence[Work], workers: int, setup: Setup, console: Console, interruption: Interruption) -> None:
    """Hand out wanted units, in order, until none is wanted and none is under way."""
    waiting = sum(1 for work in works for _ in work.wanted())
    if not waiting:
        return
    by_name = {work.job.source.name: work for work in works}
    with Pool(min(workers or visible_cores(), waiting), setup) as pool, PrepareProgress(works, console) as progress:
        while True:
            interruption.check()
            while pool.idle and (task := _next_task(works)):
                pool.submit(task)
            if not pool.busy:
                return
            for task, message in pool.messages(_TICK_SECONDS):
                work = by_name[task.job.source.name]
                if message[0] == "progress":
                    progress.advance(task, *message[1:])
                else:
                    work.done(*message[1:])
                    progress.finished(task)
            progress.tick()


def _next_task(works: Sequence[Work]) -> Task | None:
    for work in works:
        if found := next(work.wanted(), None):
            unit, limit = found
            work.in_flight.add(unit.index)
            return Task(work.job, unit, limit)
    return None
