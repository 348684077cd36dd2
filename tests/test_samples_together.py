"""Samples are written by all processes together: one that chose another token would wait for the others for ever."""

from typing import Any

import pytest
import torch
from model_helpers import build
from ranks import run_ranks
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import join
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Model, Samples
from cheaptrain.train import samples as module
from cheaptrain.train.objective import Compute

COMPUTE = Compute(torch.device("cpu"), torch.float32, True, 64)
WORDS = [f"w{number}" for number in range(500)]


def _tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def _write(rank: int, size: int, layout: Layout, disagree: bool, temperature: float) -> Any:
    processes = join(60)
    overrides = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 96}
    model = build(Model(preset="tiny-qwen3", overrides=overrides, vocab_multiple=192))
    root = parallelize(model, make_mesh(layout, "cpu"))
    if disagree and rank == 1:
        plain = module.row_logits
        module.row_logits = lambda *given: -plain(*given)  # type: ignore[assignment]
    asked = Samples(prompts=["w7 w8 w9", "w100"], max_new_tokens=9, temperature=temperature)
    return module.write_samples(root, _tokenizer(), asked, COMPUTE, processes, seed=3)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(tp=3), Layout(dp_shard=2, tp=3)], ids=str)
def test_a_layout_writes_other_samples(layout: Layout, temperature: float) -> None:
    (alone,) = run_ranks(_write, 1, Layout(), False, temperature)
    assert all(len(sample["text"].split()) > 5 for sample in alone)
    if temperature:
        assert len({word for sample in alone for word in sample["text"].split()}) > 9
    for written in run_ranks(_write, layout.world_size, layout, False, temperature):
        assert written == alone


def test_a_process_with_other_logits_goes_on_alone() -> None:
    (alone,) = run_ranks(_write, 1, Layout(), False, 0.0)
    assert run_ranks(_write, 2, Layout(dp_shard=2), True, 0.0) == [alone, alone]
