"""`cheaptrain inspect`: packed rows as the model reads them, and what packing did to every token.

Rows come from the very order and row code that training uses, at their global positions. Colour shows at a glance
what characters say as well: documents, positions, end-of-text and the positions without a target can be read in a pipe
too. Conversations show what the model must produce in them. The trap: a viewer with a reader of its own shows what
somebody meant, not what the model gets.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from cheaptrain.data.manifest import Manifest, load_manifest
from cheaptrain.data.open import open_rows, source_facts
from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.rows import PackedRows, RowBatch, RowSource, StreamRows, build_rows
from cheaptrain.data.tokenizer import TextTokenizer, load_tokenizer
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.facts import model_facts
from cheaptrain.recipe.layout import planned_processes
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.resolve import MissingFacts, Resolved, SourceFacts, resolve
from cheaptrain.recipe.schema import Recipe
from cheaptrain.recipe.shares import weighted
from cheaptrain.report.chat_text import NOT_PRODUCED, PRODUCED, chat_row
from cheaptrain.report.row_counts import count_packed, count_pass, limit_reached
from cheaptrain.report.row_text import LINE_END, TAB, Piece, TokenText, row_pieces, visible
from cheaptrain.train.survey import mixture_order

TOKEN_END, END_OF_TEXT, NO_TARGET = "▏", "⏎", "✗"
_DOCUMENT_STYLES = ("cyan", "green")


def print_rows(loaded: LoadedRecipe, console: Console, first_row: int, count: int) -> None:
    """Show `count` global rows from `first_row` on, and the counts.

    Raises PreflightError when data is not prepared, or when conversations have no token that the model must produce.
    """
    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    manifests = {source.name: load_manifest(recipe.data, source, tokenizer) for source in weighted(recipe)}
    facts = {name: source_facts(manifest, recipe.data.seq_len) for name, manifest in manifests.items()}
    resolved = _resolved(loaded, facts, tokenizer)
    if first_row >= resolved.rows:
        raise RecipeError(f"--start {first_row}: the run has {resolved.rows:,} rows, counted from 0")
    order = mixture_order(recipe, facts)
    read = [open_rows(manifests[name], recipe.data, recipe.seed, recipe.train.assistant_only) for name in order.names]
    positions = np.arange(first_row, min(first_row + count, resolved.rows))
    sources, rows, epochs = order.locate(positions)
    batch = build_rows(read, sources, rows)

    _print(console, Text(f"Rows of {loaded.name} ({loaded.path})", "bold"))
    _print(console, _legend())
    if any(isinstance(source, PackedRows) for source in read):
        _print(console, _chat_legend())
    text = TokenText(tokenizer)
    split = 0
    for j, position in enumerate(positions.tolist()):
        pieces = list(row_pieces(batch, j, text))
        source, row = read[sources[j]], int(rows[j])
        before, after = _goes_on(source, row), _goes_on(source, row + 1)
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
        if isinstance(source, PackedRows):
            filled = int((source.documents.lengths[source.packing.of_row(row)] - 1).sum())
            _print(console, chat_row(batch, j, filled, text))
        else:
            _print(console, _row(pieces, before, recipe.data.document_mask))
    _print(console, Text())
    for line in (
        *_shown_counts(batch, split, recipe.data.document_mask),
        *_source_counts(recipe, resolved, order, manifests, read),
    ):
        _print(console, line)
    refuse_untaught(dict(zip(order.names, read, strict=True)))


def refuse_untaught(sources: Mapping[str, RowSource]) -> None:
    """Conversations from which nothing can be learned. Raises PreflightError saying how many each source has."""
    problems = []
    for name, source in sources.items():
        if isinstance(source, PackedRows) and (untaught := count_packed(source).without_target):
            problems.append(
                f"source {name!r}: {untaught:,} of {len(source.documents.lengths):,} conversations have no token that "
                "the model must produce; choose another chat.template and run `cheaptrain prepare`"
            )
    if problems:
        raise PreflightError("\n".join(problems))


def _resolved(loaded: LoadedRecipe, facts: dict[str, SourceFacts], tokenizer: TextTokenizer) -> Resolved:
    """The length of the run. The model is only asked where the recipe measures the run by it."""
    recipe = loaded.recipe
    try:
        return resolve(recipe, planned_processes(recipe), facts, None, loaded.provenance)
    except MissingFacts:
        model = model_facts(recipe.model, vocab_size=tokenizer.size, seq_len=recipe.data.seq_len)
        return resolve(recipe, planned_processes(recipe), facts, model, loaded.provenance)


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


def _chat_legend() -> Text:
    return Text.assemble(
        (PRODUCED, "bold yellow"), ("answer", "bold green"), (NOT_PRODUCED, "bold yellow"),
        " of a conversation: what the model must produce; all else it only reads   ",
        ("<special>", "dim magenta"), " a special token",
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
            text.append(visible(piece.text), style if piece.supervised else f"{style} dim strike")
        if not piece.supervised:
            text.append(NO_TARGET * (piece.stop - piece.start), "bold yellow")
        text.append("\n" if piece.end_of_text else TOKEN_END, "dim")
    return text


def _goes_on(source: RowSource, row: int) -> bool:
    """Whether a document goes on from the row before this one, rather than starting with it."""
    if row == 0 or not isinstance(source, StreamRows):
        return False
    offset = row * source.seq_len
    return len(source.stream.document_starts(offset - 1, offset + 1)) == 0


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
    sources: Sequence[RowSource],
) -> Iterator[Text]:
    yield Text(f"The whole run: {resolved.rows:,} rows of {recipe.data.seq_len:,} tokens", "bold")
    read = order.counts(resolved.rows)
    limits = {source.name: source.max_tokens for source in recipe.data.sources}
    for name, source, rows in zip(order.names, sources, read.tolist(), strict=True):
        manifest = manifests[name]
        stopped = f"; stopped at max_tokens = {limits[name]:,}, the rest not read" if limit_reached(manifest) else ""
        what, lost = "documents", f"{manifest.dropped:,} empty dropped"
        if manifest.chat is not None:
            what = "conversations"
            lost = f"{manifest.chat['cut']:,} cut to fit a row, {manifest.dropped:,} dropped because no exchange fits"
        yield Text(
            f"  {name}: {manifest.train.documents:,} {what} kept for training, {manifest.val.documents:,} held out,"
            f" {lost}, {manifest.skipped:,} unreadable skipped{stopped}"
        )
        yield from _pass_counts(source, manifest)
        yield Text(f"    the run reads {rows:,} rows of it: {rows / source.rows:.2f} passes")


def _pass_counts(source: RowSource, manifest: Manifest) -> Iterator[Text]:
    if isinstance(source, PackedRows):
        packed = count_packed(source)
        yield Text(
            f"    {manifest.train.tokens:,} tokens packed into {packed.rows:,} rows x {source.seq_len:,}:"
            f" {packed.padding:,} positions of padding ({packed.padding / packed.positions:.2%})"
        )
        yield Text(
            f"    one pass: {packed.supervised:,} positions with a target ({packed.supervised / packed.positions:.2%};"
            f" {packed.supervised / max(1, packed.positions - packed.padding):.2%} of what is not padding),"
            f" {packed.rows_of_several:,} rows of several conversations ({packed.rows_of_several / packed.rows:.0%})"
        )
        return
    assert isinstance(source, StreamRows)
    counts = count_pass(source)
    positions = counts.rows * source.seq_len
    yield Text(
        f"    {manifest.train.tokens:,} tokens = {counts.rows:,} rows x {source.seq_len:,} + 1 last target"
        f" + {counts.left_over:,} cut at the end, too few for a row"
    )
    untaught = f"{counts.without_target:,} positions without a target ({counts.without_target / positions:.2%})"
    several = f"{counts.rows_of_several:,} rows of several documents ({counts.rows_of_several / counts.rows:.0%})"
    yield Text(f"    one pass: {untaught}, {several}, {counts.split_documents:,} documents split over rows")
