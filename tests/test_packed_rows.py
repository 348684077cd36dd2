"""Packed conversations are learned as if each stood alone, and each as often as the recipe says."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_files import conversations, documents_of, packed_rows
from model_helpers import VOCAB, build
from ranks import run_ranks
from token_files import numbered, stream_of
from torch import Tensor

from cheaptrain.data import order as order_of_rows
from cheaptrain.data.documents import Documents
from cheaptrain.data.loader import Loader, validation_batches
from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.packing import pack
from cheaptrain.data.rows import IGNORED, PackedRows, RowBatch, StreamRows, build_rows
from cheaptrain.data.stream import Shard, TokenStream
from cheaptrain.errors import PreflightError
from cheaptrain.model.context import Context
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import join, leave
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Train
from cheaptrain.report.row_counts import count_packed
from cheaptrain.train.objective import Compute, next_token
from cheaptrain.train.optim import build_optimizers
from cheaptrain.train.step import train_step

SEQ = 32
LENGTHS = [5, 12, 33, 2, 9, 21, 7, 7, 16, 3, 28, 14, 11, 6, 2, 19]
COMPUTE = Compute(torch.device("cpu"), torch.float32, document_mask=True, loss_chunk_tokens=64)


def all_rows(source: PackedRows, by_example: bool = False) -> RowBatch:
    return build_rows([source], np.zeros(source.rows, np.int64), np.arange(source.rows), by_example)


def test_a_row_holds_other_tokens_labels_or_positions_than_its_conversations(tmp_path: Path) -> None:
    documents, masks = conversations(LENGTHS)
    for assistant_only in (True, False):
        source = packed_rows(tmp_path, LENGTHS, SEQ, assistant_only=assistant_only)
        batch = all_rows(source)
        supervised = 0
        for row in range(source.rows):
            at = 0
            for number, document in enumerate(source.packing.of_row(row)):
                ids, mask = documents[document], masks[document]
                stretch = slice(at, at + len(ids) - 1)
                assert batch.input_ids[row, stretch].tolist() == ids[:-1]
                wanted = [t if m or not assistant_only else IGNORED for t, m in zip(ids[1:], mask[1:], strict=True)]
                assert batch.labels[row, stretch].tolist() == wanted
                assert batch.position_ids[row, stretch].tolist() == list(range(len(ids) - 1))
                assert batch.document_ids[row, stretch].tolist() == [number] * (len(ids) - 1)
                supervised += sum(label != IGNORED for label in wanted)
                at += len(ids) - 1
            assert (batch.labels[row, at:] == IGNORED).all()
            assert set(batch.document_ids[row, at:].tolist()) <= {len(source.packing.of_row(row))}
            assert batch.position_ids[row, at:].tolist() == list(range(SEQ - at))
        assert batch.supervised == supervised
    assert source.documents.supervised().tolist() == [sum(mask[1:]) for mask in masks]


def one_by_one(source: PackedRows, by_example: bool) -> tuple[list[Tensor], list[Tensor], float]:
    """Input, labels and divisor of the conversations, each for itself."""
    inputs, labels, divisor = [], [], 0.0
    for index in range(len(source.documents.lengths)):
        ids, mask = (torch.from_numpy(part.astype(np.int64)) for part in source.documents.read(index))
        inputs.append(ids[None, :-1])
        labels.append(torch.where(mask[1:] == 1, ids[1:], IGNORED)[None])
        divisor += 1 if by_example else int((labels[-1] != IGNORED).sum())
    return inputs, labels, divisor


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama", "tiny-gpt2"])
def test_packed_conversations_teach_something_else_than_one_by_one(
    tmp_path: Path, preset: str, by_example: bool
) -> None:
    torch.set_num_threads(1)
    model, source = build(preset, seq_len=SEQ).eval(), packed_rows(tmp_path, LENGTHS, SEQ)
    batch = all_rows(source, by_example)
    sums = next_token(model, batch, COMPUTE)
    (sums.loss / batch.normaliser).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    inputs, labels, divisor = one_by_one(source, by_example)
    loss = torch.zeros(())
    for ids, targets in zip(inputs, labels, strict=True):
        alone = RowBatch(
            ids, targets, torch.arange(ids.shape[1])[None], torch.zeros(ids.shape, dtype=torch.int32),
            np.zeros(1, np.int64), int((targets != IGNORED).sum()),
        )  # fmt: skip
        part = next_token(model, alone, COMPUTE).loss
        loss = loss + (part / alone.supervised if by_example else part)
    (loss / divisor).backward()
    assert batch.normaliser == divisor
    assert (sums.loss - loss).abs() <= 1e-6 * loss
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - packed[name]).abs().max() <= 1e-6 * max(1.0, packed[name].abs().max()), name


def test_what_stands_in_the_padding_changes_a_loss_or_a_gradient(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = build("tiny-qwen3", seq_len=SEQ).eval()
    batch = all_rows(packed_rows(tmp_path, [20, 9, 30, 6], SEQ))
    padding = torch.zeros_like(batch.labels, dtype=torch.bool)
    for row, ids in enumerate(batch.document_ids):
        last = ids == ids[-1]
        padding[row] = last & (batch.labels[row, last] == IGNORED).all()
    assert padding.any() and not padding.all(1).any()
    found = []
    for filled in (batch.input_ids, torch.where(padding, 1 + torch.arange(SEQ) % (VOCAB - 1), batch.input_ids)):
        model.zero_grad()
        loss = next_token(model, replace(batch, input_ids=filled), COMPUTE).loss
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0][1], found[1][1], strict=True))


def test_two_epochs_read_a_conversation_once_or_three_times(tmp_path: Path) -> None:
    """Read by their sizes, sources end their epochs together, and an epoch is every conversation of each, once."""
    lengths = {"long": [9 + k % 24 for k in range(70)], "short": [2 + k % 5 for k in range(90)], "one": [33] * 7}
    first = 0
    sources: dict[str, PackedRows] = {}
    for name, of_source in lengths.items():
        documents = numbered(of_source, first)
        first += sum(of_source)
        masks = [[0] + [1] * (length - 1) for length in of_source]
        found = documents_of(tmp_path, documents, masks, shards=2, name=name)
        sources[name] = PackedRows(found, pack(found.lengths, SEQ, 3), True)
    rows = {name: source.rows for name, source in sources.items()}
    total = sum(rows.values())
    order = MixtureOrder(3, {name: float(count) for name, count in rows.items()}, rows)
    for step, processes in ((1, 1), (total, 1), (4, 2)):
        loaders = [Loader(order, list(sources.values()), step, 1, rank, processes) for rank in range(processes)]
        seen: Counter[int] = Counter()
        for at in range(0, 2 * total // step * step, step):
            for loader in loaders:
                for batch in loader.step(at):
                    real = (batch.labels != IGNORED) & (batch.position_ids == 0)
                    seen.update(batch.input_ids[real].tolist())
        starts = np.cumsum([0, *(n for of_source in lengths.values() for n in of_source)])[:-1].tolist()
        if 2 * total % step == 0:
            assert [seen[start] for start in starts] == [2] * len(starts)
        assert set(seen) <= set(starts)


@pytest.mark.parametrize("key", [None, 0, 2**64 - 1])
@pytest.mark.parametrize("sizes", [[1, 1], [7, 3, 9], [1, 1000, 31], [97, 89, 83, 79, 73, 71, 67]])
def test_an_epoch_of_sources_read_by_size_is_a_row_short_of_one_of_them(
    sizes: list[int], key: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the seed draws, the first and the last there is included."""
    if key is not None:
        monkeypatch.setattr(order_of_rows, "key_of", lambda *_: key)
    for seed in range(200 if key is None else 1):
        rows = {f"s{k}": size for k, size in enumerate(sizes)}
        order = MixtureOrder(seed, {name: float(size) for name, size in rows.items()}, rows)
        for epochs in (1, 2, 5, 1000):
            assert order.counts(epochs * sum(sizes)).tolist() == [epochs * size for size in sizes]


def test_text_and_conversations_cannot_share_a_batch(tmp_path: Path) -> None:
    chats = packed_rows(tmp_path, LENGTHS, SEQ, assistant_only=False)
    text = StreamRows.whole(stream_of(tmp_path, numbered([40, 90, 70])), SEQ, document_mask=True)
    order = MixtureOrder(1, {"web": 0.3, "chat": 0.7}, {"web": text.rows, "chat": chats.rows})
    batches = Loader(order, [text, chats], 10, 10, 0, 1).step(0)
    assert Counter(batches[0].sources.tolist()) == {0: 3, 1: 7}
    counting = (batches[0].input_ids.diff() == 1).all(1)  # the tokens of the text are numbered
    assert counting.tolist() == [source == 0 for source in batches[0].sources.tolist()]
    for j, (_, row) in enumerate(zip(*order.locate(np.arange(10))[:2], strict=True)):
        if batches[0].sources[j] == 1:
            assert torch.equal(batches[0].labels[j], build_rows([chats], np.array([0]), np.array([row])).labels[0])


@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_share_rows_count_an_example_twice(tmp_path: Path, size: int) -> None:
    whole = all_rows(packed_rows(tmp_path, LENGTHS, SEQ), by_example=True)
    shares = [whole.share(rank, size) for rank in range(size)]
    assert whole.weights is not None
    assert torch.equal(torch.cat([share.weights for share in shares], 1), whole.weights)
    assert sum(share.supervised for share in shares) == whole.supervised
    assert whole.weights.double().sum().item() == pytest.approx(whole.normaliser, abs=1e-5)
    assert whole.normaliser == len(LENGTHS)


def _one_step(rank: int, size: int, folder: Path, seed: int, micro: int, layout: Layout) -> tuple[float, list[Tensor]]:
    """A step over all conversations, packed by `seed`: its loss, and the weights after it."""
    processes = join(60)
    own = folder / f"{size}-{seed}-{micro}-{rank}"
    own.mkdir()
    source = packed_rows(own, LENGTHS, SEQ, seed)
    order = MixtureOrder(5, {"c": 1.0}, {"c": source.rows})
    mesh = make_mesh(layout, "cpu")
    ranks = layout.data_parallel
    loader = Loader(order, [source], source.rows, micro, mesh["dp_shard"].get_local_rank(), ranks, by_example=True)
    model = build("tiny-qwen3", seq_len=SEQ)
    train = Train.model_validate({"steps": 1, "global_batch_tokens": SEQ, "lr": 1.0, "eps": 1.0, "weight_decay": 0.0})
    context = Context.of(mesh["cp"].get_group())
    root = parallelize(model, mesh)
    batches = loader.step(0)
    if context is not None:
        batches = [batch.share(context.rank, context.size) for batch in batches]
    result = train_step(
        root, build_optimizers(model, train), batches, mesh=mesh, objective=next_token,
        compute=replace(COMPUTE, context=context), sources=1, learning_rate_factor=1.0, grad_clip=1.0,
    ).result()  # fmt: skip
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    found = result.loss, [weight.detach().clone() for weight in weights]
    assert result.counts.normaliser == len(LENGTHS)
    processes.all_of(None)
    leave()
    return found


def test_weighting_by_example_depends_on_packing_accumulation_or_processes(tmp_path: Path) -> None:
    rows = packed_rows(tmp_path, LENGTHS, SEQ).rows
    assert rows % 2 == 0
    loss, weights = run_ranks(_one_step, 1, tmp_path, 0, rows, Layout())[0]
    for size, seed, micro, layout in (
        (1, 9, rows, Layout()),
        (1, 0, 1, Layout()),
        (2, 0, rows // 2, Layout(dp_shard=2)),
        (2, 9, 1, Layout(cp=2)),
    ):
        for other, others in run_ranks(_one_step, size, tmp_path, seed, micro, layout):
            assert other == pytest.approx(loss, rel=2e-6)
            # With an eps of 1 the step is nearly the gradient itself.
            for ours, theirs in zip(weights, others, strict=True):
                assert (ours - theirs).abs().max() < 2e-6


def test_validation_counts_padding_or_loses_a_conversation(tmp_path: Path) -> None:
    source = packed_rows(tmp_path, LENGTHS, SEQ)
    expected = int(source.documents.supervised().sum())
    for ranks in (1, 2, 3):
        found = [list(validation_batches(source, 2, rank, ranks)) for rank in range(ranks)]
        assert len({len(batches) for batches in found}) == 1
        assert sum(batch.supervised for batches in found for batch in batches) == expected


def test_a_mask_of_other_conversations_is_read(tmp_path: Path) -> None:
    documents, masks = conversations([5, 9, 4])
    documents_of(tmp_path, documents, masks)
    (tmp_path / "c-0.mask").write_bytes(b"\1" * 17)
    ids = stream_of(tmp_path, documents, name="ids")
    with pytest.raises(PreflightError, match=r"c-0\.mask: 17 bytes"):
        documents_of_existing(tmp_path, documents)
    with pytest.raises(PreflightError, match="do not belong together"):
        Documents(ids, stream_of(tmp_path, [[1] * 5, [1] * 13], name="m"))
    with pytest.raises(IndexError, match="document 3 of 3"):
        documents_of(tmp_path, documents, masks).read(3)


def documents_of_existing(folder: Path, documents: list[list[int]]) -> Documents:
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    bins = [Shard(folder / "c-0.bin", "<u2", ends)]
    return Documents(TokenStream(bins), TokenStream([Shard(folder / "c-0.mask", np.uint8, ends)]))


@pytest.mark.parametrize("assistant_only", [True, False])
def test_counts_of_packed_rows_are_estimates(tmp_path: Path, assistant_only: bool) -> None:
    source = packed_rows(tmp_path, LENGTHS, SEQ, assistant_only=assistant_only)
    counts, batch = count_packed(source), all_rows(source)
    assert (counts.rows, counts.positions) == (batch.labels.shape[0], batch.labels.numel())
    assert counts.padding == batch.labels.numel() - sum(LENGTHS) + len(LENGTHS)
    assert counts.supervised == batch.supervised
    held = [len(source.packing.of_row(row)) for row in range(source.rows)]
    assert counts.rows_of_several == sum(count > 1 for count in held)
    assert counts.without_target == 0
    documents, masks = conversations([5, 6, 7])
    masks[1] = [1, 0, 0, 0, 0, 0]
    untaught = documents_of(tmp_path, documents, masks, name="untaught")
    rows = PackedRows(untaught, pack(untaught.lengths, SEQ), assistant_only)
    assert count_packed(rows).without_target == (1 if assistant_only else 0)
