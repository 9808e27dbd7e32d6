"""Training."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = (
    Mutant(
        "warmup_off_by_one", "s2/training",
        "return (step + 1) / (self.warmup_steps + 1)",
        "return step / (self.warmup_steps + 1)",
        ("test_optim.py",),
    ),
    Mutant(
        "decay_ends_late", "s2/training",
        "max(total_steps - 1 - start, 1), 1.0)",
        "max(total_steps - start, 1), 1.0)",
        ("test_optim.py",),
    ),
    Mutant(
        "norms_decay", "s2/training",
        "(decayed if len(shape) >= 2 else undecayed).append(parameter)",
        "(decayed if len(shape) >= 1 else undecayed).append(parameter)",
        ("test_optim.py",),
    ),
    Mutant(
        "accumulated_gradients_are_not_scaled", "s2/training",
        "share = self._step_valid / self._step_places if self._step_valid else 1.0",
        "share = 1.0",
        ("test_normalization.py::test_every_step_is_divided_by_its_own_share",),
    ),
    Mutant(
        "masked_tokens_of_the_step_before_count", "s2/training",
        "self._step_places = self._step_valid = 0.0\n        strategy",
        "self._step_places = 0.0\n        strategy",
        ("test_normalization.py::test_every_step_is_divided_by_its_own_share",),
    ),
    Mutant(
        "resume_counts_steps_as_micro_batches", "s2/training",
        'checkpoint["global_step"] * self.trainer.accumulate_grad_batches)',
        'checkpoint["global_step"])',
        ("training/test_resume.py::test_gradient_accumulation_resumes_at_whole_steps",),
    ),
    Mutant(
        "tokens_are_counted_from_zero_after_a_resume", "s2/training",
        "return tokens + (trainer.global_step - step) * tokens_per_step(trainer)",
        "return (trainer.global_step - step) * tokens_per_step(trainer)",
        ("training/test_resume.py::test_tokens_are_counted_as_they_were_trained_on",),
    ),
    Mutant(
        "the_oldest_checkpoint_is_resumed", "s2/training",
        "for checkpoint in reversed(checkpoints):",
        "for checkpoint in checkpoints:",
        ("test_damage.py", "training/test_resume.py"),
    ),
    Mutant(
        "one_checkpoint_more_is_dropped", "s2/training",
        "for old in whole[:-keep]:",
        "for old in whole[: 1 - keep or None]:",
        ("training/test_resume.py::test_only_the_newest_checkpoints_are_kept",),
    ),
    Mutant(
        "a_checkpoint_of_other_sizes_is_whole", "s2/training",
        "if (wrong := files.damage(checkpoint, recorded, checksums=False)) or not checksums:",
        "if (wrong := files.damage(checkpoint, {}, checksums=False)) or not checksums:",
        ("test_damage.py::test_a_file_of_another_size_is_damage_without_a_look_into_it",),
    ),
    Mutant(
        "a_checkpoint_of_another_stage_is_resumed", "s2/training",
        "if _form(saved_stage) != _form(stage):",
        "if _form(saved_stage) < 0:",
        ("test_errors.py",),
    ),
    Mutant(
        "gradients_enter_buckets_as_they_come", "s2/training",
        "while self._next in self._waiting:",
        "while self._waiting and (self._next in self._waiting or self._waiting.update({self._next: "
        "self._waiting.pop(next(iter(self._waiting)))}) is None):",
        ("test_reduction.py",),
    ),
    Mutant(
        "a_loss_that_jumps_is_taken", "s2/training",
        "counters.steps >= SETTLING and loss > factor * counters.mean_loss:",
        "counters.steps >= SETTLING and loss > factor + counters.mean_loss * 1000:",
        ("test_guard.py",),
    ),
    Mutant(
        "skipped_steps_are_not_counted_in_a_row", "s2/training",
        "counters.in_a_row += 1\n",
        "counters.in_a_row = 1\n",
        ("test_guard.py",),
    ),
    Mutant(
        "an_export_of_other_tokens_is_extended", "s2/training",
        "if known.get(token) != token_id:",
        "if known.get(token, token_id) != token_id:",
        ("test_weights.py",),
    ),
    Mutant(
        "a_job_is_requeued_for_ever", "s2/training",
        "if job.restarts >= most:",
        "if job.restarts > most:",
        ("test_requeue.py",),
    ),
    Mutant(
        "a_variant_of_a_device_is_read_as_another", "s2/training",
        "return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None",
        "return PEAK_BF16_FLOPS[min(matches, key=len)] if matches else None",
        ("test_strategy.py::test_peak_flops_knows_variants_of_a_name_and_nothing_it_was_not_told",),
    ),
    Mutant(
        "a_resume_forgets_a_missed_gate", "s2/training/stage.py",
        "self._keep_gate(gate.recorded(self.run.folder))",
        "self._keep_gate({})",
        ("test_gate.py::test_a_missed_gate_stays_in_the_run_whatever_it_is_resumed_with",),
    ),
    Mutant(
        "lax_thresholds_open_a_gate", "s2/training/gate.py",
        'if thresholds and thresholds_digest(thresholds) != found["digest"]:',
        "if thresholds and not thresholds_digest(thresholds):",
        ("test_gate.py::test_other_thresholds_than_the_recipes_do_not_count",),
    ),
    Mutant(
        "an_edited_record_opens_a_gate", "s2/training/gate.py",
        'is_right = check["passed"] is holds(check)',
        "is_right = True",
        ("test_gate.py::test_an_edited_record_opens_no_stage",),
    ),
    Mutant(
        "a_resume_names_weights_that_it_never_read", "s2/training/stage.py",
        "_check_start(meta, self.config.model.init_from, newest)",
        "pass",
        ("test_errors.py::test_a_checkpoint_that_began_with_other_weights_is_not_resumed",),
    ),
    Mutant(
        "passes_count_all_steps_in_the_batches_of_the_last", "s2/training/callbacks.py",
        "step, tokens = self.checkpoint.began",
        "step, tokens = 0, 0",
        ("training/test_resume.py::test_tokens_are_counted_as_they_were_trained_on",),
    ),
    Mutant(
        "a_callback_finishes_a_stage", "s2/training/saving.py",
        "if step >= last or is_timed:",
        "if step >= 0 or is_timed:",
        ("test_ends.py::test_a_callback_that_ends_training_leaves_a_checkpoint_and_no_export",),
    ),
)  # fmt: skip
