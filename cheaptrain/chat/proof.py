"""Before anything is prepared: the template on this tokenizer, our parts against transformers' `apply_chat_template`.

What training reads is made by parts; what people and programs that load the checkpoint do is `apply_chat_template`. A
few conversations are rendered both ways and must give the same ids and the same mask (where a header merges with any
answer: the same text), one beginning of text, and a supervised end in every answer. The trap: a tokenizer may put
spaces of its own before every part (Metaspace), or its special tokens may swallow white space around them; neither
fails, and every answer would be trained on other tokens than are generated.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from cheaptrain.chat.conversation import Conversation, Turn, exchange
from cheaptrain.chat.rendering import Renderer
from cheaptrain.data.encode import Encoder
from cheaptrain.errors import PreflightError

if TYPE_CHECKING:
    from cheaptrain.data.tokenizer import TextTokenizer

_LONG = 1 << 20  # tokens; the probes are short
PROBES = (
    exchange("What is 12 plus 30?", "It is 42."),
    Conversation(
        (
            Turn("user", "Hello!\nWho is there?"), Turn("assistant", "Me.\n\nAnd you?"),
            Turn("user", "  Only\tme "), Turn("assistant", "Good."),
        )
    ),
)  # fmt: skip
_WITH_SYSTEM = Conversation((Turn("system", "Be brief."), *PROBES[0].turns))


def prove_template(tokenizer: "TextTokenizer") -> None:
    """Raises PreflightError when the ids or the masks of the two ways differ."""
    spec = tokenizer.chat_spec(_LONG)
    assert spec is not None
    renderer = Renderer(Encoder(tokenizer.encoder_spec()), spec)
    for probe in (*PROBES, _WITH_SYSTEM):
        ours = renderer.encode([probe])
        assert ours.mask is not None and ours.merging is not None
        ids = ours.ids.tolist()
        theirs: Any = tokenizer.hf.apply_chat_template(
            probe.messages(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        same = theirs["input_ids"] == ids and theirs["assistant_masks"] == ours.mask.tolist()
        if ours.merging[0]:  # other tokens, but the same text
            same = tokenizer.hf.decode(theirs["input_ids"]) == tokenizer.hf.decode(ids)
        if not same:
            raise PreflightError(
                f"chat.template: with this tokenizer, parts encoded one by one and the text as a whole have other "
                f"tokens: {tokenizer.hf.convert_ids_to_tokens(ids)} and "
                f"{tokenizer.hf.convert_ids_to_tokens(theirs['input_ids'])}. Choose another template or tokenizer"
            )
        answers = [turn for turn in probe.turns if turn.role == "assistant"]
        ends = np.flatnonzero((ours.ids == tokenizer.end_of_turn_id) & (ours.mask == 1))
        if len(ends) != len(answers):
            raise PreflightError(
                f"chat.template: {len(ends)} of {len(answers)} answers end with a supervised end of turn; the model "
                "would not learn to stop"
            )
        beginning = tokenizer.hf.bos_token_id
        if ids[:2] == [beginning] * 2:
            raise PreflightError("chat.template: the beginning of text stands twice; take one out of the template")
