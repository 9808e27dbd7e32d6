"""Documents of the `s2_heldout` task."""

from typing import Any

import datasets

from eval.heldout import find_heldout, read_texts


def load(pretrained: str, heldout: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Rows {text} of `heldout` (default: the held-out shards of the run that `pretrained` belongs to).

    Raises FileNotFoundError where there are none, ValueError for documents without any text.
    """
    source = heldout or find_heldout(pretrained)
    rows = [{"text": text} for text in read_texts(source) if text.strip()]
    if not rows:
        raise ValueError(f"s2_heldout: {source} has no document with text in it")
    return {"test": datasets.Dataset.from_list(rows)}


def text(document: dict[str, str]) -> str:
    # A function, because a template would read a document that looks like a list or a number as one.
    return document["text"]
