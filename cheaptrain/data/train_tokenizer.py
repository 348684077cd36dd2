"""Training a byte-level BPE tokenizer on the recipe's own sources.

Digits stand alone and bytes are the alphabet, so every text can be written and numbers are read place by place.
Special tokens: end of text, the two that frame a chat turn, and reserved ones for later stages (a thinking mark, a
tool call), so that no later stage has to grow the vocabulary. The folder's name is a hash of everything that
determines the result, input content included; since training must find it without reading the inputs again, a small
file beside it says which folder belongs to what the recipe says.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cheaptrain.data.files import (
    InputHashes,
    canonical_json,
    digest,
    file_sha256,
    temporary_path,
    write_atomically,
)
from cheaptrain.data.sources import Bad, Plan, Unit, plan_source, read_documents, source_spec
from cheaptrain.durable import sync
from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.recipe import schema
from cheaptrain.say import say

END_OF_TEXT = "<|endoftext|>"
RESERVED = 13
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|reserved_{number}|>" for number in range(RESERVED))]
_FORMAT = 1
_DECIDING = ("tokenizer.json", "tokenizer_config.json")
_UNITS_READ = 32  # a source is sampled at the beginnings of so many of its units, evenly spaced


def trained_folder(train: schema.TokenizerTrain, data: schema.Data) -> Path:
    """The folder of a tokenizer that was trained before. Raises PreflightError when it was not."""
    pointer = _pointer(train, data)
    try:
        folder = pointer.parent / json.loads(pointer.read_bytes())["folder"]
    except (OSError, ValueError, KeyError):
        folder = None
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise PreflightError(
            f"the tokenizer of [tokenizer.train] is not in {pointer.parent} yet; run: cheaptrain prepare RECIPE"
        )
    return folder


def train_tokenizer(train: schema.TokenizerTrain, data: schema.Data, hashes: InputHashes, console: Console) -> Path:
    """Train it unless the same was trained before; returns its folder. Raises PreflightError: no text, bad text."""
    sources = [next(source for source in data.sources if source.name == name) for name in train.sources]
    plans = [plan_source(source, data.unit_bytes, hashes) for source in sources]
    inputs = [[unit.identity for unit in plan.units] for plan in plans]
    key = digest({"spec": _spec(train, data), "inputs": inputs})[:12]
    folder = Path(data.dir) / "tokenizers" / key
    if (folder / "tokenizer.json").is_file():
        _refuse_edited(folder)
        say(console, f"tokenizer: {folder}, trained before on the same text")
    else:
        say(console, f"tokenizer: training {train.vocab_size:,} tokens on {', '.join(train.sources)}")
        counts = {"bytes": 0}
        tokenizer = _trained(train.vocab_size, _texts(sources, plans, train.max_bytes, counts))
        if not counts["bytes"]:
            raise PreflightError(f"tokenizer.train: no text in {', '.join(train.sources)}")
        _save(tokenizer, folder, {"spec": _spec(train, data), "text_bytes": counts["bytes"]})
        size = tokenizer.get_vocab_size()
        short = (
            f" (asked for {train.vocab_size:,}: the text has no more pairs to merge)" if size < train.vocab_size else ""
        )
        say(console, f"tokenizer: {folder}, {size:,} tokens{short} from {counts['bytes']:,} bytes")
    pointer = _pointer(train, data)
    content = canonical_json({"folder": folder.name})
    if not pointer.is_file() or pointer.read_bytes() != content:
        write_atomically(pointer, content)
    return folder


def _spec(train: schema.TokenizerTrain, data: schema.Data) -> dict[str, Any]:
    """What the recipe says about it. Names of sources do not matter, their order does."""
    specs = [source_spec(next(source for source in data.sources if source.name == name)) for name in train.sources]
    return {
        "format": _FORMAT, "vocab_size": train.vocab_size, "max_bytes": train.max_bytes, "sources": specs,
        "unit_bytes": data.unit_bytes,
    }  # fmt: skip


def _pointer(train: schema.TokenizerTrain, data: schema.Data) -> Path:
    return Path(data.dir) / "tokenizers" / f"{digest(_spec(train, data))[:12]}.json"


def _texts(sources: list[schema.Source], plans: list[Plan], max_bytes: int, counts: dict[str, int]) -> Iterator[str]:
    """Text of all sources, evenly: what one is too short to give is left to those after it."""
    left = max_bytes
    for number, (source, plan) in enumerate(zip(sources, plans, strict=True)):
        read = 0
        share = left // (len(sources) - number)
        units = _evenly_spaced(plan.units, _UNITS_READ)
        for position, unit in enumerate(units):
            quota = (share - read) // (len(units) - position)
            for text in _unit_texts(source, unit, quota):
                read += len(text.encode())
                yield text
        left -= read
        counts["bytes"] += read


def _unit_texts(source: schema.Source, unit: Unit, quota: int) -> Iterator[str]:
    """Documents from the beginning of a unit; the last one is cut where `quota` bytes are reached."""
    for document in read_documents(source, unit):
        if quota <= 0:
            return
        if isinstance(document, Bad):
            if source.on_bad_line == "error":
                remedy = f'mend it, or set on_bad_line = "skip" for source {source.name!r} to leave such documents out'
                raise PreflightError(f"{document.where}: {document.why}; {remedy}")
            continue
        text = document if isinstance(document, str) else document.text
        raw = text.encode()
        yield text if len(raw) <= quota else raw[:quota].decode(errors="ignore")
        quota -= len(raw)


def _evenly_spaced(units: tuple[Unit, ...], count: int) -> list[Unit]:
    if len(units) <= count:
        return list(units)
    return [units[index * len(units) // count] for index in range(count)]


def _trained(vocab_size: int, texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _refuse_edited(folder: Path) -> None:
    """A tokenizer found where it was written must still be the one that was trained."""
    try:
        hashes = json.loads((folder / "training.json").read_bytes()).get("files", {})
    except (OSError, ValueError, AttributeError):
        hashes = dict.fromkeys(_DECIDING, "not known any more")
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != expected:
            raise PreflightError(
                f"{path}: not as it was trained. To have that back, delete {folder} and run the same command again; to "
                "use an edited tokenizer, copy the folder and name the copy as tokenizer.path"
            )


def _save(tokenizer: Tokenizer, folder: Path, origin: dict[str, Any]) -> None:
    """Write the transformers folder under a temporary name and rename it."""
    from transformers import PreTrainedTokenizerFast

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)
    try:
        hf.save_pretrained(temporary)
    except Exception as error:  # tokenizers raises no OSError when the disk is full, but Exception itself
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheaptrainError(
            f"{folder.parent}: the trained tokenizer cannot be written ({error}); make room, or set data.dir to "
            "another disk, and run the same command again"
        ) from error
    hashes = {name: file_sha256(temporary / name) for name in _DECIDING}
    (temporary / "training.json").write_bytes(canonical_json(origin | {"files": hashes}))
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    try:
        os.rename(temporary, folder)
    except OSError:  # another run was faster; it made the same
        shutil.rmtree(temporary)
        if not (folder / "tokenizer.json").is_file():
            raise
    sync(folder.parent)
