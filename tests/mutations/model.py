"""The model, and generating from it."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = (
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
        "decoding_starts_at_position_zero", "s2/inference",
        "before + added, first[:, None] + token, self._kept)",
        "before + added, first[:1, None] * 0 + token, self._kept)",
        ("test_generate.py::test_cached_forward_equals_full_forward",),
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
        "self._lengths.copy_(self._begun.after)",
        "self._lengths.copy_(self._begun.after - (self._begun.num_tokens > 1))",
        ("test_generate.py::test_cached_forward_equals_full_forward",),
    ),
    Mutant(
        "a_ring_has_no_room_for_the_block_that_a_step_begins", "s2/attention",
        "min(members, -(-(region.far + spare) // region.stride))",
        "min(members, -(-region.far // region.stride))",
        ("test_regions.py::test_each_query_finds_each_key_that_it_sees_once_and_not_overwritten",),
    ),
    Mutant(
        "a_chunk_forgets_the_block_that_it_begins_in", "s2/inference",
        "return slice(begin, begin + start % self.block_size)",
        "return slice(begin, begin)",
        ("test_cache.py::test_any_calls_give_attention_over_the_whole_context",),
    ),
    Mutant(
        "a_token_of_a_step_sees_those_behind_it", "s2/attention",
        "(distance > 0)[..., None] | (offset <= (position % block)",
        "(distance > 0)[..., None] | (offset <= (position[:, -1:] % block)",
        ("test_regions.py::test_a_decode_step_is_attention_over_the_whole_context",),
    ),
    Mutant(
        "sinks_are_a_ring", "s2/attention",
        "newest = (torch.minimum(newest, last - 1) - residue)",
        "newest = (newest + 0 * last - residue)",
        ("test_regions.py::test_each_query_finds_each_key_that_it_sees_once_and_not_overwritten",),
    ),
    Mutant(
        "rings_are_taken_back_to_any_length", "s2/attention",
        "return block if block >= self.first else None",
        "return None",
        ("test_cache.py::test_slack_can_be_taken_back_at_any_time_and_no_less_than_what_rings_hold",),
    ),
    Mutant(
        "rows_of_a_batch_stand_at_the_positions_of_the_first", "s2/inference",
        "first = before[:1] if stand_alike else before",
        "first = before[:1]",
        ("test_generate.py::test_rows_of_several_lengths_are_continued_as_if_alone",),
    ),
    Mutant(
        "rows_that_ended_go_on", "s2/inference",
        "ended = [was or index in ends for was, index",
        "ended = [was for was, index",
        ("test_generate.py",),
    ),
    Mutant(
        "rows_that_are_enough_wait_for_those_that_ended", "s2/inference",
        "return [was or is_now for was, is_now in zip(ended, enough.tolist(), strict=True)]",
        "return [was or bool(enough.all()) for was in ended]",
        ("test_prefix.py::test_generation_ends_when_each_row_has_ended_or_is_enough",),
    ),
    Mutant(
        "a_stop_string_is_cut_before_one_that_begins_sooner", "s2/inference",
        "if found < len(text) and found <= begun:",
        "if found < len(text):",
        ("test_detokenize.py",),
    ),
    Mutant(
        "the_beginning_of_a_stop_string_is_shown", "s2/inference",
        "shown = min(found, begun)",
        "shown = found",
        ("test_detokenize.py",),
    ),
    Mutant(
        "half_a_character_is_shown", "s2/inference",
        "sure = text.removesuffix(_INCOMPLETE)",
        "sure = text",
        ("test_detokenize.py",),
    ),
    Mutant(
        "runs_of_byte_tokens_are_shown_while_they_may_become_invalid", "s2/inference",
        "if not self._decoder.is_adding or token in self._decoder.bytes:",
        "if not self._decoder.is_adding:",
        ("test_detokenize.py",),
    ),
    Mutant(
        "special_tokens_are_context_for_the_next", "s2/inference",
        "            return \"\"\n        if self._decoder.tokenizer.id_to_token(token) is None:",
        "            pass\n        if self._decoder.tokenizer.id_to_token(token) is None:",
        ("test_detokenize.py",),
    ),
    Mutant(
        "rows_go_on_behind_a_stop_string", "s2/inference",
        "        if self._text.is_stopped:\n            reason = \"stop\"",
        "        if self._text.is_stopped and self._left == 0:\n            reason = \"stop\"",
        ("test_text.py", "test_adapter.py::test_a_stop_sequence_of_several_tokens_ends_generation"),
    ),
    Mutant(
        "a_captured_step_has_the_positions_of_rows_of_one_length", "s2/inference",
        "self._open(num_tokens, [num_tokens] * len(self._held), stand_alike=False)",
        "self._open(num_tokens, [num_tokens] * len(self._held), stand_alike=len(set(self._held)) == 1)",
        ("test_graph.py",),
    ),
    Mutant(
        "replays_are_not_counted_on_the_host", "s2/inference",
        "        self._cache.commit(new)\n        return logits",
        "        return logits",
        ("test_graph.py",),
    ),
    Mutant(
        "rows_that_ended_draw_on", "s2/inference",
        "token = torch.where(*held, token)",
        "token = token",
        ("test_generate.py::test_rows_stop_at_eos_and_generation_when_all_have", "test_stream.py"),
    ),
    Mutant(
        "one_answer_ends_every_row", "s2/inference",
        "if enough.shape != (len(ended),):",
        "if False:",
        ("test_prefix.py::test_what_is_enough_is_said_of_each_row",),
    ),
    Mutant(
        "a_prefix_changes_with_the_rows_of_the_caller", "s2/inference",
        "self._held = input_ids.clone()",
        "self._held = input_ids",
        ("test_prefix.py::test_rows_that_the_caller_overwrites_are_computed_anew",),
    ),
    Mutant(
        "a_cache_takes_keys_of_other_shapes", "s2/inference",
        "if (k.shape[2], k.shape[3], k.dtype) != store.keys:",
        "if False:",
        ("test_cache.py::test_a_cache_made_for_another_model_is_refused_at_once",),
    ),
    Mutant(
        "padding_counts_towards_the_longest_context", "s2/model/transformer.py",
        "zip(real, cache.lengths, strict=False)",
        "zip([max(real)] * len(real), cache.lengths, strict=False)",
        ("test_cache.py::test_the_longest_context_bounds_each_sequence_and_not_the_padding",),
    ),
    Mutant(
        "gradients_lack_what_goes_through_a_cache", "s2/model/transformer.py",
        "if cache is not None and torch.is_grad_enabled():",
        "if False:",
        ("test_cache.py::test_nobody_takes_gradients_that_lack_what_goes_through_a_cache",),
    ),
)  # fmt: skip
