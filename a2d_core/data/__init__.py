"""From text and conversations to rows of tokens, and from rows to batches.

Load (`load_documents`, `load_conversations`: a training and a held-out part), make rows (`pretraining_rows`,
`conversation_rows`), and collate (`DiffusionCollator`); `stream_rows` loads and makes rows while training. Whatever is
wrong with the data is said here, before any training.
"""

from a2d_core.data.batches import DiffusionCollator
from a2d_core.data.cache import digest
from a2d_core.data.conversations import conversation_rows, end_of_turn
from a2d_core.data.sources import load_conversations, load_documents
from a2d_core.data.streams import open_stream, stream_rows
from a2d_core.data.text import pretraining_rows

__all__ = [
    "DiffusionCollator",
    "conversation_rows",
    "digest",
    "end_of_turn",
    "load_conversations",
    "load_documents",
    "open_stream",
    "pretraining_rows",
    "stream_rows",
]
