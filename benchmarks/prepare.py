"""How fast text becomes token shards: ours, the bare tokenizers library, and `datasets.map`, side by side in one run.

    python benchmarks/prepare.py [--max-bytes 200MB] [--rounds 2] [--tokenizer FOLDER]

All three encode the same documents with the same tokenizer, on one core each, and are judged by tokens per CPU-second,
so that a busy machine does not decide. `cheaptrain prepare` is charged with everything it does, in the command and its
worker: starting up, reading parquet, hashing input and output, splitting, writing, fsync. Bare tokenizers get the
texts in memory and keep nothing: the ceiling. Rounds alternate between the three, and the best of each counts.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import glob
import io
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from results import report
from rich.console import Console
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cheaptrain.data.prepare import prepare_recipe  # noqa: E402
from cheaptrain.data.tokenizer import TextTokenizer, load_tokenizer  # noqa: E402
from cheaptrain.recipe.quantities import parse_bytes  # noqa: E402
from cheaptrain.recipe.schema import Recipe  # noqa: E402

DATA = HERE.parent.parent / "shared" / "data"
BATCH = 1000  # documents; the default of datasets.map


def main() -> None:
    """Run all three and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-bytes", type=parse_bytes, default=200_000_000, help="text to encode in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokenizer", help="folder or hub id; default: GPT-2's if it is there, else one is trained")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        texts, name, files = corpus(Path(scratch), options.max_bytes)
        spec: dict[str, Any] = {"path": options.tokenizer or str(DATA / "tokenizers" / "gpt2")}
        if options.tokenizer is None and not Path(spec["path"]).is_dir():
            spec = {"train": {"vocab_size": 16_384, "sources": ["text"], "max_bytes": 5_000_000}}
        recipe = make_recipe(spec, files, Path(scratch) / "first")
        prepare_recipe(recipe, console=Console(file=io.StringIO()))  # also trains the tokenizer, if there is none
        tokenizer = load_tokenizer(recipe.tokenizer, recipe.data)
        if "train" in spec:
            spec = {"path": str(tokenizer.hf.name_or_path)}
        seconds: dict[str, list[float]] = {"cheaptrain prepare": [], "tokenizers, bare": [], "datasets.map": []}
        tokens = 0
        for number in range(options.rounds):
            folder = Path(scratch) / f"round{number}"
            tokens, spent = bare(tokenizer, texts)
            seconds["tokenizers, bare"].append(spent)
            seconds["cheaptrain prepare"].append(ours(make_recipe(spec, files, folder), tokens + len(texts)))
            seconds["datasets.map"].append(datasets_map(tokenizer, files, folder))
    write(name, len(texts), sum(len(text.encode()) for text in texts), tokens, seconds)


def corpus(scratch: Path, max_bytes: int) -> tuple[list[str], str, list[str]]:
    """Texts, what they are, and the parquet files that hold exactly these."""
    found = sorted(glob.glob(str(DATA / "pretrain" / "*.parquet")))
    texts: list[str] = []
    if found:
        name = "every file of shared/data/pretrain, in equal parts"
        for path in found:
            texts += within(pq.read_table(path, columns=["text"])["text"].to_pylist(), max_bytes // len(found))
    else:
        name = "Python source of the standard library"
        sources = sorted(Path(os.__file__).parent.glob("*.py"))
        texts = within([path.read_text(encoding="utf-8", errors="ignore") for path in sources], max_bytes)
    import pyarrow as pa

    path = scratch / "corpus.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)
    return texts, name, [str(path)]


def within(texts: list[str], max_bytes: int) -> list[str]:
    """The first of `texts`, up to so many bytes."""
    chosen = []
    for text in texts:
        max_bytes -= len(text.encode())
        if max_bytes < 0:
            break
        if text:
            chosen.append(text)
    return chosen


def make_recipe(tokenizer: dict[str, Any], files: list[str], folder: Path) -> Recipe:
    """One source, one worker."""
    source = {"name": "text", "weight": 1.0, "files": files}
    return Recipe.model_validate(
        {
            "run": {"dir": str(folder)},
            "tokenizer": tokenizer,
            "model": {"preset": "any"},
            "data": {"dir": str(folder / "data"), "seq_len": 1024, "workers": 1, "sources": [source]},
            "train": {"tokens": 1024, "global_batch_tokens": 1024, "lr": 1e-3},
        }
    )


def cpu_seconds() -> float:
    """User and system time of this process and of the children it has waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def ours(recipe: Recipe, expected_tokens: int) -> float:
    """CPU-seconds of preparing, all included."""
    started = cpu_seconds()
    (manifest,) = prepare_recipe(recipe, console=Console(file=io.StringIO()))
    spent = cpu_seconds() - started
    assert manifest.train.tokens + manifest.val.tokens == expected_tokens, "not the same tokens"
    return spent


def bare(tokenizer: TextTokenizer, texts: list[str]) -> tuple[int, float]:
    """(tokens, CPU-seconds) of the tokenizers library alone."""
    # A fresh one each time: the library remembers words, and a second round would not be the work of the first.
    backend = Tokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    tokens = 0
    started = time.process_time()
    for start in range(0, len(texts), BATCH):
        encodings = backend.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(map(len, encodings))
    spent = time.process_time() - started
    return tokens, spent


def datasets_map(tokenizer: TextTokenizer, files: list[str], folder: Path) -> float:
    """CPU-seconds of the usual way: load_dataset, then map with the transformers tokenizer."""
    import datasets

    datasets.disable_progress_bars()

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer.hf(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"ids": [[*document, tokenizer.eot_id] for document in ids], "tokens": [len(d) + 1 for d in ids]}

    started = cpu_seconds()
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "datasets"))
    dataset.map(encode, batched=True, batch_size=BATCH, remove_columns=["text"])
    return cpu_seconds() - started


def write(name: str, documents: int, text_bytes: int, tokens: int, seconds: dict[str, list[float]]) -> None:
    """Print the table and write the figures."""
    ceiling = tokens / min(seconds["tokenizers, bare"])
    speeds = {method: tokens / min(spent) for method, spent in seconds.items()}
    rounds = len(seconds["tokenizers, bare"])
    what = f"{name}, {documents:,} documents, {text_bytes / 1e6:,.0f} MB, {tokens:,} tokens; best of {rounds}"
    report(
        "prepare",
        title=f"Text to shards: {what}",
        header=["method", "tokens per CPU-second", "share of bare tokenizers"],
        rows=[[method, f"{speed:,.0f}", f"{speed / ceiling:.1%}"] for method, speed in speeds.items()],
        data={"tokens": tokens, "bytes": text_bytes, "documents": documents, "cpu_seconds": seconds},
    )


if __name__ == "__main__":
    main()
