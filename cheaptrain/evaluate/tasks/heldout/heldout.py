"""Bits per byte of held-out text, by source: what a model that has not read it needs to say it.

Metadata `held_out` names the files: `{"web": "web.jsonl.gz", "books": "books.parquet"}`. Each document is scored whole,
from a beginning-of-text token; bytes are those of its UTF-8, so models with different tokenizers compare. The value of
a document is its bits over the mean bytes of the documents of its source: the mean of these values is all bits over all
bytes, and two models compare document by document.

The trap is the error. lm-eval has none for bits per byte, and that of the mean would mostly say that documents differ
in length. A second metric, named as lm-eval names the error of the first, takes its place: the error of a ratio.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from cheaptrain.errors import RecipeError

_METRIC = "bits_per_byte"
_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


class HeldOut(ConfigurableTask):
    """Documents of all sources. Metrics, with errors: `bits_per_byte` of all, `bits_per_byte_NAME` of each source."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._mean_bytes: dict[str, float] = {}

    def build_all_requests(self, **kwargs: Any) -> None:
        super().build_all_requests(**kwargs)
        asked = [instance.doc for instance in self._instances or []]
        total: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for doc in asked:
            for metric in self._metrics_of(doc):
                total[metric] += len(doc["text"].encode())
                count[metric] += 1
        self._mean_bytes = {metric: total[metric] / count[metric] for metric in total}

    def process_results(self, doc: dict[str, Any], results: Sequence[float]) -> dict[str, Any]:
        """The document's value, and its (bits, bytes), for all sources and for its own."""
        size = len(doc["text"].encode())
        bits = -results[0] / math.log(2)
        values: dict[str, Any] = {}
        for metric in self._metrics_of(doc):
            values[metric] = bits / self._mean_bytes[metric]
            values[f"{metric}_stderr"] = (bits, size)
        return values

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        names = [_METRIC, *(f"{_METRIC}_{name}" for name in dict.fromkeys(self.task_docs["source"]))]
        return dict.fromkeys(names, mean) | {f"{name}_stderr": ratio_stderr for name in names}

    def higher_is_better(self) -> dict[str, bool]:
        return dict.fromkeys(self.aggregation(), False)

    def _metrics_of(self, doc: Mapping[str, Any]) -> tuple[str, str]:
        return _METRIC, f"{_METRIC}_{doc['source']}"


def documents(
    held_out: Mapping[str, str] | str | None = None, held_out_documents: int | str | None = None, **_: Any
) -> dict[str, Dataset]:
    """The documents of the files in `held_out` (name → jsonl, parquet or txt, gz or not; column `text`; a txt file is
    one document), at most `held_out_documents` of each file, its first. They take turns: a limit cuts all alike.

    Raises RecipeError when none is named or one cannot be read.
    """
    if isinstance(held_out, str):  # of a command line
        pairs = [pair.partition("=") for pair in held_out.split(",")]
        held_out = {name: file for name, _, file in pairs}
    if not held_out or not all(held_out.values()):
        raise RecipeError('held-out text is needed: metadata {"held_out": {"NAME": "FILE.jsonl"}}, or NAME=FILE,…')
    count = None if held_out_documents is None else int(held_out_documents)
    texts = {name: _texts(name, Path(file), count) for name, file in held_out.items()}
    turns = range(max(map(len, texts.values())))
    rows = [{"source": name, "text": each[turn]} for turn in turns for name, each in texts.items() if turn < len(each)]
    return {"test": Dataset.from_list(rows)}


def ratio_stderr(pairs: Sequence[tuple[float, int]]) -> float:
    """Standard error of (sum of bits) / (sum of bytes), both of documents drawn together; NaN for a single one."""
    count = len(pairs)
    if count < 2:
        return math.nan
    size = sum(each for _, each in pairs)
    ratio = sum(bits for bits, _ in pairs) / size
    squares = sum((bits - ratio * each) ** 2 for bits, each in pairs)
    return math.sqrt(squares * count / (count - 1)) / size


def _texts(name: str, file: Path, count: int | None) -> list[str]:
    kind = _TYPES.get(Path(file.name.removesuffix(".gz")).suffix)
    if kind is None or not file.is_file():
        what = "no such file" if kind else f"none of {', '.join(_TYPES)}"
        raise RecipeError(f"metadata held_out.{name} = {str(file)!r}: {what}")
    options = {"sample_by": "document"} if kind == "text" else {}
    rows = load_dataset(kind, data_files=str(file), split="train", **options)
    if "text" not in rows.column_names:
        raise RecipeError(f"{file} (held_out.{name}): no column `text`, only {', '.join(rows.column_names)}")
    texts = [row["text"] for row in islice(rows, count)]
    if empty := sum(not text for text in texts):
        raise RecipeError(f"{file} (held_out.{name}): {empty} of {len(texts)} documents are empty")
    return texts
