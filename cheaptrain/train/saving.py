"""What all saves of a stage share, and the proof that what was written is the live model.

`checkpoint/` writes and compares bytes and knows nothing of models. Here is what makes the bytes a model: the folder
alone, run under transformers' own attention, gives the logits that the live model gave at the moment of the save.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.saver import Saver
from cheaptrain.checkpoint.write import ProofFailed
from cheaptrain.data.tokenizer import TextTokenizer, load_tokenizer
from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.model.build import meta_model
from cheaptrain.model.lora import adapters
from cheaptrain.model.streamed import SavedForm, saved_form, streamed_logits
from cheaptrain.model.twin import plain_twin
from cheaptrain.parallel.processes import Processes
from cheaptrain.parallel.root import Root, forget_gathered
from cheaptrain.recipe.resolve import Resolved
from cheaptrain.recipe.schema import Recipe, Tokenizer
from cheaptrain.train.objective import Compute, row_logits


@dataclass(frozen=True)
class Saving:
    """What all saves of a stage share."""

    saver: Saver
    form: SavedForm | None  # on the main process


def begin_saving(
    run: RunDirectory,
    processes: Processes,
    recipe: Recipe,
    resolved: Resolved,
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
) -> Saving:
    """Make ready to save `model`, laid out or not. Raises PreflightError, on all processes, when its config or its
    tokenizer would not come back from a folder as they are. Collective."""
    forms: list[SavedForm] = []
    processes.on_main(lambda: forms.append(_form(model, tokenizer, recipe)))
    saver = Saver(
        run,
        processes,
        asynchronous=recipe.checkpoint.asynchronous,
        keep_last=recipe.checkpoint.keep_last,
        keeps=resolved.keeps,
    )
    return Saving(saver, forms[0] if forms else None)


def prove_saved(form: SavedForm | None, live: Tensor, ids: Tensor, allowed: float, folder: Path) -> dict[str, Any]:
    """The folder alone gives the `live` logits of `ids`, to within `allowed` of the largest. Together with the slices
    that each process has compared and the files that were compared with `form`, this is the proof."""
    assert form is not None
    try:
        logits = streamed_logits(form, folder, ids)
    except CheaptrainError as error:
        raise ProofFailed(str(error)) from error
    difference = (logits - live).abs().max().item()
    if not difference <= allowed * max(1.0, live.abs().max().item()):
        raise ProofFailed(f"{folder}: logits from the files differ from the live model's by {difference:g}")
    return {"max_abs_difference": difference, "tokens": ids.numel()}


def allowed_difference(processes: Processes, compute: Compute, *, merged: bool = False) -> float:
    """How far logits from the files may be from the live ones, relative to the largest.

    Not at all on one CPU process, where both are the same operations. A GPU rounds otherwise (5e-3: TF32), several
    processes add up in another order, and layers gathered in bf16 compute in it. `merged` adapters are another order of
    adding up as well: the live model computes W x + B A x, the files have W + B A.
    """
    if processes.size == 1 and not merged:
        return 0.0 if compute.device.type == "cpu" else 5e-3
    if compute.dtype != torch.float32:
        return 5e-2
    return 1e-4 if compute.device.type == "cpu" else 5e-3


@torch.no_grad()
def live_logits(root: Root, ids: Tensor, compute: Compute, processes: Processes) -> Tensor:
    """fp32 logits `[1, seq, vocab]` of `ids` `[1, seq]` from the live model, on the CPU. Collective."""
    if processes.size == 1 and not adapters(root.model):
        alone: Tensor = plain_twin(root.model)(ids, use_cache=False).logits
        return alone.float().cpu()
    was_training = root.training
    root.eval()
    try:
        logits: Tensor = root(row_logits, ids, compute)
    finally:
        root.train(was_training)
        forget_gathered(root)
    return logits.float().cpu()


def _form(model: PreTrainedModel, tokenizer: TextTokenizer, recipe: Recipe) -> SavedForm:
    def write_tokenizer(folder: Path) -> None:
        tokenizer.hf.save_pretrained(folder)
        again = load_tokenizer(Tokenizer(path=str(folder)), recipe.data)
        if again.fingerprint != tokenizer.fingerprint:
            raise PreflightError("tokenizer: saved and loaded again it is another one, so no checkpoint could carry it")

    if adapters(model):  # the form is that of the model's own class, without them
        adapted, model = model, meta_model(model.config)
        model.generation_config = adapted.generation_config
    return saved_form(model, write_tokenizer)
