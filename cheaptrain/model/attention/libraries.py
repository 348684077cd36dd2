"""The flash-attn libraries, where installed: 2 (`flash_attn`), 3 (`flash_attn_interface`), 4 (`flash_attn.cute`).

Written for flash-attn 2.8, the interface of flash-attn 3 in the `hopper` folder of its repository (3.0), and
flash-attn-4 4.0.0b36. All three have `flash_attn_func` and `flash_attn_varlen_func`, which take tokens before heads and
know grouped heads; the keywords used here are those they agree on. Versions 2 and 3 register what they launch as
operators, so that a compiled layer keeps them in its graph. Version 4 registers nothing: its two launches are wrapped
as operators in `flash4.py`. Some builds return the output alone, others a tuple that begins with it.

The trap it avoids: an import within a compiled layer, and one that fails there. A library is loaded once, before the
first step (`load`), and whether it can be is said in words (`why_not`).
"""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

NAMES = ("flash2", "flash3", "flash4")
LABELS = {"flash2": "flash-attn 2", "flash3": "flash-attn 3", "flash4": "flash-attn 4"}

_MODULES = {
    "flash2": "flash_attn",
    "flash3": "flash_attn_interface",
    "flash4": "cheaptrain.model.attention.flash4",
}
_CAUSAL: dict[str, Callable[..., Any]] = {}
_PACKED: dict[str, Callable[..., Any]] = {}


def why_not(name: str) -> str | None:
    """Load a library; why that cannot be done here, or None."""
    if name in _CAUSAL:
        return None
    try:
        module = importlib.import_module(_MODULES[name])
        causal, packed = module.flash_attn_func, module.flash_attn_varlen_func
    except AttributeError:
        return "not installed"  # what is there is the folder of flash-attn 4, or something else of that name
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        known = missing in ("flash_attn", "flash_attn_interface")
        return "not installed" if known else f"needs {missing}, which is not installed"
    except Exception as error:  # a library built for another torch or CUDA fails in many ways
        lines = str(error).splitlines() or [""]
        return f"does not load: {type(error).__name__}: {lines[0]}"
    _CAUSAL[name], _PACKED[name] = causal, packed
    return None


def causal(name: str, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """`[rows, heads, seq, head_dim]` → `[rows, seq, heads, head_dim]`. `why_not` has to have been asked before."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if name == "flash2":
        output = _CAUSAL[name](query, key, value, dropout_p=dropout, softmax_scale=scaling, causal=True)
    else:
        output = _CAUSAL[name](query, key, value, softmax_scale=scaling, causal=True)
    return _alone(output)


def packed(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """`[tokens, heads, head_dim]` of documents end to end, of which none is longer than `longest`; like `causal`."""
    extra: dict[str, Any] = {"dropout_p": dropout} if name == "flash2" else {}
    output = _PACKED[name](
        query,
        key,
        value,
        cu_seqlens_q=boundaries,
        cu_seqlens_k=boundaries,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
        **extra,
    )
    return _alone(output)


def _alone(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(first, Tensor)
    return first
