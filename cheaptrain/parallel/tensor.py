"""Tensor parallelism: each matrix of a layer split over the `tp` axis, each row's tokens too where they are not needed
whole.

Queries, keys, values, gate and up are split by their outputs, the way back by its inputs, embedding and head by the
vocabulary. Between layers each process holds its share of the tokens (sequence parallelism), so norms and residuals
are not repeated. The embedding's output stays whole: transformers reads the row's length off it.

Two traps, both silent. torch hands on the embedding's output before its sum over processes has arrived, and a compiled
layer that takes such a tensor loses the embedding's gradient (pytorch #184980, #179506): it is waited for here. And a
norm inside a head sees one process's heads only, so its gradient must be summed over all of them.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedConfig, PreTrainedModel

from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.model.parts import decoder, decoder_layers, layer_parts

_WHOLE, _TOKENS = Replicate(), Shard(1)


def check_tensor_parallel(config: PreTrainedConfig, tp: int) -> None:
    """Raise PreflightError when a model of `config` cannot be split over `tp` processes, saying what does not
    divide."""
    if tp == 1:
        return
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    for what, size in (("attention heads", heads), ("key/value heads", shared), ("vocabulary", config.vocab_size)):
        if size % tp:
            fitting = [n for n in range(2, 65) if heads % n == 0 and shared % n == 0 and config.vocab_size % n == 0]
            possible = f"parallel.tp = {' or '.join(map(str, fitting))}" if fitting else "no parallel.tp above 1"
            raise PreflightError(f"parallel.tp = {tp} does not divide the {what} ({size:,}) of this model: {possible}")


def split_tensors(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split `model` in place over the axis `mesh` ("tp"). Raises PreflightError for a class there is no plan for.

    All processes must hold the same weights: nothing is sent.
    """
    if mesh.size() == 1:
        return
    check_tensor_parallel(model.config, mesh.size())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    parallelize_module(model, mesh, tensor_plan(model), src_data_rank=None)
    if tied:  # both are split by the vocabulary, so one parameter still serves both
        head.weight = embedding.weight
    embedding.register_forward_hook(_arrived)


def tensor_plan(model: PreTrainedModel) -> dict[str, ParallelStyle]:
    """How each module of `model` is split, by its name. Only its structure is looked at. Raises PreflightError naming
    what there is no plan for."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plan: dict[str, ParallelStyle] = {
        names[embedding]: RowwiseParallel(input_layouts=_WHOLE, output_layouts=_WHOLE),
        names[head]: ColwiseParallel(input_layouts=_WHOLE, output_layouts=_WHOLE),
    }
    layers = decoder_layers(model)
    for name, child in decoder(model).named_children():
        if child is embedding or child is layers or not any(True for _ in child.parameters()):
            continue
        if any(p.dim() != 1 for p in child.parameters()):
            raise PreflightError(
                f"{type(model).__name__} cannot be split with parallel.tp: there is no plan for {name}; "
                "use parallel.tp = 1"
            )
        plan[names[child]] = SequenceParallel()
    for layer in layers:
        plan |= _layer_plan(names[layer], layer)
    # The first layer takes the whole rows of the embedding, the others their share of the tokens.
    plan[names[layers[0]]] = PrepareModuleInput(
        input_layouts=(_WHOLE,), desired_input_layouts=(_TOKENS,), use_local_output=True
    )
    return plan


def _layer_plan(prefix: str, layer: nn.Module) -> dict[str, ParallelStyle]:
    try:
        parts = layer_parts(layer)
    except CheaptrainError as error:
        raise PreflightError(str(error)) from error
    attention, mlp = f"{prefix}.{parts.attention}", f"{prefix}.{parts.mlp}"
    plan: dict[str, ParallelStyle] = {
        attention: PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": _TOKENS}, desired_input_kwarg_layouts={"hidden_states": _WHOLE}
        ),
        mlp: PrepareModuleInput(input_layouts=(_TOKENS,), desired_input_layouts=(_WHOLE,)),
        f"{attention}.{parts.attention_out}": RowwiseParallel(output_layouts=_TOKENS),
        f"{mlp}.{parts.mlp_out}": RowwiseParallel(output_layouts=_TOKENS),
    }
    plan |= {f"{prefix}.{name}": SequenceParallel() for name in parts.norms}
    plan |= {f"{attention}.{name}": ColwiseParallel() for name in parts.attention_in}
    plan |= {f"{attention}.{name}": _HeadNorm() for name in parts.head_norms}
    plan |= {f"{mlp}.{name}": ColwiseParallel() for name in parts.mlp_in}
    return plan


class _HeadNorm(ParallelStyle):
    """A norm over each head's own dimension: weights on every process, applied to its heads, gradients summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def replicate(_: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in list(part.named_parameters(recurse=False)):
                whole = DTensor.from_local(parameter.data, mesh, [_WHOLE], run_check=False)
                part.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))

        def heads_in(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            # [rows, seq, heads of this process, head_dim]
            return (DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False), *inputs[1:])

        def heads_out(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        return distribute_module(module, device_mesh, replicate, heads_in, heads_out)  # type: ignore[arg-type]


def _arrived(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    """The output with its sum over processes done, in a tensor whose gradient a compiled layer keeps."""
    return output + 0 if isinstance(output, AsyncCollectiveTensor) else output
