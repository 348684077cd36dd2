"""Prepared conversations: the same bytes however often they are interrupted, counted losses, a viewer of the mask."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from chat_helpers import chat_recipe, numbered_chats, rendered, write_chats
from prepare_helpers import all_bytes, quiet, said
from tiny_recipe import pipe

from cheaptrain.chat.conversation import from_row
from cheaptrain.data.manifest import load_manifest, refusal_of_losses, source_directory
from cheaptrain.data.open import open_documents, open_rows
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.rows import IGNORED, PackedRows, build_rows
from cheaptrain.data.tokenizer import load_tokenizer
from cheaptrain.errors import PreflightError
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.schema import Chat, Recipe
from cheaptrain.report.inspect import print_rows, refuse_untaught

UNIT = 12_000


def folder_of(recipe: Recipe) -> Path:
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    return source_directory(recipe.data, recipe.data.sources[0], tokenizer)


def test_ids_and_masks_on_disk_are_not_those_of_the_conversations(tmp_path: Path) -> None:
    rows = numbered_chats(60, turns=3)
    recipe = chat_recipe(
        tmp_path, {"files": str(write_chats(tmp_path / "a.jsonl", rows))}, unit_bytes=5000, validation=0.2, seq_len=4096
    )
    (manifest,) = prepare_recipe(recipe, console=quiet())
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    expected = {}
    for row in rows:
        encoded = rendered(tokenizer, [from_row(row, {"messages": "messages"})])
        assert encoded.mask is not None
        expected[tuple(encoded.ids.tolist())] = encoded.mask.tolist()
    found = {}
    for split in ("train", "val"):
        documents = open_documents(manifest, split)  # type: ignore[arg-type]
        assert len(documents.lengths) == getattr(manifest, split).documents > 5
        supervised = 0
        for index in range(len(documents.lengths)):
            ids, mask = documents.read(index)
            found[tuple(ids.tolist())] = mask.tolist()
            supervised += int(mask.sum())
        assert supervised == getattr(manifest, split).supervised
    assert found == expected and len(manifest.units) > 3
    assert all(f"train-{unit['index']:05d}.mask" in manifest.files for unit in manifest.units)


@pytest.mark.slow
def test_preparing_conversations_killed_midway_gives_other_bytes(tmp_path: Path) -> None:
    source = {"files": str(write_chats(tmp_path / "a.jsonl", numbered_chats(500, turns=3)))}
    expected = prepare_recipe(
        chat_recipe(tmp_path, source, unit_bytes=UNIT, dir=str(tmp_path / "undisturbed")), console=quiet()
    )[0]
    recipe = chat_recipe(tmp_path, source, unit_bytes=UNIT)
    folder = folder_of(recipe)
    script = (
        "import sys; from cheaptrain.recipe.schema import Recipe; from cheaptrain.data.prepare import prepare_recipe\n"
        "prepare_recipe(Recipe.model_validate_json(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, recipe.model_dump_json()]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 60
    while len(list(folder.glob("unit-*.json"))) < 3:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.002)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert 3 <= len(list(folder.glob("unit-*.json"))) < len(expected.units)
    with pytest.raises(PreflightError, match="not completely prepared"):
        load_manifest(recipe.data, recipe.data.sources[0], load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat))
    time.sleep(0.5)  # its worker sees that it is alone
    (manifest,) = prepare_recipe(recipe, console=quiet())
    assert all_bytes(manifest.directory) == all_bytes(expected.directory)
    mask = next(iter(sorted(manifest.directory.glob("train-*.mask"))))
    mask.write_bytes(bytes(1 - byte for byte in mask.read_bytes()))
    console = quiet()
    prepare_recipe(recipe, console=console)
    assert f"{mask.name}: its content changed" in said(console)
    assert all_bytes(manifest.directory) == all_bytes(expected.directory)


def test_another_template_or_row_length_is_taken_for_the_same(tmp_path: Path) -> None:
    source = {"files": str(write_chats(tmp_path / "a.jsonl", numbered_chats(20)))}
    recipes = [
        chat_recipe(tmp_path, source, chat=chat, **data)  # type: ignore[arg-type]
        for chat, data in (
            ({"template": "chatml"}, {}), ({"template": "chatml", "system": "Be brief."}, {}),
            ({"template": "smollm2"}, {}), ({"template": "chatml"}, {"seq_len": 128}),
        )
    ]  # fmt: skip
    assert len({folder_of(recipe) for recipe in recipes}) == 4
    loose = chat_recipe(tmp_path, source, chat={"max_cut": 0.9, "max_dropped": 0.9})
    assert folder_of(loose) == folder_of(recipes[0])
    prepare_recipe(recipes[0], console=quiet())
    with pytest.raises(PreflightError, match="chat seq_len: 256 -> 128"):
        tokenizer = load_tokenizer(recipes[3].tokenizer, recipes[3].data, recipes[3].chat)
        load_manifest(recipes[3].data, recipes[3].data.sources[0], tokenizer)


def test_the_system_turn_of_a_source_replaces_one_that_is_there_or_is_not_given(tmp_path: Path) -> None:
    rows = numbered_chats(6)
    rows[2]["messages"].insert(0, {"role": "system", "content": "Mine."})
    source = {"files": str(write_chats(tmp_path / "a.jsonl", rows))}
    recipe = chat_recipe(
        tmp_path, source | {"system": "Of the source."}, source, chat={"system": "Of all."}, validation=0.0
    )
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    for manifest, expected in zip(prepare_recipe(recipe, console=quiet()), ("Of the source.", "Of all."), strict=True):
        documents = open_documents(manifest, "train")
        for index in range(6):
            text = tokenizer.hf.decode(documents.read(index)[0])
            assert text.startswith(
                f"<|im_start|>system\n{'Mine.' if index == 2 else expected}<|im_end|>\n<|im_start|>user"
            )


def test_more_is_cut_or_dropped_than_the_recipe_allows(tmp_path: Path) -> None:
    rows = numbered_chats(16) + numbered_chats(3, turns=9)
    rows.append({"messages": [{"role": "user", "content": "fox " * 400}, {"role": "assistant", "content": "ok"}]})
    source = {"files": str(write_chats(tmp_path / "a.jsonl", rows))}
    with pytest.raises(PreflightError, match=r"3 of 20 conversations \(15.0%\) lose turns.*chat.max_cut = 0.15"):
        prepare_recipe(chat_recipe(tmp_path, source, validation=0.0, chat={"max_dropped": 0.5}), console=quiet())
    with pytest.raises(PreflightError, match=r"1 of 20 conversations \(5.0%\) are left out.*chat.max_dropped = 0.05"):
        prepare_recipe(
            chat_recipe(tmp_path, source, validation=0.0, chat={"max_cut": 0.15, "max_dropped": 0.04}), console=quiet()
        )
    console = quiet()
    allowed = chat_recipe(tmp_path, source, validation=0.0, chat={"max_cut": 0.15})
    (manifest,) = prepare_recipe(allowed, console=console)
    assert (manifest.train.documents, manifest.dropped, manifest.chat["cut"]) == (19, 1, 3)  # type: ignore[index]
    assert "20 conversations: 3 lost turns to fit a row (15.0%), 1 left out because no exchange fits (5.0%)" in said(
        console
    )
    tokenizer = load_tokenizer(allowed.tokenizer, allowed.data, Chat(max_cut=0.1))
    with pytest.raises(PreflightError, match="lose turns"):  # the limit was lowered after preparing
        load_manifest(allowed.data, allowed.data.sources[0], tokenizer)
    untaught = type(manifest)(**{**vars(manifest), "chat": {"cut": 0, "merging": 0, "untaught": 7}})
    assert "7 of 19 conversations have no token" in str(refusal_of_losses(untaught, Chat()))


def test_held_out_conversations_depend_on_where_they_stand(tmp_path: Path) -> None:
    rows = numbered_chats(80)
    pairs = [{"prompt": r["messages"][0]["content"], "completion": r["messages"][1]["content"]} for r in rows[::-1]]
    recipe = chat_recipe(
        tmp_path, {"files": str(write_chats(tmp_path / "a.jsonl", rows))},
        {"files": str(write_chats(tmp_path / "b.jsonl", pairs))}, validation=0.3,
    )  # fmt: skip
    first, second = prepare_recipe(recipe, console=quiet())
    held = [
        {tuple(open_documents(manifest, "val").read(i)[0].tolist()) for i in range(manifest.val.documents)}
        for manifest in (first, second)
    ]
    assert held[0] == held[1] and 10 < len(held[0]) < 40


def test_max_tokens_stops_conversations_elsewhere_with_other_units(tmp_path: Path) -> None:
    source = {"files": str(write_chats(tmp_path / "a.jsonl", numbered_chats(200))), "max_tokens": 3000}
    read = []
    for unit_bytes in (1000, 20_000):
        (manifest,) = prepare_recipe(
            chat_recipe(tmp_path, source, unit_bytes=unit_bytes, dir=str(tmp_path / f"d{unit_bytes}")), console=quiet()
        )
        documents = open_documents(manifest, "train")
        read.append([documents.read(i)[1].tolist() for i in range(len(documents.lengths))])
        assert 3000 <= manifest.train.tokens < 3200
    assert read[0] == read[1]


def loaded_chats(root: Path, template: str) -> LoadedRecipe:
    source = {"files": str(write_chats(root / "a.jsonl", numbered_chats(40, turns=2)))}
    recipe = chat_recipe(root, source, chat={"template": template}, seq_len=512, validation=0.1)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch_tokens": 1024})})
    prepare_recipe(recipe, console=quiet())
    return LoadedRecipe(recipe, root / "chats.toml", (), {})


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_inspect_shows_another_mask_than_training_reads(tmp_path: Path, template: str) -> None:
    loaded = loaded_chats(tmp_path, template)
    recipe = loaded.recipe
    console, written = pipe()
    print_rows(loaded, console, 0, 2)
    shown = written.getvalue()
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    manifest = load_manifest(recipe.data, recipe.data.sources[0], tokenizer)
    source = open_rows(manifest, recipe.data, recipe.seed, assistant_only=True)
    answers = re.findall("⟦(.*?)⟧", shown.split("row 0 of the run")[1], flags=re.S)
    rows = [int(number) - 0 for number in re.findall(r"epoch 0, row (\d+) of", shown)]
    batch = build_rows([source], np.zeros(2, np.int64), np.array(rows))
    expected = []
    for labels in batch.labels.numpy():
        taught = np.flatnonzero(labels != IGNORED)
        runs = np.split(taught, np.flatnonzero(np.diff(taught) > 1) + 1)
        expected += [tokenizer.hf.decode(labels[run]) for run in runs]
    assert [answer.replace("↵\n", "\n") for answer in answers] == expected and len(expected) > 4
    assert f"{manifest.train.documents} conversations kept for training" in shown
    assert "0 cut to fit a row, 0 dropped because no exchange fits" in shown
    assert re.search(r"[\d.]+% of what is not padding", shown) and "|padding: " in shown


def test_examples_without_a_supervised_token_are_shown_as_if_nothing_were_wrong(tmp_path: Path) -> None:
    loaded = loaded_chats(tmp_path, "chatml")
    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    manifest = load_manifest(recipe.data, recipe.data.sources[0], tokenizer)
    source = open_rows(manifest, recipe.data, recipe.seed, assistant_only=True)
    assert isinstance(source, PackedRows)
    refuse_untaught({"source0": source})
    documents = open_documents(manifest, "train")
    for index in (3, 5):
        stop = int(np.cumsum(documents.lengths)[index])
        path = manifest.directory / "train-00000.mask"
        raw = bytearray(path.read_bytes())
        raw[stop - int(documents.lengths[index]) : stop] = bytes(int(documents.lengths[index]))
        path.write_bytes(raw)
    again = open_rows(manifest, recipe.data, recipe.seed, assistant_only=True)
    with pytest.raises(
        PreflightError, match=rf"'source0': 2 of {manifest.train.documents} conversations have no token"
    ):
        refuse_untaught({"source0": again})
    console, _ = pipe()
    with pytest.raises(PreflightError, match="have no token that the model must produce"):
        print_rows(loaded, console, 0, 1)


def test_manifests_of_text_changed(tmp_path: Path) -> None:
    """What was prepared before conversations could be: not one key more in its record."""
    from prepare_helpers import prepare, write_jsonl

    manifest, _ = prepare(tmp_path, {"files": str(write_jsonl(tmp_path / "a.jsonl", range(30)))})
    assert "chat" not in manifest.settings and "format" not in manifest.settings["source"]
    content = json.loads((manifest.directory / "manifest.json").read_text())
    assert "chat" not in content and set(content["train"]) == {"tokens", "documents", "bytes"}
    assert not list(manifest.directory.glob("*.mask"))
