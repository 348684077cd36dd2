"""Which code a figure is of: a hash of the files that decide how fast a step is, and the versions of what they call.

A commit would not do: it changes with a typing error in a document, and does not change with a file that was edited
and not committed. Figures of two hashes are never put into one median.
"""

import hashlib
from pathlib import Path

import cheaptrain_kernels

import cheaptrain
from cheaptrain.environment import versions_of

_FOLDERS = ("bench", "data", "model", "parallel", "train")
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "liger-kernel", "trl", "torchao", "flash-attn")


def code_hash() -> str:
    """Twelve hexadecimal digits over the Python files of the packages that a step goes through."""
    root, kernels = Path(cheaptrain.__file__).parent, Path(cheaptrain_kernels.__file__).parent
    files = [file for folder in _FOLDERS for file in (root / folder).glob("**/*.py")] + list(kernels.glob("**/*.py"))
    total = hashlib.sha256()
    for name, file in sorted((f"{file.parent.name}/{file.name}", file) for file in files):
        total.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    return versions_of(_PACKAGES)
