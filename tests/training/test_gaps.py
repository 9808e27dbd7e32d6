"""Each gap of `s2.training.gaps` is there in the library itself. What fails here after an upgrade can go there."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.call import _call_and_handle_interrupt
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from s2.training import resize
from s2.training.gaps import deepspeed as gaps
from s2.training.gaps.lightning import STOP_SIGNALS, StopSignals
from tests.training.tiny import train

EVERY_3 = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "limit_val_batches": 1}


class Watch(Callback):
    """Steps that were validated, and what a function finds when training starts."""

    def __init__(self, look: Callable[[Any], Any] = lambda trainer: None, save: Path | None = None) -> None:
        self.validated: list[int] = []
        self.look, self.save, self.found = look, save, None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = self.look(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.save is not None and trainer.global_step == 3:
            trainer.save_checkpoint(self.save)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.validated.append(trainer.global_step)


def fit(watch: Watch, *, resume: Path | None = None, **settings: Any) -> Watch:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "callbacks": [watch]}
    Trainer(**quiet, **settings).fit(BoringModel(), ckpt_path=resume, weights_only=False)
    return watch


def test_lightning_puts_its_handler_over_ours() -> None:
    def handler(*_: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    try:
        watch = fit(Watch(lambda trainer: signal.getsignal(signal.SIGTERM)), max_steps=1, **EVERY_3)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert watch.found is not handler


def test_lightning_kills_the_main_process_after_a_helper_that_ended_with_a_code(monkeypatch: Any) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    helper: Any = Mock(returncode=75, pid=2)
    assert _ChildProcessObserver(1, [helper])._run() and killed == [(1, signal.SIGKILL)]


def test_lightning_leaves_its_helpers_behind_when_a_run_fails() -> None:
    trainer: Any = MagicMock()
    trainer.strategy.launcher.launch.side_effect = RuntimeError("in training")
    with pytest.raises(RuntimeError, match="in training"):
        _call_and_handle_interrupt(trainer, Mock())
    trainer.strategy.launcher.kill.assert_not_called()


def test_lightning_makes_an_interrupt_a_failure() -> None:
    trainer: Any = MagicMock()
    trainer.strategy.launcher.launch.side_effect = KeyboardInterrupt
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as error:
            _call_and_handle_interrupt(trainer, Mock())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert error.value.code == 1


def test_lightnings_error_for_wrong_settings_is_no_value_error() -> None:
    assert not issubclass(MisconfigurationException, ValueError)


def test_lightning_takes_a_batch_script_for_a_task_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "s2")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert SLURMEnvironment.detect() and SLURMEnvironment().auto_requeue


def test_lightning_counts_validations_in_micro_batches_and_leaves_out_the_last_step() -> None:
    assert fit(Watch(), max_steps=4, **EVERY_3).validated == [3]
    assert fit(Watch(), max_steps=4, accumulate_grad_batches=2, **EVERY_3).validated == [1, 3]


def test_lightning_skips_the_validation_before_which_a_run_was_stopped(tmp_path: Path) -> None:
    fit(Watch(save=tmp_path / "saved"), max_steps=3, **EVERY_3)
    assert 3 not in fit(Watch(), resume=tmp_path / "saved", max_steps=5, **EVERY_3).validated


def test_lightning_restores_micro_batches_of_another_accumulation_as_they_were(tmp_path: Path) -> None:
    fit(Watch(save=tmp_path / "saved"), max_steps=3, accumulate_grad_batches=2, **EVERY_3)
    watch = Watch(lambda trainer: trainer.fit_loop.epoch_loop.batch_progress.total.ready)
    assert fit(watch, resume=tmp_path / "saved", max_steps=4, accumulate_grad_batches=3, **EVERY_3).found == 6


def test_lightning_warns_of_its_own_calls_of_torch() -> None:
    with pytest.warns(FutureWarning, match="treespec, LeafSpec"):
        fit(Watch(), max_steps=1, **EVERY_3)


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA B200"])
def test_lightning_does_not_know_the_peak_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert get_available_flops(torch.device("cuda"), torch.bfloat16) is None


def test_lightnings_deepspeed_refuses_the_cpu_and_steps_after_every_micro_batch() -> None:
    strategy = DeepSpeedStrategy(accelerator=CPUAccelerator())
    assert strategy.handles_gradient_accumulation
    with pytest.raises((RuntimeError, MisconfigurationException)):
        strategy.setup_environment()


def test_deepspeed_would_compile_an_operator_for_shared_memory() -> None:
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def test_deepspeed_divides_losses_by_the_accumulation_and_hands_gradients_over_as_they_come() -> None:
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "def backward(self, loss, retain_graph=False, scale_wrt_gas=True)" in inspect.getsource(engine)
    for name in ("reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue"):
        assert name in vars(DeepSpeedZeroOptimizer)
    assert "_place" not in inspect.getsource(DeepSpeedZeroOptimizer.reduce_ready_partitions_and_remove_grads)


def test_deepspeed_loads_one_groups_settings_and_one_step_into_all_from_a_universal_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[set[float], int]] = []
    original = gaps.universal_load

    def watched(engine: Any) -> Any:
        with original(engine) as nothing:
            yield nothing
            steps = {id(state["step"]) for state in engine.optimizer.optimizer.state.values()}
            found.append(({group["weight_decay"] for group in engine.optimizer.param_groups}, len(steps)))

    train(tmp_path, "trainer.max_steps=3", "trainer.strategy=zero_3")
    monkeypatch.setattr(gaps, "universal_load", contextlib.contextmanager(watched))
    monkeypatch.setattr(resize, "saved_ranks", lambda state: 2)
    assert train(tmp_path, "trainer.max_steps=4", "trainer.strategy=zero_3")[0] == 0
    assert found == [({0.1}, 1)]


def test_torchs_loader_workers_die_of_a_signal_to_the_job() -> None:
    program = (
        "import os, signal, torch, multiprocessing; from torch.utils.data import DataLoader\n"
        "batches = iter(DataLoader(torch.arange(64), num_workers=1)); next(batches)\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise\n"
        "worker = multiprocessing.active_children()[0]; os.system(f'kill {worker.pid}')\n"
        "worker.join(20); print(worker.exitcode, flush=True); os._exit(0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert int(result.stdout) == -signal.SIGTERM, result.stderr


def test_a_stop_signal_after_a_fit_ends_the_process_before_its_last_sentence_unless_it_is_ignored():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for ignored in (False, True):
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
            trainer._signal_connector.register_signal_handlers()
            if ignored:
                StopSignals().ignore(trainer)
            trainer._signal_connector.teardown()
            wanted = signal.SIG_IGN if ignored else signal.SIG_DFL
            assert [signal.getsignal(number) for number in STOP_SIGNALS] == [wanted, wanted]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
