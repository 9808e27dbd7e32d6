"""The Hopper kernels, on a GPU."""

from __future__ import annotations

from .mutant import Mutant

HOPPER = "s2/attention/kernels/hopper"
SHORT = "test_gpu_short.py::test_"
_FORWARD = (f"{SHORT}forward",)
_TWO_PASSES, _ONE_PASS = (f"{SHORT}two_passes",), (f"{SHORT}one_pass",)
_LATE = ("test_gpu.py::test_queries_at_the_end_of_longer_keys_on_hopper",)
_LATE_DOCUMENTS = ("test_gpu_varlen.py::test_documents_with_longer_keys_are_as_each_alone",)
_ROWS = (f"{SHORT}documents",)

MUTANTS = (
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
        "cuda_late_tiles_begin_with_the_first_key", HOPPER,
        "m_block += problem.first_m_block;",
        "",
        _LATE, gpu=True,
    ),
    Mutant(
        "cuda_rows_before_the_first_query_leave_statistics", HOPPER,
        "(!LATE || own % TOKENS >= held.rows_before)",
        "true",
        _LATE, gpu=True,
    ),
    Mutant(
        "cuda_late_queries_are_those_of_earlier_places", HOPPER,
        "const int token = next.begin + row_of(next.m_block + c, pack_gqa);",
        "const int token = next.begin / TOKENS * TOKENS + row_of(next.m_block + c, pack_gqa);",
        _LATE, gpu=True,
    ),
    Mutant(
        "cuda_documents_overwrite_the_queries_before_them", HOPPER,
        "stores_box<PACKED, LATE>(row, done.before, done.length)",
        "stores_box<PACKED, LATE && !PACKED>(row, done.before, done.length)",
        _LATE_DOCUMENTS, gpu=True,
    ),
    Mutant(
        "cuda_a_store_begins_before_the_first_query", HOPPER,
        "stores_box<PACKED, LATE>(row, done.before, done.length)",
        "stores_box<PACKED, LATE && PACKED>(row, done.before, done.length)",
        _LATE, gpu=True,
    ),
    Mutant(
        "cuda_a_box_that_holds_a_query_is_stored", HOPPER,
        "(!IS_LATE || row >= before)",
        "(!IS_LATE || row + TOKENS > before)",
        ("hopper/test_rows.py::test_boxes_are_stored_neither_before_the_queries_nor_over_neighbours",),
    ),
    Mutant(
        "cuda_a_box_that_holds_a_token_is_stored", HOPPER,
        "(!IS_PACKED || row + TOKENS <= length)",
        "(!IS_PACKED || row < length)",
        ("hopper/test_rows.py::test_boxes_are_stored_neither_before_the_queries_nor_over_neighbours",),
    ),
    Mutant(
        "cuda_first_rows_of_all_sequences_go_to_the_first", HOPPER,
        "batch = PACKED ? 0 : divide(head, heads);",
        "batch = 0;",
        _LATE, gpu=True,
    ),
    Mutant(
        "cuda_ragged_rows_overwrite_the_queries_before_them", HOPPER,
        "if (own % TOKENS < rows_left && (!LATE || own % TOKENS >= rows_before))",
        "if (own % TOKENS < rows_left)",
        _LATE_DOCUMENTS, gpu=True,
    ),
    Mutant(
        "cuda_first_ragged_rows_are_left_to_nobody", HOPPER,
        "stores_box<PACKED, LATE>(0, held.rows_before, held.rows_left)",
        "stores_box<PACKED, false>(0, held.rows_before, held.rows_left)",
        _LATE_DOCUMENTS, gpu=True,
    ),
    Mutant(
        "cuda_ragged_rows_before_the_first_token_wrap", HOPPER,
        "const unsigned first = held.statistics + before;",
        "const unsigned first = held.statistics;",
        _LATE_DOCUMENTS, gpu=True,
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
        "stores_box<PACKED, LATE>(row, done.before, done.length)",
        "stores_box<false, LATE>(row, done.before, done.length)",
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
        "if (i / 4 * 8 + i % 2 < lane_row() + i / 2 % 2 * 8 - lane_column()) x[i] = MINUS_INFINITY;",
        "if (i / 4 * 8 + i % 2 <= lane_row() + i / 2 % 2 * 8 - lane_column()) x[i] = MINUS_INFINITY;",
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
