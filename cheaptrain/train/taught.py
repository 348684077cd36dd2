"""The chat template that the weights of a stage were taught before, held against the one it teaches them.

A model that learned to answer after `<|im_start|>assistant` is half lost when the next stage writes `Assistant:`, and
nothing fails: the loss only starts higher. Templates are compared by what they write, not by name or text, because two
spellings of one template are common. The trap is the default: who leaves `chat.template` out means "as before", so
where that is not as before it is refused; who names another is taken at their word, and it is said.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from cheaptrain.checkpoint.verify import RECIPE
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.train.survey import Survey, written_by

_TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "R"},
    {"role": "assistant", "content": "B"},
]


@dataclass(frozen=True)
class OtherTemplate:
    """A stage that teaches another template than its weights know. `meant`: the recipe names it."""

    meant: bool
    text: str


def other_template(survey: Survey, earlier: Sequence[Survey]) -> OtherTemplate | None:
    """What there is to say when the conversations of `survey` are written otherwise than those its weights were taught
    by an earlier stage of the command, or by whoever trained the folder it starts from."""
    recipe, hf = survey.loaded.recipe, survey.tokenizer.hf
    known = _taught(survey.loaded, earlier)
    if recipe.chat is None or known is None or not isinstance(hf.chat_template, str):
        return None
    name, template = known
    ours, theirs = _written(hf, hf.chat_template), _written(hf, template)
    if ours == theirs:
        return None
    meant = survey.loaded.provenance.get("chat.template", "default") != "default"
    text = (
        f"{survey.loaded.path}: chat.template = {recipe.chat.template!r} writes {_shown(ours)}, and the weights were "
        f"taught {_shown(theirs)} by {name}"
    )
    if not meant:
        text += '. Name the template that is meant in [chat]: that one, or "tokenizer" for the one that came with them'
    return OtherTemplate(meant, text)


def _taught(loaded: LoadedRecipe, earlier: Sequence[Survey]) -> tuple[str, str] | None:
    """Who taught the weights a stage starts from their last template, and that template."""
    start = loaded.recipe.model.init_from
    writer = written_by(start, earlier)
    if writer is not None:
        template = writer.tokenizer.hf.chat_template
        if writer.loaded.recipe.chat is None or not isinstance(template, str):
            return _taught(writer.loaded, earlier)
        return f"{writer.loaded.path} (chat.template = {writer.loaded.recipe.chat.template!r})", template
    return _taught_in(Path(start)) if start is not None else None


def _taught_in(folder: Path) -> tuple[str, str] | None:
    """The same of a folder. A checkpoint of ours carries the template of its tokenizer even where no stage taught it,
    so its recipe is asked; of anyone else's, a template means that it was used."""
    recipe = _json(folder / RECIPE).get("recipe")
    if isinstance(recipe, dict) and not recipe.get("chat"):
        start = (recipe.get("model") or {}).get("init_from")
        return _taught_in(Path(start)) if start else None
    template: Any
    try:
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        template = _json(folder / "tokenizer_config.json").get("chat_template")
    return (str(folder), template) if isinstance(template, str) else None


def _written(hf: PreTrainedTokenizerBase, template: str) -> str | None:
    """What a template makes of a short talk, without its system turn where it takes none."""
    for messages in (_TALK, _TALK[1:]):
        try:
            return str(hf.apply_chat_template(messages, chat_template=template, tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError):
            continue
    return None


def _shown(text: str | None) -> str:
    return "nothing that can be shown" if text is None else repr(text if len(text) < 60 else f"{text[:56]}...")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
