"""`parallelize`: a model that one process could train, laid out over all of them.

The order matters: tensors are split first, then layers recompute, are compiled, and are sharded, each step around the
one before. The traps are in the gradients. FSDP averages over processes, and the loss here is already divided by the
tokens of the whole batch: every sharded module must sum instead, and the setting does not reach its children. The
embedding and a head tied to it must lie in one group. And what is rounded to bf16 is the same with or without
processes: the matrices of layers are gathered in it, which is the rounding autocast does anyway; embedding, head and
all vectors (`vectors.py`) stay fp32, and with them the residual stream.
"""

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cheaptrain.model import compiled
from cheaptrain.model.parts import decoder_layers
from cheaptrain.parallel.root import Root
from cheaptrain.parallel.tensor import split_tensors
from cheaptrain.parallel.vectors import vectors


def parallelize(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    compile_layers: bool = False,
) -> Root:
    """Lay `model` out over `mesh` (see mesh.py), in place, and return the module to call.

    `dtype` is what layers compute in (autocast does the casting; sharded weights are gathered in it). `recompute`:
    layers keep their input only and run again in the backward pass. `compile_layers`: see `model/compiled`; where
    nothing of the model trains, a forward pass without gradients is compiled too. The model must hold the same weights
    on every process, on the CPU or the mesh's device. A frozen teacher goes through here as well. Raises PreflightError
    where the model cannot be split.
    """
    split_tensors(model, mesh["tp"])
    layers = decoder_layers(model)
    # The forward itself, not the call: what hooks do around it (sharding, splitting rows) stays outside of both.
    # And recomputing goes around the compiled layer: inside, it cannot handle split tensors.
    if compile_layers:
        compiled.compile_layers(layers, frozen=not any(p.requires_grad for p in model.parameters()))
    if recompute:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    root = Root(model)
    if mesh.size() == 1:
        return root
    over = _data_mesh(mesh)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    kept = set(vectors(model))
    for vector in kept:
        if vector.device.type != mesh.device_type and not vector.is_meta:
            vector.data = vector.data.to(mesh.device_type)
    for layer in layers:
        fully_shard(layer, mesh=over, mp_policy=policy, ignored_params=kept)
    fully_shard(
        root,
        mesh=over,
        mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        reshard_after_forward=False,
        ignored_params=kept,
    )
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Without it gloo refuses and NCCL has been seen to zero bf16 sums (pytorch #190747).
            module.set_force_sum_reduction_for_comms(True)
    return root


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes a model is sharded over, and replicated over where there are copies. Processes that share a row hold
    different shards of the weights like any others."""
    if mesh["cp"].size() == 1:
        shard = "dp_shard"
    else:
        shard = "dp_shard_cp"
        mesh["dp_shard", "cp"]._flatten(shard)
    return mesh["dp_replicate", shard] if mesh["dp_replicate"].size() > 1 else mesh[shard]
