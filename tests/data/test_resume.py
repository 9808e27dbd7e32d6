"""Stop and resume through a real Lightning trainer: batches go on as in an uninterrupted run."""

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data.datamodule import PackedDataModule
from tests.data.shard_factory import VOCAB_SIZE, random_documents, write_shards
from tests.training.processes import LEFT_BY_LIGHTNING

ROOT = Path(__file__).parents[2]


class Recorder(LightningModule):
    """A tiny model whose weights depend on every batch in order; writes what each rank saw to `log`."""

    def __init__(self, log=None, estimate_early=False):
        super().__init__()
        self.log_folder, self.estimate_early, self.seen = log, estimate_early, []
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, 4)
        self.head = torch.nn.Linear(4, VOCAB_SIZE)

    def training_step(self, batch, batch_idx):
        self.seen.append((int(batch["position"]), batch["input_ids"].sum().item()))
        logits = self.head(self.embedding(batch["input_ids"]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_end(self):
        if self.log_folder is not None:
            (self.log_folder / f"rank{self.global_rank}.json").write_text(json.dumps(self.seen))

    def configure_optimizers(self):
        if self.estimate_early:
            _ = self.trainer.estimated_stepping_batches
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data_of(folder, **overrides):
    settings = {
        "seq_len": 16,
        "micro_batch_size": 3,
        "mixture": [{"path": str(folder / "long"), "weight": 2}, {"path": str(folder / "short"), "weight": 1}],
        "validation": [{"name": "heldout", "path": str(folder / "heldout")}],
        "num_workers": 0,
    }
    return PackedDataModule(**settings | overrides)


@pytest.fixture
def make_data(tmp_path):
    write_shards(tmp_path / "long", random_documents([900] * 4, seed=1))
    write_shards(tmp_path / "short", random_documents([30] * 60, seed=2))
    write_shards(tmp_path / "heldout", random_documents([100] * 3, seed=3))
    return partial(data_of, tmp_path)


def make_trainer(folder, max_steps, *callbacks, **overrides):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": max_steps,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "callbacks": list(callbacks),
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 2,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
    }
    return Trainer(**settings | overrides)


def fit(trainer, model, data, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data, **kwargs)


@pytest.mark.parametrize(("accumulate", "num_workers"), [(1, 0), (3, 0), (2, 2)])
def test_resume_at_every_step_equals_the_uninterrupted_run(tmp_path, make_data, accumulate, num_workers):
    steps = 5
    whole, data = Recorder(), make_data(num_workers=num_workers)
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_trainer(tmp_path, steps, keep, accumulate_grad_batches=accumulate), whole, data)
    assert data.consumed_samples == steps * accumulate * 3
    assert [position for position, _ in whole.seen] == list(range(0, steps * accumulate * 3, 3))
    for step in (1, 3, 4):
        resumed, data = Recorder(), make_data(num_workers=num_workers)
        trainer = make_trainer(tmp_path, steps, accumulate_grad_batches=accumulate)
        fit(trainer, resumed, data, ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step * accumulate :]
        assert data.consumed_samples == steps * accumulate * 3
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, resumed.state_dict()[name]), name


class SaveAt(Callback):
    """Saves one checkpoint in the given hook at the given micro-step."""

    def __init__(self, hook, micro_step, file):
        self.micro_step, self.file = micro_step, file
        setattr(self, hook, self._save)

    def _save(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.micro_step and not self.file.exists():
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize(
    ("hook", "micro_step", "consumed"),
    [
        ("on_train_batch_start", 2, 2),
        ("on_train_batch_end", 2, 3),
        ("on_validation_end", 3, 4),
        ("on_train_end", 5, 6),
    ],
)
def test_position_is_what_was_trained_whichever_hook_saves(tmp_path, make_data, hook, micro_step, consumed):
    file = tmp_path / "here.ckpt"
    fit(make_trainer(tmp_path, 6, SaveAt(hook, micro_step, file)), Recorder(), make_data(num_workers=1))
    resumed = Recorder()
    fit(make_trainer(tmp_path, 8), resumed, make_data(), ckpt_path=file)
    assert resumed.seen[0][0] == consumed * 3
    assert len(resumed.seen) == 8 - consumed


def test_resume_of_a_resume_and_another_micro_batch_size(tmp_path, make_data):
    files = [tmp_path / f"{i}.ckpt" for i in range(2)]
    fit(make_trainer(tmp_path, 2, SaveAt("on_train_end", 1, files[0])), Recorder(), make_data())
    second = Recorder()
    data = make_data(micro_batch_size=1)
    fit(
        make_trainer(tmp_path, 5, SaveAt("on_train_end", 4, files[1])),
        second,
        data,
        ckpt_path=files[0],
    )
    assert [position for position, _ in second.seen] == [6, 7, 8]
    third = Recorder()
    fit(make_trainer(tmp_path, 7), third, make_data(), ckpt_path=files[1])
    assert [position for position, _ in third.seen] == [9, 12]


# in a process of its own: a fork of one that has used gloo hangs
TWO_PROCESSES = """
import pathlib, sys
from tests.data.test_resume import Recorder, data_of, fit, make_trainer

folder = pathlib.Path(sys.argv[1])
trainer = make_trainer(folder, 5, devices=2, strategy="ddp_fork")
fit(trainer, Recorder(log=folder), data_of(folder), ckpt_path=folder / "one.ckpt")
"""


def test_two_processes_continue_what_one_began(tmp_path, make_data):
    file = tmp_path / "one.ckpt"
    fit(make_trainer(tmp_path, 3, SaveAt("on_train_end", 2, file)), Recorder(), make_data())
    alone = Recorder()
    fit(make_trainer(tmp_path, 7), alone, make_data(), ckpt_path=file)
    inherited = {key: value for key, value in os.environ.items() if key not in LEFT_BY_LIGHTNING}
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=inherited, check=True, timeout=200)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    together = [tuple(batch) for pair in zip(*ranks, strict=True) for batch in pair]
    assert together == alone.seen
    assert [position for position, _ in together] == [9, 12, 15, 18]


def test_epochs_by_batch_limit_go_on_where_the_last_one_ended(tmp_path, make_data):
    model = Recorder()
    trainer = make_trainer(tmp_path, -1, max_epochs=3, limit_train_batches=2, val_check_interval=2)
    fit(trainer, model, make_data(num_workers=1))
    assert [position for position, _ in model.seen] == list(range(0, 18, 3))


def test_one_data_module_starts_afresh_with_each_trainer(tmp_path, make_data):
    data = make_data()
    for _ in range(2):
        model = Recorder()
        fit(make_trainer(tmp_path, 2), model, data)
        assert [position for position, _ in model.seen] == [0, 3]


def test_early_length_estimate_does_not_lose_the_position(tmp_path, make_data):
    file = tmp_path / "x.ckpt"
    fit(make_trainer(tmp_path, 2, SaveAt("on_train_end", 1, file)), Recorder(), make_data())
    model = Recorder(estimate_early=True)
    fit(make_trainer(tmp_path, 4), model, make_data(num_workers=1), ckpt_path=file)
    assert [position for position, _ in model.seen] == [6, 9]


def test_batches_drawn_before_the_checkpoint_are_an_error(make_data):
    data = make_data()
    state = data.state_dict() | {"consumed_samples": 12}
    next(iter(data.train_dataloader()))
    with pytest.raises(RuntimeError, match="drawn before the checkpoint was restored"):
        data.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 != 1"),
        ({"seq_len": 8}, "seq_len: 16 != 8"),
        ({"mixture": "heldout"}, r"phases\[0\]\.components: 2 entries != 1 entries"),
        ({"curriculum": [{"seq_len": 8, "tokens": 64}]}, "phases: 1 entries != 2 entries"),
    ],
)
def test_resume_on_another_sequence_names_the_difference(tmp_path, make_data, change, message):
    state = make_data().state_dict()
    if "mixture" in change:
        change = {"mixture": [{"path": str(tmp_path / "heldout")}], "validation": []}
    with pytest.raises(ValueError, match=message):
        make_data(**change).load_state_dict(state)


def test_saving_inside_an_accumulation_window_warns(tmp_path, make_data):
    save = SaveAt("on_train_batch_end", 1, tmp_path / "x.ckpt")
    trainer = make_trainer(tmp_path, 1, save, accumulate_grad_batches=4)
    with pytest.warns(UserWarning, match="gradients of 2 accumulated micro-batches"):
        trainer.fit(Recorder(), make_data())


def test_prepare_section_makes_the_shards_and_names_the_sets(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"row {i} " + "words " * 20}) + "\n" for i in range(200)))
    prepare = {
        "output": str(tmp_path / "out"),
        "sources": [str(corpus)],
        "tokenizer": {"train": {"vocab_size": 300}},
        "heldout_fraction": 0.2,
    }
    data = PackedDataModule(seq_len=16, micro_batch_size=2, num_workers=0, prepare=prepare)
    fit(make_trainer(tmp_path, 2), Recorder(), data)
    assert data.validation_names == ["heldout"]
    assert data.tokenizer_file == (tmp_path / "out" / "tokenizer.json").resolve()
    assert 0 < data.unigram_loss("heldout") < 6


def test_the_position_counts_the_rows_of_all_ranks(make_data):
    """Those that another rank has trained on are not to be trained on again, however many ranks go on."""

    class Stub:
        pass

    trainer, progress, count = Stub(), Stub(), Stub()
    trainer.distributed_sampler_kwargs, trainer.accumulate_grad_batches = {"rank": 1, "num_replicas": 2}, 1
    trainer.fit_loop, trainer.fit_loop.epoch_loop = Stub(), Stub()
    trainer.fit_loop.epoch_loop.batch_progress = progress
    progress.total = progress.current = count
    count.processed = 0
    data = make_data(micro_batch_size=3)
    data.trainer = trainer
    data.setup("fit")
    next(iter(data.train_dataloader()))
    count.processed = 4
    assert data.consumed_samples == data.state_dict()["consumed_samples"] == 4 * 2 * 3
