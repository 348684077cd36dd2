"""The commands, each a few lines: what they do stands in the modules they import when they are asked for."""

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cheaptrain.console import lasting_console
from cheaptrain.errors import RecipeError
from cheaptrain.exits import guarded

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Take a small language model through its whole life. Training itself: cheaptrain launch RECIPE",
)

RecipePaths = Annotated[list[str], typer.Argument(metavar="RECIPE… [key=value…]", help="recipes, and keys to override")]


@app.command()
def prepare(
    arguments: RecipePaths,
    shard: Annotated[
        str | None, typer.Option(help="do part k of n only, e.g. 2/8, to share the work among machines")
    ] = None,
) -> None:
    """Turn the sources of recipes into token shards. Can be killed and run again at any time."""
    from cheaptrain.data.prepare import prepare_recipe
    from cheaptrain.model.hub import fetch_model, is_future_checkpoint
    from cheaptrain.recipe.load import load_recipes
    from cheaptrain.recipe.parents import teacher_model, written_in

    paths, overrides = _split(arguments)
    part = _parse_shard(shard)
    recipes = load_recipes(paths, overrides)
    for recipe in [loaded.recipe for loaded in recipes]:
        for model in (recipe.model, *([teacher_model(recipe.distill)] if recipe.distill else [])):
            # "phase1/final" looks like a hub id, and is what another of these recipes writes.
            if not is_future_checkpoint(model) and not any(written_in(model.init_from, other) for other in recipes):
                fetch_model(model)
        prepare_recipe(recipe, part, console=_console())
        if part is None and (recipe.eval.tasks or recipe.eval.light):
            from cheaptrain.train.evaluating import fetch_tasks

            fetch_tasks(recipe)


@app.command()
def plan(
    arguments: RecipePaths,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="processes to plan for, one a GPU; without --layout the cheapest that fits is proposed"
        ),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="AXIS=N,…", help="instead of [parallel], e.g. dp_shard=8,tp=8")
    ] = None,
) -> None:
    """Say what a run would take: steps, tokens, memory, time, disk and money, on any number of GPUs. Starts nothing."""
    from cheaptrain.recipe.load import load_recipes
    from cheaptrain.recipe.parents import in_order
    from cheaptrain.report.plan import layout_overrides, print_plans

    paths, overrides = _split(arguments)
    overrides += layout_overrides(gpus, layout)
    recipes = in_order(load_recipes(paths, overrides))
    print_plans(recipes, _console(), gpus=gpus is not None, propose=gpus is not None and layout is None)


@app.command()
def inspect(
    arguments: RecipePaths,
    rows: Annotated[int, typer.Option(min=1, help="packed rows to show")] = 3,
    start: Annotated[int, typer.Option(min=0, help="global row to start at")] = 0,
) -> None:
    """Show packed rows as the model will read them: documents, positions, end-of-text, mask."""
    from cheaptrain.recipe.load import load_recipe
    from cheaptrain.report.inspect import print_rows

    paths, overrides = _split(arguments)
    for path in paths:
        print_rows(load_recipe(path, overrides), _console(), first_row=start, count=rows)


ProcessesHere = Annotated[
    int | None, typer.Option(min=1, help="processes on this machine; default: what [parallel] says, else one a GPU")
]
NodeCount = Annotated[int, typer.Option(min=1, help="machines that train together; run the command on each")]
NodeRank = Annotated[int, typer.Option(min=0, help="which of them this is, from 0")]
MainAddress = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="of the first machine, the same on all")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the command and start nothing")]
Seeds = Annotated[
    str | None, typer.Option(metavar="1,2,…", help="once for each seed, in run folders that end in -seed1, -seed2, …")
]


@app.command()
def launch(
    arguments: RecipePaths,
    processes: ProcessesHere = None,
    nodes: NodeCount = 1,
    node_rank: NodeRank = 0,
    main_address: MainAddress = None,
    seeds: Seeds = None,
    dry_run: DryRun = False,
) -> None:
    """Train: check the recipes, then start launch/run.py in as many processes as it takes. Ctrl-C saves first."""
    from cheaptrain import launching

    paths, overrides = _split(arguments)
    machines = launching.parse_nodes(nodes, node_rank, main_address)
    for of_seed in _of_seeds(paths, overrides, seeds):
        code = launching.launch(of_seed, overrides, _console(), processes=processes, nodes=machines, dry_run=dry_run)
        if code:
            raise typer.Exit(code)


@app.command()
def chain(
    arguments: RecipePaths,
    processes: ProcessesHere = None,
    nodes: NodeCount = 1,
    node_rank: NodeRank = 0,
    main_address: MainAddress = None,
    prepare_first: Annotated[bool, typer.Option("--prepare", help="prepare the data of all stages first")] = False,
    seeds: Seeds = None,
    dry_run: DryRun = False,
) -> None:
    """Train several stages, each after what it is made from. Finished ones are skipped; all are checked against each
    other before the first."""
    from cheaptrain.recipe.load import load_recipes
    from cheaptrain.recipe.parents import in_order

    paths, overrides = _split(arguments)
    ordered = [str(loaded.path) for loaded in in_order(load_recipes(paths, overrides))]
    if prepare_first and dry_run:
        typer.echo(shlex.join(["cheaptrain", "prepare", *arguments]))
    elif prepare_first:
        prepare(arguments)
    launch([*ordered, *overrides], processes, nodes, node_rank, main_address, seeds, dry_run)


@app.command()
def status(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE|RUN]… [key=value…]", help="recipes or run folders; default: all in outputs/"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Show the stages: done, running, failed, stale, and where their checkpoints are."""
    from cheaptrain.report.status_view import print_status

    print_status(what or [], _console(), as_json=as_json)


@app.command()
def report(
    what: Annotated[
        list[str],
        typer.Argument(metavar="RUN|RECIPE…", help="run folders, folders with runs, or recipes; several are a chain"),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where to write it; default: report/ in the last run")
    ] = None,
) -> None:
    """Write what was asked and what happened as one HTML page, with pictures and report.json. Reads runs only."""
    from cheaptrain.report.write import report_on

    typer.echo(report_on(what, output))


@app.command(name="distill-cache")
def distill_cache(
    arguments: RecipePaths,
    shard: Annotated[str | None, typer.Option(help="do part k of n only, e.g. 2/8")] = None,
) -> None:
    """Run the teacher once over the rows a recipe will read and keep what it says. Can be killed and run again."""
    from cheaptrain.recipe.load import load_recipe
    from cheaptrain.train.distill_cache import fill_cache

    paths, overrides = _split(arguments)
    part = _parse_shard(shard)
    for path in paths:
        fill_cache(load_recipe(path, overrides), part, _console())


@app.command(name="eval")
def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(metavar="PATH…|RECIPE…", help="checkpoints, runs, hub ids; recipes, and keys to override"),
    ],
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="instead of eval.tasks")] = None,
    task_folder: Annotated[str | None, typer.Option(metavar="DIR", help="folder of lm-eval task files besides")] = None,
    data_folder: Annotated[str | None, typer.Option(metavar="DIR", help="where their data_files count from")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="handed to the tasks; may be repeated")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="worked examples, for all tasks")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many questions of each task")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="requests at once")] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template/--no-chat-template", help="ask in the checkpoint's chat template")
    ] = None,
    system: Annotated[str | None, typer.Option(help="system turn, or text before each prompt")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the weights: auto, float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="e.g. cuda:1 or cpu")] = None,
    processes: Annotated[int, typer.Option(min=1, help="each takes whole tasks, and a GPU if there are")] = 1,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="keep the results there")] = None,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="all of a run, and its learning curve")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="score also what is scored already")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Score checkpoints in tasks of lm-eval. What was scored before is shown; can be killed and run again."""
    from cheaptrain.evaluate.command import Options
    from cheaptrain.evaluate.command import evaluate as score

    given = {
        "task_folder": task_folder,
        "data_folder": data_folder,
        "limit": limit,
        "batch_size": batch_size,
        "chat_template": chat_template,
        "system": system,
        "dtype": dtype,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    options = Options(
        tasks, shots, changes, _pairs(metadata or []), output, all_checkpoints, again, device, processes, as_json
    )
    score(what, options, _console())


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(metavar="A B [C…]", help="runs, checkpoints, recipes; seeds: RUN (for RUN-seed1 …), NAME=R1,R2"),
    ],
    axis: Annotated[str, typer.Option(metavar="tokens|flops|time", help="of the curves")] = "tokens",
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="write the page and the JSON there")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Hold runs against the first of them: recipes, curves, and scores with what chance alone would have done."""
    from cheaptrain.compare.logged import parse_axis
    from cheaptrain.compare.view import print_comparison

    print_comparison(what, parse_axis(axis), output, _console(), as_json=as_json)


Against = Annotated[str | None, typer.Option(metavar="PATH", help="another checkpoint, side by side")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time")]
SystemTurn = Annotated[str | None, typer.Option(help="system turn of the conversation")]
NewTokens = Annotated[int, typer.Option(min=1, help="longest answer, in tokens")]


@app.command()
def chat(
    path: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="e.g. outputs/quickstart/sft_reasoning/final")],
    against: Against = None,
    system: SystemTurn = None,
    temperature: Temperature = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1: all tokens")] = 1.0,
    max_new_tokens: NewTokens = 512,
    seed: Annotated[int | None, typer.Option(help="the same answers each time")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="keep the conversation there, as JSON")] = None,
) -> None:
    """Talk to a checkpoint in the terminal. /help lists what can be typed besides text."""
    from cheaptrain.talk.terminal import Settings
    from cheaptrain.talk.terminal import chat as talk

    talk(path, against, Settings(system, temperature, top_p, max_new_tokens, seed, save), _console())


@app.command()
def serve(
    path: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="e.g. outputs/quickstart/sft_reasoning/final")],
    against: Against = None,
    host: Annotated[str, typer.Option(help="another address than loopback lets others in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
) -> None:
    """A page to talk to a checkpoint, and an OpenAI-compatible /v1/chat/completions behind it."""
    from cheaptrain.talk.server import serve as serve_checkpoints

    serve_checkpoints(path, against, host, port, _console())


@app.command()
def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE…] [key=value…]", help="recipes whose needs to check, and keys to override"),
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="processes to try out together")] = None,
) -> None:
    """Check this machine before a long run: GPUs, attention, disk, memory, and how the processes hear each other."""
    from cheaptrain.doctor import examine
    from cheaptrain.recipe.load import load_recipe

    paths, overrides = _split(arguments) if arguments else ([], [])
    examine([load_recipe(path, overrides) for path in paths], _console(), processes=processes)


@app.command()
def bench(
    works: Annotated[str | None, typer.Option(metavar="A,B", help="these works only; --list names them")] = None,
    variants: Annotated[str | None, typer.Option(metavar='"A;B"', help="these variants only")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="begin nothing that would not be done by then")] = 8.5,
    rounds: Annotated[int, typer.Option(min=1, help="samples of each to add, as far as the time goes")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="of a process on a CPU; 0: torch's own choice")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="keep the samples in DIR/<machine>/")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="name works and variants, measure nothing")] = False,
    profile: Annotated[
        str | None, typer.Option(metavar="WORK[:VARIANT]", help="show where a step goes instead")
    ] = None,
) -> None:
    """Measure throughput on this machine, beside what people would otherwise use."""
    from cheaptrain.bench.command import Options
    from cheaptrain.bench.command import bench as measure

    measure(Options(works, variants, minutes, rounds, threads, output, show_list, profile), _console())


@app.command()
def schema(out: Annotated[Path | None, typer.Option(help="file to write to; default: print")] = None) -> None:
    """Write the JSON schema of recipes, for completion and checks in an editor."""
    from cheaptrain.recipe.schema_json import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


def main() -> None:
    """Entry point of the `cheaptrain` command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is there; why: `launching.set_defaults`
    guarded(lambda: app())


def _console() -> Console:
    # With emoji `recipe.toml:100: ...` is printed with a picture in place of the line.
    return lasting_console(emoji=False)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    from cheaptrain.recipe.overrides import split_arguments

    paths, overrides = split_arguments(arguments)
    if not paths:
        raise RecipeError("name at least one recipe, e.g. recipes/quickstart/phase1.toml")
    return paths, overrides


def _of_seeds(paths: list[str], overrides: list[str], seeds: str | None) -> list[list[str]]:
    """The recipes to train one after the other: for each seed those that were written for it, or as they are."""
    from cheaptrain.recipe.seeds import parse_seeds, seeded_recipes

    return [paths] if seeds is None else [seeded_recipes(paths, overrides, seed) for seed in parse_seeds(seeds)]


def _pairs(given: list[str]) -> dict[str, str]:
    """`--metadata KEY=VALUE`, each."""
    for text in given:
        if not text.partition("=")[0] or "=" not in text:
            raise RecipeError(f"--metadata {text}: write KEY=VALUE, e.g. core=data/bench/core")
    return {text.partition("=")[0]: text.partition("=")[2] for text in given}


def _parse_shard(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    k, _, n = shard.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise RecipeError(f"--shard {shard}: write k/n with 1 <= k <= n, e.g. 2/8")
    return int(k), int(n)
