"""A tree of values → a typed recipe, or everything that is wrong with it in words.

Unknown keys are found by walking the schema, wrong values by pydantic. pydantic stops at the keys: whether keys go
together is only asked once every key is right. So that one attempt still shows everything, wrong values are replaced by
good ones and the recipe is read again; what is then said about a replaced value is dropped.
"""

from collections.abc import Sequence
from copy import deepcopy
from math import isfinite
from typing import Any

from pydantic import ValidationError

from cheaptrain.recipe.errors import COMMAND_LINE, Problem
from cheaptrain.recipe.keys import Key, dotted_names, free_value, is_free, key_at, keys
from cheaptrain.recipe.schema import Clash, Recipe
from cheaptrain.recipe.suggest import unknown_key
from cheaptrain.recipe.tree import Node, Steps, at, dotted, leaves, plain, put
from cheaptrain.recipe.words import how_telling, missing_text, wrong_value


def check(tree: Node, files: Sequence[str], problems: list[Problem]) -> Recipe | None:
    """The recipe; None, and `problems` longer, when it is not right. `files`: in the order in which they count."""
    known, meant = _without_unknown(tree, problems)
    problems.extend(_unwritable(known))
    values, replaced = plain(known), set[Steps]()
    recipe: Recipe | None = None
    for attempt in range(4):
        try:
            recipe = Recipe.model_validate(values)
            break
        except ValidationError as failure:
            errors = failure.errors()
        for error in errors:
            if error["type"] == "clash":
                table = _steps(known, error["loc"])
                for clash in error["ctx"]["clashes"]:
                    if clash.one_of and any(dotted_names((*table, name)) in meant for name in clash.keys):
                        continue  # given under another name, which has been said
                    problems.extend(_clash(known, table, clash, replaced, files))
            elif attempt == 0:
                problems.extend(_wrong(known, error, errors, meant))
        for error in errors:
            _replace(values, known, error, replaced)
    assert recipe is not None or problems, "a recipe is refused for a reason"
    return recipe if not problems else None


def _without_unknown(tree: Node, problems: list[Problem]) -> tuple[Node, set[str]]:
    """The tree with the keys that the schema has, and the dotted keys that the others were probably meant for."""
    meant: set[str] = set()
    known = tree
    for steps in reversed(list(_unknown(tree, ()))):  # back to front: a table is judged before its keys
        node = at(tree, steps)
        assert node is not None and isinstance(steps[-1], str)
        known = put(known, steps, None)
        table = dotted_names(steps[:-1])
        suggestion = unknown_key(table, steps[-1], is_table=isinstance(node.value, dict))
        meant |= {suggestion.meant} if suggestion.meant else set()
        problems.append(Problem(node.origin, dotted(tree, steps), suggestion.message))
        for inner, leaf in leaves(node) if isinstance(node.value, dict) else ():
            guess = unknown_key(dotted_names((*steps, *inner[:-1])), str(inner[-1]), home=suggestion.home)
            meant |= {guess.meant} if guess.meant else set()
            if guess.meant and guess.meant != f"{suggestion.home}.{inner[-1]}":  # else right once its table is
                problems.append(Problem(leaf.origin, dotted(tree, (*steps, *inner)), guess.message))
    return known, meant


def _unknown(node: Node, steps: Steps) -> list[Steps]:
    """Places of keys that the schema does not have, outermost only."""
    key = key_at(steps)
    if isinstance(node.value, list):
        return [found for i, child in enumerate(node.value) for found in _unknown(child, (*steps, i))]
    if not isinstance(node.value, dict) or (key is not None and key.section is None):
        return []
    prefix = f"{key.name}." if key else ""
    found: list[Steps] = []
    for name, child in node.value.items():
        known = "." not in name and prefix + name in keys()  # "train.lr" in quotes is one key, and none of ours
        found += _unknown(child, (*steps, name)) if known else [(*steps, name)]
    return found


def _unwritable(tree: Node) -> list[Problem]:
    """Values in free tables that could not be kept in recipe.json: dates, infinities."""
    return [
        Problem(leaf.origin, dotted(tree, steps), f"{leaf.value} cannot be kept in recipe.json: give text or a number")
        for steps, leaf in leaves(tree)
        if (key := key_at(steps)) is not None
        and is_free(key)
        and free_value(key) is Any
        and (
            not isinstance(leaf.value, str | int | float)
            or (isinstance(leaf.value, float) and not isfinite(leaf.value))
        )
    ]


def _wrong(known: Node, error: Any, errors: Sequence[Any], meant: set[str]) -> list[Problem]:
    steps = _steps(known, error["loc"])
    if error["type"] == "missing":
        steps = (*steps, error["loc"][-1])
        key = key_at(steps)
        assert key is not None
        if key.name in meant:
            return []
        return [Problem(_nearest(known, steps).origin, dotted(known, steps), missing_text(key))]
    key = key_at(steps)
    if key is None:
        return [Problem(known.origin, "", error["msg"])]
    # A union complains once for each of its types. The sentence names them all; what is wrong inside a list says more,
    # and so does a limit.
    field = _field_steps(steps, key)
    others = [_steps(known, other["loc"]) for other in errors]
    if steps == field and any(len(other) > len(field) and other[: len(field)] == field for other in others):
        return []
    of_this = [other for other, place in zip(errors, others, strict=True) if place == steps]
    if error is not max(of_this, key=lambda other: how_telling(other["type"])):
        return []
    node = at(known, steps)
    assert node is not None
    return [Problem(node.origin, dotted(known, steps), wrong_value(key, error, plain(node), inside=steps != field))]


def _clash(known: Node, table: Steps, clash: Clash, replaced: set[Steps], files: Sequence[str]) -> list[Problem]:
    """One problem, at the key that came last; it names where the other keys were set."""
    places = [(*table, *(int(part) if part.isdigit() else part for part in name.split("."))) for name in clash.keys]
    if any(place[: len(gone)] == gone for place in places for gone in replaced):
        return []
    order = {file: index for index, file in enumerate([*files, COMMAND_LINE.file])}
    nodes = [(dotted(known, place), node) for place in places if (node := at(known, place))]
    if not nodes:
        return [Problem(_nearest(known, places[0]).origin, dotted(known, table), clash.message)]
    last = max((node for _, node in nodes), key=lambda node: (order[node.origin.file], node.origin.line))
    message = clash.message
    if len(nodes) > 1:
        message += f" ({', '.join(f'{key} in {node.origin}' for key, node in nodes)})"
    droppable = nodes if clash.one_of else nodes[:1]
    inherited = [key for key, node in droppable if order[node.origin.file] < order[last.origin.file]]
    if inherited and last.origin == COMMAND_LINE:
        message += f"; to drop what the recipe says: {' '.join(f'{key}=unset' for key in inherited)}"
    elif inherited:
        quoted = ", ".join(f'"{key}"' for key in inherited)
        message += f"; to drop what is inherited, put unset = [{quoted}] at the top of {last.origin.file}"
    return [Problem(last.origin, dotted(known, table), message)]


def _replace(values: Any, known: Node, error: Any, replaced: set[Steps]) -> None:
    """Put a good value in the place of a wrong one, so that the rest can be judged."""
    steps = _steps(known, error["loc"])
    if error["type"] == "missing":
        steps = (*steps, error["loc"][-1])
    key = key_at(steps)
    if key is None:
        return
    if not (key.listed and error["type"] == "clash"):
        steps = _field_steps(steps, key)
    if not isinstance(steps[-1], int):
        replaced.add(steps)
    holder: Any = values
    for step in steps[:-1]:
        try:
            holder = holder[step]
        except (LookupError, TypeError):
            return  # inside something that was itself replaced
    examples = deepcopy(key.field.examples)
    if isinstance(steps[-1], int):
        assert examples
        if not isinstance(holder, list) or steps[-1] >= len(holder):
            return  # the list was itself replaced
        # Its name stays, when it has one: other keys refer to it.
        name = at(known, (*steps, "name"))
        kept = name.value if name and isinstance(name.value, str) else f"source-{steps[-1]}"
        holder[steps[-1]] = examples[0][0] | {"name": kept}
        assert key.section is not None
        replaced.update((*steps, leaf) for leaf in key.section.model_fields if leaf != "name")
    elif steps[-1] == "name":
        holder["name"] = f"source-{steps[-2]}"
    elif examples:
        holder[steps[-1]] = examples[0]
    elif isinstance(holder, dict):
        holder.pop(steps[-1], None)


def _steps(tree: Node, loc: Sequence[str | int]) -> Steps:
    """pydantic's location as steps in the tree; it also names types of unions, which are no steps."""
    steps: Steps = ()
    for part in loc:
        if at(tree, (*steps, part)) is not None:
            steps = (*steps, part)
    return steps


def _field_steps(steps: Steps, key: Key) -> Steps:
    """The steps cut to the key itself, without elements of its list."""
    names = 0
    for index, step in enumerate(steps):
        names += isinstance(step, str)
        if names == key.name.count(".") + 1:
            return steps[: index + 1]
    return steps


def _nearest(tree: Node, steps: Steps) -> Node:
    """The innermost table on the way that is there."""
    while steps:
        node = at(tree, steps)
        if node is not None:
            return node
        steps = steps[:-1]
    return tree
