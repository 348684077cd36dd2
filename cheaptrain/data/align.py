"""Two tokenizers over one text: the stretches ("spans") that both cut at the same bytes.

The student's rows are turned back into bytes, document by document, the teacher's tokenizer encodes the same text, and
wherever both have a token boundary at the same byte a span ends and the next begins. Of a span each model can say how
likely it finds it: the sum over its own tokens of it. That is what a student learns from a teacher whose tokens are
others (`train/aligned.py`).

    student   | The| quick| bro|wn| fox|      |The quick|  brown | fox|  ← spans
    teacher   |The| |quick| brown| fox|

Everything lies on one line of byte offsets, over all documents of a batch; a special token that both know takes one
place on it. What only one side covers is no span: special tokens that the teacher lacks, text that its tokenizer would
change, what it has no positions for. Nor is a span in which the student has a token that is not supervised, or either
has the first token of its document, which nobody predicts. The trap: a row may begin or end inside a character, whose
bytes are no text. They are skipped, not replaced: a replacement character would shift every byte after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cheaptrain.data.pieces import refuse_lost_text
from cheaptrain.data.stream import Int64
from cheaptrain.data.tokenizer import TextTokenizer

IGNORED = -100
_MULTIPLE = 64  # of the length of the teacher's rows: few lengths, and so few shapes


@dataclass(frozen=True, eq=False)
class Aligned:
    """What the teacher reads of a batch, as rows of its own, and the spans of both. CPU tensors.

    Span i is made of the next `student_lengths[i]` of the student's positions and the next `teacher_lengths[i]` of the
    teacher's. A position is where a token is predicted: an index into the flattened rows.
    """

    ids: torch.Tensor  # int64 [rows, width]
    targets: torch.Tensor  # int64 [rows, width]; the next token where it lies in a span, else -100
    position_ids: torch.Tensor  # int64 [rows, width]; from 0 in each document
    document_ids: torch.Tensor  # int32 [rows, width]
    student_positions: torch.Tensor  # int64 [tokens of the student in spans]
    student_lengths: torch.Tensor  # int64 [spans]
    teacher_positions: torch.Tensor  # int64 [tokens of the teacher in spans]
    teacher_lengths: torch.Tensor  # int64 [spans]

    def to(self, device: torch.device) -> "Aligned":
        """The same on `device`; document_ids stay, as those of a RowBatch do."""
        return replace(self, **{name: each.to(device, non_blocking=True) for name, each in self._moving().items()})

    def pinned(self) -> "Aligned":
        """The same with what goes to a GPU in page-locked memory."""
        return replace(self, **{name: each.pin_memory() for name, each in self._moving().items()})

    def _moving(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "document_ids"}


class _Document(NamedTuple):
    """The student's tokens of one document of a row, as far as one is supervised."""

    tokens: Int64
    known: NDArray[np.bool_]  # the student predicts it, and is supervised there
    position: int  # where its second token is predicted, in the flattened rows


class _Reading(NamedTuple):
    """The teacher's tokens of one document; `starts` and `lengths` in bytes, from the start of the document."""

    ids: Int64
    starts: Int64
    lengths: Int64
    known: NDArray[np.bool_]


def refuse_unalignable(*tokenizers: tuple[TextTokenizer, str]) -> None:
    """Raise PreflightError for a tokenizer, each with the key that names it, whose tokens do not add up to the text."""
    for tokenizer, key in tokenizers:
        _reader(tokenizer, key)


class Aligner:
    """Aligns batches; reading is safe from several threads."""

    def __init__(self, student: TextTokenizer, teacher: TextTokenizer, longest: int) -> None:
        """`longest`: tokens that the teacher can read at once. Raises as `refuse_unalignable` does."""
        self.longest, self.bos_id = longest, teacher.bos_id
        self._encoder, self._pieces = _reader(teacher, "distill.teacher")
        _, self._text = _reader(student, "tokenizer")
        self._lengths = np.array([len(piece) for piece in self._text], np.int64)
        self._piece_lengths = np.array([len(piece) for piece in self._pieces], np.int64)
        self._twin = _twins(student, teacher)

    def align(self, ids: Int64, labels: Int64, document_ids: NDArray[np.int32]) -> Aligned:
        """The spans of rows `[rows, seq]`, whose `labels` are the next tokens, -100 where none is supervised."""
        documents = list(_documents(ids, labels, document_ids))
        return _spans(documents, self._sizes(documents), self._read(documents), self.longest, ids.shape[1])

    def _sizes(self, documents: list[_Document]) -> list[Int64]:
        """Bytes that each token of the student takes; one where it stands for no text."""
        return [np.maximum(self._lengths[document.tokens], 1) for document in documents]

    def _read(self, documents: list[_Document]) -> list[_Reading]:
        """What the teacher makes of them."""
        parts = [list(self._parts(document.tokens)) for document in documents]
        texts = [part for of_document in parts for _, part in of_document if isinstance(part, str)]
        encodings = iter(self._encoder.encode_batch_fast(texts, add_special_tokens=False))
        readings = []
        for of_document in parts:
            read = [] if self.bos_id is None else [_one(self.bos_id, 0, 0)]
            for start, part in of_document:
                read.append(
                    self._of_text(next(encodings).ids, start, part.encode())
                    if isinstance(part, str)
                    else _one(part, start, 1)
                )
            together = _Reading(*(np.concatenate(each) for each in zip(*read, strict=True))) if read else _NOTHING
            together.known[:1] = False  # nobody predicts the first
            readings.append(together)
        return readings

    def _of_text(self, ids: list[int], start: int, text: bytes) -> _Reading:
        tokens = np.array(ids, np.int64)
        said = b"".join([self._pieces[index] for index in ids])
        if said not in (text, b" " + text):  # it reads another text: no more than what goes before
            nothing = np.zeros(len(ids), np.int64)
            return _Reading(tokens, nothing + start, nothing, nothing.astype(bool))
        lengths = self._piece_lengths[tokens]
        lengths[:1] -= len(said) - len(text)  # a space that some tokenizers put before every text
        return _Reading(tokens, start + np.cumsum(lengths) - lengths, lengths, np.ones(len(ids), bool))

    def _parts(self, tokens: Int64) -> Iterator[tuple[int, str | int]]:
        """Text, or a special token of the teacher, and at which byte it begins."""
        silent = self._lengths[tokens] == 0
        ends = np.cumsum(np.maximum(self._lengths[tokens], 1))
        edges = np.flatnonzero(np.diff(silent, prepend=~silent[:1], append=~silent[-1:])).tolist()
        for first, stop in pairwise(edges):
            begin = int(ends[first - 1]) if first else 0
            if silent[first]:
                for place, twin in enumerate(self._twin[tokens[first:stop]].tolist()):
                    if twin >= 0:
                        yield begin + place, twin
            else:
                text = b"".join([self._text[index] for index in tokens[first:stop].tolist()])
                for offset, whole in _whole_characters(text):
                    yield begin + offset, whole


def _reader(tokenizer: TextTokenizer, name: str) -> tuple[Tokenizer, list[bytes]]:
    """A tokenizer's encoder, which takes literal special tokens for text, and the bytes of each of its ids."""
    spec = tokenizer.encoder_spec()
    encoder = Tokenizer.from_str(spec.backend)
    encoder.encode_special_tokens = True
    pieces = tokenizer.pieces()
    refuse_lost_text(encoder, pieces, name)
    return encoder, pieces


def _twins(student: TextTokenizer, teacher: TextTokenizer) -> Int64:
    """For each id of the student the special token of the teacher that means the same: the one of that name, and for
    the end of text, failing that, its own. -1: none."""
    theirs = dict(zip(teacher.hf.convert_ids_to_tokens(list(teacher.silent_ids)), teacher.silent_ids, strict=True))
    twin = np.full(student.size, -1, np.int64)
    for index in student.silent_ids:
        twin[index] = theirs.get(str(student.hf.convert_ids_to_tokens(index)), -1)
    if twin[student.eot_id] < 0:
        twin[student.eot_id] = teacher.eot_id
    if teacher.bos_id is not None and student.bos_id not in (None, student.eot_id):
        twin[student.bos_id] = -1  # the teacher's stands before every document
    return twin


def _one(index: int, start: int, length: int) -> _Reading:
    ids, starts, lengths = np.array([[index], [start], [length]], np.int64)
    return _Reading(ids, starts, lengths, np.ones(1, bool))


_NOTHING = _Reading(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))


def _whole_characters(data: bytes) -> Iterator[tuple[int, str]]:
    """The stretches of `data` that are text, each with its offset; bytes that are no character lie between them."""
    at = 0
    while at < len(data):
        try:
            yield at, data[at:].decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield at, data[at : at + error.start].decode()
            at += error.end


def _documents(ids: Int64, labels: Int64, document_ids: NDArray[np.int32]) -> Iterator[_Document]:
    """The documents of all rows that have a supervised token, up to their last one."""
    seq = ids.shape[1]
    for row in range(len(ids)):
        starts = np.flatnonzero(np.diff(document_ids[row], prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], seq], strict=True):
            supervised = labels[row, start:stop] != IGNORED
            if supervised.any():
                last = start + int(np.flatnonzero(supervised)[-1])
                yield _Document(
                    np.append(ids[row, start : last + 1], labels[row, last]),
                    np.append(False, supervised[: last - start + 1]),
                    row * seq + start,
                )


def _spans(documents: list[_Document], sizes: list[Int64], readings: list[_Reading], longest: int, seq: int) -> Aligned:
    """Cut both sides where both have a boundary, and lay out the teacher's rows."""
    begins = np.cumsum([0, *(int(size.sum()) for size in sizes)])  # of each document on the line
    inputs = [min(longest, max(0, len(reading.ids) - 1)) for reading in readings]
    places, shape = _rows_of_teacher(inputs, longest, seq)
    ours = _line(
        [
            (begin + np.cumsum(size) - size, size, document.known, document.position - 1 + np.arange(len(size)))
            for begin, size, document in zip(begins, sizes, documents, strict=False)
        ]
    )
    theirs = _line(
        [
            (
                begin + reading.starts,
                reading.lengths,
                reading.known & (np.arange(len(reading.ids)) <= count),
                place - 1 + np.arange(len(reading.ids)),
            )
            for begin, reading, count, place in zip(begins, readings, inputs, places, strict=False)
        ]
    )
    shared = np.intersect1d(ours.boundaries, theirs.boundaries, assume_unique=True)
    of_ours, of_theirs = (np.searchsorted(shared, side.starts, side="right") for side in (ours, theirs))
    # Span i ends at shared boundary i; 0 and the last one are what lies before the first boundary and after the last.
    spans = len(shared) + 1
    covered = np.bincount(of_theirs, theirs.lengths, spans) == np.diff(shared, prepend=-1, append=-1)
    for of, side in ((of_ours, ours), (of_theirs, theirs)):
        covered &= np.bincount(of[~side.known], minlength=spans) == 0
    covered[[0, -1]] = False

    ids, targets, positions, numbers = _fill(readings, inputs, places, shape)
    chosen_ours, chosen_theirs = covered[of_ours], covered[of_theirs]
    asked = theirs.positions[chosen_theirs]
    kept = np.full(targets.shape, IGNORED, np.int64)
    kept.reshape(-1)[asked] = targets.reshape(-1)[asked]
    student_lengths, teacher_lengths = (np.bincount(of, minlength=spans)[covered] for of in (of_ours, of_theirs))
    arrays = (
        ids, kept, positions, numbers,
        ours.positions[chosen_ours], student_lengths, asked, teacher_lengths,
    )  # fmt: skip
    return Aligned(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


class _Line(NamedTuple):
    """The tokens of one side on the line."""

    starts: Int64
    lengths: Int64
    known: NDArray[np.bool_]
    positions: Int64
    boundaries: Int64  # ascending, each once


def _line(parts: list[tuple[Int64, Int64, NDArray[np.bool_], Int64]]) -> _Line:
    if not parts:
        nothing = np.empty(0, np.int64)
        return _Line(nothing, nothing, nothing.astype(bool), nothing, nothing)
    starts, lengths, known, positions = (np.concatenate(each) for each in zip(*parts, strict=True))
    return _Line(starts, lengths, known, positions, np.unique(np.concatenate([starts, starts + lengths])))


def _rows_of_teacher(inputs: list[int], longest: int, seq: int) -> tuple[list[int], tuple[int, int]]:
    """Where each document begins in the teacher's flattened rows, and their shape: whole documents in order, a row
    more where the next does not fit. There is one row at least: with many processes all of them ask together."""
    width = min(longest, -(-max([seq, *inputs]) // _MULTIPLE) * _MULTIPLE)
    places, row, at = [], 0, 0
    for count in inputs:
        if at + count > width:
            row, at = row + 1, 0
        places.append(row * width + at)
        at += count
    return places, (row + 1, width)


def _fill(
    readings: list[_Reading], inputs: list[int], places: list[int], shape: tuple[int, int]
) -> tuple[Int64, Int64, Int64, NDArray[np.int32]]:
    """Ids, next tokens, positions and documents of the teacher's rows. What is left of a row is a document too."""
    ids, targets, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    starts = np.zeros(shape, np.int32)
    starts[:, 0] = 1
    for reading, count, place in zip(readings, inputs, places, strict=True):
        here = slice(place, place + count)
        ids.reshape(-1)[here], targets.reshape(-1)[here] = reading.ids[:count], reading.ids[1 : count + 1]
        positions.reshape(-1)[here] = np.arange(count)
        starts.reshape(-1)[place : place + 1] = 1
        starts.reshape(-1)[place + count : place + count + 1] = 1
    return ids, targets, positions, np.cumsum(starts, axis=1, dtype=np.int32) - 1
