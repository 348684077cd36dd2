"""The commands beside training: prepare, plan, inspect, schema."""

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
    help="Take a small language model through its whole life. Training itself: accelerate launch launch/run.py RECIPE",
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
def plan(arguments: RecipePaths) -> None:
    """Say what a run would take: steps, tokens, memory, time, disk and money. Starts nothing."""
    from cheaptrain.recipe.load import load_recipe
    from cheaptrain.report.plan import print_plans

    paths, overrides = _split(arguments)
    print_plans([load_recipe(path, overrides) for path in paths], _console())


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
