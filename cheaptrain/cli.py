"""The commands: prepare, plan, inspect, launch, doctor, schema."""

import json
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
    from cheaptrain.recipe.load import load_recipe

    paths, overrides = _split(arguments)
    part = _parse_shard(shard)
    for recipe in [load_recipe(path, overrides).recipe for path in paths]:
        if not is_future_checkpoint(recipe.model):
            fetch_model(recipe.model)
        prepare_recipe(recipe, part, console=_console())


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
    from cheaptrain.recipe.load import load_recipe
    from cheaptrain.report.plan import layout_overrides, print_plans

    paths, overrides = _split(arguments)
    overrides += layout_overrides(gpus, layout)
    recipes = [load_recipe(path, overrides) for path in paths]
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


@app.command()
def launch(
    arguments: RecipePaths,
    processes: Annotated[
        int | None, typer.Option(min=1, help="processes on this machine; default: what [parallel] says, else one a GPU")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="machines that train together; run the command on each")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="which of them this is, from 0")] = 0,
    main_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="of the first machine, the same on all")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the command and start nothing")] = False,
) -> None:
    """Train: check the recipes, then start launch/run.py in as many processes as it takes. Ctrl-C saves first."""
    from cheaptrain import launching

    paths, overrides = _split(arguments)
    machines = launching.parse_nodes(nodes, node_rank, main_address)
    code = launching.launch(paths, overrides, _console(), processes=processes, nodes=machines, dry_run=dry_run)
    raise typer.Exit(code)


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


def _parse_shard(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    k, _, n = shard.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise RecipeError(f"--shard {shard}: write k/n with 1 <= k <= n, e.g. 2/8")
    return int(k), int(n)
