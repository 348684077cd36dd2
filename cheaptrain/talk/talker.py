"""A checkpoint that can be talked to: any transformers folder, ours or not, or a hub id that is on this machine.

Everything is taken from the checkpoint: its template, and at which tokens it stops. The trap is a model that never
stops although it says when it is done: a template ends a turn with a token that generation_config.json does not name.
So where the template ends an assistant's turn is looked up in the template itself, and added. Sampling settings of a
checkpoint (temperature, repetition penalty) are left behind and told: two checkpoints are compared under the same ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cheaptrain.checkpoint.verify import MANIFEST, verify_checkpoint
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.saving import no_progress_bars

_PROBE = "probe of the end of a turn"


@dataclass(frozen=True, eq=False)
class Talker:
    """A model ready to answer.

    `name`: the path or id it was asked for by; `ends`: ids that end an answer; `empty`: ids that stand for no token,
    as where a vocabulary was padded; `positions`: the most tokens the model can read, prompt and answer together (None:
    it names no limit).
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    empty: tuple[int, ...]
    positions: int | None
    notes: tuple[str, ...] = ()

    @property
    def has_template(self) -> bool:
        """Whether it takes turns; without a template it only goes on with a text."""
        return self.tokenizer.chat_template is not None


def load_talkers(path: str, against: str | None, say: Callable[[str], None]) -> list[Talker]:
    """The checkpoint at `path` and, if named, the one to put beside it; what is worth knowing of them goes to `say`.

    Raises RecipeError or PreflightError with what is wrong, before any weights are read where possible.
    """
    folders = [find_folder(name) for name in ([path] if against is None else [path, against])]
    if len(folders) == 2 and folders[0].resolve() == folders[1].resolve():
        raise RecipeError(f"--against {against}: this is {path} itself; name another checkpoint")
    talkers = []
    for name, folder in zip([path, against], folders, strict=False):
        talker = load_talker(str(name), folder)
        talkers.append(talker)
        size = sum(parameter.numel() for parameter in talker.model.parameters())
        room = f"{talker.positions:,} positions" if talker.positions else "no limit of positions"
        say(f"{name}: {size:,} parameters, {room}, on {talker.model.device}")
        for note in talker.notes:
            say(f"{name}: {note}")
    return talkers


def find_folder(name: str) -> Path:
    """The folder behind a path or a hub id. Nothing is fetched. Raises RecipeError when there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        final = folder / "final"
        hint = f"did you mean {final}?" if (final / "config.json").is_file() else "it is no transformers checkpoint"
        raise RecipeError(f"{name}: there is no config.json in it; {hint}")
    if folder.exists():
        raise RecipeError(f"{name} is a file; give the folder of the checkpoint")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise RecipeError(f"{name}: there is no such folder")
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{name}: there is no such folder, and no model of this id in the hub's cache on this machine; "
            f"fetch it with: hf download {name}"
        ) from error


def load_talker(name: str, folder: Path) -> Talker:
    """The checkpoint in `folder`, in evaluation mode: on the accelerator in the precision it was saved in, else on the
    CPU in fp32. Raises PreflightError when it is not whole or has no usable tokenizer."""
    if (folder / MANIFEST).is_file() and (problems := verify_checkpoint(folder, state=False)):
        raise PreflightError(f"{name}: not what was written: {problems[0]}; take another checkpoint")
    tokenizer = _tokenizer(name, folder)
    notes = []
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32 if device is None else "auto",
                local_files_only=True,
                trust_remote_code=False,  # not said, it would ask on the terminal
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise PreflightError(f"{name}: the model cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise PreflightError(f"{name}: {len(missing)} weights are missing ({missing[0]}, …); take another checkpoint")
    if unexpected := sorted(report["unexpected_keys"]):
        notes.append(f"{len(unexpected)} of its weights have no place in the model ({unexpected[0]}, …)")
    known, rows = set(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if (size := max(known) + 1) > rows:
        raise PreflightError(f"{name}: its tokenizer has {size:,} tokens and its model only {rows:,}: not a pair")
    ends = _ends(model, tokenizer)
    notes += _neutral_generation(model)
    if tokenizer.chat_template is None:
        notes.append("has no chat template: it goes on with the whole text so far, turns one below the other")
    if not ends:
        notes.append("names no token that ends an answer: every answer goes on to its limit")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    empty = tuple(index for index in range(rows) if index not in known)
    return Talker(name, model.to(device or "cpu").eval(), tokenizer, ends, empty, positions, tuple(notes))


def _tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    remedy = "it needs tokenizer.json and tokenizer_config.json in the same folder"
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")) and not (folder / "vocab.json").is_file():
        raise PreflightError(f"{name}: there is no tokenizer in it: {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a foreign folder makes the library raise
        reason = " ".join(str(error).split())[:300]
        raise PreflightError(f"{name}: its tokenizer cannot be loaded: {remedy} ({reason})") from error
    if not tokenizer.is_fast:
        raise PreflightError(f"{name}: its tokenizer is a slow (pure Python) one: {remedy}")
    return tokenizer


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: what the checkpoint generates to, its end of text, and its template's end of turn."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = list(named) if isinstance(named, list) else [named]
    found += [tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    return tuple(sorted({end for end in found if end is not None}))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token that the template puts right behind what an assistant said."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError):
        return None  # what is wrong with the template is told when a conversation is rendered with it
    after = text.rpartition(_PROBE)[2].lstrip()
    tokens = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    return next((tokenizer.added_tokens_encoder[token] for token in tokens if after.startswith(token)), None)


def _neutral_generation(model: PreTrainedModel) -> list[str]:
    """Forget how the checkpoint would sample by itself; a note for each setting that would have changed answers."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    if own is None:
        return []
    kept = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache", "_from_model_config"}
    dropped = {key: value for key, value in own.to_diff_dict().items() if key not in kept}
    told = ", ".join(f"{key} = {value}" for key, value in sorted(dropped.items()))
    return [f"its own sampling settings are not used: {told}"] if dropped else []
