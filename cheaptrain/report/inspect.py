"""`cheaptrain inspect`: packed rows as the model reads them, and what packing did to every token.

Rows come from the very order and row code that training uses, at their global positions. Colour shows at a glance
what characters say as well: documents, positions, end-of-text and the positions without a target can be read in a pipe
too. The trap: a viewer with a reader of its own shows what somebody meant, not what the model gets.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from cheaptrain.data.manifest import Manifest, load_manifest
from cheaptrain.data.open import open_stream
from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.rows import RowBatch, build_rows
from cheaptrain.data.stream import TokenStream
from cheaptrain.data.tokenizer import TextTokenizer, load_tokenizer
from cheaptrain.errors import RecipeError
from cheaptrain.model.facts import model_facts
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.resolve import MissingFacts, Resolved, SourceFacts, resolve
from cheaptrain.recipe.schema import Recipe
from cheaptrain.recipe.shares import weighted
from cheaptrain.report.row_counts import count_pass, limit_reached
from cheaptrain.report.row_text import Piece, TokenText, row_pieces
from cheaptrain.train.survey import mixture_order

TOKEN_END, END_OF_TEXT, NO_TARGET, LINE_END, TAB = "▏", "⏎", "✗", "↵", "⇥"
_DOCUMENT_STYLES = ("cyan", "green")


def print_rows(loaded: LoadedRecipe, console: Console, first_row: int, count: int) -> None:
    """Show `count` global rows from `first_row` on, and the counts. Raises PreflightError when data is not prepared."""
    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data)
    manifests = {source.name: load_manifest(recipe.data, source, tokenizer) for source in weighted(recipe)}
    facts = {name: manifest.facts() for name, manifest in manifests.items()}
    resolved = _resolved(loaded, facts, tokenizer)
    if first_row >= resolved.rows:
        raise RecipeError(f"--start {first_row}: the run has {resolved.rows:,} rows, counted from 0")
    order = mixture_order(recipe, facts)
    streams = [open_stream(manifests[name], "train") for name in order.names]
    positions = np.arange(first_row, min(first_row + count, resolved.rows))
    sources, rows, epochs = order.locate(positions)
    batch = build_rows(streams, sources, rows, recipe.data.seq_len, recipe.data.document_mask)

    _print(console, Text(f"Rows of {loaded.name} ({loaded.path})", "bold"))
    _print(console, _legend())
    text = TokenText(tokenizer)
    split = 0
    for j, position in enumerate(positions.tolist()):
        pieces = list(row_pieces(batch, j, text))
        stream, start = streams[sources[j]], int(rows[j]) * recipe.data.seq_len
        before, after = _goes_on(stream, start), _goes_on(stream, start + recipe.data.seq_len)
        split += _split_documents(pieces[-1].document + 1, before, after) if recipe.data.document_mask else 0
        _print(console, Text())
        _print(
            console,
            Text(
                f"row {position:,} of the run: {order.names[sources[j]]}, epoch {epochs[j]}, row {rows[j]:,} of"
                f" {order.rows[sources[j]]:,}",
                "bold",
            ),
        )
        _print(console, _row(pieces, before, recipe.data.document_mask))
    _print(console, Text())
    for line in (
        *_shown_counts(batch, split, recipe.data.document_mask),
        *_source_counts(recipe, resolved, order, manifests, streams),
    ):
        _print(console, line)


def _resolved(loaded: LoadedRecipe, facts: dict[str, SourceFacts], tokenizer: TextTokenizer) -> Resolved:
    """The length of the run. The model is only asked where the recipe measures the run by it."""
    recipe = loaded.recipe
    try:
        return resolve(recipe, recipe.plan.gpus, facts, None, loaded.provenance)
    except MissingFacts:
        model = model_facts(recipe.model, vocab_size=tokenizer.size, seq_len=recipe.data.seq_len)
        return resolve(recipe, recipe.plan.gpus, facts, model, loaded.provenance)


def _print(console: Console, line: Text) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _legend() -> Text:
    return Text.assemble(
        ("|doc 1 pos 0|", "reverse"), " a document of the row starts, its position_ids from 0   ",
        (TOKEN_END, "dim"), " a token ends   ",
        (END_OF_TEXT, "bold red"), " end-of-text token   ",
        (NO_TARGET, "bold yellow"), " no target (label -100): not trained on   ",
        (LINE_END, "dim"), " line break, ", (TAB, "dim"), " tab in the text",
    )  # fmt: skip


def _row(pieces: Sequence[Piece], continued: bool, document_mask: bool) -> Text:
    """One row. `continued`: its first document began in the row before."""
    text = Text()
    document = -1
    for piece in pieces:
        if piece.document != document:
            document = piece.document
            goes_on = ", goes on from the row before" if document == 0 and continued and document_mask else ""
            text.append(f"|doc {document} pos {piece.position}{goes_on}|", "reverse")
        style = _DOCUMENT_STYLES[document % len(_DOCUMENT_STYLES)]
        if piece.end_of_text:
            text.append(END_OF_TEXT, "bold red" if piece.supervised else "dim red")
        else:
            text.append(_visible(piece.text), style if piece.supervised else f"{style} dim strike")
        if not piece.supervised:
            text.append(NO_TARGET * (piece.stop - piece.start), "bold yellow")
        text.append("\n" if piece.end_of_text else TOKEN_END, "dim")
    return text


def _visible(text: str) -> str:
    """Line breaks and tabs as signs, other control characters as \\xNN."""
    shown = []
    for letter in text:
        if letter == "\n":
            shown.append(LINE_END + "\n")
        elif letter == "\t":
            shown.append(TAB)
        elif letter < " " or letter == "\x7f":
            shown.append(f"\\x{ord(letter):02x}")
        else:
            shown.append(letter)
    return "".join(shown)


def _goes_on(stream: TokenStream, offset: int) -> bool:
    """Whether a document goes on over `offset`, rather than starting there."""
    return offset > 0 and len(stream.document_starts(offset - 1, offset + 1)) == 0


def _split_documents(documents: int, before: bool, after: bool) -> int:
    """Of the documents of one row, those that are also in the row before or after it."""
    return 1 if documents == 1 and (before or after) else before + after


def _shown_counts(batch: RowBatch, split: int, document_mask: bool) -> Iterator[Text]:
    rows, tokens = batch.input_ids.shape[0], batch.input_ids.numel()
    held = batch.document_ids[:, -1] + 1  # [rows]
    several = int((held > 1).sum())
    yield Text("These rows", "bold")
    yield Text(
        f"  {rows:,} rows, {tokens:,} positions, {tokens - batch.supervised:,} of them without a target"
        f" ({1 - batch.supervised / tokens:.2%})"
    )
    if not document_mask:
        yield Text("  data.document_mask is off: a row is one text, its documents see each other")
        return
    yield Text(
        f"  {int(held.sum()):,} documents or parts of one; {several:,} rows hold several ({several / rows:.0%});"
        f" {split:,} parts belong to documents split over rows"
    )


def _source_counts(
    recipe: Recipe,
    resolved: Resolved,
    order: MixtureOrder,
    manifests: dict[str, Manifest],
    streams: Sequence[TokenStream],
) -> Iterator[Text]:
    yield Text(f"The whole run: {resolved.rows:,} rows of {recipe.data.seq_len:,} tokens", "bold")
    read = order.counts(resolved.rows)
    limits = {source.name: source.max_tokens for source in recipe.data.sources}
    for name, stream, rows in zip(order.names, streams, read.tolist(), strict=True):
        manifest = manifests[name]
        counts = count_pass(stream, recipe.data.seq_len, recipe.data.document_mask)
        positions = counts.rows * recipe.data.seq_len
        stopped = f"; stopped at max_tokens = {limits[name]:,}, the rest not read" if limit_reached(manifest) else ""
        yield Text(
            f"  {name}: {manifest.train.documents:,} documents kept for training, {manifest.val.documents:,} held out,"
            f" {manifest.dropped:,} empty dropped, {manifest.skipped:,} unreadable skipped{stopped}"
        )
        yield Text(
            f"    {manifest.train.tokens:,} tokens = {counts.rows:,} rows x {recipe.data.seq_len:,} + 1 last target"
            f" + {counts.left_over:,} cut at the end, too few for a row"
        )
        untaught = f"{counts.without_target:,} positions without a target ({counts.without_target / positions:.2%})"
        several = f"{counts.rows_of_several:,} rows of several documents ({counts.rows_of_several / counts.rows:.0%})"
        yield Text(f"    one pass: {untaught}, {several}, {counts.split_documents:,} documents split over rows")
        yield Text(f"    the run reads {rows:,} rows of it: {rows / counts.rows:.2f} passes")
