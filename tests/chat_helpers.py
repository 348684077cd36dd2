"""What the tests of conversations share: tokenizers of several kinds, rendering both ways, the real data."""

import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_helpers import save_tokenizer, text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cheaptrain.chat.conversation import Conversation, Turn, exchange, from_row
from cheaptrain.chat.rendering import Renderer
from cheaptrain.data.encode import Encoded, Encoder
from cheaptrain.data.tokenizer import TextTokenizer, open_tokenizer, with_template
from cheaptrain.recipe.schema import Chat, Recipe

SHARED = Path(__file__).parents[2] / "shared" / "data"
TEMPLATES = ("chatml", "smollm2", "llama3", "plain")
LONG = 1 << 20
CALL = {"name": "weather", "arguments": {"city": "Zürich"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

CONVERSATIONS = (
    exchange("What is 1 plus 22?", "The sum is 23."),
    Conversation((Turn("system", "Be brief. 🙂"), *exchange("naïve\nfox", "Ελληνικά\n\nwords").turns)),
    Conversation(
        (
            Turn("user", "\n\n  Hi \n"),
            Turn("assistant", "Hello.\n"),
            Turn("user", ""),
            Turn("assistant", "Still there?"),
            Turn("user", "bye"),
        )
    ),
    Conversation(
        (
            Turn("user", "Weather?"),
            Turn("assistant", "", (CALL, {"name": "time", "arguments": '{"zone": 1}'})),
            Turn("tool", '{"sun": true}'),
            Turn("tool", "12"),
            Turn("assistant", "Sunny.", (CALL,)),
        ),
        (TOOL, {"name": "time"}),
    ),
    Conversation((Turn("system", ""), Turn("assistant", "I begin."), Turn("user", "why"), Turn("assistant", "So."))),
)


@cache
def backend(kind: str) -> str:
    """A small byte-level tokenizer: cut as GPT-2's, as Llama 3's, or as GPT-2's with single digits."""
    llama = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cut: list[Any] = {
        "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama3": [
            pre_tokenizers.Split(Regex(llama), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = [f"{text(i)}!\n\n user: Hello.\nassistant:  {i}\n\n\n\nand" for i in range(60)]
    tokenizer.train_from_iterator(lines, trainer)
    return str(tokenizer.to_str())


def tokenizer_in(folder: Path, kind: str = "gpt2") -> TextTokenizer:
    hf = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend(kind)), eos_token="<|endoftext|>")
    hf.save_pretrained(folder)
    return open_tokenizer(str(folder))


def rendered(tokenizer: TextTokenizer, conversations: Any, seq_len: int = LONG) -> Encoded:
    spec = tokenizer.chat_spec(seq_len)
    assert spec is not None
    return Renderer(Encoder(tokenizer.encoder_spec()), spec).encode(list(conversations))


def one_by_one(encoded: Encoded) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, mask) of each conversation."""
    assert encoded.mask is not None
    ends = np.cumsum(encoded.lengths)
    for stop, length in zip(ends, encoded.lengths, strict=True):
        yield encoded.ids[stop - length : stop].tolist(), encoded.mask[stop - length : stop].tolist()


def applied(tokenizer: TextTokenizer, conversation: Conversation) -> tuple[list[int], list[int]]:
    """(ids, mask) as transformers gives them."""
    found: Any = tokenizer.hf.apply_chat_template(
        conversation.messages(), tools=[dict(tool) for tool in conversation.tools] or None, tokenize=True,
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    return found["input_ids"], found["assistant_masks"]


def sft_files() -> list[Path]:
    files = sorted((SHARED / "sft").glob("*.jsonl.gz"))
    if not files:
        pytest.skip(f"{SHARED / 'sft'} is not there")
    return files


def real_conversations(each: int | None) -> Iterator[Conversation]:
    """Of every file the first `each`, or all."""
    for file in sft_files():
        with gzip.open(file, "rb") as lines:
            for number, line in enumerate(lines):
                if number == each:
                    break
                yield from_row(json.loads(line), {"messages": "messages"})


def templated(folder: Path, name: str, kind: str = "gpt2", system: str | None = None) -> TextTokenizer:
    return with_template(tokenizer_in(folder, kind), Chat(template=name, system=system))


def chat_recipe(root: Path, *sources: dict[str, Any], chat: dict[str, Any] | None = None, **data: Any) -> Recipe:
    folder = root / "tokenizer"
    path = str(folder if folder.is_dir() else save_tokenizer(folder))
    content: dict[str, Any] = {"workers": 1, "seq_len": 256, "dir": str(root / "data"), **data}
    content["sources"] = [{"name": f"source{i}", "weight": 1.0, "format": "chat"} | s for i, s in enumerate(sources)]
    train = {"tokens": 1000, "global_batch_tokens": 256, "lr": 1e-3, "objective": "assistant_only"}
    return Recipe.model_validate(
        {
            "run": {"dir": "out"}, "tokenizer": {"path": path}, "model": {"preset": "x"}, "data": content,
            "train": train, "chat": chat or {},
        }
    )  # fmt: skip


def write_chats(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered_chats(count: int, turns: int = 1) -> list[dict[str, Any]]:
    """Rows of `messages`, another conversation each."""
    rows = []
    for i in range(count):
        messages = []
        for turn in range(turns):
            messages.append({"role": "user", "content": f"question {i} {turn}: " + text(i, 8)})
            messages.append({"role": "assistant", "content": f"answer {i} {turn}: " + text(i + 1, 12)})
        rows.append({"messages": messages})
    return rows
