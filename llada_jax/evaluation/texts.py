"""Texts and (prompt, answer) pairs as rows to score, one document or window per row."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import flax.struct
import numpy as np

from llada_jax.attention.visibility import make_layout
from llada_jax.data import chat
from llada_jax.data.order import Batch
from llada_jax.data.records import parse_row, read_rows
from llada_jax.data.sources import SourceFile, list_files, place
from llada_jax.data.text import iter_documents
from llada_jax.errors import InputError
from llada_jax.model.alignment import predictable
from llada_jax.tokenizer import Tokenizer

_LENGTH_STEP = 32


@flax.struct.dataclass
class Texts(Batch):
    """A batch of texts. goes_on [rows] bool: the row continues the text of an earlier window."""

    goes_on: np.ndarray


class _Document(NamedTuple):
    conversation: chat.Conversation
    goes_on: bool = False


def read_texts(source: str, tokenizer: Tokenizer, length: int, limit: int | None = None) -> Texts:
    """Reads the first `limit` rows from the texts of `source`, a file or folder of .txt, .jsonl or .parquet.

    A row with "text" is scored whole, with its end of sequence, in windows of at most `length` tokens that do not see
    each other. Any other row is a conversation, or a prompt and its completion, as in data/chat.py ("answer" is another
    name for the completion). Of those, the supervised tokens are scored, given what comes before them. A beginning of
    sequence is not scored. Raises InputError naming file and line, also if a pair has more than `length` tokens.
    """
    entries = list(itertools.islice(_documents(list_files(source), tokenizer, length), limit))
    documents = [document.conversation for document in entries]
    if not documents:
        raise InputError(f"{source}: nothing to score")
    longest = max(len(document.ids) for document in documents)
    shape = len(documents), longest + -longest % _LENGTH_STEP
    ids, segment_ids, supervised = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = document.ids
        segment_ids[row, : len(document.ids)] = 1
        for first, last in document.spans:
            supervised[row, first:last] = True
    rows = np.arange(len(documents), dtype=np.uint32)
    goes_on = np.array([document.goes_on for document in entries])
    return Texts(ids, segment_ids, supervised, rows, np.zeros_like(rows), goes_on)


def scored_bytes(batch: Batch, tokenizer: Tokenizer, alignment: str) -> int:
    """UTF-8 bytes of the tokens of the batch that a model of this alignment gives a probability; special tokens have
    none.
    """
    asked = np.asarray(predictable(make_layout(batch.segment_ids, 1), batch.segment_ids, alignment)) & batch.supervised
    goes_on = batch.goes_on if isinstance(batch, Texts) else np.zeros(len(batch.ids), bool)
    total = 0
    for ids, segment_ids, scored, inside in zip(batch.ids, batch.segment_ids, asked, goes_on, strict=True):
        for segment in range(1, segment_ids.max(initial=0) + 1):
            at = segment_ids == segment
            total += tokenizer.text.count_bytes(ids[at], scored[at], begins=not inside)
    return total


def _documents(files: Sequence[SourceFile], tokenizer: Tokenizer, length: int) -> Iterator[_Document]:
    for index, file in enumerate(files):
        if file.format == "text":
            for *_, text in iter_documents(files, start=(index, 0), stop=(index + 1, 0)):
                yield from _windows(text, tokenizer, length)
            continue
        columns = ("text", *chat.COLUMNS)
        for _, offset, row in read_rows(files, columns, (index, 0), (index + 1, 0)):
            try:
                yield from _row_documents(parse_row(row), tokenizer, length)
            except InputError as error:
                raise InputError(f"{place(file, offset)}: {error}") from error


def _row_documents(row: dict, tokenizer: Tokenizer, length: int) -> Iterator[_Document]:
    if isinstance(row.get("text"), str):
        yield from _windows(row["text"], tokenizer, length)
        return
    if "answer" in row:
        row = {"completion": row["answer"]} | row
    for document in chat.tokenise(chat.prepare(row, tokenizer), tokenizer):
        if document is None:
            continue
        if len(document.ids) > length:
            raise InputError(f"{len(document.ids)} tokens, more than --length={length}")
        yield _Document(document)


def _windows(text: str, tokenizer: Tokenizer, length: int) -> Iterator[_Document]:
    begun = tokenizer.encode_document(text)
    given = len(tokenizer.document_prefix)  # a beginning of sequence is not scored
    ids = np.asarray(begun + ([] if tokenizer.eos_id is None else [tokenizer.eos_id]), np.int32)
    for start in range(0, len(ids), length):
        window = ids[start : start + length]
        if (first := max(given - start, 0)) < len(window):
            yield _Document(chat.Conversation(window, [(first, len(window))]), goes_on=start > 0)
