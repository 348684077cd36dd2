"""Two ways of compiling layers that training does not use, measured to decide whether it should.

With the kernels for layers: norms, rotations and gated activations of the compiled graph through `cheaptrain_kernels`
instead of what torch.compile makes of them. As CUDA graphs: the kernels of a layer are recorded once and started as
one, which spares the host where layers are small.

CUDA graphs are for steps of one micro-batch. A gradient that a recorded backward pass gives lies in the graph's own
memory, and `.grad` is that tensor, not a copy. The next micro-batch may write there, so torch refuses access to what
the one before gave: as their sources say, 2.11 and 2.13 raise where the gradient would be added up ("... output of
CUDAGraphs that has been overwritten by a subsequent run"), and 2.13 names as the way out gradients that were allocated
beforehand. Where the gradients are gone before the next step, as in `train_step`, nothing is overwritten.

The trap: torch leaves out what it cannot record, and a pass leaves alone what it does not know, and both would be
measured as if they were what they are called. So both are looked after, and are an error.
"""

import cheaptrain_kernels.rms_norm
import cheaptrain_kernels.rope
import cheaptrain_kernels.swiglu  # noqa: F401  # importing them registers their operators
import torch
from torch import fx
from transformers import PreTrainedModel

from cheaptrain.bench.trial import Unavailable
from cheaptrain.bench.works import CUDA_GRAPHS, LAYER_KERNELS, Work
from cheaptrain.model.compiled import compile_layers
from cheaptrain.model.compiled.layer_kernels import Found, LayerKernels, use_kernels
from cheaptrain.model.parts import decoder_layers

# Of a layer. What its first norm is of was added up at the end of the layer before.
EXPECTED = Found(norms=2, sums=1, rotations=2, gates=1)
_RECORDED_BY = 2  # one step to warm up, one to record


def compile_experiment(model: PreTrainedModel, variant: str) -> str:
    """Compile the layers of a model that trains, in place, as `variant` says. Returns a note for the table."""
    if variant == LAYER_KERNELS:
        compile_layers(decoder_layers(model), passes=(_with_kernels,))
        return "layers compiled, with our kernels"
    compile_layers(decoder_layers(model), cuda_graphs=True)
    return "layers compiled, as CUDA graphs"


def refuse_experiment(work: Work, variant: str, device: torch.device, micro_rows: int) -> None:
    """Raise Unavailable for a variant that cannot be measured at this many rows at once."""
    if variant != CUDA_GRAPHS:
        return
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    if micro_rows < work.rows:
        raise Unavailable(
            f"CUDA graphs are for steps of one micro-batch, and {work.rows} rows at once do not fit: gradients in a "
            "graph's memory cannot be added up"
        )


def before_step(variant: str, number: int) -> None:
    """Call before each step, from step 0 on. Raises Unavailable where those so far should be recorded and are not."""
    if variant != CUDA_GRAPHS:
        return
    if number == _RECORDED_BY:
        from torch._dynamo.utils import counters

        did = counters["inductor"]
        if did["cudagraph_skips"] or not did["cudagraph_recorded_non_static_inputs"]:
            raise Unavailable(
                f"layers did not run as CUDA graphs: {did['cudagraph_skips']} left out; TORCH_LOGS=cudagraphs says why"
            )
    torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs gave may be overwritten


def _with_kernels(module: fx.GraphModule) -> None:
    operators = torch.ops.cheaptrain
    kernels = LayerKernels(operators.rms_norm.default, operators.rope.default, operators.swiglu.default)
    if (found := use_kernels(module, kernels)) != EXPECTED:
        raise Unavailable(f"a layer's graph has {found} for our kernels instead of {EXPECTED}")
