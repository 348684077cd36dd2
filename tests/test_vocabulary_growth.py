"""New tokens of a trained model: rows of noise, rows that are new twice, a tokenizer that is another one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_helpers import numbered_chats, tokenizer_in, write_chats
from model_helpers import build, tokens
from small_runs import prepare, recipe_table, run_child, tail, train, write_recipe, write_texts
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cheaptrain.data.tokenizer import TextTokenizer, open_tokenizer, with_template
from cheaptrain.errors import RecipeError
from cheaptrain.model.config import model_config, vocabulary_growth
from cheaptrain.model.saving import save_model
from cheaptrain.recipe.schema import Chat, Model
from cheaptrain.train.survey import origin

KNOWN = 500  # of 512 rows


def saved(folder: Path, preset: str) -> tuple[PreTrainedModel, Model]:
    model = build(preset, vocab_size=KNOWN)
    with torch.no_grad():  # rows of padding are nothing to go by
        model.get_input_embeddings().weight[KNOWN:] = 7.0
        model.get_output_embeddings().weight[KNOWN:] = 7.0
    save_model(model, folder)
    return model, Model(init_from=str(folder))


def matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@pytest.mark.parametrize("wanted, rows", [(503, 512), (512, 512), (513, 576)])
@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama", "tiny-gpt2", "tiny-llama4"])
def test_new_rows_are_not_the_mean_or_old_ones_change(tmp_path: Path, preset: str, wanted: int, rows: int) -> None:
    before, spec = saved(tmp_path, preset)
    after = build(spec, vocab_size=wanted)
    growth = vocabulary_growth(spec, wanted)
    assert growth is not None and (growth.known, growth.rows_after) == (KNOWN, rows)
    assert after.config.vocab_size == rows and after.config.unpadded_vocab_size == wanted
    assert after.config.vocabulary_growth == {"new_tokens": wanted - KNOWN, "from_id": KNOWN}
    for old, new in zip(matrices(before), matrices(after), strict=True):
        assert new.shape[0] == rows and torch.equal(new[:KNOWN], old[:KNOWN])
        mean = old[:KNOWN].mean(dim=0)
        torch.testing.assert_close(new[KNOWN:wanted], mean.expand(wanted - KNOWN, -1), rtol=0, atol=1e-6)
    tied = before.get_input_embeddings().weight is before.get_output_embeddings().weight
    assert tied is (after.get_input_embeddings().weight is after.get_output_embeddings().weight)
    ids = tokens() % KNOWN
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    with torch.no_grad():
        old, new = (
            AutoModelForCausalLM.from_pretrained(path).eval()(ids, position_ids=positions).logits[..., :KNOWN]
            for path in (tmp_path, _written(after, tmp_path / "after"))
        )
    torch.testing.assert_close(new, old, rtol=0, atol=1e-6)


def _written(model: PreTrainedModel, folder: Path) -> Path:
    save_model(model, folder)
    return folder


def test_rows_grow_again_when_a_run_goes_on(tmp_path: Path) -> None:
    _, spec = saved(tmp_path / "base", "tiny-llama")
    grown = build(spec, vocab_size=513)
    with torch.no_grad():  # training moves them
        for weight in matrices(grown):
            weight[KNOWN:513] += torch.arange(13)[:, None]
    save_model(grown, tmp_path / "grown")
    again = Model(init_from=str(tmp_path / "grown"))
    assert vocabulary_growth(again, 513) is None
    for old, new in zip(matrices(grown), matrices(build(again, vocab_size=513)), strict=True):
        assert torch.equal(old, new)
    more = vocabulary_growth(again, 514)  # a later stage adds one: only that one is new
    assert more is not None and (more.known, more.tokens, more.rows_after) == (513, 514, 576)


def test_a_checkpoint_of_others_is_taken_to_know_all_its_rows(tmp_path: Path) -> None:
    _, spec = saved(tmp_path, "tiny-llama")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["unpadded_vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vocabulary_growth(spec, 512) is None
    growth = vocabulary_growth(spec, 513)
    assert growth is not None and growth.known == 512
    size = tokenizer_in(tmp_path).size  # a tokenizer lies with it: it says which rows are padding
    growth = vocabulary_growth(spec, 512)
    assert size < 500 and growth is not None and (growth.known, growth.rows_after) == (size, 512)
    assert "from id 500 on, 12 of them in padded rows (512 -> 576 rows)" in str(
        vocabulary_growth(saved(tmp_path / "ours", "tiny-llama")[1], 513)
    )


def test_another_size_is_asked_for_and_ignored(tmp_path: Path) -> None:
    _, spec = saved(tmp_path, "tiny-llama")
    wished = spec.model_copy(update={"overrides": {"vocab_size": 1024}})
    with pytest.raises(
        RecipeError, match=r"overrides.vocab_size: the vocabulary of a checkpoint follows the tokenizer"
    ):
        build(wished, vocab_size=513)
    assert model_config(spec, vocab_size=513, seq_len=32).vocab_size == 576


def checkpoint_with(folder: Path, tokenizer: TextTokenizer) -> Model:
    model = build("tiny-llama", vocab_size=tokenizer.size)
    save_model(model, folder)
    tokenizer.hf.save_pretrained(folder)
    return Model(init_from=str(folder))


def planned(folder: Path, tokenizer: TextTokenizer) -> Any:
    recipe = SimpleNamespace(run=SimpleNamespace(dir=str(folder)), model=Model(preset="tiny-llama"))
    return SimpleNamespace(loaded=SimpleNamespace(recipe=recipe, path=folder / "r.toml"), tokenizer=tokenizer)


def test_a_stage_with_another_tokenizer_starts_all_the_same(tmp_path: Path) -> None:
    base = tokenizer_in(tmp_path / "gpt2", "gpt2")
    grown, other = with_template(base, Chat(template="llama3")), tokenizer_in(tmp_path / "digits", "digits")
    spec = checkpoint_with(tmp_path / "base", base)
    origin(spec, base, [])
    origin(spec, grown, [])  # the same and special tokens more
    with pytest.raises(RecipeError, match="was trained with another tokenizer"):
        origin(spec, other, [])
    with pytest.raises(RecipeError, match="was trained with another tokenizer"):
        origin(spec, with_template(other, Chat(template="llama3")), [])
    with pytest.raises(RecipeError, match=r"knows 4 tokens that this recipe's tokenizer lacks, '<\|begin_of_text\|>'"):
        origin(checkpoint_with(tmp_path / "grown", grown), base, [])

    yet_to_come = Model(init_from=str(tmp_path / "run" / "final"))
    origin(yet_to_come, grown, [planned(tmp_path / "run", base)])
    for stage, earlier in ((base, grown), (other, base), (grown, other)):
        with pytest.raises(RecipeError, match="will be trained with another tokenizer"):
            origin(yet_to_come, stage, [planned(tmp_path / "run", earlier)])


def test_weights_without_a_tokenizer_grow_for_a_larger_vocabulary_of_another(tmp_path: Path) -> None:
    base = tokenizer_in(tmp_path / "t")
    assert base.size % 64 < 50
    save_model(build("tiny-llama", vocab_size=base.size - 50), tmp_path / "small")
    with pytest.raises(RecipeError, match=rf"the tokenizer {base.size} tokens besides those added"):
        origin(Model(init_from=str(tmp_path / "small")), base, [])
    save_model(build("tiny-llama", vocab_size=base.size), tmp_path / "same")
    hf = base.hf
    hf.add_tokens([AddedToken(f"<{n}x{m}>", normalized=False) for n in range(1, 10) for m in range(1, 10)])
    hf.save_pretrained(tmp_path / "multiplied")
    multiplied = open_tokenizer(str(tmp_path / "multiplied"))
    assert multiplied.own_size == base.size and multiplied.size == base.size + 81
    origin(Model(init_from=str(tmp_path / "same")), multiplied, [])


def test_tokens_are_put_into_rows_of_which_nobody_knows_whether_they_mean_something(tmp_path: Path) -> None:
    base = tokenizer_in(tmp_path / "t")
    spec = checkpoint_with(tmp_path / "bare", base)
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["unpadded_vocab_size"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    grown = with_template(base, Chat(template="llama3"))
    assert base.size < grown.size <= config["vocab_size"]
    origin(spec, grown, [])  # its tokenizer says so
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"has no tokenizer.json, so nobody knows .* adds <\|begin_of_text\|>"):
        origin(spec, grown, [])
    origin(spec, base, [])


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True])
def test_a_chat_stage_grows_once_and_its_checkpoint_can_talk(tmp_path: Path, at_once: bool) -> None:
    write_texts(tmp_path)
    write_chats(tmp_path / "chats.jsonl", numbered_chats(60))
    base = recipe_table(tmp_path, "base")
    base["model"]["vocab_multiple"] = 1
    base["train"] |= {"steps": 2, "warmup": 0}
    base["checkpoint"] = {"every": "2 steps"}
    sft = recipe_table(tmp_path, "sft") | {"model": {"init_from": str(tmp_path / "base" / "final")}}
    sft["tokenizer"] = base["tokenizer"]
    sft["chat"] = {"template": "llama3"}
    sft["train"] |= {"steps": 4, "warmup": 0, "objective": "assistant_only"}
    sft["train"]["global_batch_tokens"] = 512
    sft["checkpoint"] = {"every": "2 steps", "keep_last": 5}
    sft["data"] |= {"seq_len": 256}
    for source in sft["data"]["sources"]:
        source["weight"] = 0
    sft["data"]["sources"].append(
        {"name": "chats", "files": str(tmp_path / "chats.jsonl"), "format": "chat", "weight": 1, "max_epochs": 9.0}
    )
    recipes = [write_recipe(tmp_path / "base.toml", base), write_recipe(tmp_path / "sft.toml", sft)]
    for recipe in recipes:
        prepare(recipe)
    log = tmp_path / "log"
    for launch in [recipes] if at_once else [[recipe] for recipe in recipes]:
        assert run_child(train(*launch), log) == 0, tail(log)
    (known,) = re.findall(r"vocabulary: 4 new tokens from id (\d+) on, 0 of them in padded rows", log.read_text())
    rows = -(-(int(known) + 4) // 64) * 64
    final = tmp_path / "sft" / "final"
    hf = AutoTokenizer.from_pretrained(final)
    prompt = hf.apply_chat_template(
        [{"role": "user", "content": "fox?"}], add_generation_prompt=True, return_dict=False
    )
    ends = hf.convert_tokens_to_ids(["<|endoftext|>", "<|eot_id|>"])
    assert json.loads((final / "generation_config.json").read_text())["eos_token_id"] == ends
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.config.vocab_size == rows and model.config.unpadded_vocab_size == int(known) + 4 == len(hf)
    assert model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False).shape[1] > len(prompt)

    later = dict(sft) | {"model": {"init_from": str(final)}, "run": {"dir": str(tmp_path / "later")}}
    later["tokenizer"] = {"path": str(final)}
    del later["chat"]
    later["data"] = {**sft["data"], "sources": [{**sft["data"]["sources"][0], "weight": 1}]}
    later["train"] = {**sft["train"], "objective": "next_token"}
    recipe = write_recipe(tmp_path / "later.toml", later)
    prepare(recipe)
    assert run_child(train(recipe), log) == 0, tail(log)
    assert log.read_text().count("new tokens from id") == 1
    kept = AutoTokenizer.from_pretrained(tmp_path / "later" / "final")
    assert kept.chat_template == hf.chat_template
    assert json.loads((tmp_path / "later" / "final" / "generation_config.json").read_text())["eos_token_id"] == ends
