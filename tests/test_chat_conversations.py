"""A malformed conversation is named and never trained on; the same one in other columns is the same one."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_helpers import CALL, TOOL, chat_recipe, numbered_chats, real_conversations, write_chats
from prepare_helpers import quiet, said

from cheaptrain.chat.conversation import Conversation, Malformed, Turn, choose_columns, exchange, from_row
from cheaptrain.data.open import open_documents
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.errors import PreflightError
from cheaptrain.recipe.schema import Recipe

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = Turn("system", "s")
PAIR = exchange("q", "a")

SAME = [
    ({"messages": [U, A]}, PAIR),
    ({"messages": json.dumps([U, A])}, PAIR),
    ({"messages": [{**U, "content": [{"type": "text", "text": "q"}]}, A]}, PAIR),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
    ({"prompt": "q", "completion": "a"}, PAIR),
    ({"prompt": [U], "completion": [A]}, PAIR),
    ({"instruction": "q", "input": "", "output": "a"}, PAIR),
    ({"instruction": "q", "input": "more", "output": "a"}, exchange("q\n\nmore", "a")),
    ({"messages": [U, A], "system": "s"}, Conversation((SYSTEM, *PAIR.turns))),
    ({"messages": [{"role": "developer", "content": "s"}, U, A], "system": ""}, Conversation((SYSTEM, *PAIR.turns))),
    ({"messages": [U, A], "tools": json.dumps([TOOL])}, Conversation(PAIR.turns, (TOOL,))),
    (
        {"conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "12"}, {"from": "gpt", "value": "a"},
        ]},
        Conversation((Turn("user", "q"), Turn("assistant", "", (CALL,)), Turn("tool", "12"), Turn("assistant", "a"))),
    ),
    (
        {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": CALL}]}]},
        Conversation((Turn("user", "q"), Turn("assistant", "", (CALL,)))),
    ),
]  # fmt: skip


@pytest.mark.parametrize("row, expected", SAME)
def test_one_conversation_in_other_columns_is_another(row: dict[str, Any], expected: Conversation) -> None:
    found = from_row(row, choose_columns(row, None, "file", "s"))
    assert found == expected and found.canonical() == expected.canonical()


@pytest.mark.parametrize(
    "messages, why",
    [
        ([U, U, A], "turn 2: two user turns in a row"),
        ([U, A, A], "turn 3: two assistant turns in a row"),
        ([U], "no assistant turn"),
        ([U, {**A, "content": " \n"}], "turn 2: the assistant says nothing"),
        ([U, {**A, "content": None}], "turn 2 holds nothing, not text"),
        ([{**U, "role": "narrator"}, A], "turn 1 has the role 'narrator'"),
        ([U, A, {"role": "system", "content": "s"}], "turn 3: a system turn that is not the first"),
        ([U, {"role": "tool", "content": "1"}, A], "turn 2: a tool answers that no assistant called"),
        ([U, {**A, "weight": 0}], "turn 2 says 'weight'"),
        ([U, {**A, "content": "\ud800"}], "turn 2: half a surrogate pair"),
        ([U, "a"], "turn 2 is a str, not an object"),
        ("no json", "not JSON"),
        ({"a": 1}, "holds a dict, not a list of turns"),
        (None, "holds a NoneType|holds nothing"),
        ([{**U, "content": [{"type": "image"}]}, A], "turn 1 holds a list, not text"),
        ([U, {**A, "tool_calls": [{"function": {}}]}], "calls a tool without a name"),
        ([U, {**A, "tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}], "turn 2: a call cannot be written"),
        ([{**U, "tool_calls": [CALL]}, A], "turn 1: the user calls a tool"),
        ([U, {**A, "function_call": "f(1)"}], "not in the form of a conversation"),
    ],
)
def test_a_malformed_conversation_is_trained_on(messages: Any, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        from_row({"messages": messages}, {"messages": "messages"})


@pytest.mark.parametrize("column", [{"system": "\ud800"}, {"tools": [{"name": "\ud800"}]}])
def test_half_a_character_beside_a_conversation_kills_the_worker(column: dict[str, Any]) -> None:
    with pytest.raises(Malformed, match=r"half a surrogate pair|cannot be written"):
        from_row({"messages": [U, A], **column}, {"messages": "messages", **{name: name for name in column}})


def test_a_column_that_appears_late_is_dropped_silently(tmp_path: Path) -> None:
    rows = numbered_chats(120)
    rows[110]["tools"] = [TOOL]
    files = {"files": str(write_chats(tmp_path / "a.jsonl", rows))}
    with pytest.raises(PreflightError, match=r"a\.jsonl:111: it has a column 'tools'"):
        prepare_recipe(chat_recipe(tmp_path, files), console=quiet())
    named = chat_recipe(tmp_path, files | {"columns": {"messages": "messages"}, "on_bad_line": "skip"})
    assert prepare_recipe(named, console=quiet())[0].skipped == 1


def test_columns_are_guessed_wrongly_or_silently(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"which columns hold the conversations.* has question, answer"):
        choose_columns(["question", "answer"], None, "a.jsonl", "s")
    given = {"prompt": "question", "completion": "answer"}
    assert choose_columns(["question", "answer"], given, "a.jsonl", "s") == given
    with pytest.raises(PreflightError, match=r"columns.prompt: there is no column 'question'"):
        choose_columns(["answer"], given, "a.jsonl", "s")
    with pytest.raises(PreflightError, match="which columns"):
        choose_columns(["messages", "prompt"], {"messages": "messages", "prompt": "prompt"}, "a", "s")
    rows = [{"question": f"q{i}", "answer": f"a{i}", "id": i} for i in range(5)]
    console = quiet()
    source = {"files": str(write_chats(tmp_path / "a.jsonl", rows)), "columns": given}
    prepare_recipe(chat_recipe(tmp_path, source, validation=0.0), console=console)
    assert "columns: completion = answer, prompt = question; not read: id" in said(console)


def test_parquet_and_jsonl_of_the_same_rows_differ(tmp_path: Path) -> None:
    rows = numbered_chats(30, turns=2)
    jsonl = {"files": str(write_chats(tmp_path / "a.jsonl", rows))}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    recipe = chat_recipe(tmp_path, jsonl, {"files": str(tmp_path / "a.parquet")}, chat={"max_cut": 1.0})
    read = [open_documents(manifest, "train") for manifest in prepare_recipe(recipe, console=quiet())]
    assert read[0].lengths.tolist() == read[1].lengths.tolist() and len(read[0].lengths) > 25
    for index in range(len(read[0].lengths)):
        assert [column.tolist() for column in read[0].read(index)] == [c.tolist() for c in read[1].read(index)]


def test_a_bad_conversation_is_skipped_without_being_counted(tmp_path: Path) -> None:
    rows = numbered_chats(10)
    rows[4]["messages"].append({"role": "assistant", "content": "again"})
    files = {"files": str(write_chats(tmp_path / "a.jsonl", rows))}
    with pytest.raises(
        PreflightError, match=r"a\.jsonl:5: turn 3: two assistant turns in a row; mend it, or set on_bad"
    ):
        prepare_recipe(chat_recipe(tmp_path, files), console=quiet())
    (manifest,) = prepare_recipe(chat_recipe(tmp_path, files | {"on_bad_line": "skip"}), console=quiet())
    assert (manifest.skipped, manifest.train.documents + manifest.val.documents) == (1, 9)


def test_a_text_file_or_a_missing_chat_table_is_taken_for_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(PreflightError, match="a text file holds no conversations"):
        prepare_recipe(chat_recipe(tmp_path, {"files": str(tmp_path / "a.txt")}), console=quiet())
    content = chat_recipe(tmp_path, {"files": "x.jsonl"}).model_dump()
    with pytest.raises(ValueError, match="say how they are rendered in"):
        Recipe.model_validate(content | {"chat": None})


def test_every_real_file_is_read() -> None:
    assert sum(1 for _ in real_conversations(300)) == 300 * 9
