"""Evaluation."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = (
    Mutant(
        "needle_accepts_a_prefix", "eval",
        "right = [f is not None and f[0] == n.number for f",
        "right = [f is not None and n.number.startswith(f[0]) for f",
        ("test_needle.py",),
    ),
    Mutant(
        "needle_accepts_one_right_token", "eval",
        '"exact": fmean([all(h) for h in hits])',
        '"exact": fmean([any(h) for h in hits])',
        ("test_needle.py::test_one_wrong_digit_fails_exact_but_counts_in_part",),
    ),
    Mutant(
        "needle_reads_the_answer_from_the_prompt", "eval",
        "[*prompt.tokens[:-count], *said]",
        "prompt.tokens",
        ("test_needle.py",),
    ),
    Mutant(
        "wilson_is_walds_interval", "eval",
        "/ n + (Z95 / (2 * n)) ** 2) / shrink",
        "/ n) / shrink",
        ("eval/test_sweep.py",),
    ),
    Mutant(
        "cells_with_more_samples_count_more", "eval",
        "return float(np.mean([np.mean(scores) for scores in self.cells.values()]))",
        "return float(np.mean([score for scores in self.cells.values() for score in scores]))",
        ("eval/test_sweep.py",),
    ),
    Mutant(
        "needles_lie_at_the_other_end", "eval",
        "targets = [round(((depth + 100 * i / needles) % 100 if i else depth) / 100 * size)",
        "targets = [round((100 - (depth + 100 * i / needles) % 100) / 100 * size)",
        ("test_haystack.py",),
    ),
    Mutant(
        "distractors_tell_the_answer", "eval",
        "numbers = [str(n) for n in rng.sample(range(10 ** (text.digits - 1), 10**text.digits), count)]",
        "numbers = [str(rng.randrange(1_000_000, 10_000_000))] * count",
        ("test_haystack.py",),
    ),
    Mutant(
        "likelihoods_of_the_token_after", "eval",
        "hidden[b, len(row) - lengths[b] : len(row)] for b, row in enumerate(rows)",
        "hidden[b, len(row) - lengths[b] - 1 : len(row) - 1] for b, row in enumerate(rows)",
        ("test_lm.py::test_loglikelihoods_equal_those_of_the_hugging_face_model",),
    ),
    Mutant(
        "greedy_is_any_token", "eval",
        "return [(value.sum().item(), bool(hit.all())) for value, hit in per_request]",
        "return [(value.sum().item(), bool(hit.any())) for value, hit in per_request]",
        ("test_lm.py::test_greedy_flag_tells_the_models_own_continuation",),
    ),
    Mutant(
        "long_inputs_are_cut_on_the_right", "eval",
        "return tokens[-limit:]",
        "return tokens[:limit]",
        ("test_lm.py::test_long_inputs_are_cut_on_the_left_with_a_warning_that_names_max_length", "test_lm.py"),
    ),
    Mutant(
        "bos_is_doubled", "s2/inference",
        "and tokens[:1] != [self.bos_id] else tokens",
        "else tokens",
        ("test_adapter.py::test_a_chat_template_is_filled_in_and_its_special_tokens_read",),
    ),
    Mutant(
        "white_space_belongs_to_the_context", "eval",
        "answer = context[len(bare) :] + answer",
        "bare = context",
        ("test_adapter.py", "test_lm.py"),
    ),
    Mutant(
        "results_of_another_checkpoint_are_replaced", "eval",
        'same = all(old["s2"][key] == results["s2"][key] for key in ("fingerprint", "lm_eval"))',
        'same = all(old["s2"][key] == results["s2"][key] for key in ("lm_eval",))',
        ("test_results.py",),
    ),
    Mutant(
        "documents_are_named_without_what_was_asked", "eval",
        'for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash")] for row in rows',
        'for key in ("doc_id",)] for row in rows',
        ("test_documents.py",),
    ),
    Mutant(
        "a_perplexity_moves_the_wrong_way", "eval",
        "return [value * (1 - (row - mean)) for row in rows]",
        "return [value * (1 + (row - mean)) for row in rows]",
        ("test_documents.py",),
    ),
    Mutant(
        "the_mean_over_tasks_needs_whole_tasks", "eval",
        'if task in whole and kind in ("acc", "acc_norm") and is_better:',
        'if task in whole and kind in ("acc", "acc_norm") and is_better and limit is None:',
        ("test_report_tasks.py",),
    ),
    Mutant(
        "texts_that_a_normalizer_makes_longer_are_skipped", "eval",
        "return normalizer is not None and 1 + of_a_byte * len(normalizer.normalize_str(text).encode()) >= count",
        "return False",
        ("test_positions.py",),
    ),
    Mutant(
        "added_tokens_of_one_byte_are_forgotten", "eval",
        "of_a_byte = 2 if any(",
        "of_a_byte = 1 if any(",
        ("test_positions.py",),
    ),
    Mutant(
        "every_document_is_encoded", "eval",
        "if not may(text, shortest - len(head)):",
        "if not may(text, 0):",
        ("test_positions.py::test_documents_that_cannot_be_long_enough_are_not_encoded",),
    ),
    Mutant(
        "a_finished_command_stays_done_when_it_changes", "scripts",
        "return None if words == self.command else _where_they_differ(words, self.command)",
        "return None",
        ("test_experiments.py",),
    ),
    Mutant(
        "carried_records_are_not_looked_at", "scripts",
        "if entry.name in records and not stays(parts):",
        "if False:",
        ("test_experiments.py",),
    ),
    Mutant(
        "only_the_arms_that_run_are_looked_at", "scripts",
        "for job in (job for each in plan.jobs().values() for job in each):",
        "for job in (job for each in jobs.values() for job in each):",
        ("test_experiments.py",),
    ),
    Mutant(
        "a_table_of_other_data_is_current", "eval",
        "checksum_of(Path(source)) == checksum for source, checksum in content.items()",
        "Path(source).name for source in content",
        ("test_results.py",),
    ),
    Mutant(
        "all_right_answers_are_certain", "eval",
        "if numbers and {*numbers.values()} <= {0.0, 1.0}:",
        "if numbers and {*numbers.values()} < {0.0}:",
        ("test_documents.py",),
    ),
    Mutant(
        "arms_are_compared_without_their_pairs", "scripts",
        "if found := of_documents(base.samples, figure.samples):",
        "if found := of_documents({}, figure.samples):",
        ("test_experiment_figures.py",),
    ),
    Mutant(
        "the_haystack_holds_the_frame_of_documents", "eval",
        "tokens = tokens[:-1] if tokens and tokens[-1] in frame else tokens",
        "tokens = tokens[:-1] if tokens and len(frame) > 2 else tokens",
        ("test_lm.py", "test_needle.py", "test_haystack.py"),
    ),
    Mutant(
        "every_token_of_a_mixed_folder_is_synthetic", "data",
        'if each["path"] == SYNTHETIC and each["documents"]]',
        'if each["documents"]]',
        ("test_mixture.py::test_passes_say_which_share_of_a_components_tokens_is_synthetic",),
    ),
    Mutant(
        "the_recorded_share_of_synthetic_documents_is_not_read", "eval",
        "part = recorded.get(label)",
        "part = None",
        ("eval/test_report.py", "test_experiment_figures.py"),
    ),
    Mutant(
        "cells_of_a_table_below_run_into_the_next_column", "eval",
        "while count > 4 and max(map(measure, textwrap.wrap(text, count))) > width:",
        "while False:",
        ("test_heatmap.py::test_a_long_cell_of_the_table_below_stays_in_its_column",),
    ),
    Mutant(
        "any_needle_is_in_the_front", "eval",
        'return stem in run.needle and kind_of(run.needle[stem].content) == "single"',
        "return stem in run.needle",
        ("eval/test_report.py",),
    ),
    Mutant(
        "the_front_of_an_experiment_is_its_first_stage", "scripts",
        "stage, sweeps = found[max(found)]",
        "stage, sweeps = found[min(found)]",
        ("test_experiment_page.py",),
    ),
    Mutant(
        "a_mean_over_tasks_is_compared_within_a_stage_alone", "scripts",
        "[part.key[1:] for part in figure.parts] == [part.key[1:] for part in base.parts]",
        "[part.key for part in figure.parts] == [part.key for part in base.parts]",
        ("test_experiment_page.py",),
    ),
    Mutant(
        "the_report_says_the_cache_needs_what_a_dense_one_does", "eval",
        "KVCache.bytes_for(longer, 1, seq_len, torch.bfloat16)",
        'KVCache.bytes_for(longer.replace(attention_layout="dense"), 1, seq_len, torch.bfloat16)',
        ("eval/test_report.py",),
    ),
    Mutant(
        "a_config_counts_as_weights_that_are_lost", "scripts",
        'if option != "--config"]',
        "]",
        ("test_experiment_page.py",),
    ),
    Mutant(
        "every_source_of_a_folder_is_read", "eval",
        'for document in shards.documents_of(source, "--documents"):',
        'for document in shards.documents_of(None, "--documents"):',
        ("test_positions.py",),
    ),
)  # fmt: skip
