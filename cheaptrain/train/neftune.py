"""NEFTune: noise on the input embeddings while training (arXiv 2310.05914).

Each number of an embedding gets uniform noise in [-1, 1] times alpha / sqrt(L * d): L tokens of the text, d numbers an
embedding, so that the noise of a whole text has the same size however long it is. In a packed row L is the length of
the document a position is in, not of the row; anything else would make the noise depend on the packing. It is drawn
from torch's own state, which is seeded for every step and share of the rows: a run that goes on draws what it would
have drawn.
"""

import torch
from torch import Tensor

from cheaptrain.data.rows import RowBatch
from cheaptrain.model.context import Context
from cheaptrain.train.sending import send


def noisy(embeddings: Tensor, batch: RowBatch, alpha: float, context: Context | None) -> Tensor:
    """`embeddings` `[rows, seq, hidden]` of this process's stretch of the rows, with noise."""
    lengths = document_lengths(batch.document_ids)
    if context is not None:
        lengths = lengths.chunk(context.size, 1)[context.rank]
    scale = alpha / (lengths * embeddings.shape[2]).sqrt().unsqueeze(2)  # [rows, seq, 1]
    noise = torch.empty_like(embeddings).uniform_(-1, 1)
    return embeddings + noise * send(scale.to(embeddings.dtype), embeddings.device)


def document_lengths(document_ids: Tensor) -> Tensor:
    """How many positions the document has that each position is in: fp32, of the shape of `document_ids`."""
    rows, seq = document_ids.shape
    number = document_ids.long() + torch.arange(rows)[:, None] * seq  # other numbers in every row
    return torch.bincount(number.flatten())[number].float()
