"""Triton's kernels, and index arithmetic of the Hopper kernels, as the interpreter and the host run them."""

from __future__ import annotations

from .mutant import Mutant

KERNELS, HOPPER = "s2/attention/kernels", "s2/attention/kernels/hopper"
GROUPED = "test_kernels.py::test_grouped_query_heads_share_the_pattern_of_their_kv_head"
FOLLOWS_LEVELS = "test_kernels.py::test_every_block_size"
LONGER_KEYS = "test_varlen.py::test_documents_with_longer_keys_are_as_each_alone"
NEXT_DOOR = "test_varlen.py::test_documents_do_not_see_nan_next_door"
PADDING = "test_varlen.py::test_rows_behind_the_last_border_are_zero_and_nobody_reads_them"

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
        "begin, length = tl.load(entry), tl.load(entry + 1)",
        "begin, length = tl.load(entry) * 0, tl.load(entry + 1)",
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
    Mutant(
        "triton_late_tiles_are_as_many_as_queries_fill", KERNELS,
        "return first, tl.where(length > 0, (other + TILE - 1) // TILE - first, 0)",
        "return first, tl.where(length > 0, (length + TILE - 1) // TILE, 0)",
        (LONGER_KEYS,),
    ),
    Mutant(
        "triton_documents_may_have_fewer_keys_than_queries", KERNELS,
        'too_few = other < length if SIDE == "queries" else length < other',
        "too_few = other < 0",
        ("test_varlen.py::test_borders_of_keys_that_do_not_fit_give_nan_where_they_cannot_be_read",),
    ),
    Mutant(
        "triton_keys_are_looked_for_at_the_queries_place", f"{KERNELS}/triton/forward.py",
        "k += batch * stride_kb + kv_begin * stride_kt + kv_head * stride_kh",
        "k += batch * stride_kb + begin * stride_kt + kv_head * stride_kh",
        (LONGER_KEYS,),
    ),
    Mutant(
        "triton_lists_of_keys_without_queries_are_read", KERNELS,
        "list_end = tl.where(q_len > 0, list_end, list_begin)",
        "list_end = tl.where(q_len >= 0, list_end, list_begin)",
        (LONGER_KEYS,),
    ),
)  # fmt: skip

_HOPPER_HOST = (
    Mutant(
        "hopper_late_tables_forget_the_keys_before_the_queries", HOPPER,
        "tl.store(entry + 3, q_begin - before + lane * 0, mask=exists)",
        "tl.store(entry + 3, q_begin + lane * 0, mask=exists)",
        ("hopper/test_launch.py::test_the_table_of_documents_with_longer_keys",),
    ),
    Mutant(
        "hopper_late_tables_have_room_for_whole_m_blocks_alone", HOPPER,
        "most_m_blocks = problem.length // tokens + 2 * count",
        "most_m_blocks = problem.length // tokens + count",
        ("hopper/test_launch.py::test_the_table_of_documents_with_longer_keys_has_room",),
    ),
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

_DECODE = (
    Mutant(
        "decode_rings_do_not_wrap", f"{KERNELS}/triton/decode.py",
        "slot = tl.where(slot >= region_end, slot - slots, slot)",
        "slot = tl.where(slot >= region_end, region_end - slots, slot)",
        ("test_decode.py::test_tiles_of_several_blocks_wrap_at_any_of_them",),
    ),
    Mutant(
        "decode_sees_a_token_to_come", f"{KERNELS}/triton/decode.py",
        "(key[None, :] <= position[:, None])",
        "(key[None, :] <= position[:, None] + 1)",
        ("test_decode.py::test_new_tokens_on_both_sides_of_a_border",),
    ),
    Mutant(
        "decode_drops_the_end_of_the_window", f"{KERNELS}/triton/decode_plan.py",
        "oldest = tl.maximum(length - TOKENS, 0) // BLOCK if TOKENS > 1 else newest",
        "oldest = newest",
        ("test_decode.py::test_new_tokens_on_both_sides_of_a_border",),
    ),
    Mutant(
        "decode_reads_what_is_not_written", f"{KERNELS}/triton/decode_plan.py",
        "tl.maximum((high - low) * BLOCK - missing, 0)",
        "tl.maximum((high - low) * BLOCK, 0)",
        ("test_decode_plan.py::test_no_key_is_read_that_nobody_sees",),
    ),
    Mutant(
        "decode_merges_from_the_last_part_on", f"{KERNELS}/triton/decode.py",
        "partials, logs, program - part * step, step,",
        "partials, logs, program, step,",
        ("test_decode.py::test_empty_sequences_give_zeros_and_the_others_what_they_give_alone",),
    ),
    Mutant(
        "decode_leaves_the_counter", f"{KERNELS}/triton/decode.py",
        "tl.store(counter, 0)",
        "tl.store(counter, 1)",
        ("test_decode.py::test_every_block_size_with_rings_that_wrap",),
    ),
    Mutant(
        "decode_leaves_a_tile_to_nobody", f"{KERNELS}/triton/decode_plan.py",
        "(part + 1) * num_tiles // parts))",
        "(part + 1) * num_tiles // parts - part))",
        ("test_decode.py::test_every_block_size_with_rings_that_wrap",),
    ),
    Mutant(
        "decode_idle_programs_have_a_share", f"{KERNELS}/triton/decode_plan.py",
        "tl.store(share + word, 0)",
        "tl.store(share + word, 1)",
        ("test_decode.py::test_empty_sequences_give_zeros_and_the_others_what_they_give_alone",),
    ),
    Mutant(
        "decode_parts_in_turn_for_all", f"{KERNELS}/triton/decode_plan.py",
        "share = tl.min(tl.where(needed <= programs, share, MANY), 0)",
        "share = tl.max(tl.where(needed <= programs, share, 0), 0)",
        ("test_decode_plan.py::test_programs_go_to_sequences_by_their_length",),
    ),
)  # fmt: skip

_WRITE = (
    Mutant(
        "a_slot_has_two_writers", f"{KERNELS}/triton/write.py",
        "count = tl.minimum(capacity, tl.cdiv(span, stride))",
        "count = tl.cdiv(span, stride)",
        ("test_write.py::test_a_prompt_that_overflows_its_rings_leaves_its_last_blocks",),
    ),
    Mutant(
        "padding_is_written", f"{KERNELS}/triton/write.py",
        "end = tl.minimum(end, (block + 1) * BLOCK)",
        "end = (block + 1) * BLOCK",
        ("test_write.py::test_a_prompt_that_overflows_its_rings_leaves_its_last_blocks",),
    ),
    Mutant(
        "tokens_of_a_block_that_had_begun_are_not_written", f"{KERNELS}/triton/write.py",
        "return cls((tokens + block - 2) // block + 1,",
        "return cls((tokens + block - 1) // block,",
        ("test_write.py::test_blocks_in_several_tiles_and_heads_of_any_width",),
    ),
)  # fmt: skip

MUTANTS = (*_TRITON, *_DECODE, *_WRITE, *_HOPPER_HOST)
