"""A checkpoint as the evaluations see it: the model and the tokenizer of one Hugging Face folder."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from s2.files import kind_of
from s2.inference.folder import ModelFolder
from s2.inference.generate import generate
from s2.inference.pool import DecodePool
from s2.inference.prefix import PrefixCache
from s2.model.hf import FOLDER_KIND, fingerprint
from s2.model.loss import chunk_rows

_ASK_EVERY = 8  # new tokens between questions whether they are enough


def checkpoint_name(folder: str | Path) -> str:
    """Short name for titles and tables: `runs/demo/extend-2k/hf` is `demo/extend-2k`."""
    parts = [part for part in Path(folder).resolve().parts if part != "hf"]
    return "/".join(parts[-2:]).lstrip("/")


def results_folder(folder: str | Path) -> Path:
    """Where results go by default: runs/<recipe>/<stage>/results for a run or its `hf`, runs/eval/<name>/results for a
    checkpoint that no run here has made, whose folder is its owner's."""
    folder = Path(folder)
    is_checkpoint = (folder / "config.json").is_file()
    if folder.name == "hf":
        of_a_run = any((folder.parent / name).is_file() for name in ("summary.json", "logs/metrics.csv"))
        if kind_of(folder) == FOLDER_KIND or of_a_run or not is_checkpoint:
            return folder.parent / "results"
    if not is_checkpoint:
        return folder / "results"
    return Path("runs") / "eval" / checkpoint_name(folder).replace("/", "-") / "results"


class Checkpoint(ModelFolder):
    """A folder with what the evaluations ask of its model."""

    @cached_property
    def fingerprint(self) -> str:
        """`s2.model.hf.fingerprint` of the folder as it was when first asked."""
        return fingerprint(self.folder)

    @torch.inference_mode()
    def predict_last(
        self,
        rows: Sequence[list[int]],
        count: int,
        prefix: PrefixCache | None = None,
        following: Sequence[list[int]] = (),
    ) -> list[list[int]]:
        """Most likely next token after each of the last `count` tokens of each row, in one forward pass, or in pieces
        of `prefill_chunk` tokens where rows are longer.

        rows: of one length. prefix: what the rows before have computed of these is not computed again. following: the
        rows after these, if any, with the same `prefix`.
        """
        input_ids = torch.tensor(rows, device=self.device)
        if prefix is None and input_ids.shape[1] <= self.prefill_chunk:
            logits = self.model(input_ids, logits_to_keep=count)
        else:
            prefix = prefix or self.prefix_cache(*input_ids.shape)
            logits = prefix(input_ids, count, torch.tensor(following, device=self.device) if following else None)
        return logits.argmax(-1).tolist()

    def prefix_cache(self, rows: int, max_length: int) -> PrefixCache:
        """For `predict_last`, on batches of so many rows that begin alike."""
        return PrefixCache(self.model, rows, max_length, self.prefill_chunk)

    @torch.inference_mode()
    def generate(
        self,
        rows: Sequence[list[int]],
        max_new_tokens: int,
        is_done: Callable[[int, list[int]], bool] | None = None,
        pool: DecodePool | None = None,
    ) -> list[list[int]]:
        """Greedy continuations of rows of one length, up to an end of text, which is left out.

        is_done(i, tokens): whether row i needs no more than these new tokens; asked now and then, and it ends there.
        pool: serves one batch after another.
        """
        lengths = [max_new_tokens] * len(rows)

        def is_enough(new: Tensor) -> list[bool]:
            if is_done is not None and new.shape[1] % _ASK_EVERY == 0:
                for i, tokens in enumerate(new.tolist()):
                    if lengths[i] == max_new_tokens and is_done(i, tokens):
                        lengths[i] = len(tokens)
            return [length < max_new_tokens for length in lengths]

        new = generate(
            self.model, torch.tensor(rows), max_new_tokens, eos_token_id=self.eos_ids or None, is_enough=is_enough,
            prefill_chunk=self.prefill_chunk, pool=pool,
        ).tolist()  # fmt: skip
        said = [tokens[:length] for tokens, length in zip(new, lengths, strict=True)]
        return [tokens[: next((i for i, t in enumerate(tokens) if t in self.eos_ids), None)] for tokens in said]

    @torch.inference_mode()
    def log_likelihoods(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens `[N]` after hidden states `[N, E]`: log-probabilities, float64 `[N]`, and whether each is the most
        likely one, bool `[N]`.

        Raises ValueError for log-probabilities that are not finite.
        """
        values, hits = [], []
        # The logits of a long window over a large vocabulary would not fit; a few thousand positions at a
        # time do.
        size = chunk_rows(self.config.vocab_size)
        for positions, tokens in zip(hidden.split(size), targets.split(size), strict=True):
            scores = F.log_softmax(cast(Tensor, self.model.lm_head(positions)), dim=-1)  # [<=size, V]
            values.append(scores.gather(1, tokens[:, None])[:, 0].double())
            hits.append(scores.argmax(-1) == tokens)
        result = torch.cat(values)
        if not result.isfinite().all():
            raise ValueError(f"the likelihoods are not finite in {hidden.dtype}; evaluate in another --dtype")
        return result, torch.cat(hits)

    def describe(self) -> dict[str, Any]:
        """What result files record about the checkpoint."""
        return {
            "checkpoint": checkpoint_name(self.folder),
            "fingerprint": self.fingerprint,
            "attention_layout": self.config.attention_layout,
            "block_size": self.config.block_size,
            "max_position_embeddings": self.max_length,
            "dtype": self.dtype_name,
        }
