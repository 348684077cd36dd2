"""Spans of two tokenizers: one byte beside the other, and the student learns what another text is like."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cheaptrain.data.align import Aligned, Aligner, refuse_unalignable
from cheaptrain.data.encode import Encoder
from cheaptrain.data.tokenizer import TextTokenizer, open_tokenizer
from cheaptrain.errors import PreflightError

torch.set_num_threads(1)
SHARED = Path(__file__).parents[2] / "shared" / "data"
END = "<|end|>"
TEXTS = [
    "the quick brown fox jumps over the lazy dog and the small river",
    "A river, a stone; light under the bridge.\n\n  Füße und Grüße: 語学 🙂🙃 42",
    "quick light, quicker stones: 123 + 456 = 579. <|end|> is a word here <|other|>",
    "x",
    "🙂",
]


def _save(tokenizer: Tokenizer, folder: Path, **special: str) -> TextTokenizer:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return open_tokenizer(str(folder))


def _byte_level(folder: Path, size: int, end: str = END, **special: str) -> TextTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end, *special.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return _save(tokenizer, folder, eos_token=end, **special)


def _sentencepiece(folder: Path) -> TextTokenizer:
    """Spelt with `▁`, with bytes for what it does not know, a space before every text, and a beginning of its own."""
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁the", "▁quick", "▁", "qu", "ick", "▁riv", "er", "fox", *"abcdefghijklmnopqrstuvwxyzA.,"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_of, *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(tokenizer, folder, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return _byte_level(tmp_path_factory.mktemp("ours"), 320)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return _byte_level(tmp_path_factory.mktemp("theirs"), 400, end="<|stop|>")


def _rows(tokenizer: TextTokenizer, texts: list[str], seq: int, skip: int = 0) -> tuple[Any, Any, Any]:
    """Rows as training reads them: the documents end to end, from token `skip` on; the last row is padded."""
    ids, lengths = Encoder(tokenizer.encoder_spec()).encode(texts)
    starts = np.zeros(len(ids), bool)
    starts[np.cumsum(lengths)[:-1]] = True
    ids, starts = ids[skip:].astype(np.int64), starts[skip:]
    rows = -(-(len(ids) - 1) // seq)
    inputs, labels, begin = np.zeros(rows * seq, np.int64), np.full(rows * seq, -100), np.zeros(rows * seq, bool)
    count = len(ids) - 1
    inputs[:count], labels[:count], begin[:count] = ids[:-1], np.where(starts[1:], -100, ids[1:]), starts[:-1]
    begin[count : count + 1] = True
    begin = begin.reshape(rows, seq)
    begin[:, 0] = True
    return inputs.reshape(rows, seq), labels.reshape(rows, seq), np.cumsum(begin, 1, dtype=np.int32) - 1


@functools.cache
def _pieces(tokenizer: TextTokenizer) -> list[bytes]:
    return tokenizer.pieces()


def _said(aligned: Aligned, labels: Any, ours: TextTokenizer, theirs: TextTokenizer) -> Iterator[tuple[bytes, bytes]]:
    """The text of each span as each side has it; special tokens as their ids' names."""
    sides = (
        (labels.reshape(-1), aligned.student_positions, aligned.student_lengths, ours),
        (aligned.targets.flatten().numpy(), aligned.teacher_positions, aligned.teacher_lengths, theirs),
    )
    texts = []
    for tokens, positions, lengths, tokenizer in sides:
        pieces, at, found = _pieces(tokenizer), 0, []
        for length in lengths.tolist():
            mine = tokens[positions[at : at + length].numpy()].tolist()
            assert min(mine) >= 0
            found.append(b"".join(b"(end)" if index == tokenizer.eot_id else pieces[index] for index in mine))
            at += length
        assert at == len(positions)
        texts.append(found)
    return zip(*texts, strict=True)


@pytest.mark.parametrize("skip", range(6))
@pytest.mark.parametrize("seq", [7, 32, 200])
def test_both_sides_of_every_span_are_the_same_text(
    ours: TextTokenizer, theirs: TextTokenizer, seq: int, skip: int
) -> None:
    ids, labels, documents = _rows(ours, TEXTS, seq, skip)
    aligned = Aligner(ours, theirs, 4096).align(ids, labels, documents)
    spans = list(_said(aligned, labels, ours, theirs))
    assert spans and all(mine == other != b"" for mine, other in spans)
    # What is supervised and in no span begins a document or lies at the cut of a row.
    text = np.zeros(labels.size, bool)
    text[aligned.student_positions.numpy()] = True
    left_out = (labels.reshape(-1) >= 0) & ~text
    if seq == 200 and not skip:
        assert left_out.sum() <= 2 * len(TEXTS)
        assert [mine for mine, _ in spans].count(b"(end)") == len(TEXTS)


def test_every_byte_is_in_one_span_or_left_out_for_a_reason(ours: TextTokenizer, theirs: TextTokenizer) -> None:
    """One document in one row: the spans laid end to end are its text, less what the first tokens begin with."""
    for text in TEXTS[:3]:
        ids, labels, documents = _rows(ours, [text], 256)
        aligned = Aligner(ours, theirs, 4096).align(ids, labels, documents)
        joined = b"".join(mine for mine, _ in _said(aligned, labels, ours, theirs))
        whole = text.encode() + b"(end)"
        assert whole.endswith(joined) and len(whole) - len(joined) <= 6
        positions = aligned.student_positions
        assert len(positions.unique()) == len(positions)


def test_a_span_is_as_short_as_both_tokenizers_allow(ours: TextTokenizer, theirs: TextTokenizer) -> None:
    ids, labels, documents = _rows(ours, [TEXTS[0]], 128)
    aligned = Aligner(ours, theirs, 4096).align(ids, labels, documents)
    encoded = [Encoder(tokenizer.encoder_spec()).pieces([TEXTS[0]])[0] for tokenizer in (ours, theirs)]
    cuts = [
        set(np.cumsum([len(tokenizer.pieces()[index]) for index in found]).tolist())
        for tokenizer, found in zip((ours, theirs), encoded, strict=True)
    ]
    assert len(aligned.student_lengths) == len(cuts[0] & cuts[1])  # the end instead of the first


def test_a_literal_special_token_is_text_to_both(ours: TextTokenizer, tmp_path: Path) -> None:
    theirs = _byte_level(tmp_path, 330, pad_token="<|other|>")
    ids, labels, documents = _rows(ours, [TEXTS[2]], 128)
    aligned = Aligner(ours, theirs, 4096).align(ids, labels, documents)
    joined = b"".join(mine for mine, _ in _said(aligned, labels, ours, theirs))
    assert b"<|end|> is a word here <|other|>(end)" in joined
    assert (aligned.targets == theirs.eot_id).sum() == 1


def test_unsupervised_tokens_break_spans_and_the_teacher_still_reads_them(
    ours: TextTokenizer, theirs: TextTokenizer
) -> None:
    ids, labels, documents = _rows(ours, [TEXTS[0]], 128)
    whole = Aligner(ours, theirs, 4096).align(ids, labels, documents)
    masked = labels.copy()
    masked[0, 8:13] = -100
    part = Aligner(ours, theirs, 4096).align(ids, masked, documents)
    assert torch.equal(part.ids, whole.ids)
    kept = set(part.student_positions.tolist())
    assert kept < set(whole.student_positions.tolist()) and not kept & set(range(8, 13))
    for mine, other in _said(part, masked, ours, theirs):
        assert mine == other
    nothing = Aligner(ours, theirs, 4096).align(ids, np.full_like(labels, -100), documents)
    assert len(nothing.student_lengths) == 0 and nothing.ids.shape[0] == 1


@pytest.mark.parametrize("text", ["", "x", "🙂"])
def test_documents_of_nothing_and_of_one_token(ours: TextTokenizer, theirs: TextTokenizer, text: str) -> None:
    ids, labels, documents = _rows(ours, [text, "quick", text], 64)
    aligned = Aligner(ours, theirs, 4096).align(ids, labels, documents)
    spans = [mine for mine, other in _said(aligned, labels, ours, theirs) if mine == other]
    assert spans.count(b"(end)") == (1 if text == "" else 3)


def test_a_row_that_begins_inside_a_character(ours: TextTokenizer, theirs: TextTokenizer) -> None:
    encoders = [Encoder(tokenizer.encoder_spec()) for tokenizer in (ours, theirs)]
    ids = encoders[0].pieces(["🦊語🦊 the river"])[0].astype(np.int64)[None]
    broken = 0
    for cut in range(1, ids.shape[1] - 1):
        mine = ids[:, cut:]
        labels = np.append(mine[:, 1:], [[ours.eot_id]], 1)
        aligned = Aligner(ours, theirs, 4096).align(mine, labels, np.zeros(mine.shape, np.int32))
        spans = list(_said(aligned, labels, ours, theirs))
        assert all(one == other for one, other in spans)
        rest = b"".join(_pieces(ours)[index] for index in mine[0].tolist())
        assert b"".join(one for one, _ in spans)[-11:] == (rest + b"(end)")[-11:]
        # The teacher reads all of it but the bytes that are no character.
        whole = rest.decode(errors="ignore")
        broken += len(whole.encode()) < len(rest)
        read = encoders[1].pieces([whole])[0].tolist()
        assert aligned.ids[0, : len(read)].tolist() == read
    assert broken > 4


def test_a_teacher_of_another_family_with_a_beginning_and_a_space_before_every_text(
    ours: TextTokenizer, tmp_path: Path
) -> None:
    theirs = _sentencepiece(tmp_path)
    assert theirs.bos_id == 1
    ids, labels, documents = _rows(ours, TEXTS, 200)
    aligned = Aligner(ours, theirs, 4096).align(ids, labels, documents)
    spans = list(_said(aligned, labels, ours, theirs))
    assert all(mine == other for mine, other in spans)
    starts = aligned.ids[aligned.position_ids == 0]
    assert (starts == 1).sum() == len(TEXTS)
    assert "語学 🙂🙃 42".encode() in b"".join(mine for mine, _ in spans)
    # And the other way round.
    ids, labels, documents = _rows(theirs, TEXTS, 300)
    aligned = Aligner(theirs, ours, 4096).align(ids, labels, documents)
    spans = list(_said(aligned, labels, theirs, ours))
    assert all(mine == other for mine, other in spans) and len(aligned.student_positions) > 0.9 * (labels >= 0).sum()


def test_what_the_teacher_has_no_positions_for_is_left_out(ours: TextTokenizer, theirs: TextTokenizer) -> None:
    ids, labels, documents = _rows(ours, TEXTS[:2], 256)
    aligner = Aligner(ours, theirs, 9)
    aligned = aligner.align(ids, labels, documents)
    assert aligned.ids.shape[1] == 9 and int(aligned.position_ids.max()) <= 8
    whole = Aligner(ours, theirs, 4096).align(ids, labels, documents)
    assert 0 < len(aligned.student_positions) < len(whole.student_positions)
    assert all(mine == other for mine, other in _said(aligned, labels, ours, theirs))


def test_a_tokenizer_that_changes_the_text_is_refused(ours: TextTokenizer, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", END]))
    lossy = _save(tokenizer, tmp_path, eos_token=END, unk_token="<unk>")
    with pytest.raises(PreflightError, match=r"distill\.teacher: its tokens do not add up to the text"):
        refuse_unalignable((ours, "tokenizer"), (lossy, "distill.teacher"))


def test_gpt2_learns_from_smollm2_on_nearly_every_token_of_real_text() -> None:
    folders = [SHARED / "tokenizers" / name for name in ("gpt2", "smollm2-instruct")]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip(f"no tokenizers in {SHARED}")
    gpt2, smollm2 = (open_tokenizer(str(folder)) for folder in folders)
    aligner = Aligner(gpt2, smollm2, 8192)
    for name in ("wiki", "code", "math"):
        texts = pq.read_table(SHARED / "pretrain" / f"{name}.parquet").column("text").to_pylist()[:12]
        ids, labels, documents = _rows(gpt2, [text[:2000] for text in texts], 512)
        aligned = aligner.align(ids, labels, documents)
        for mine, other in _said(aligned, labels, gpt2, smollm2):
            # Both end with a token of the same name, which is not the one SmolLM2 ends a turn with.
            assert mine == other or (mine == b"(end)" and other == b"")
        supervised = int((labels >= 0).sum())
        assert len(aligned.student_positions) > 0.99 * supervised, name
        assert len(aligned.student_lengths) > 0.5 * supervised, name
        assert int((aligned.targets == 0).sum()) == int((labels == gpt2.eot_id).sum())
