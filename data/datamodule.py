"""`PackedDataModule`: the data of a recipe, for Lightning.

There is one global order of samples, a pure function of the seed. A checkpoint stores how many of them have been
trained on, so a run resumes at the very next sample on any number of GPUs, whatever the workers had read ahead.
"""

import math
import weakref
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from data.corpus.sources import LOST
from data.corpus.tokenizer import DROPPED, UNKNOWN
from data.prepare import prepare_all
from data.section import DataSection
from data.shards.loader import Collate, HeldOutDataset, RankSampler, Sample, TrainDataset
from data.shards.mixture import Curriculum, Mixture, PackedStream, Passes
from data.shards.reader import TokenShards
from data.shards.unigram import target_counts, unigram_loss
from s2.recipe import difference_lines
from s2.settings import SettingError, read

LOST_TEXT = (LOST, UNKNOWN, DROPPED)  # counted in manifests: characters of documents that did not become tokens
WASTEFUL = 0.05  # share of empty places that is worth a warning; length filters cost some


class PackedDataModule(LightningDataModule):
    """Packed token batches from a weighted mixture of shard folders (batch layout: `data.shards.loader`).

    Args:
        seq_len: inputs a row.
        micro_batch_size: rows a rank and micro-step (gradient accumulation is the trainer's business).
        mixture, validation, curriculum: lists of `data.section.Component`, `HeldOutSet`, `Phase`. Windows of a phase
            share a row, so batches keep their shape; after the last one windows are `seq_len` long.
        prepare: how to make the shards if they are not there, see `data.prepare.spec.PrepareSpec`; or a list of such.
            Without `mixture` / `validation`, the prepared train / held-out folders are used.
        retrieval: synthetic retrieval documents in addition, see `data.section.RetrievalShare`.
        seed: of the sample order.
        num_workers: reader processes a rank.
        document_mask: attention and positions stop at document borders.

    Raises ValueError for a wrong setting (naming its key), shards of different tokenizers, or a filter that
    leaves too little; FileNotFoundError for a missing or unfinished shard folder.
    """

    def __init__(
        self,
        seq_len: int,
        micro_batch_size: int,
        mixture: list[dict[str, Any]] | None = None,
        validation: list[dict[str, Any]] | None = None,
        prepare: dict[str, Any] | list[dict[str, Any]] | None = None,
        seed: int = 0,
        num_workers: int = 2,
        document_mask: bool = True,
        curriculum: list[dict[str, Any]] | None = None,
        retrieval: dict[str, Any] | None = None,
    ):
        given = {name: value for name, value in locals().items() if name in DataSection.__dataclass_fields__}
        super().__init__()
        self.prepare_data_per_node = False  # shards lie on storage that all nodes share
        self.section = read(DataSection, given, "data")
        self.seq_len, self.micro_batch_size = self.section.seq_len, self.section.micro_batch_size
        self.components, self.heldout_sets = self.section.components, self.section.heldout_sets
        self._rows: Curriculum | None = None
        self._heldout: dict[str, PackedStream] = {}
        # Position of the run: `_samples` were consumed when the trainer, at `_counted_from` micro-steps, began to draw
        # batches. Its count says nothing about samples before that: accumulation and ranks may have been others.
        self._samples = self._counted_from = 0
        self._started_at: int | None = None
        self._last_trainer: Any = lambda: None

    # --- Data

    def prepare_data(self) -> None:
        """Make missing shards (global rank 0 only; the others wait)."""
        prepare_all(self.section.specs)

    def setup(self, stage: str | None = None) -> None:
        """Open the shards and check that they fit together; on `fit`, begin a new run at sample 0 unless this
        trainer has trained before."""
        if stage == "fit":
            self._samples, self._started_at = self.consumed_samples, None
            if self._last_trainer() is not self.trainer:
                self._samples = self._counted_from = 0
                self._last_trainer = weakref.ref(self.trainer) if self.trainer is not None else lambda: None
        if self._rows is not None:
            return
        opened = {}
        for key, sets in (("mixture", self.components), ("validation", self.heldout_sets)):
            for i, each in enumerate(sets):
                try:
                    opened[each.path] = TokenShards(each.path)
                except FileNotFoundError as error:
                    raise SettingError(f"data.{key}[{i}].path", str(error)) from None
        self._check_one_tokenizer(list(opened.values()))
        phases = self.section.phases
        self._rows = Curriculum(
            [self._mix(opened, seq_len) for seq_len in (*(phase.seq_len for phase in phases), self.seq_len)],
            [phase.tokens // self.seq_len for phase in phases],
        )
        self._heldout = {
            heldout.name: heldout.pack(opened[heldout.path], heldout.seq_len or self.seq_len, f"data.validation[{i}]")
            for i, heldout in enumerate(self.heldout_sets)
        }

    def _mix(self, opened: dict[str, TokenShards], seq_len: int) -> Mixture:
        streams, weights = [], []
        for i, component in enumerate(self.components):
            for part in component.by_length():
                stream = part.pack(opened[part.path], seq_len, f"data.mixture[{i}]")
                if stream.packing.waste > WASTEFUL:
                    rank_zero_warn(
                        f"data.mixture[{i}]: {stream.packing.waste:.0%} of its windows of {seq_len} tokens are empty:"
                        f" too few documents are short enough, or long enough to be cut, to fill the gaps that"
                        f" documents of {part.min_tokens} to {part.max_tokens or 'any number of'} tokens leave"
                    )
                streams.append(stream)
                weights.append(part.weight)
        return Mixture(streams, weights, self.section.seed)

    @staticmethod
    def _check_one_tokenizer(folders: list[TokenShards]) -> None:
        first = folders[0]
        for shards in folders[1:]:
            if shards.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
                raise SettingError(
                    "data",
                    f"{first.folder} and {shards.folder} were tokenized by different tokenizers"
                    f" (sha256 {first.manifest['tokenizer']['sha256'][:12]} and"
                    f" {shards.manifest['tokenizer']['sha256'][:12]}); prepare both with one tokenizer.json",
                )

    @property
    def prepared(self) -> list[Path]:
        """Folders that the `prepare` sections write."""
        return [Path(spec.output) for spec in self.section.specs]

    @property
    def rows(self) -> Curriculum:
        """The training sequence (after `setup`)."""
        if self._rows is None:
            self.setup()
        assert self._rows is not None
        return self._rows

    def passes(self, total_tokens: int) -> list[Passes]:
        """How often the first `total_tokens` tokens of training go through each component of the mixture."""
        return self.rows.passes(-(-total_tokens // self.seq_len))

    def lost_text(self) -> list[str]:
        """What of the mixture's text is not in its tokens: what the tokenizer never keeps, and for each source the
        characters of `LOST_TEXT`; one line each."""
        folders = {stream.shards.folder: stream.shards.manifest for stream in self.mixture.streams}
        never = self._shards.manifest["tokenizer"].get("not_kept")
        lines = [f"{', '.join(never)} (its normalization)"] if never else []
        for folder, manifest in folders.items():
            for source in manifest["sources"]:
                if lost := [f"{source['skipped'][what]:,} {what}" for what in LOST_TEXT if source["skipped"].get(what)]:
                    lines.append(f"{folder}, source {source['name']}: {', '.join(lost)}")
        return lines

    @property
    def mixture(self) -> Mixture:
        """The mixture of the full length, which training ends with."""
        return self.rows.mixtures[-1]

    @property
    def _shards(self) -> TokenShards:
        return self.mixture.streams[0].shards

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the tokenizer: a model needs at least this many embeddings."""
        return self._shards.vocab_size

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json of the shards; raises FileNotFoundError where it was moved away."""
        file = self._shards.tokenizer_file
        if not file.is_file():
            raise FileNotFoundError(f"{file}: the tokenizer of {self._shards.folder} is missing; it belongs there")
        return file

    @property
    def bos_token_id(self) -> int | None:
        return self._shards.manifest["tokenizer"]["bos_id"]

    @property
    def eos_token_id(self) -> int:
        return self._shards.manifest["tokenizer"]["eos_id"]

    def check_vocab_size(self, model_vocab_size: int) -> None:
        """Raises SettingError where the data has tokens the model has no embedding for."""
        if model_vocab_size < self.vocab_size:
            raise SettingError(
                "model.config.vocab_size",
                f"{model_vocab_size} is smaller than the tokenizer's {self.vocab_size}"
                f" ({self._shards.folder}); set it to at least {self.vocab_size}",
            )

    # --- Loaders

    def _rank(self) -> tuple[int, int]:
        """(data-parallel rank, data-parallel size), as the strategy says in `distributed_sampler_kwargs`."""
        kwargs = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return kwargs.get("rank", 0), kwargs.get("num_replicas", 1)

    def _loader(self, dataset: Any, sampler: Any, batch_size: int, seq_len: int) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.section.num_workers,
            collate_fn=Collate(seq_len, self.section.document_mask),
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        sampler = RankSampler(*self._rank(), self.micro_batch_size, self._start)
        return self._loader(TrainDataset(self.rows), sampler, self.micro_batch_size, self.seq_len)

    @property
    def validation_names(self) -> list[str]:
        """Names of the held-out sets, in the order of `dataloader_idx`."""
        return [heldout.name for heldout in self.heldout_sets]

    def val_dataloader(self) -> list[DataLoader[Sample]]:
        loaders = []
        for settings in self.heldout_sets:
            stream = self._heldout_stream(settings.name)
            tokens = self.micro_batch_size * self.seq_len
            rows = settings.micro_batch_size or max(1, tokens // stream.seq_len)
            dataset = HeldOutDataset(stream, settings.max_windows)
            sampler = RankSampler(*self._rank(), rows, lambda: 0, len(dataset))
            loaders.append(self._loader(dataset, sampler, rows, stream.seq_len))
        return loaders

    # --- Position in the training sequence

    @property
    def consumed_samples(self) -> int:
        """Global samples trained on so far, over all ranks. It counts micro-steps whose training step is done, so it
        is right in every hook from `on_train_batch_end` on."""
        if self.trainer is None or self._started_at is None:
            return self._samples
        micro_steps = self._progress().total.processed - self._counted_from
        return self._samples + micro_steps * self._rank()[1] * self.micro_batch_size

    def _progress(self) -> Any:
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress

    def _start(self) -> int:
        self._samples = self._started_at = self.consumed_samples
        if self.trainer is not None:
            self._counted_from = self._progress().total.processed
        return self._samples

    def state_dict(self) -> dict[str, Any]:
        """The position, for Lightning's checkpoint. Warns inside an accumulation window, whose gradients are lost."""
        if self.trainer is not None:
            pending = self._progress().current.processed % self.trainer.accumulate_grad_batches
            if pending:
                rank_zero_warn(
                    f"checkpoint between optimizer steps: the gradients of {pending} accumulated"
                    " micro-batches are not in it; save after whole steps to resume exactly"
                )
        return {"consumed_samples": self.consumed_samples, "order": self.rows.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a checkpoint's position; does nothing unless the trainer is fitting.

        Raises SettingError where data, mixture, seq_len or seed are not those of the checkpoint: the position
        would mean nothing. RuntimeError where something drew training batches before the checkpoint was read.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        if lines := difference_lines(state_dict["order"], self.rows.fingerprint()):
            raise SettingError(
                "data",
                "the checkpoint was trained on another sample sequence"
                f" ({'; '.join(lines[:3])}; checkpoint != recipe). Resume with the same data,"
                " seq_len and seed, or start a new stage from the weights alone",
            )
        if self._started_at not in (None, state_dict["consumed_samples"]):
            raise RuntimeError(
                "training batches were drawn before the checkpoint was restored, so its position is lost"
                " (trainer.estimated_stepping_batches in configure_optimizers does that; use max_steps)"
            )
        self._samples = state_dict["consumed_samples"]

    # --- Baselines

    def _heldout_stream(self, name: str) -> PackedStream:
        self.rows  # noqa: B018  # opens the shards on first use
        if name not in self._heldout:
            raise ValueError(f"no validation set {name!r}; there are: {', '.join(self._heldout)}")
        return self._heldout[name]

    def unigram_loss(self, name: str) -> float:
        """Loss (nats per target token) that token frequencies alone reach on held-out set `name`; comparable
        with the model's held-out loss, see `data.shards.unigram`."""
        opened = {str(stream.shards.folder): stream.shards for stream in self.mixture.streams}
        train = [(opened[str(Path(c.path))], c.source, c.weight) for c in self.components]
        return unigram_loss(train, self._heldout_stream(name))

    def bits_per_byte(self, name: str, loss: float) -> float:
        """A held-out loss in nats per token as bits per UTF-8 byte of text, which compares across tokenizers."""
        stream = self._heldout_stream(name)
        return loss * int(target_counts(stream).sum()) / stream.num_bytes / math.log(2)
