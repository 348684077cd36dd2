"""What the tests of preparing share: a small tokenizer, small recipes, and all bytes of a prepared source."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cheaptrain.data.manifest import Manifest
from cheaptrain.data.open import open_stream
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.tokenizer import TextTokenizer, open_tokenizer
from cheaptrain.recipe.schema import Recipe

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "counting",
    "1",
    "22",
    "333",
    "stars",
    "and",
    "naïve",
    "Ελληνικά",
    "words",
]


def text(number: int, words: int = 40) -> str:
    """A small document, another for each number."""
    return f"document {number}: " + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def write_jsonl(path: Path, documents: range, words: int = 40) -> Path:
    path.write_text("".join(json.dumps({"text": text(i, words), "id": i}) + "\n" for i in documents))
    return path


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(i) for i in range(30)], trainer)
    return str(tokenizer.to_str())


def save_tokenizer(folder: Path, **options: Any) -> Path:
    backend = Tokenizer.from_str(_backend())
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, **({"eos_token": "<|endoftext|>"} | options))
    hf.save_pretrained(folder)
    return folder


def recipe(root: Path, *sources: dict[str, Any], tokenizer: dict[str, Any] | None = None, **data: Any) -> Recipe:
    if tokenizer is None:
        folder = root / "tokenizer"
        tokenizer = {"path": str(folder if folder.is_dir() else save_tokenizer(folder))}
    content: dict[str, Any] = {"workers": 1, "seq_len": 64, "dir": str(root / "data"), **data}
    content["sources"] = [{"name": f"source{i}", "weight": 1.0} | source for i, source in enumerate(sources)]
    train = {"tokens": 1000, "global_batch_tokens": 64, "lr": 1e-3}
    return Recipe.model_validate(
        {"run": {"dir": "out"}, "tokenizer": tokenizer, "model": {"preset": "x"}, "data": content, "train": train}
    )


def quiet() -> Console:
    """A console whose output the test reads with `.file.getvalue()`."""
    import io

    return Console(file=io.StringIO(), width=120)


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def prepare(root: Path, *sources: dict[str, Any], **data: Any) -> tuple[Manifest, str]:
    """Prepare one source (the first) and return its manifest and what was printed."""
    console = quiet()
    manifests = prepare_recipe(recipe(root, *sources, **data), console=console)
    return manifests[0], said(console)


def tokenizer_of(root: Path) -> TextTokenizer:
    return open_tokenizer(str(root / "tokenizer"))


def documents_of(manifest: Manifest, tokenizer: TextTokenizer, split: str = "train") -> list[str]:
    """The documents of a prepared source as text."""
    stream = open_stream(manifest, split)  # type: ignore[arg-type]
    starts = [0, *stream.document_starts(0, stream.tokens).tolist(), stream.tokens]
    texts = []
    for start, stop in pairwise(starts):
        ids = stream.read(start, stop).tolist()
        if ids:
            assert ids[-1] == tokenizer.eot_id and tokenizer.eot_id not in ids[:-1]
            texts.append(tokenizer.hf.backend_tokenizer.decode(ids[:-1], skip_special_tokens=False))
    return texts


def all_bytes(directory: Path) -> dict[str, bytes]:
    """Every file of a prepared source but its locks."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if not path.name.startswith(".lock")}
