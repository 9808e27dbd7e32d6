"""How far a source is read: `max_bytes` and `max_documents`, exact for any number of workers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data.corpus.readers import Document
from data.corpus.sources import Source


@dataclass
class Limit:
    """The limits of a source (None: there is none) and what has been taken of it: bytes of text, documents.

    A first document is taken however long it is. reached: nothing more is taken.
    """

    most_bytes: int | None = None
    most_documents: int | None = None
    bytes: int = 0
    documents: int = 0
    reached: bool = False

    @classmethod
    def of(cls, source: Source) -> "Limit":
        return cls(source.max_bytes, source.max_documents)

    @property
    def is_none(self) -> bool:
        return self.most_bytes is None and self.most_documents is None

    def allows(self, size: int, documents: int = 1) -> bool:
        """Whether so much more stays within the limit."""
        count = self.documents + documents
        return (self.most_documents is None or count <= self.most_documents) and (
            self.most_bytes is None or self.bytes + size <= self.most_bytes or count <= 1
        )

    def add(self, size: int, documents: int = 1) -> None:
        self.bytes += size
        self.documents += documents
        full = self.most_bytes is not None and self.bytes >= self.most_bytes
        self.reached |= full or (self.most_documents is not None and self.documents >= self.most_documents)

    def takes(self, size: int) -> bool:
        """Whether the next document, of `size` bytes of text, is still taken; after the first that is not, none is."""
        self.reached = self.reached or not self.allows(size)
        if not self.reached:
            self.add(size)
            return True
        return False

    def within(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that are taken."""
        for document in documents:
            if not self.takes(len(document.text.encode())):
                return
            yield document
