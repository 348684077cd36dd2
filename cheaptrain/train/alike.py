"""Whether all processes begin with the same.

Each reads recipe, tokens, tokenizer and weights for itself, on another machine perhaps, from another disk. Where those
differ nothing fails: the processes train one model on two mixtures, or two models as if they were one.
"""

import torch
import transformers
from transformers import PreTrainedModel

import cheaptrain
from cheaptrain.durable import fingerprint
from cheaptrain.errors import PreflightError
from cheaptrain.parallel.processes import Processes
from cheaptrain.train.survey import Survey


def refuse_other_beginnings(survey: Survey, model: PreTrainedModel, processes: Processes) -> None:
    """Raise PreflightError, on all processes, naming what is not everywhere as on the main one. `model` is not laid
    out yet. Collective."""
    if processes.size == 1:
        return
    here = {
        "the recipe": fingerprint(survey.loaded.recipe.model_dump(mode="json")),
        "the tokenizer": survey.tokenizer.fingerprint,
        **{f"the prepared data of {name}": manifest.fingerprint for name, manifest in survey.manifests.items()},
        "the length of the run": f"{survey.resolved.steps} steps, {survey.resolved.tokens} tokens",
        "the starting weights": str(
            [int(torch.hash_tensor(tensor).view(torch.int64)) for tensor in model.state_dict().values()]
        ),
        "the version of cheaptrain, torch or transformers": " ".join(
            (cheaptrain.__version__, str(torch.__version__), transformers.__version__)
        ),
    }
    everywhere = processes.all_of(here)
    for what, found in everywhere[0].items():
        if others := [rank for rank, theirs in enumerate(everywhere) if theirs.get(what) != found]:
            raise PreflightError(
                f"{what} is not the same on rank {', '.join(map(str, others[:8]))} as on rank 0. All machines must "
                "read the same files, from a file system that they share, with the same packages installed"
            )
