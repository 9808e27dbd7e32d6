"""Patterns, and the attention op on any device."""

from __future__ import annotations

from .mutant import Mutant

ATTENTION = "s2/attention"
GROUPED = "test_kernels.py::test_grouped_query_heads_share_the_pattern_of_their_kv_head"

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
        "more_queries_than_keys_are_taken", ATTENTION,
        "if end - begin > last - first:",
        "if False:",
        ("test_varlen.py::test_borders_of_keys_that_do_not_fit_are_refused_where_they_can_be_read",),
    ),
    Mutant(
        "compiled_sdpa_puts_queries_first", ATTENTION,
        "before = (keys.lengths - rows.lengths)[rows.document]",
        "before = (keys.lengths - rows.lengths)[rows.document] * 0",
        ("test_varlen.py::test_compiled_documents_with_longer_keys_keep_to_themselves",),
    ),
    Mutant(
        "hopper_gradients_of_longer_packed_keys", ATTENTION,
        "is_late = tensors[0].shape[-3] != tensors[1].shape[-3] or cu_seqlens_k is not None",
        "is_late = tensors[0].shape[-3] != tensors[1].shape[-3]",
        ("test_op.py::test_gradients_of_queries_at_the_end_of_longer_keys_are_triton_s",),
    ),
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
        "(rows.document[begin:end, None] == keys.document)",
        "(rows.document[begin:end, None] >= keys.document)",
        ("test_op.py::test_packed_sdpa_compiles_to_one_graph_for_all_borders",),
    ),
    Mutant(
        "compiled_positions_run_across_documents", ATTENTION,
        "return cls(token < borders[-1], document, token - borders[document], lengths, fits)",
        "return cls(token < borders[-1], document, token, lengths, fits)",
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
        "lists_of_a_level_begin_within_the_sinks", ATTENTION,
        "low = np.maximum(query - level.end + 1, rule.sinks)",
        "low = np.maximum(query - level.end + 1, 0)",
        ("test_pattern.py::test_block_lists_name_exactly_the_kept_blocks",),
    ),
    Mutant(
        "queries_before_a_chunk_see_its_keys", ATTENTION,
        "begin = np.maximum(key + near, first)",
        "begin = key + near",
        ("test_pattern.py::test_block_lists_name_exactly_the_kept_blocks",),
    ),
    Mutant(
        "captured_tables_are_dropped", ATTENTION,
        "droppable = [key for key in self.values if key not in self.captured]",
        "droppable = list(self.values)",
        ("test_kept.py",),
    ),
)  # fmt: skip

MUTANTS = (*_PATTERNS, *_OP)
