"""Preparing, mixing and loading data."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = (
    Mutant(
        "a_cut_loses_a_target", "data",
        "full = (lengths[long] - 1) // seq_len",
        "full = lengths[long] // seq_len",
        ("test_packing.py",),
    ),
    Mutant(
        "poured_documents_lose_a_target", "data",
        "start, left = start + taken - 1, left - taken + 1",
        "start, left = start + taken, left - taken",
        ("test_packing.py",),
    ),
    Mutant(
        "loss_mask_is_shifted", "data",
        "flat_labels[at + starts - 1] = IGNORED",
        "flat_labels[at + starts] = IGNORED",
        ("test_loader.py::test_batches_equal_brute_force",),
    ),
    Mutant(
        "labels_are_the_inputs", "data",
        "flat_labels[at : at + max(0, len(tokens) - 1)] = tokens[1:]",
        "flat_labels[at : at + max(0, len(tokens) - 1)] = tokens[:-1]",
        ("test_loader.py::test_batches_equal_brute_force",),
    ),
    Mutant(
        "a_document_border_is_dropped", "data",
        "borders.append(starts[starts < size] + at)",
        "borders.append(starts[1:][starts[1:] < size] + at)",
        ("test_loader.py::test_batches_equal_brute_force",),
    ),
    Mutant(
        "ranks_see_the_same_rows", "data",
        "first = self._start() + self.rank * self.rows",
        "first = self._start()",
        ("test_loader.py",),
    ),
    Mutant(
        "every_epoch_has_the_same_order", "data",
        '("windows", self.seed, component, epoch)',
        '("windows", self.seed, component)',
        ("test_mixture.py",),
    ),
    Mutant(
        "the_seed_does_not_matter", "data",
        "digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()",
        "digest = hashlib.blake2b(b'', digest_size=8 * _ROUNDS).digest()",
        ("test_mixture.py",),
    ),
    Mutant(
        "a_period_repeats_the_windows_of_the_one_before", "data",
        "local = int(self._quotas.before(period)[component] + turn[place])",
        "local = int(turn[place])",
        ("test_mixture.py",),
    ),
    Mutant(
        "a_curriculum_starts_late", "data",
        "first = (index - self.begins[phase]) * per_row",
        "first = index * per_row",
        ("test_mixture.py",),
    ),
    Mutant(
        "length_filter_is_exclusive", "data",
        "keep[of_source] = lengths[of_source] >= min_tokens",
        "keep[of_source] = lengths[of_source] > min_tokens",
        ("test_mixture.py",),
    ),
    Mutant(
        "resume_forgets_the_other_ranks", "data",
        "return self._samples + micro_steps * self._rank()[1] * self.micro_batch_size",
        "return self._samples + micro_steps * self.micro_batch_size",
        ("data/test_resume.py::test_the_position_counts_the_rows_of_all_ranks",),
    ),
    Mutant(
        "resume_starts_over", "data",
        'self._samples = state_dict["consumed_samples"]',
        'self._samples = 0 * state_dict["consumed_samples"]',
        ("test_loader.py::test_fifty_random_resumptions_are_bit_identical",),
    ),
    Mutant(
        "held_out_windows_come_twice", "data",
        "if index >= len(self):\n            return index, [(np.zeros",
        "if index > len(self):\n            return index, [(np.zeros",
        ("test_loader.py",),
    ),
    Mutant(
        "documents_end_without_eos", "data",
        "document.append(self.eos_id)",
        "document.append(self.pad_id or 0)",
        ("test_tokenizer.py::test_any_text_survives_a_round_trip_inside_its_frame",),
    ),
    Mutant(
        "documents_begin_without_bos", "data",
        "head = [] if self.bos_id is None else [self.bos_id]",
        "head = [] if not self.bos_id else [self.bos_id]",
        ("test_tokenizer.py::test_any_text_survives_a_round_trip_inside_its_frame",),
    ),
    Mutant(
        "a_piece_of_a_long_text_is_dropped", "data",
        "        if batch:\n            yield batch",
        "        if len(batch) > 1:\n            yield batch",
        ("test_tokenizer.py",),
    ),
    Mutant(
        "held_out_documents_are_trained_on", "data",
        "return math.ceil(self.heldout_fraction * 2**64)",
        "return math.ceil(self.heldout_fraction * 2**63)",
        ("test_prepare.py::test_split_depends_only_on_id_and_seed", "test_prepare.py"),
    ),
    Mutant(
        "near_duplicates_stay", "data",
        ">= self.settings.threshold",
        "> 1.01",
        ("test_prepare.py::test_near_duplicates_go_and_the_first_stays",),
    ),
    Mutant(
        "reading_stops_at_the_end_of_a_shard", "data",
        "done, shard = done + size, shard + 1",
        "done, shard = done + max(size, 1), shard",
        ("test_loader.py", "test_mixture.py"),
    ),
    Mutant(
        "checksums_of_shards_are_not_compared", "data",
        "if sha256(file) != checksum:",
        "if sha256(file) == checksum[:0]:",
        ("test_prepare.py::test_damaged_shards_are_refused",),
    ),
    Mutant(
        "unigram_without_smoothing", "data",
        "(targets + 1) / (targets.sum() + len(targets))",
        "(targets + 1) / targets.sum()",
        ("test_unigram.py",),
    ),
    Mutant(
        "only_the_first_preparation_is_looked_up", "data",
        "for number, spec in enumerate(specs[1:], 1):",
        "for number, spec in enumerate(specs[1:1], 1):",
        ("test_prepare.py",),
    ),
    Mutant(
        "lists_among_filler_are_given_again_in_their_order", "data/corpus/retrieval.py",
        "for line in rng.sample(lines, len(lines))",
        "for line in lines",
        ("test_retrieval.py::test_lists_lie_scattered_among_filler_and_are_given_again_line_by_line",),
    ),
    Mutant(
        "a_filler_without_lines_is_taken", "data/corpus/retrieval.py",
        "if not _filler(self.filler).has_lines(self.length[1], unit):",
        "if False:",
        ("test_retrieval.py::test_a_filler_without_lines_that_fit_is_refused_before_any_document_is_made",),
    ),
    Mutant(
        "the_filler_of_what_is_trained_on_is_held_out", "data/section.py",
        "if scored := [each for each in self.heldout_sets if os.path.realpath(each.path) == filler]:",
        "if scored := [each for each in self.heldout_sets if each.path is None]:",
        ("test_loader.py::test_what_fills_retrieval_documents_that_are_trained_on_is_not_held_out",),
    ),
    Mutant(
        "documents_keep_a_filler_that_is_no_more", "data/prepare/run.py",
        "is_same = recorded is None or retrieval.text == recorded",
        "is_same = True",
        ("test_retrieval.py::test_documents_whose_filler_was_prepared_anew_are_told_of_and_made_again_where_they_were_begun",),
    ),
    Mutant(
        "no_document_with_filler_begins_with_a_fact", "data/corpus/retrieval.py",
        "places[0] = 0",
        "pass",
        ("test_retrieval.py::test_a_share_of_the_documents_begins_with_a_fact",),
    ),
    Mutant(
        "a_folder_is_trained_on_and_held_out", "data/section.py",
        "if os.path.realpath(self.path) != os.path.realpath(other.path):",
        "if self.path != other.path:",
        ("test_loader.py::test_what_is_trained_on_is_not_held_out",),
    ),
)  # fmt: skip
