"""Whether two models mean the same by a token id, asked of every id before a teacher's word on it is believed.

A teacher says how likely each id is. If it means another token by that id, the student learns nonsense and nothing
fails: shapes fit, the loss falls. So the tokenizers are compared token by token. Tokens that the teacher alone has
(those of a chat format, say) are harmless: they lie beyond the student's, whose tokens alone are scored. A token that
the student alone has is not: the teacher has no embedding to read it with.
"""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from cheaptrain.errors import PreflightError

_SHOWN = 5


def is_same(ours: Mapping[str, int], theirs: Mapping[str, int]) -> bool:
    """Whether each id of `ours` (token → id) is the same token in `theirs`."""
    return ours.items() <= theirs.items()


def refuse_other_tokenizer(ours: Mapping[str, int], theirs: Mapping[str, int], where: str) -> None:
    """Raise PreflightError, showing the first ids, unless each id of `ours` (token → id) is the same token in `theirs`,
    the tokenizer of the teacher `where`."""
    known = {number: token for token, number in theirs.items()}
    differing = [(number, token) for token, number in ours.items() if known.get(number) != token]
    if not differing:
        return
    differing.sort()
    shown = "; ".join(
        f"{number} is {token!r} here and {repr(known[number]) if number in known else 'nothing'} there"
        for number, token in differing[:_SHOWN]
    )
    beyond = [number for number, _ in differing if number not in known]
    if len(beyond) == len(differing):
        what = f"the teacher has no embedding for {len(beyond):,} tokens of this recipe's tokenizer"
        remedy = "take a teacher that was trained with them, or data that needs none of them (a [chat] adds its own)"
    else:
        what = f"{len(differing):,} of {len(ours):,} ids mean something else to the teacher"
        remedy = f'set tokenizer.path = "{where}", or take a teacher that has this tokenizer'
    raise PreflightError(f"distill.teacher: {where}: {what}: {shown}; {remedy}")


def vocabulary_in(folder: Path) -> dict[str, int]:
    """Token → id of the tokenizer that lies beside a model, added tokens included. Raises PreflightError."""
    file = folder / "tokenizer.json"
    try:
        return dict(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
    except Exception as error:  # the library raises plain Exception
        raise PreflightError(
            f"distill.teacher: {folder} holds no tokenizer.json that can be read ({error}), so nobody knows which "
            "tokens it speaks of; put its tokenizer there (save_pretrained)"
        ) from error
