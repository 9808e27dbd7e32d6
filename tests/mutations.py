"""Faults of the kind that people make, each with the tests that have to notice it; `mutants.py` tries them out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in the files of the folder (or file) `where`, and `new` takes its place.

    tests: names of test files (`data/test_resume.py` where there are two), which may go on with `::test`. gpu: only a
    GPU shows it.
    """

    name: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]
    gpu: bool = False


ATTENTION, KERNELS, HOPPER = "s2/attention", "s2/attention/kernels", "s2/attention/kernels/hopper"
GROUPED = "test_kernels.py::test_grouped_query_heads_share_the_pattern_of_their_kv_head"
FOLLOWS_LEVELS = "test_kernels.py::test_every_block_size"
NEXT_DOOR = "test_varlen.py::test_documents_do_not_see_nan_next_door"
PADDING = "test_varlen.py::test_rows_behind_the_last_border_are_zero_and_nobody_reads_them"

_PATTERNS = (
    Mutant(
        "residue_off_by_one", ATTENTION,
        "head * widest // num_heads if covers",
        "(head * widest // num_heads + 1) % widest if covers",
        ("test_pattern.py",),
    ),
    Mutant(
        "residues_do_not_rotate", ATTENTION,
        "else (head + layer * num_heads) % widest",
        "else (head + layer) % widest",
        ("test_pattern.py", "test_layout.py"),
    ),
    Mutant(
        "window_edge", ATTENTION,
        "keep = distance < self.local\n",
        "keep = distance <= self.local\n",
        ("test_pattern.py", "test_kernels.py::test_no_stride_is_a_sliding_window_of_blocks"),
    ),
    Mutant(
        "level_end", ATTENTION,
        "(distance >= begin) & (distance < level.end)",
        "(distance >= begin) & (distance <= level.end)",
        ("test_pattern.py",),
    ),
    Mutant(
        "sinks_are_dropped", ATTENTION,
        "return (keep | (key_block < self.sinks)) & (distance >= 0)",
        "return keep & (distance >= 0)",
        ("test_pattern.py",),
    ),
    Mutant(
        "later_layers_take_the_rules_of_the_first", ATTENTION,
        "return layer % math.lcm(*turns)",
        "return 0",
        ("test_pattern.py", "test_kept.py"),
    ),
    Mutant(
        "masks_of_ranges_overlap", ATTENTION,
        "combined |= mask.cpu() & (distance >= begin) & (distance < end)",
        "combined |= mask.cpu() & (distance < end)",
        ("test_pattern.py",),
    ),
    Mutant(
        "dense_range_is_exclusive", ATTENTION,
        "layers |= set(range(first, last + 1))",
        "layers |= set(range(first, last))",
        ("test_layout.py",),
    ),
    Mutant(
        "interleaving_starts_dense", ATTENTION,
        'set(range(1, num_layers, 2)) if reader.take("-inter")',
        'set(range(0, num_layers, 2)) if reader.take("-inter")',
        ("test_layout.py",),
    ),
)  # fmt: skip

_OP = (
    Mutant(
        "reference_hides_the_diagonal", ATTENTION,
        "return kept & (key[None, :] <= query[:, None])",
        "return kept & (key[None, :] < query[:, None])",
        ("test_kernels.py::test_stride_one_is_dense_causal_attention", GROUPED),
    ),
    Mutant(
        "reference_takes_the_first_queries", ATTENTION,
        "query = torch.arange(kv_len - q_len, kv_len, device=blocks.device)",
        "query = torch.arange(0, q_len, device=blocks.device)",
        ("test_kernels.py::test_sdpa_matches_the_definition",),
    ),
    Mutant(
        "rules_forget_the_head_offset",
        ATTENTION,
        "return rules[self.head_offset : self.head_offset + num_heads]",
        "return rules[:num_heads]",
        ("test_kernels.py::test_head_offset_selects_global_heads",),
    ),
    Mutant(
        "masks_forget_the_head_offset",
        ATTENTION,
        "return mask[self.head_offset : self.head_offset + num_heads]",
        "return mask[:num_heads]",
        ("test_kernels.py::test_head_offset_selects_global_heads",),
    ),
    Mutant(
        "head_offset_of_expanded_heads", ATTENTION,
        "head_offset, total = head_offset * group, total * group",
        "head_offset, total = head_offset, total * group",
        ("test_kernels.py::test_head_offset_selects_global_heads",),
    ),
    Mutant(
        "packed_mask_crosses_borders", ATTENTION,
        "together = document[:, None] == document  # [T, T]",
        "together = document[:, None] >= document  # [T, T]",
        ("test_op.py::test_packed_sdpa_compiles_to_one_graph_for_all_borders",),
    ),
    Mutant(
        "compiled_positions_run_across_documents", ATTENTION,
        "position = torch.where(inside, token - cu_seqlens[document], 0)",
        "position = torch.where(inside, token, 0)",
        ("test_op.py::test_packed_sdpa_compiles_to_one_graph_for_all_borders",),
    ),
    Mutant(
        "borders_that_fall_are_taken", ATTENTION,
        "if borders[0] != 0 or borders[-1] > num_tokens or borders != sorted(borders):",
        "if borders[0] != 0 or borders[-1] > num_tokens:",
        ("test_op.py::test_errors_name_what_is_wrong",),
    ),
    Mutant(
        "softmax_scale_is_not_passed_on", ATTENTION,
        "scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)",
        "scale = 1.0 / math.sqrt(q.shape[-1])",
        ("test_op.py", "test_varlen.py"),
    ),
    Mutant(
        "kept_tables_forget_whose_they_are", ATTENTION,
        "found = self.values.pop(key, None)",
        "found = self.values.pop(next(iter(self.values), key), None)",
        ("test_kept.py",),
    ),
    Mutant(
        "captured_tables_are_dropped", ATTENTION,
        "droppable = [key for key in self.values if key not in self.captured]",
        "droppable = list(self.values)",
        ("test_kept.py",),
    ),
)  # fmt: skip

_TRITON = (
    Mutant(
        "triton_hides_the_diagonal", KERNELS,
        "causal = key <= query\n",
        "causal = key < query\n",
        (GROUPED,),
    ),
    Mutant(
        "triton_window_reaches_further", KERNELS,
        "causal & (query // BLOCK - block < reach_of(block, rule, LEVELS, SINKS))",
        "causal & (query // BLOCK - block <= reach_of(block, rule, LEVELS, SINKS))",
        (FOLLOWS_LEVELS, "test_kernels.py::test_every_head_dimension"),
    ),
    Mutant(
        "triton_residue_off_by_one", KERNELS,
        "return tl.maximum(bound - residue + stride - 1, 0) // stride",
        "return tl.maximum(bound - residue + stride, 0) // stride",
        (FOLLOWS_LEVELS,),
    ),
    Mutant(
        "triton_forgets_sinks", KERNELS,
        "sink_blocks = tl.minimum(sinks, window)",
        "sink_blocks = tl.minimum(sinks, 0)",
        ("test_varlen.py", "test_kernels.py::test_chunked_prefill_and_decoding_equal_one_pass"),
    ),
    Mutant(
        "triton_window_starts_late", KERNELS,
        "window = tl.maximum(i0 - local + 1, 0)  # first block",
        "window = tl.maximum(i0 - local + 2, 0)  # first block",
        ("test_kernels.py::test_no_stride_is_a_sliding_window_of_blocks",),
    ),
    Mutant(
        "triton_lse_is_in_base_two", KERNELS,
        "(row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * LN2)",
        "(row_max + tl.log2(tl.where(empty, 1.0, row_sum))))",
        (GROUPED, "test_kernels.py::test_split_keys_merged_by_lse_equal_the_whole"),
    ),
    Mutant(
        "triton_lse_without_the_sum", KERNELS,
        "(row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * LN2)",
        "row_max * LN2)",
        ("test_kernels.py::test_split_keys_merged_by_lse_equal_the_whole",),
    ),
    Mutant(
        "triton_sign_of_dlse", KERNELS,
        "total -= tl.load(dlse",
        "total += tl.load(dlse",
        ("test_op.py::test_gradient_through_lse_alone", GROUPED),
    ),
    Mutant(
        "triton_sign_of_delta_in_dk", KERNELS,
        "dscores = (probs * (product(v, gradients) - row_delta[None, :]))",
        "dscores = (probs * (product(v, gradients) + row_delta[None, :]))",
        (GROUPED,),
    ),
    Mutant(
        "triton_sign_of_delta_in_dq", KERNELS,
        "dscores = (probs * (dprobs - row_delta[:, None])).to(k[0].dtype)",
        "dscores = (probs * (dprobs + row_delta[:, None])).to(k[0].dtype)",
        (GROUPED,),
    ),
    Mutant(
        "triton_dk_without_scale", KERNELS,
        "store_parts(gathered_rows(dk, key, stride_gkt), exists, dk_acc, scale, D, D0, D1)",
        "store_parts(gathered_rows(dk, key, stride_gkt), exists, dk_acc, 1.0, D, D0, D1)",
        (GROUPED,),
    ),
    Mutant(
        "triton_second_part_is_not_scaled", KERNELS,
        "_store_tile(rows, valid, parts[1] * factor, D, D0, D1)",
        "_store_tile(rows, valid, parts[1], D, D0, D1)",
        ("test_kernels.py::test_every_head_dimension",),
    ),
    Mutant(
        "triton_strides_of_values_are_those_of_keys", KERNELS,
        "*_strides(q, k, v, out_rows, row_lse),",
        "*_strides(q, k, k, out_rows, row_lse),",
        ("test_kernels.py::test_strided_views_are_read_in_place",),
    ),
    Mutant(
        "triton_strides_of_dout_are_those_of_the_output", KERNELS,
        "*_strides(q, k, v, dout, grad_q, lse),",
        "*_strides(q, k, v, grad_q, grad_q, lse),",
        ("test_kernels.py::test_strided_views_are_read_in_place",),
    ),
    Mutant(
        "triton_documents_begin_at_the_first_token", KERNELS,
        "return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)",
        "return tl.load(entry) * 0, tl.load(entry + 1), tl.load(entry + 2)",
        ("test_kernels.py::test_packed_equals_separate", NEXT_DOOR),
    ),
    Mutant(
        "triton_keys_past_the_end_are_read", "s2/attention/kernels/triton/forward.py",
        "exists = key < kv_len if MASKED else True",
        "exists = key < kv_len + 16 if MASKED else True",
        (NEXT_DOOR,),
    ),
    Mutant(
        "triton_leaves_rows_of_no_document", KERNELS,
        "at = begin.to(tl.int64) * width + nth * _FILLED",
        "at = (begin + 1).to(tl.int64) * width + nth * _FILLED",
        (PADDING,),
    ),
    Mutant(
        "triton_takes_borders_that_do_not_fit", KERNELS,
        "return (begin < 0) | (end < begin) | (end > num_tokens)",
        "return (begin < 0) | (end > num_tokens)",
        ("test_varlen.py",),
    ),
    Mutant(
        "triton_skips_blocks_of_the_wider_level", KERNELS,
        "unit = tl.where(index < skip, index, skip + (past // keep) * ratio + 1 + past % keep)",
        "unit = tl.where(index < skip, index, skip + (past // keep) * ratio + past % keep)",
        (FOLLOWS_LEVELS,),
    ),
)  # fmt: skip

_HOPPER_HOST = (
    Mutant(
        "hopper_residue_off_by_one", HOPPER,
        "return divide(maximum(bound - residue + stride - 1, 0), stride);",
        "return divide(maximum(bound - residue + stride, 0), stride);",
        ("hopper/test_rows.py::test_the_key_tiles_of_a_tile_of_rows_are_those_that_it_sees",),
    ),
    Mutant(
        "hopper_window_edge", HOPPER,
        "const int begin = maximum(i0 - rule.local + 1, 0);",
        "const int begin = maximum(i0 - rule.local + 2, 0);",
        ("hopper/test_rows.py::test_the_key_tiles_of_a_tile_of_rows_are_those_that_it_sees",),
    ),
    Mutant(
        "hopper_sinks_are_dropped", HOPPER,
        "const int sinks = minimum(rule.sinks, begin);",
        "const int sinks = minimum(0, begin);",
        ("hopper/test_rows.py::test_the_key_tiles_of_a_tile_of_rows_are_those_that_it_sees",),
    ),
    Mutant(
        "hopper_columns_reach_too_far", HOPPER,
        "return {block, minimum(block + reach_of(block, rule), num_blocks), true};",
        "return {block, minimum(block + reach_of(block, rule) + 1, num_blocks), true};",
        ("hopper/test_index.py::test_runs_of_queries_agree", "hopper/test_n_blocks.py"),
    ),
)  # fmt: skip

_MODEL = (
    Mutant(
        "rope_turns_the_other_way", "s2/model",
        "torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)",
        "torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)",
        ("test_rope.py",),
    ),
    Mutant(
        "rope_positions_run_on_into_the_next_document", "s2/model",
        "document = torch.searchsorted(cu_seqlens, token, right=True) - 1",
        "document = torch.searchsorted(cu_seqlens, token) - 1",
        ("test_rope.py",),
    ),
    Mutant(
        "llama3_blends_the_wrong_way", "s2/model",
        "return keep * inv_freq + (1 - keep) * inv_freq / scaling",
        "return (1 - keep) * inv_freq + keep * inv_freq / scaling",
        ("test_rope.py",),
    ),
    Mutant(
        "loss_counts_what_is_masked", "s2/model",
        "loss = losses.masked_fill(~counts, 0.0).sum().float()",
        "loss = losses.sum().float()",
        ("test_loss.py",),
    ),
    Mutant(
        "loss_mask_is_swapped_in_the_gradient", "s2/model",
        "return loss, grad.masked_fill(~counts[:, None], 0.0).to(logits.dtype)",
        "return loss, grad.masked_fill(counts[:, None], 0.0).to(logits.dtype)",
        ("test_loss.py",),
    ),
    Mutant(
        "head_gradient_keeps_only_the_last_chunk", "s2/model",
        "grad_weight += grad_logits.t() @ rows",
        "grad_weight = grad_logits.t() @ rows",
        ("test_loss.py",),
    ),
    Mutant(
        "decoding_starts_at_position_zero", "s2/model",
        "first = 0 if cache is None else cache.length",
        "first = 0",
        ("test_generate.py",),
    ),
    Mutant(
        "layers_share_the_residues_of_the_first", "s2/model",
        "Block(config, i, pattern, rotations[i]) for i, pattern in",
        "Block(config, i, pattern, rotations[0]) for i, pattern in",
        ("test_transformer.py::test_layers_of_one_pattern_rotate_residues_and_share_them_where_they_repeat",),
    ),
    Mutant(
        "checkpointing_forgets_the_attention", "s2/model",
        "if _is_attention(op):\n        return CheckpointPolicy.MUST_SAVE",
        "if _is_attention(op):\n        return CheckpointPolicy.PREFER_RECOMPUTE",
        ("test_transformer.py::test_what_each_mode_recomputes", "test_triton_op.py"),
    ),
    Mutant(
        "backward_is_not_counted_in_flops", "s2/model",
        "_FORWARD_AND_BACKWARD = 3",
        "_FORWARD_AND_BACKWARD = 2",
        ("test_flops.py",),
    ),
    Mutant(
        "a_tied_head_is_not_compared", "s2/model",
        "head is not embedding and not torch.equal(head, embedding):",
        "head is not embedding and head.shape != embedding.shape:",
        ("test_hf.py",),
    ),
    Mutant(
        "nucleus_takes_one_more", "s2/inference",
        "ranked = ranked.masked_fill(before >= top_p, 0.0)",
        "ranked = ranked.masked_fill(before - ranked >= top_p, 0.0)",
        ("test_generate.py",),
    ),
    Mutant(
        "cache_overwrites_its_last_token", "s2/inference",
        "self._length += num_tokens",
        "self._length += max(num_tokens - 1, 1)",
        ("test_generate.py",),
    ),
    Mutant(
        "rows_that_ended_go_on", "s2/inference",
        "ended = ended | torch.isin(token, stop_ids)",
        "ended = torch.isin(token, stop_ids[:0])",
        ("test_generate.py",),
    ),
)  # fmt: skip

_DATA = (
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
        "first = start + (micro_step * self.num_replicas + self.rank) * self.micro_batch_size",
        "first = start + micro_step * self.num_replicas * self.micro_batch_size",
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
)  # fmt: skip

_TRAINING = (
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
)  # fmt: skip

_BASE = (
    Mutant(
        "a_failed_write_leaves_its_half", "s2/files.py",
        "    except BaseException:\n        temporary.unlink(missing_ok=True)\n        raise",
        "    except BaseException:\n        os.replace(temporary, path)\n        raise",
        ("test_files.py",),
    ),
    Mutant(
        "folders_of_others_are_removed", "s2/files.py",
        "    require_marked(folder)\n    listed = ",
        "    listed = ",
        ("test_files.py",),
    ),
    Mutant(
        "aside_overwrites_what_is_there", "s2/files.py",
        "    number = 1\n    while os.path.lexists",
        "    number = 1\n    while False and os.path.lexists",
        ("test_files.py",),
    ),
    Mutant(
        "damage_of_content_is_not_seen", "s2/files.py",
        'if checksums and "xxh3_128" in was and checksum(path) != was["xxh3_128"]:',
        'if checksums and "xxh3_128" not in was and checksum(path) != was["xxh3_128"]:',
        ("test_files.py",),
    ),
    Mutant(
        "two_writers_hold_a_lock", "s2/locks.py",
        "fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        ("test_locks.py",),
    ),
    Mutant(
        "a_release_forgets_its_record", "s2/locks.py",
        "os.ftruncate(self._stream.fileno(), 0)",
        "os.fstat(self._stream.fileno())",
        ("test_locks.py",),
    ),
    Mutant(
        "a_lock_of_another_host_is_taken", "s2/locks.py",
        "return _read(file) is not None\n    return False",
        "return False\n    return False",
        ("test_locks.py",),
    ),
    Mutant(
        "without_flock_a_holder_counts_as_dead", "s2/locks.py",
        "        return None\n    return True",
        "        return True\n    return True",
        ("test_locks.py",),
    ),
    Mutant(
        "what_stands_in_the_way_of_a_folder_is_refused", "s2/files.py",
        "if os.path.lexists(final) and kind_of(final) != kind:",
        "if os.path.lexists(final) and kind_of(final) == MARK:",
        ("test_files.py",),
    ),
    Mutant(
        "bad_input_ends_as_a_crash", "s2/ending.py",
        "return BAD_INPUT if isinstance(error, ValueError | OSError) else CRASH",
        "return BAD_INPUT if isinstance(error, OSError) else CRASH",
        ("test_ending.py",),
    ),
    Mutant(
        "an_override_of_a_list_takes_the_next_entry", "s2/recipe.py",
        "            index = int(part)\n",
        "            index = int(part) - 1\n",
        ("test_recipe.py",),
    ),
    Mutant(
        "yes_is_a_boolean", "s2/recipe.py",
        '("bool", r"true|false", "tf")',
        '("bool", r"true|false|no", "tfn")',
        ("test_recipe.py",),
    ),
)  # fmt: skip

_EVAL = (
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
        "predicted = reader.predict_last(tokens[:-1], len(tokens) - first)",
        "predicted = tokens[first:]",
        ("test_needle.py",),
    ),
    Mutant(
        "wilson_is_walds_interval", "eval",
        "/ n + (_Z / (2 * n)) ** 2) / shrink",
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
        "numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]",
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
        "bos_is_doubled", "eval",
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
        "the_haystack_holds_the_frame_of_documents", "eval",
        "tokens = tokens[:-1] if tokens and tokens[-1] in frame else tokens",
        "tokens = tokens[:-1] if tokens and len(frame) > 2 else tokens",
        ("test_lm.py", "test_needle.py", "test_haystack.py"),
    ),
)  # fmt: skip

SHORT = "test_gpu_short.py::test_"
_FORWARD = (f"{SHORT}forward",)
_TWO_PASSES, _ONE_PASS = (f"{SHORT}two_passes",), (f"{SHORT}one_pass",)
_ROWS = (f"{SHORT}documents",)

_CUDA = (
    Mutant(
        "cuda_causal_mask_off_by_one", HOPPER,
        "if (i / 4 * 8 + i % 2 > last[i / 2 % 2]) x",
        "if (i / 4 * 8 + i % 2 >= last[i / 2 % 2]) x",
        _FORWARD, gpu=True,
    ),
    Mutant(
        "cuda_sees_the_next_token", HOPPER,
        "return is_seen ? row + lane_row % TOKENS - tile.keys[entry] : -1;",
        "return is_seen ? row + lane_row % TOKENS - tile.keys[entry] + 1 : -1;",
        _FORWARD, gpu=True,
    ),
    Mutant(
        "cuda_output_is_not_rescaled", HOPPER,
        "for (int i = 0; i < D / 2; i++) acc[i] *= factor[i / 2 % 2];",
        "for (int i = 0; i < D / 2; i++) acc[i] *= 1.0f;",
        (f"{SHORT}maxima_that_rise",), gpu=True,
    ),
    Mutant(
        "cuda_sum_is_not_rescaled", HOPPER,
        "sum[r] *= factor[r];",
        "sum[r] *= 1.0f;",
        (f"{SHORT}maxima_that_rise",), gpu=True,
    ),
    Mutant(
        "cuda_maxima_never_rise", HOPPER,
        "if (raise || !__any_sync(ALL, !(fmaxf(part[0], part[1]) <= MOST))) break;",
        "if (raise || __any_sync(ALL, true)) break;",
        (f"{SHORT}maxima_that_rise",), gpu=True,
    ),
    Mutant(
        "cuda_lse_is_in_base_two", HOPPER,
        "(top[r] + log2_fast(sum[r])) * LN2;",
        "(top[r] + log2_fast(sum[r]));",
        _FORWARD, gpu=True,
    ),
    Mutant(
        "cuda_lse_of_other_heads", HOPPER,
        "params.lse[held.statistics + own / TOKENS * tokens + own % TOKENS]",
        "params.lse[held.statistics + own % TOKENS]",
        (f"{SHORT}small_blocks",), gpu=True,
    ),
    Mutant(
        "cuda_wait_for_values_is_missing", HOPPER,
        "barrier_wait(keys_full + 8 * keys.index, keys.phase);\n"
        "                barrier_wait(values_full + 8 * values.index, values.phase);",
        "barrier_wait(keys_full + 8 * keys.index, keys.phase);",
        (f"{SHORT}long_forward",), gpu=True,
    ),
    Mutant(
        "cuda_keys_are_never_handed_back", HOPPER,
        "if (lane == 0) barrier_arrive(keys_empty + 8 * keys.index);\n"
        "                if (lane == 0) barrier_arrive(values_empty + 8 * values.index);",
        "if (lane == 0) barrier_arrive(values_empty + 8 * values.index);",
        (f"{SHORT}long_forward",), gpu=True,
    ),
    Mutant(
        "cuda_query_heads_of_a_group_are_one", HOPPER,
        "return kv_head * group + remainder(m_block, pack_gqa) * (ROWS / TOKENS);",
        "return kv_head * group + remainder(m_block, 1) * (ROWS / TOKENS);",
        (f"{SHORT}grouped_heads",), gpu=True,
    ),
    Mutant(
        "cuda_documents_are_stored_over_their_neighbours", HOPPER,
        "if (STORES && is_mover && (!PACKED || row + TOKENS <= done.length)) {",
        "if (STORES && is_mover) {",
        _ROWS, gpu=True,
    ),
    Mutant(
        "cuda_values_of_the_next_document", HOPPER,
        "const int own_past = CUTS && nth < 0 ? keys_past(key, tile.length) : 0;",
        "const int own_past = CUTS && nth < -WARP ? keys_past(key, tile.length) : 0;",
        _ROWS, gpu=True,
    ),
    Mutant(
        "hopper_keys_past_the_end", HOPPER,
        "key < length ? maximum(key + TOKENS - length, 0) : 0",
        "key < length ? maximum(key + TOKENS - length - 1, 0) : 0",
        _ROWS, gpu=True,
    ),
    Mutant(
        "cuda_counter_is_not_reset", HOPPER,
        "index = draw(problem.counter, num_tiles, gridDim.x);",
        "index = draw(problem.counter, num_tiles + 1, gridDim.x);",
        (f"{SHORT}long_forward",), gpu=True,
    ),
    Mutant(
        "cuda_sign_of_dlse", HOPPER,
        "sum - (params.dlse ? params.dlse[at] : 0.0f)",
        "sum + (params.dlse ? params.dlse[at] : 0.0f)",
        _ONE_PASS, gpu=True,
    ),
    Mutant(
        "cuda_sign_of_delta", HOPPER,
        "scores[i] *= dprobs[i] - (i % 2 ? delta.y : delta.x);",
        "scores[i] *= dprobs[i] + (i % 2 ? delta.y : delta.x);",
        _ONE_PASS, gpu=True,
    ),
    Mutant(
        "cuda_columns_of_delta_are_swapped", HOPPER,
        "scores[i] *= dprobs[i] - (i % 2 ? delta.y : delta.x);",
        "scores[i] *= dprobs[i] - (i % 2 ? delta.x : delta.y);",
        _ONE_PASS, gpu=True,
    ),
    Mutant(
        "cuda_causal_mask_of_dk_off_by_one", HOPPER,
        "if (i / 4 * 8 + i % 2 < lane_key() + i / 2 % 2 * 8 - lane_column()) x[i] = MINUS_INFINITY;",
        "if (i / 4 * 8 + i % 2 <= lane_key() + i / 2 % 2 * 8 - lane_column()) x[i] = MINUS_INFINITY;",
        _ONE_PASS, gpu=True,
    ),
    Mutant(
        "cuda_small_blocks_see_themselves_late", HOPPER,
        "if (query < first[r] || query >= until[r]) x[i] = MINUS_INFINITY;",
        "if (query <= first[r] || query >= until[r]) x[i] = MINUS_INFINITY;",
        (f"{SHORT}small_blocks",), gpu=True,
    ),
    Mutant(
        "cuda_wait_before_dscores_is_missing", HOPPER,
        "barrier_wait(base + PLACE(dscores_empty) + 8 * stage, phase ^ 1);\n                hand_over(left, stage);",
        "hand_over(left, stage);",
        (f"{SHORT}long_one_pass",), gpu=True,
    ),
    Mutant(
        "cuda_wait_for_the_other_thread_block_is_missing", HOPPER,
        "barrier_wait(base + PLACE(other_full) + 8 * consumer, phase);",
        "",
        (f"{SHORT}long_one_pass",), gpu=True,
    ),
    Mutant(
        "cuda_dscores_are_never_released", HOPPER,
        "barrier_arrive_remote(other_base + PLACE(dscores_empty) + 8 * consumer);",
        "",
        _ONE_PASS, gpu=True,
    ),
    Mutant(
        "cuda_dq_of_a_step_that_is_not_seen", HOPPER,
        "if (nth < item.first_step[c] || nth >= item.end_step[c]) continue;",
        "if (nth < item.first_step[c] || nth > item.end_step[c]) continue;",
        (f"{SHORT}long_one_pass",), gpu=True,
    ),
    Mutant(
        "cuda_dq_without_scale", HOPPER,
        "store_matrices(at(chunk, matrix_row), pack(x.x * params.scale, x.y * params.scale),",
        "store_matrices(at(chunk, matrix_row), pack(x.x, x.y),",
        _ONE_PASS, gpu=True,
    ),
    Mutant(
        "cuda_dk_without_scale", HOPPER,
        "store_gradient(dk, params.scale, params.dk, item, consumer, params);",
        "store_gradient(dk, 1.0f, params.dk, item, consumer, params);",
        _ONE_PASS, gpu=True,
    ),
    Mutant(
        "cuda_parts_stand_in_one_place", HOPPER,
        "to.partial[c] = partial + index;",
        "to.partial[c] = partial;",
        (f"{SHORT}divided_columns",), gpu=True,
    ),
    Mutant(
        "cuda_queries_of_the_next_document", HOPPER,
        "const bool is_cut = PACKED && row + TOKENS > length;",
        "const bool is_cut = PACKED && row > length;",
        (f"{SHORT}documents_of_the_one_pass",), gpu=True,
    ),
    Mutant(
        "cuda_keys_of_the_next_document", HOPPER,
        "const bool is_cut = PACKED && is_item_cut(item);",
        "const bool is_cut = false;",
        (f"{SHORT}documents_of_the_one_pass",), gpu=True,
    ),
    Mutant(
        "cuda_sign_of_delta_in_dq", HOPPER,
        "ds[i / 2] = pack(probs[i] * (dprobs[i] - own), probs[i + 1] * (dprobs[i + 1] - own));",
        "ds[i / 2] = pack(probs[i] * (dprobs[i] + own), probs[i + 1] * (dprobs[i + 1] + own));",
        _TWO_PASSES, gpu=True,
    ),
    Mutant(
        "cuda_sign_of_dlse_in_dq", HOPPER,
        "delta[r] = exists[r] ? delta[r] - dlse[r] : 0.0f;",
        "delta[r] = exists[r] ? delta[r] + dlse[r] : 0.0f;",
        _TWO_PASSES, gpu=True,
    ),
    Mutant(
        "cuda_delta_of_another_row", HOPPER,
        "own % AT_ONCE * LANES + own / AT_ONCE * 2);",
        "own % AT_ONCE * LANES);",
        _TWO_PASSES, gpu=True,
    ),
    Mutant(
        "cuda_dq_of_two_passes_without_scale", HOPPER,
        "const float factor[2] = {params.scale, params.scale};",
        "const float factor[2] = {1.0f, 1.0f};",
        _TWO_PASSES, gpu=True,
    ),
    Mutant(
        "cuda_dq_forgets_the_last_keys", HOPPER,
        "        accumulate(dq, ds, operand<ROWS_INNER>(key_base + stage * BOX_BYTES), add);\n"
        "        wgmma_wait<0>();\n"
        "        pin(dq);\n"
        "        if (is_first_lane) barrier_arrive(keys_empty + 8 * stage);\n"
        "        const float factor",
        "        if (is_first_lane) barrier_arrive(keys_empty + 8 * stage);\n"
        "        const float factor",
        _TWO_PASSES, gpu=True,
    ),
    Mutant(
        "cuda_dq_hands_back_the_wrong_keys", HOPPER,
        "if (is_first_lane) barrier_arrive(keys_empty + 8 * stage);\n"
        "                barrier_wait(values_full + 8 * ring.index, ring.phase);",
        "if (is_first_lane) barrier_arrive(keys_empty + 8 * ring.index);\n"
        "                barrier_wait(values_full + 8 * ring.index, ring.phase);",
        (f"{SHORT}long_two_passes",), gpu=True,
    ),
    Mutant(
        "cuda_dq_does_not_wait_for_values", HOPPER,
        "if (is_first_lane) barrier_arrive(keys_empty + 8 * stage);\n"
        "                barrier_wait(values_full + 8 * ring.index, ring.phase);",
        "if (is_first_lane) barrier_arrive(keys_empty + 8 * stage);",
        (f"{SHORT}long_two_passes",), gpu=True,
    ),
    Mutant(
        "two_passes_sign_of_delta_in_dk", HOPPER,
        "ds = gl.convert_layout((probs * (dprobs - delta)).to(element), p_layout)",
        "ds = gl.convert_layout((probs * (dprobs + delta)).to(element), p_layout)",
        _TWO_PASSES, gpu=True,
    ),
    Mutant(
        "two_passes_causal_mask_off_by_one", HOPPER,
        "probs = gl.where((key[:, None] <= query[None, :]) | (diagonal == 0), probs, 0.0)",
        "probs = gl.where((key[:, None] < query[None, :]) | (diagonal == 0), probs, 0.0)",
        _TWO_PASSES, gpu=True,
    ),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = (
    *_PATTERNS, *_OP, *_TRITON, *_HOPPER_HOST, *_MODEL, *_DATA, *_TRAINING, *_BASE, *_EVAL, *_CUDA
)  # fmt: skip
