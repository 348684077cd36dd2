"""What Triton's interpreter accepts its compiler may refuse: every kernel of the losses is compiled for a Hopper GPU,
which takes none."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILING = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cheaptrain_kernels import triton_divergence, triton_rows

# What its arguments are called says of which kind they are.
KINDS = {"logits": "*bf16", "teacher_logits": "*bf16", "labels": "*i64", "targets": "*i64", "likeliest": "*i64"}
KINDS |= {name: "*fp32" for name in ("weights", "results", "factors", "facts")}
KINDS |= {name: "i32" for name in ("rows", "row_stride", "teacher_stride")}
ROW = {"VOCAB": 50257, "COLUMNS": 50304, "BLOCK": 4096}
ALL = {"CAPPED": True, "SCALED": True, "MASKED": True, "WEIGHTED": True, "WRITES": True, "MEASURES": True}
NONE = dict.fromkeys(ALL, False)
CASES = [(triton_rows._cross_entropy_rows, ALL), (triton_rows._cross_entropy_rows, NONE | {"WRITES": True})]
CASES += [(triton_rows._row_statistics, flags) for flags in (ALL, NONE)]
CASES += [(triton_rows._softmax_gradient, flags) for flags in (ALL, NONE)]
for kind in range(3):
    more = ROW | {"TEACHER_COLUMNS": 50432, "KIND": kind, "MIXED": kind > 0}
    CASES += [(triton_divergence._divergence_rows, ALL | more)]
for kernel, flags in CASES:
    constants = {name: value for name, value in (ROW | flags).items() if name in kernel.arg_names}
    for flag, pointer in (("WEIGHTED", "weights"), ("MASKED", "labels")):
        if constants.get(flag) is False:
            constants[pointer] = None
    kinds = {name: "constexpr" if name in constants else KINDS.get(name, "fp32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    whole = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if kinds[name].startswith("*") or name.endswith("stride")
    }
    source = ASTSource(kernel, kinds, places, whole)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    if "ld.global.v4.b32" not in ptx:
        sys.exit(f"{kernel.fn.__name__} loads its logits one by one")
    print(kernel.fn.__name__)
"""


def test_the_compiler_refuses_no_kernel_and_loads_16_bytes_at_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = str(tmp_path_factory.mktemp("triton"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": folder}
    ended = subprocess.run(
        [sys.executable, "-c", COMPILING], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert len(ended.stdout.split()) == 9
