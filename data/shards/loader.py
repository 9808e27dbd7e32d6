"""From windows to batches: datasets, rank-aware samplers and the collate function.

Shapes: B rows a batch, S = seq_len. A batch is a dict of `input_ids` int64 [B, S]; `labels` int64 [B, S],
where labels[t] is the token after position t, or -100 where that one opens another document (or is padding);
`cu_seqlens` int32 [64 k + 1], borders over the flattened B * S tokens, padded with B * S so that its shape
varies little; `position` int64 scalar, the global sample index of the first row. Without a border inside any row
there is no `cu_seqlens`: rows that are one document each take the model's faster unpacked path.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from data.shards.mixture import Curriculum, PackedStream, Window
from data.shards.order import Permutation

IGNORED = -100
CU_SEQLENS_MULTIPLE = 64

Sample = tuple[int, list[Window]]  # index; windows of equal length that fill a row side by side


class TrainDataset(Dataset[Sample]):
    """The endless training sequence, indexed by global sample number."""

    def __init__(self, rows: Curriculum):
        self.rows = rows

    def __getitem__(self, index: int) -> Sample:
        return index, self.rows[index]


class HeldOutDataset(Dataset[Sample]):
    """Windows of a held-out set once each, in a fixed shuffled order, so that the first `max_windows` (None: all) are
    a fair sample.

    An index beyond the end is an empty sample, whose labels are all ignored.
    """

    def __init__(self, stream: PackedStream, max_windows: int | None = None):
        self.stream = stream
        self._order = Permutation(stream.num_windows, "held-out")
        self._size = min(stream.num_windows, max_windows or stream.num_windows)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            return index, [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
        return index, [self.stream.window(self._order[index])]


class RankSampler(DistributedSampler):
    """Rows of one rank: micro-step m gives rank r of W the rows start + m*W*b + r*b + i, i < b.

    start: is asked for whenever iteration begins. size: rows of one pass, None: endless. No row of it comes twice;
    ranks that run out get rows beyond the end (empty samples), so that all of them do the same number of batches, which
    sharded parameters need.

    It is a DistributedSampler only because that is how Lightning knows not to wrap it into one; nothing of that class
    is used.
    """

    def __init__(self, rank: int, world_size: int, rows: int, start: Callable[[], int], size: int | None = None):
        self.rank, self.num_replicas, self.rows, self._start = rank, world_size, rows, start
        self.num_batches = None if size is None else -(-size // (world_size * rows))

    def __iter__(self) -> Iterator[int]:
        first = self._start() + self.rank * self.rows
        steps = itertools.count() if self.num_batches is None else range(self.num_batches)
        return (first + step * self.num_replicas * self.rows + i for step in steps for i in range(self.rows))

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("the training sequence has no end; limit training by max_steps")
        return self.num_batches * self.rows


class Collate:
    """Samples to one batch (see the top of this file). Without `document_mask` only rows and the windows of a
    curriculum are borders, so attention and positions run across documents; the labels are the same either way,
    which keeps losses comparable."""

    def __init__(self, seq_len: int, document_mask: bool):
        self.seq_len, self.document_mask = seq_len, document_mask

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        B, S = len(samples), self.seq_len
        input_ids = torch.zeros((B, S), dtype=torch.int64)
        labels = torch.full((B, S), IGNORED, dtype=torch.int64)
        flat_ids, flat_labels = input_ids.numpy().reshape(-1), labels.numpy().reshape(-1)
        borders: list[Sequence[int] | np.ndarray] = []
        for row, (_, windows) in enumerate(samples):
            size = S // len(windows)
            for i, (tokens, starts) in enumerate(windows):
                at = row * S + i * size
                flat_ids[at : at + min(len(tokens), size)] = tokens[:size]
                flat_labels[at : at + max(0, len(tokens) - 1)] = tokens[1:]
                flat_labels[at + starts - 1] = IGNORED
                borders.append([at])
                if self.document_mask:
                    borders.append(starts[starts < size] + at)
        cu_seqlens = np.concatenate([*borders, [B * S]])
        batch = {"input_ids": input_ids, "labels": labels, "position": torch.tensor(samples[0][0], dtype=torch.int64)}
        if len(cu_seqlens) > B + 1:
            padding = -(len(cu_seqlens) - 1) % CU_SEQLENS_MULTIPLE
            cu_seqlens = np.pad(cu_seqlens, (0, padding), constant_values=B * S)
            batch["cu_seqlens"] = torch.from_numpy(cu_seqlens.astype(np.int32))
        return batch
