"""Decoder layers compiled by torch.compile, for the fixed shapes of training.

Each layer on its own: one graph serves all of them, in seconds, and it ran faster than the whole model in one piece.
Only what trains goes through it. Rows of other lengths, in evaluation and in samples, would compile every layer again,
so a forward pass without gradients takes the plain forward of the same layer, with the same weights; a frozen teacher,
which never has gradients and always the same rows, says so.

The trap it avoids: torch gives up compiling a function after some variants and runs it as it stands, at half the speed,
with one line in a log. Here that is an error. What may change from batch to batch is therefore known: how documents
are packed (one graph each) and how many documents there are (a dimension of any size).

Graphs are kept on disk (`use_compile_cache`), so that the next start of the same recipe finds them.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from cheaptrain.errors import CheaptrainError
from cheaptrain.model.compiled.merging import merge_linears

# Of one layer's forward. A student and a teacher of one class, with two kinds of layers and two kinds of packing, make
# eight, which is also where torch gives up by itself.
MOST_GRAPHS = 16

Pass = Callable[[fx.GraphModule], object]  # changes a graph in place, before there is a backward pass


class CompileCounts(NamedTuple):
    """What torch.compile did in this process so far: graphs (of a forward and a backward pass each), how many of them
    were found on disk, and the seconds both took."""

    graphs: int
    from_cache: int
    seconds: float


def compile_layers(
    layers: Iterable[nn.Module],
    *,
    frozen: bool = False,
    merge: bool | None = None,
    passes: tuple[Pass, ...] = (),
    cuda_graphs: bool = False,
) -> None:
    """Compile the forward of each layer, in place; what hooks do around it stays outside.

    Without gradients the plain forward runs, unless the layers are `frozen`: then it is always the compiled one.
    `merge`: linear layers of one input become one (`merging.py`); by default where there is a backward pass: the
    weights of a frozen layer would only be copied. `passes`: what else is done to each graph, in this order; functions
    of a module, or layers compiled apart share no graph. `cuda_graphs`: on a GPU the kernels of each graph are recorded
    and started as one, and what cannot be recorded is an error; what a step's graphs gave is gone after
    `torch.compiler.cudagraph_mark_step_begin()`. A forward pass raises CheaptrainError where a layer would have to be
    compiled again and again.
    """
    from torch._dynamo import config

    use_compile_cache()
    merges = not frozen if merge is None else merge
    backend = _backend(((merge_linears,) if merges else ()) + passes, cuda_graphs)
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    config.fail_on_recompile_limit_hit = True
    for layer in layers:
        compiled = torch.compile(layer.forward, backend=backend, dynamic=False)
        layer.forward = _dispatch(layer.forward, compiled, type(layer).__name__, frozen)


def compile_counts() -> CompileCounts:
    """Counted over all that this process compiled."""
    if "torch._dynamo" not in sys.modules:  # a second to import, for nothing
        return CompileCounts(0, 0, 0.0)
    from torch._dynamo.utils import calculate_time_spent, counters

    return CompileCounts(
        graphs=counters["stats"]["unique_graphs"],
        from_cache=counters["aot_autograd"]["autograd_cache_hit"],
        seconds=calculate_time_spent().get("total_wall_time", 0.0),
    )


def forget_graphs() -> None:
    """Drop the graphs of all models that this process compiled. For the beginning of another stage: torch counts graphs
    by the code of a layer's class, and those of models that are gone would be counted against the ones to come."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def use_compile_cache() -> Path:
    """Keep compiled graphs in `$XDG_CACHE_HOME/cheaptrain/compiled` (`~/.cache` without it), unless
    TORCHINDUCTOR_CACHE_DIR says where; returns where that is. torch's own place is under /tmp, which a restart of the
    machine or of its container empties. A folder that cannot be written is warned of, and torch's own is used."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    asked = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if asked and Path(asked) != Path(default_cache_dir()):  # torch itself puts its default there
        return Path(asked)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cheaptrain" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        warnings.warn(
            f"compiled layers are kept in {default_cache_dir()}, because {error}; set TORCHINDUCTOR_CACHE_DIR to keep "
            "them elsewhere",
            stacklevel=2,
        )
        return Path(default_cache_dir())
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return folder


def lower(
    module: fx.GraphModule, inputs: list[Any], config_patches: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """What torch.compile does by default with a graph, forward and backward."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, inputs, config_patches=config_patches)  # type: ignore[return-value]


@functools.cache  # torch keeps the graphs of each backend apart: a new one for each layer would be a graph for each
def _backend(passes: tuple[Pass, ...], cuda_graphs: bool) -> Callable[..., Any]:
    def compile_graph(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        for change in passes:
            change(module)
        return lower(module, inputs, _CUDA_GRAPHS) if cuda_graphs else lower(module, inputs)

    return compile_graph


# Without the second, torch says in a log that it could not, and goes on without.
_CUDA_GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}


def _dispatch(plain: Callable[..., Any], compiled: Callable[..., Any], name: str, frozen: bool) -> Callable[..., Any]:
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    @functools.wraps(plain)
    def forward(*arguments: Any, **named: Any) -> Any:
        if not frozen and not torch.is_grad_enabled():
            return plain(*arguments, **named)
        boundaries = named.get("packing_boundaries")
        if boundaries is not None:  # as long as the next power of two above the number of documents
            torch._dynamo.maybe_mark_dynamic(boundaries, 0)
        try:
            return compiled(*arguments, **named)
        except FailOnRecompileLimitHit as error:
            raise CheaptrainError(
                f"{name} was compiled {config.recompile_limit} times and a batch asks for one more: rows of changing "
                "shapes, or layers that differ from each other. TORCH_LOGS=recompiles names what changes; "
                'train.compile = "off" trains without compiling'
            ) from error

    return forward
