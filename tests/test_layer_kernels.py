"""The kernels for layers give the outputs and gradients of the plain code, over odd shapes and dtypes."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from cheaptrain_kernels import Backend, use_backend
from cheaptrain_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from cheaptrain_kernels.rope import rope, rope_reference
from cheaptrain_kernels.swiglu import swiglu, swiglu_reference
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
_ON_GPU = torch.cuda.is_available() and not _INTERPRETED
DEVICE = "cuda" if _ON_GPU else "cpu"
needs_triton = pytest.mark.skipif(
    not _ON_GPU and not _INTERPRETED, reason="needs a GPU, or triton with TRITON_INTERPRET=1"
)
HALF, FULL = torch.bfloat16, torch.float32
# The interpreter cuts off what does not fit into bf16, a GPU rounds it.
ALLOWED = {HALF: {"rtol": 2**-6, "atol": 2**-6}, FULL: {"rtol": 2e-5, "atol": 2e-5}}


@pytest.fixture(autouse=True)
def _seeded(monkeypatch) -> Iterator[None]:
    torch.manual_seed(0)
    if needs_triton.args[0] is False:  # few programs, so that each has several rows and some one fewer
        for name in ("triton_norm", "triton_rope"):
            monkeypatch.setattr(f"cheaptrain_kernels.{name}.PROGRAMS", 4)
    with use_backend("triton"):
        yield


def _given(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def _compare(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
) -> None:
    """Outputs, and gradients of all inputs for random gradients of all outputs."""
    results = []
    for each in (function, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = each(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        draw = torch.Generator(DEVICE).manual_seed(1)
        above = [torch.randn(o.shape, generator=draw, device=DEVICE).to(o.dtype) for o in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, above)))
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0  # gradients of gains are long sums
        allowed = ALLOWED[HALF if any(x.dtype == HALF for x in inputs) else FULL]
        torch.testing.assert_close(got / scale, wanted / scale, **allowed)


@needs_triton
@pytest.mark.parametrize("shape", [(3, 3, 100), (2, 1), (1, 1536), (0, 16), (11, 24)])
@pytest.mark.parametrize(("of_x", "of_residual", "of_normed"), [(FULL,) * 3, (HALF, FULL, HALF), (HALF,) * 3])
def test_sum_and_norm_in_one_pass(
    shape: tuple[int, ...], of_x: torch.dtype, of_residual: torch.dtype, of_normed: torch.dtype
) -> None:
    inputs = _given(*shape, dtype=of_x), _given(*shape, dtype=of_residual), _given(shape[-1])
    _compare(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5, of_normed),
        lambda x, r, w: add_rms_norm_reference(x, r, w, 1e-5, of_normed),
        inputs,
    )
    # The sum alone, or the norm alone, is what goes on.
    for one in (0, 1):
        _compare(
            lambda x, r, w, one=one: add_rms_norm(x, r, w, 1e-5)[one] + 0 * w.sum().to(r.dtype),
            lambda x, r, w, one=one: add_rms_norm_reference(x, r, w, 1e-5)[one] + 0 * w.sum().to(r.dtype),
            inputs,
        )


@needs_triton
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("shape", [(3, 5, 100), (7, 3), (0, 16)])
def test_norm_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = _given(*shape, dtype=dtype), _given(shape[-1])
    _compare(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), inputs)


@needs_triton
def test_the_gain_has_the_same_bits_in_every_run() -> None:
    x, weight = _given(5000 if _ON_GPU else 30, 40), _given(40)
    above = torch.randn_like(x)
    first, second = (torch.autograd.grad(rms_norm(x, weight, 1e-6), weight, above)[0] for _ in range(2))
    assert torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("shape", [(3, 3, 100), (4, 2), (2, 5000), (0, 8)])
def test_gate_and_up(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _compare(swiglu, swiglu_reference, [_given(*shape, dtype=dtype)])


@needs_triton
def test_a_gate_far_from_zero_is_no_nan() -> None:
    gates = torch.tensor([[-200.0, 200.0, -1e4, 1e4, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    _compare(swiglu, swiglu_reference, [gates])


@needs_triton
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("norm", ["none", "plain", "gains"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 3, 10), (1, 4, 6, 64), (3, 2, 1, 2), (0, 3, 2, 8)])
def test_rotation_with_and_without_the_norm_before_it(
    shape: tuple[int, int, int, int], interleaved: bool, norm: str, dtype: torch.dtype
) -> None:
    rows, seq, _, dim = shape
    angles = 9 * torch.randn(rows, seq, dim // 2, device=DEVICE)
    how = {"interleaved": interleaved, "eps": None if norm == "none" else 1e-5}
    gains = [_given(dim)] if norm == "gains" else []
    _compare(
        lambda x, *g: rope(x, angles.cos(), angles.sin(), gain=g[0] if g else None, **how),
        lambda x, *g: rope_reference(x, angles.cos(), angles.sin(), gain=g[0] if g else None, **how),
        [_given(*shape, dtype=dtype), *gains],
    )


@needs_triton
def test_rotation_of_a_slice_of_a_merged_projection() -> None:
    """Queries lie in the rows of queries, keys and values; taken as contiguous they would be other tokens' values."""
    angles = torch.randn(2, 5, 4, device=DEVICE)

    def queries(merged: Tensor) -> Tensor:
        return merged[..., :24].view(2, 5, 3, 8)

    _compare(
        lambda m: rope(queries(m), angles.cos(), angles.sin(), interleaved=False),
        lambda m: rope_reference(queries(m), angles.cos(), angles.sin(), interleaved=False),
        [_given(2, 5, 40)],
    )


def test_turning_and_norming_without_gains_can_change_places() -> None:
    x, angles = _given(2, 3, 2, 8), torch.randn(2, 3, 4, device=DEVICE)
    turned = rope_reference(x, angles.cos(), angles.sin(), interleaved=True)
    after = turned * torch.rsqrt(turned.square().mean(-1, keepdim=True) + 1e-5)
    before = rope_reference(x, angles.cos(), angles.sin(), interleaved=True, eps=1e-5)
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope"])
def test_compiled_graphs_go_through(name: str, backend: Backend) -> None:
    x, angles = _given(2, 3, 2, 8), torch.randn(2, 3, 4, device=DEVICE)
    ops = torch.ops.cheaptrain
    arguments = {
        "rms_norm": (x, _given(2, 3, 2, 8), _given(8), 1e-5, torch.float32),
        "swiglu": (x,),
        "rope": (x, angles.cos(), angles.sin(), _given(8), 1e-5, True),
    }[name]
    with use_backend(backend):
        torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize(("of_x", "of_residual"), [(FULL, FULL), (HALF, FULL), (HALF, HALF)])
@pytest.mark.parametrize("wanted", ["both", "norm", "sum"])
def test_operators_without_triton_have_their_gradients(
    wanted: str, of_x: torch.dtype, of_residual: torch.dtype
) -> None:
    """A compiled graph of a machine that has no GPU runs them; autograd sees nothing of what they do inside."""
    ops, angles = torch.ops.cheaptrain, torch.randn(2, 3, 4, device=DEVICE)
    outputs = {"both": slice(2), "norm": slice(1), "sum": slice(1, 2)}[wanted]
    with use_backend("torch"):
        _compare(
            lambda x, r, w: (*ops.rms_norm(x, r, w, 1e-5, of_x)[outputs], 0 * w),
            lambda x, r, w: (*add_rms_norm_reference(x, r, w, 1e-5, of_x)[outputs], 0 * w),
            [_given(3, 5, 100, dtype=of_x), _given(3, 5, 100, dtype=of_residual), _given(100)],
        )
        _compare(
            lambda x, w: ops.rms_norm(x, None, w, 1e-5, of_x)[0],
            lambda x, w: rms_norm_reference(x, w, 1e-5, of_x),
            [_given(3, 5, 100, dtype=of_x), _given(100)],
        )
        _compare(ops.swiglu, swiglu_reference, [_given(3, 4, 10, dtype=of_x)])
        for interleaved in (False, True):
            for eps, gains in ((0.0, []), (1e-5, []), (1e-5, [_given(8)])):
                _compare(
                    lambda x, *g, e=eps, i=interleaved: ops.rope(
                        x, angles.cos(), angles.sin(), g[0] if g else None, e, i
                    ),
                    lambda x, *g, e=eps, i=interleaved: rope_reference(
                        x, angles.cos(), angles.sin(), interleaved=i, eps=e or None, gain=g[0] if g else None
                    ),
                    [_given(2, 3, 2, 8, dtype=of_x), *gains],
                )


COMPILING = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cheaptrain_kernels import triton_norm, triton_rope, triton_swiglu

FP32 = ("weight", "inverse", "parts", "cosines", "sines", "gain", "grad_residual", "residual", "total", "grad_total")
KINDS = {"rows": "i32", "programs": "i32", "tokens": "i32", "stride": "i32", "gradient_stride": "i32", "eps": "fp32"}
KINDS |= {name: "*fp32" for name in FP32}
OF = {"ADDS": "residual", "NORMED": "grad_normed", "TOTAL": "grad_total", "GAINS": "gain"}


def ptx(kernel, **constants):
    constants |= {OF[name]: None for name, value in constants.items() if value is False and name in OF}
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else KINDS.get(name, "*bf16") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    whole = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if kinds[n][0] == "*" or "stride" in n}
    source = ASTSource(kernel, kinds, places, whole)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(kernel.fn.__name__, "v4.b32" in compiled.asm["ptx"])


NORM = {"HIDDEN": 1536, "BLOCK": 2048}
for adds in (True, False):
    ptx(triton_norm._forward, ADDS=adds, **NORM)
    ptx(triton_norm._backward, NORMED=adds, TOTAL=True, OTHER=adds, ROWS_EACH=62, **NORM)
ptx(triton_swiglu._forward, FFN=6144, BLOCK=2048)
ptx(triton_swiglu._backward, FFN=6144, BLOCK=2048)
HEADS = {"HEADS": 24, "HALF": 32, "HEADS_BLOCK": 32, "HALF_BLOCK": 32}
for norms, gains, interleaved in ((True, True, False), (True, False, True), (False, False, True)):
    how = {"NORMS": norms, "GAINS": gains, "INTERLEAVED": interleaved}
    ptx(triton_rope._forward, **how, **HEADS)
    ptx(triton_rope._backward, TOKENS_EACH=62, **how, **HEADS)
"""


def test_the_compiler_for_a_hopper_gpu_refuses_no_kernel(tmp_path: Path) -> None:
    """What Triton's interpreter accepts its compiler may refuse. It takes no GPU."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", COMPILING], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    # Norms and SwiGLU load 16 bytes at once.
    assert [line.split() for line in ended.stdout.splitlines()[:6]] == [["_forward", "True"], ["_backward", "True"]] * 3
    assert len(ended.stdout.splitlines()) == 12


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden"):
        rms_norm(torch.zeros(2, 8), torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="side by side"):
        swiglu(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="an eps above 0"):
        rope(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), interleaved=True, gain=torch.ones(4))
