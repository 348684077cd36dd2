"""A GGUF file → a transformers folder that can be a teacher, a starting point, or somebody to talk to.

    python -m cheaptrain.model.gguf MODEL.gguf[.zst] FOLDER [--tokenizer FOLDER] [--dtype bf16]

transformers reads the file and unpacks its blocks; here the result is made a folder like any other, and proven: what is
written gives the logits of what was read, and they are finite. The trap is the tokenizer. GGUF stores tokens and
merges, but names the rule that cuts a text before them by a word that not every reader knows; with another rule the
same text becomes other ids, and nothing fails. `--tokenizer` takes the original one, which must have the same tokens
under the same ids.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_gguf_available

from cheaptrain.console import lasting_console
from cheaptrain.durable import sync_tree
from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.exits import guarded
from cheaptrain.model.saving import load_saved, no_progress_bars
from cheaptrain.say import say

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
QUESTION = "What is the capital of France?"
BEGINNING = "The capital of France is"
_ANSWER_TOKENS = 24
_TEMPORARY = ".converting-"


def convert(file: Path, out: Path, *, tokenizer: Path | None, dtype: str, console: Console) -> None:
    """Write the model of `file` (.gguf, or .gguf.zst) to the new folder `out`: safetensors in `dtype`, config,
    generation config, tokenizer and chat template; print what it weighs and how it goes on from a text.

    `tokenizer`: a folder to take the tokenizer from, instead of the file. Raises PreflightError for what cannot be
    converted, CheaptrainError when what was written is not what was read; then nothing is left at `out`.
    """
    _refuse(file, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=out.parent) as work, no_progress_bars():
        plain = _unpacked(file, Path(work))
        model = _read_model(plain)
        hf = _read_tokenizer(plain, tokenizer)
        ends = _ends(model, hf, plain)
        folder = Path(work) / "folder"
        _round(model, DTYPES[dtype])
        _write(model, hf, ends, folder)
        written = load_saved(folder)
        ids = _prompt(hf)
        _round(model, torch.float32)
        live, again = _logits(model, ids), _logits(written, ids)
        difference = (live - again).abs().max().item()
        if not (torch.isfinite(again).all() and difference == 0):
            raise CheaptrainError(f"{file}: the folder gives other logits than the file (by {difference:g}); not kept")
        sync_tree(folder)
        os.rename(folder, out)
    parameters = sum(parameter.numel() for parameter in written.parameters())
    say(console, f"{out}: {type(written).__name__}, {parameters:,} parameters in {dtype}, {len(hf):,} tokens")
    if tokenizer is None:
        say(console, "tokenizer: as transformers reads it from the file; --tokenizer takes the original one", "yellow")
    say(console, f"ends at {', '.join(repr(hf.convert_ids_to_tokens(end)) for end in ends)}; greedy:")
    generate: Any = written.generate
    answer = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    say(console, str(hf.decode(answer[0])), "dim")


def _refuse(file: Path, out: Path) -> None:
    if not is_gguf_available():
        raise PreflightError("reading GGUF needs the package gguf: pip install 'cheaptrain[gguf]'")
    if not file.is_file():
        raise PreflightError(f"{file}: there is no such file")
    if not file.name.endswith((".gguf", ".gguf.zst")):
        raise PreflightError(f"{file}: give a .gguf or a .gguf.zst")
    if out.exists() or out.is_symlink():
        raise PreflightError(f"{out} exists; give a new folder, or move it away: nothing is overwritten")


def _unpacked(file: Path, work: Path) -> Path:
    """The file itself, or what is in it when it is compressed."""
    if file.suffix != ".zst":
        return file.absolute()
    plain = work / file.stem
    try:
        with pa.input_stream(file, compression="zstd") as packed, plain.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 22)
    except OSError as error:
        raise PreflightError(f"{file} cannot be unpacked into {work}: {' '.join(str(error).split())}") from error
    return plain


def _read_model(file: Path) -> PreTrainedModel:
    """The dense fp32 model. It keeps no trace of how it was stored: as it comes it refuses to be saved."""
    from transformers import GgufConfig

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and gguf raise errors of many kinds for a file they do not know
        raise PreflightError(f"{file}: transformers cannot read it: {_one_line(error)}") from error
    stored, report = loaded
    # What it does not find it fills with random numbers, and what it has no place for it drops.
    if missing := sorted(map(str, report["missing_keys"])):
        raise PreflightError(f"{file}: {len(missing)} weights of the model are not in it: {', '.join(missing[:3])}")
    held, used = _numbers_in(file), sum(parameter.numel() for parameter in stored.parameters())
    if held != used:
        raise PreflightError(
            f"{file}: it holds {held:,} weights, and transformers makes a model of {used:,} of it: some were dropped"
        )
    fields = {key: value for key, value in stored.config.to_dict().items() if key not in _OF_THE_FILE}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        type(stored.config).from_dict(fields), dtype=torch.float32
    )
    model.load_state_dict(stored.state_dict(), assign=True)
    model.tie_weights()
    return model.eval()


_OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")


def _read_tokenizer(file: Path, folder: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, once it is known to be that of the model; without one, that of the file."""
    if folder is None:
        try:
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        except Exception as error:
            raise PreflightError(
                f"{file}: its tokenizer cannot be read ({_one_line(error)}); give the original one with --tokenizer"
            ) from error
    try:
        hf: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PreflightError(f"--tokenizer {folder} cannot be read: {_one_line(error)}") from error
    theirs = _field(file, "tokenizer.ggml.tokens") or []
    ours = {number: token for token, number in hf.get_vocab().items()}
    other = [number for number, token in enumerate(theirs) if number in ours and ours[number] != token]
    if other or max(ours) >= max(len(theirs), 1):
        first = f"{other[0]} is {theirs[other[0]]!r} there and {ours[other[0]]!r} here" if other else "it has more"
        raise PreflightError(
            f"--tokenizer {folder} is not the one of {file.name}: {len(other):,} of {len(theirs):,} tokens differ; "
            f"{first}"
        )
    return hf


def _ends(model: PreTrainedModel, hf: PreTrainedTokenizerBase, file: Path) -> list[int]:
    """The ids that end an answer: end of text and, where the file names another, end of turn."""
    named = [hf.eos_token_id, model.config.eos_token_id, *(_field(file, f"tokenizer.ggml.{n}_token_id") for n in _ENDS)]
    ends = list(dict.fromkeys(int(end) for end in named if isinstance(end, int) and 0 <= end < len(hf)))
    if not ends:
        raise PreflightError(f"{file}: it names no end of text, so the model would never stop; give --tokenizer")
    return ends


_ENDS = ("eos", "eot", "eom")


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The weights in `dtype`, and nothing else: `model.to` would round the frequencies of the positions as well, which
    no checkpoint holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _write(model: PreTrainedModel, hf: PreTrainedTokenizerBase, ends: list[int], folder: Path) -> None:
    model.config.eos_token_id = ends[0]
    model.generation_config = GenerationConfig(
        eos_token_id=ends if len(ends) > 1 else ends[0],
        bos_token_id=model.config.bos_token_id,
        pad_token_id=hf.pad_token_id if hf.pad_token_id is not None else ends[0],
    )
    model.save_pretrained(folder)
    hf.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone


def _prompt(hf: PreTrainedTokenizerBase) -> Tensor:
    """A question in the model's own template, or without one the beginning of a sentence. `[1, tokens]`"""
    if hf.chat_template is None:
        return torch.tensor([hf(BEGINNING)["input_ids"]])
    messages = [{"role": "user", "content": QUESTION}]
    return torch.tensor([hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def _field(file: Path, name: str) -> Any:
    """A field of the file's header; None when it is not there."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get(name)
    return None if field is None else field.contents()


def _numbers_in(file: Path) -> int:
    """How many weights the file holds; tables of positions are computed, not learned."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors if not tensor.name.startswith("rope_"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(prog="python -m cheaptrain.model.gguf", description="GGUF to transformers")
    arguments.add_argument("file", type=Path, help="MODEL.gguf or MODEL.gguf.zst")
    arguments.add_argument("out", type=Path, help="folder to write; must not exist")
    arguments.add_argument("--tokenizer", type=Path, help="folder of the original tokenizer; default: the file's")
    arguments.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: bf16)")
    given = arguments.parse_args()
    convert(given.file, given.out, tokenizer=given.tokenizer, dtype=given.dtype, console=lasting_console(emoji=False))


if __name__ == "__main__":
    guarded(main)
