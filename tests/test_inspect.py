"""What goes wrong when a viewer shows something else than the model reads."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_recipe import pipe, tiny_recipe
from token_files import numbered, stream_of

from cheaptrain.data.manifest import load_manifest
from cheaptrain.data.open import open_stream
from cheaptrain.data.rows import IGNORED, RowBatch, StreamRows, build_rows
from cheaptrain.data.stream import TokenStream
from cheaptrain.data.tokenizer import load_tokenizer
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.report import row_counts
from cheaptrain.report.inspect import END_OF_TEXT, NO_TARGET, TOKEN_END, print_rows
from cheaptrain.report.row_counts import count_pass
from cheaptrain.report.row_text import TokenText, row_pieces
from cheaptrain.train.survey import mixture_order

ROWS = 12


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedRecipe:
    return tiny_recipe(tmp_path_factory.mktemp("inspect"), prepared=True)


def streams_of(loaded: LoadedRecipe) -> dict[str, TokenStream]:
    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data)
    sources = recipe.data.sources
    return {source.name: open_stream(load_manifest(recipe.data, source, tokenizer), "train") for source in sources}


def batch_of(loaded: LoadedRecipe, rows: int) -> RowBatch:
    """The first rows of the run, located as training does."""
    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data)
    manifests = {source.name: load_manifest(recipe.data, source, tokenizer) for source in recipe.data.sources}
    order = mixture_order(recipe, {name: manifest.facts() for name, manifest in manifests.items()})
    streams = streams_of(loaded)
    sources, indices, _ = order.locate(np.arange(rows))
    rows_of = [StreamRows.whole(streams[name], recipe.data.seq_len, True) for name in order.names]
    return build_rows(rows_of, sources, indices)


def shown(loaded: LoadedRecipe, first: int, count: int) -> str:
    console, written = pipe()
    print_rows(loaded, console, first, count)
    return written.getvalue()


def shown_rows(text: str) -> list[str]:
    """The rows alone: what stands under each header, up to the counts."""
    return re.split(r"\nrow [^\n]*\n", text.split("\nThese rows")[0])[1:]


def test_marks_other_positions_than_those_without_a_target(loaded: LoadedRecipe) -> None:
    batch, rows = batch_of(loaded, ROWS), shown_rows(shown(loaded, 0, ROWS))
    assert len(rows) == ROWS
    text = TokenText(load_tokenizer(loaded.recipe.tokenizer, loaded.recipe.data))
    for j, row in enumerate(rows):
        unsupervised = np.flatnonzero(batch.labels[j].numpy() == IGNORED).tolist()
        pieces = list(row_pieces(batch, j, text))
        assert [i for piece in pieces if not piece.supervised for i in range(piece.start, piece.stop)] == unsupervised
        assert row.count(NO_TARGET) == len(unsupervised)
    assert sum(row.count(NO_TARGET) for row in rows) == int((batch.labels == IGNORED).sum()) > 0


def test_hides_where_documents_start_and_end_when_piped(loaded: LoadedRecipe) -> None:
    batch, rows = batch_of(loaded, ROWS), shown_rows(shown(loaded, 0, ROWS))
    eot = load_tokenizer(loaded.recipe.tokenizer, loaded.recipe.data).eot_id
    for j, row in enumerate(rows):
        markers = re.findall(r"\|doc (\d+) pos (\d+)[^|]*\|", row)
        starts = np.flatnonzero(np.diff(batch.document_ids[j].numpy(), prepend=-1))
        assert [(int(d), int(p)) for d, p in markers] == [
            (int(batch.document_ids[j, i]), int(batch.position_ids[j, i])) for i in starts
        ]
        assert row.count(END_OF_TEXT) == int((batch.input_ids[j] == eot).sum())


def test_loses_a_token_or_a_byte(loaded: LoadedRecipe) -> None:
    batch = batch_of(loaded, ROWS)
    tokenizer = load_tokenizer(loaded.recipe.tokenizer, loaded.recipe.data)
    text = TokenText(tokenizer)
    seen = set()
    for j in range(ROWS):
        pieces = list(row_pieces(batch, j, text))
        assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
        assert pieces[0].start == 0 and pieces[-1].stop == loaded.recipe.data.seq_len
        inside = [piece for piece in pieces if not piece.end_of_text]
        ids = [int(i) for piece in inside for i in batch.input_ids[j, piece.start : piece.stop]]
        assert b"".join(text.bytes_of(i) for i in ids).decode(errors="replace") == tokenizer.hf.decode(ids)
        seen |= {piece.text for piece in pieces}
    assert "\ufffd" not in "".join(seen)


def test_half_a_character_is_shown_as_a_replacement_sign(loaded: LoadedRecipe) -> None:
    tokenizer = load_tokenizer(loaded.recipe.tokenizer, loaded.recipe.data)
    text = TokenText(tokenizer)
    of_byte = {text.bytes_of(i): i for i in range(tokenizer.size) if len(text.bytes_of(i)) == 1}
    ids = [of_byte[bytes([b])] for b in b"a" + "é€".encode() + b"\xf0\x9fz" + b"\x80"]
    stream = np.array([[*ids, 0]])
    batch = RowBatch(
        *(torch.from_numpy(array) for array in (stream[:, :-1], stream[:, 1:], stream[:, :-1] * 0)),
        document_ids=torch.zeros(1, len(ids), dtype=torch.int32),
        sources=np.zeros(1, np.int64),
        supervised=len(ids),
    )
    assert [(p.text, p.stop - p.start) for p in row_pieces(batch, 0, text)] == [
        ("a", 1),
        ("é", 2),
        ("€", 3),
        ("\\xf0", 1),
        ("\\x9f", 1),
        ("z", 1),
        ("\\x80", 1),
    ]


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 1 << 16])
@pytest.mark.parametrize("seed", range(8))
def test_counts_of_a_pass_are_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, rows_at_once: int
) -> None:
    monkeypatch.setattr(row_counts, "_ROWS_AT_ONCE", rows_at_once)
    generator, seq_len = np.random.default_rng(seed), 8
    lengths = generator.choice([1, 2, 3, 7, 8, 9, 16, 17, 40], size=25).tolist()
    stream = stream_of(tmp_path, numbered(lengths), shards=3)
    source = StreamRows.whole(stream, seq_len, document_mask=True)
    counts = count_pass(source)
    rows = (sum(lengths) - 1) // seq_len
    owner = np.repeat(np.arange(len(lengths)), lengths)  # [tokens]
    grid = owner[: rows * seq_len].reshape(rows, seq_len)
    batch = build_rows([source], np.zeros(rows, np.int64), np.arange(rows))
    assert counts.rows == rows
    assert counts.left_over == sum(lengths) - rows * seq_len - 1
    assert counts.without_target == int((batch.labels == IGNORED).sum()) == rows * seq_len - batch.supervised
    assert counts.rows_of_several == sum(len(set(row)) > 1 for row in grid.tolist())
    held_by = [set(np.flatnonzero((grid == document).any(axis=1))) for document in range(len(lengths))]
    assert counts.split_documents == sum(len(rows_held) > 1 for rows_held in held_by)


def test_dropped_and_skipped_documents_go_unmentioned(loaded: LoadedRecipe) -> None:
    text = shown(loaded, 0, 1)
    web = re.search(
        r"web: ([\d,]+) documents kept for training, (\d+) held out, (\d+) empty dropped, (\d+) unread", text
    )
    assert web is not None
    kept, held_out, empty, skipped = (int(part.replace(",", "")) for part in web.groups())
    assert skipped == 2
    assert empty > 0 and kept + held_out + empty == 160
    for name, stream in streams_of(loaded).items():
        rows = (stream.tokens - 1) // 64
        left = stream.tokens - 1 - rows * 64
        assert f"{stream.tokens:,} tokens = {rows:,} rows x 64 + 1 last target + {left} cut at the end" in text, name


def test_a_split_document_is_not_counted(loaded: LoadedRecipe) -> None:
    total = 40
    text = shown(loaded, 0, total)
    parts = int(re.search(r"([\d,]+) parts belong to documents split over rows", text)[1].replace(",", ""))
    # A row's first part goes on from before, or its last goes on after, as its text and the next token say.
    batch = batch_of(loaded, total)
    eot = load_tokenizer(loaded.recipe.tokenizer, loaded.recipe.data).eot_id
    expected = 0
    for row, shown_row in enumerate(shown_rows(text)):
        before, after = "goes on from the row before" in shown_row, int(batch.input_ids[row, -1]) != eot
        single = int(batch.document_ids[row, -1]) == 0
        expected += (before or after) if single else before + after
    assert parts == expected > 0


def test_the_same_row_is_shown_differently_from_another_start(loaded: LoadedRecipe) -> None:
    assert shown_rows(shown(loaded, 0, 5))[3] == shown_rows(shown(loaded, 3, 1))[0]


def test_rows_that_the_run_never_reads_are_shown(loaded: LoadedRecipe) -> None:
    assert len(shown_rows(shown(loaded, 38, 10))) == 2  # the run has 40
    with pytest.raises(RecipeError, match="40 rows"):
        shown(loaded, 40, 1)


def test_unprepared_data_fails_without_saying_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="cheaptrain prepare"):
        shown(tiny_recipe(tmp_path), 0, 1)


def test_rows_without_document_mask_show_boundaries_the_model_does_not_see(tmp_path: Path) -> None:
    text = shown(tiny_recipe(tmp_path, "data.document_mask=false", prepared=True), 0, 4)
    rows = shown_rows(text)
    assert all(row.count("|doc ") == 1 and NO_TARGET not in row for row in rows)
    assert "document_mask is off" in text and "0 positions without a target" in text
    assert all(TOKEN_END in row for row in rows)
