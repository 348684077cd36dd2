"""The Triton cross-entropy must be the plain one: value, gradient, count, at every size and for rows that are special.

Without a GPU the kernels run in Triton's interpreter, with one compiled. The interpreter cuts fp32 to bf16 where a GPU
rounds to the nearest: a number is off by less than 2^-7 of itself, not 2^-8.
"""

import itertools

import pytest
import torch
from cheaptrain_kernels import linear_cross_entropy, linear_cross_entropy_reference, token_losses, use_backend
from cheaptrain_kernels.row_ops import cross_entropy_rows, row_statistics, softmax_gradient
from torch import Tensor

pytest.importorskip("triton")
from cheaptrain_kernels import triton_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the infinities that are meant
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [(0.0, None), (1e-2, None), (0.0, 3.0), (1e-2, 3.0)]  # z-loss, soft cap


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, at sizes that an interpreter can do."""
    monkeypatch.setattr(triton_rows, "TWICE_SWEPT", 128)
    monkeypatch.setattr(triton_rows, "ONCE_SWEPT", 128)


def _rows(vocab: int, rows: int = 5, size: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in fp32, labels of which the second is not supervised, weights of either sign and zero."""
    draw = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=draw) * size
    labels = torch.randint(0, vocab, (rows,), generator=draw)
    labels[1:2] = -100
    weights = torch.tensor([0.5, 2.0, -1.5, 0.0, 1.0])[:rows]
    return logits.to(DEVICE), labels.to(DEVICE), weights.to(DEVICE)


def _padded(logits: Tensor, columns: int, stride: int) -> Tensor:
    """The same as the first columns of wider rows that are further apart, what is beside them being wild."""
    room = torch.full((len(logits), stride), 1e4, dtype=logits.dtype, device=logits.device)
    room[:, : logits.shape[1]] = logits
    return room[:, :columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 131, 1000])
def test_rows_become_the_gradient_of_the_plain_loss(vocab: int, dtype: torch.dtype) -> None:
    logits, labels, weights = _rows(vocab)
    logits = logits.to(dtype)
    for (z_loss, cap), weighted in itertools.product(OPTIONS, (False, True)):
        exact = logits.double().requires_grad_()
        own = weights if weighted else None
        plain = linear_cross_entropy_reference(
            exact,
            torch.eye(vocab, dtype=torch.float64, device=DEVICE),
            labels,
            weights=own,
            z_loss=z_loss,
            soft_cap=cap,
        )
        plain.loss.backward()
        assert exact.grad is not None
        columns = vocab + 5
        room = _padded(logits, columns, columns + 11)
        found = cross_entropy_rows(room, labels, own, vocab, z_loss, cap or 0.0, True)
        what = f"{z_loss=} {cap=} {weighted=}"
        assert found[0].sum().item() == pytest.approx(plain.loss.item(), rel=2e-6, abs=2e-5), what
        assert found[1].sum().item() == pytest.approx(plain.cross_entropy.item(), rel=2e-6, abs=2e-5), what
        assert found[2].sum().item() == plain.correct.item(), what
        assert found[:, 1].tolist() == [0.0, 0.0, 0.0] and room[1].abs().max() == 0, what
        assert room[:, vocab:].abs().max() == 0, what
        off = (room[:, :vocab].double() - exact.grad).abs()
        bound = 5e-6 if dtype == torch.float32 else 2**-7 * exact.grad.abs() + 5e-6
        assert (off <= bound).all(), f"{what}: off by {off.max()}"


@pytest.mark.parametrize(("tokens", "vocab"), [(0, 7), (1, 1), (5, 7), (9, 131), (5, 160)])
def test_linear_gives_the_values_and_gradients_of_the_plain_way(tokens: int, vocab: int) -> None:
    draw = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, 24, generator=draw).to(DEVICE)
    weight = torch.randn(vocab, 12, generator=draw).to(DEVICE)
    labels = torch.randint(0, vocab, (tokens,), generator=draw).to(DEVICE)
    labels[2:4] = -100
    weights = torch.randn(tokens, generator=draw).to(DEVICE)
    for (z_loss, cap), own in itertools.product(OPTIONS, (None, weights)):
        results = []
        for function, options in ((linear_cross_entropy, {"chunk_tokens": 4}), (linear_cross_entropy_reference, {})):
            states, head = wide.clone().requires_grad_(), weight.clone().requires_grad_()
            with use_backend("triton"):  # every second column: not contiguous
                sums = function(states[:, ::2], head, labels, weights=own, z_loss=z_loss, soft_cap=cap, **options)
            (sums.loss / 3).backward()
            results.append((sums, states.grad, head.grad))
        (ours, *gradients), (plain, *plain_gradients) = results
        for name in ("loss", "cross_entropy"):
            assert getattr(ours, name).item() == pytest.approx(getattr(plain, name).item(), rel=1e-5, abs=1e-5), name
        assert ours.correct.item() == plain.correct.item()
        assert z_loss > 0 or torch.equal(ours.loss, ours.cross_entropy)
        for mine, theirs in zip(gradients, plain_gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_nothing_supervised_is_zero_and_no_nan() -> None:
    states = torch.full((3, 8), torch.inf, device=DEVICE, requires_grad=True)  # what is not supervised is not read
    labels = torch.full((3,), -100, device=DEVICE)
    gradient = torch.full((3, 7), torch.nan, device=DEVICE)
    assert cross_entropy_rows(gradient, labels, None, 7, 1e-2, 0.0, True).tolist() == [[0.0] * 3] * 3
    assert gradient.abs().max() == 0
    with use_backend("triton"):
        sums = linear_cross_entropy(states, torch.ones(7, 8, device=DEVICE), labels)
        sums.loss.backward()
    assert [value.item() for value in sums] == [0, 0, 0]
    assert states.grad is not None and states.grad.abs().max() == 0


def test_of_equally_likely_tokens_only_the_lowest_id_counts() -> None:
    logits = torch.zeros(4, 200, device=DEVICE)
    logits[:, [70, 3, 199]] = 2.0
    labels = torch.tensor([3, 70, 199, 5], device=DEVICE)
    assert cross_entropy_rows(logits, labels, None, 200, 0.0, 0.0, False)[2].tolist() == [1, 0, 0, 0]
    assert row_statistics(logits, None, 200, 1.0, 0.0)[1].tolist() == [3] * 4
    logits[3] = -7.0
    assert row_statistics(logits, None, 200, 1.0, 0.0)[1].tolist() == [3, 3, 3, 0]


def test_large_logits_lose_no_digits() -> None:
    logits, labels, _ = _rows(131, size=80.0)
    wanted = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    found = cross_entropy_rows(logits.clone(), labels, None, 131, 0.0, 0.0, True)[1]
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)
    (largest, total, scaled), at = row_statistics(logits, None, 131, 2.0, 0.0)
    exact = logits.double() - logits.double().amax(1, keepdim=True)
    assert torch.equal(largest, logits.amax(1)) and torch.equal(at, logits.argmax(1))
    torch.testing.assert_close(total.double(), exact.exp().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.double(), (exact / 2).exp().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_logit_gives_a_loss_that_is_not_finite(bad: float) -> None:
    for column in (0, 70, 130):
        logits, labels, _ = _rows(131)
        logits[0, column] = bad
        found = cross_entropy_rows(logits.clone(), labels, None, 131, 0.0, 0.0, True)
        assert not found[0, 0].isfinite() and found[0, 1:].isfinite().all()
        assert not row_statistics(logits, None, 131, 1.0, 0.0)[0][1, 0].isfinite()


def test_a_block_without_a_finite_logit_is_no_nan() -> None:
    logits, labels, _ = _rows(131)
    logits[:, :128], labels[:] = -torch.inf, 129
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(cross_entropy_rows(logits, labels, None, 131, 0.0, 0.0, False)[1], wanted)


def test_what_wants_no_gradient_writes_none() -> None:
    logits, labels, _ = _rows(131)
    before = logits.clone()
    cross_entropy_rows(logits, labels, None, 131, 1e-2, 0.0, False)
    assert torch.equal(logits, before)
    head = torch.randn(131, 131, device=DEVICE)
    for cap in (None, 2.0):
        with use_backend("torch"):
            plain = token_losses(before, head, labels, soft_cap=cap)
        with use_backend("triton"):
            ours = token_losses(before, head, labels, soft_cap=cap, chunk_tokens=2)
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
            assert token_losses(before[:0], head, labels[:0]).shape == (0,)


def test_a_row_without_a_share_gets_zeros_unread() -> None:
    logits = torch.full((2, 70), torch.nan, device=DEVICE)
    logits[1] = 1.0
    factors = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]], device=DEVICE)
    softmax_gradient(logits, torch.tensor([5, 66], device=DEVICE), factors, 68, 1.0, 0.0)
    assert logits[0].abs().max() == 0
    wanted = torch.full((70,), 2.0, device=DEVICE)
    wanted[66], wanted[68:] = -1.0, 0.0
    torch.testing.assert_close(logits[1], wanted)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU a device assertion, which ends the process")
def test_a_label_outside_the_vocabulary_is_refused() -> None:
    states, head = torch.randn(2, 4), torch.randn(7, 4)
    for backend, label in itertools.product(("torch", "triton"), (7, -1)):
        with use_backend(backend), pytest.raises(RuntimeError, match="outside the vocabulary of 7"):
            linear_cross_entropy(states, head, torch.tensor([1, label]))
    found = cross_entropy_rows(torch.randn(2, 7), torch.tensor([1, 9]), None, 7, 0.0, 0.0, False)
    assert found[0].isnan().tolist() == [False, True]
