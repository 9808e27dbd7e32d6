"""What other libraries get."""

from __future__ import annotations

from .mutant import Mutant

_MODELING = "s2/integrations/modeling_s2_llama.py"
_PLAIN = "s2/integrations/plain_s2_llama.py"
_KEPT = "s2/integrations/kept_layer.py"

MUTANTS = (
    Mutant(
        "residues_stand_still_from_layer_to_layer", _PLAIN,
        "(head + turn * num_heads) % widest",
        "head % widest",
        ("test_modeling_rules.py",),
    ),
    Mutant(
        "levels_begin_at_the_window", _PLAIN,
        "begin = end\n    if local < 1:",
        "pass\n    if local < 1:",
        ("test_modeling_rules.py",),
    ),
    Mutant(
        "queries_of_a_later_piece_take_the_first_blocks", _PLAIN,
        "seen = block_mask(rules, block[first // size :], block)",
        "seen = block_mask(rules, block[: len(block) - first // size], block)",
        ("test_modeling_rules.py",),
    ),
    Mutant(
        "the_backward_keeps_all_scores", _PLAIN,
        "if torch.is_grad_enabled() and length > step:",
        "if False:",
        ("test_modeling_rules.py::test_plain_attention_never_holds_the_scores_of_all_queries",),
    ),
    Mutant(
        "blocks_count_from_the_padding", _MODELING,
        "self.starts = starts if any(starts) else None",
        "self.starts = None",
        ("test_transformers.py::test_generation_of_a_batch_padded_on_the_left_gives_each_prompts_own_tokens",),
    ),
    Mutant(
        "padding_between_tokens_is_seen", _MODELING,
        "k[row, place][None], v[row, place][None])",
        "k[row, : len(place)][None], v[row, : len(place)][None])",
        ("test_transformers.py::"
         "test_a_pad_token_in_a_prompt_without_a_mask_is_left_out_as_transformers_own_llama_does",),
    ),
    Mutant(
        "the_model_without_its_head_is_not_known", "s2/integrations/hf.py",
        "AutoModel.register(S2LlamaConfig, S2LlamaModel, exist_ok=True)\n",
        "",
        ("test_transformers.py::test_the_model_without_its_head_opens_saves_and_gives_the_same_hidden_states",),
    ),
    Mutant(
        "packed_documents_see_each_other", _MODELING,
        "if not restart.any():",
        "if True:",
        ("test_transformers.py::test_packed_documents_by_position_are_apart_forward_and_backward",),
    ),
    Mutant(
        "dense_layers_rotate_as_sparse_ones", _MODELING,
        'functools.partial(_take_rope, "dense" if',
        'functools.partial(_take_rope, "sparse" if',
        ("test_transformers.py::test_every_part_of_a_model_comes_there_and_back",),
    ),
    Mutant(
        "another_attention_is_taken", _MODELING,
        "if self.config._attn_implementation != NAME:",
        "if self.config._attn_implementation is None:",
        ("test_transformers.py::test_another_attention_is_refused_whenever_it_is_asked_for",),
    ),
    Mutant(
        "longer_rings_claim_what_shorter_ones_dropped", _KEPT,
        "self._least = self._oldest()",
        "pass",
        ("test_kept_layer.py::test_longer_rings_do_not_claim_what_the_shorter_ones_had_dropped",),
    ),
    Mutant(
        "a_store_grows_by_the_blocks_that_are_seen_alone", _KEPT,
        "lay_out(pattern, num_kv_heads, rotation, num_blocks + reach, spare)",
        "lay_out(pattern, num_kv_heads, rotation, num_blocks, spare)",
        ("test_kept_layer.py::test_greedy_tokens_are_those_of_a_cache_that_keeps_every_key",),
    ),
    Mutant(
        "padding_of_a_chunk_stands_before_its_tokens", _KEPT,
        "if any(padding):",
        "if False:",
        ("test_kept_layer.py::test_any_calls_give_the_logits_of_a_cache_that_keeps_every_key",),
    ),
    Mutant(
        "gradients_through_a_cache_are_lost", _MODELING,
        "and not (kept.is_empty and gets_gradients)",
        "",
        ("test_kept_layer.py::test_gradients_go_through_a_cache_that_was_filled_with_them_and_to_new_tokens_behind_one_"
         "that_was_not",),
    ),
    Mutant(
        "a_dense_export_keeps_the_modeling_file", "s2/model/hf.py",
        '"model*.safetensors", *(file.name for file in HF_FILES))',
        '"model*.safetensors")',
        ("test_transformers.py::"
         "test_a_dense_export_is_a_plain_llama_and_leaves_no_modeling_file_of_an_earlier_one",),
    ),
    Mutant(
        "rope_by_kind_is_lost_on_the_way_back", "s2/model/config.py",
        'named = next((key for key, rope in said.items() if rope), "rope_scaling")',
        'named = "rope_scaling" if said["rope_scaling"] else "rope_parameters"',
        ("test_transformers.py::test_every_part_of_a_model_comes_there_and_back",),
    ),
    Mutant(
        "one_edited_spelling_of_ropes_by_kind_wins", "s2/model/config.py",
        "        if ropes[0] != ropes[1]:",
        "        if False:",
        ("test_config.py::test_ropes_by_kind_of_which_one_spelling_was_edited_are_refused",),
    ),
    Mutant(
        "transformers_reads_one_edited_spelling_of_ropes_by_kind", _PLAIN,
        "        if rope != ropes[first]:",
        "        if False:",
        ("test_config.py::test_ropes_by_kind_of_which_one_spelling_was_edited_are_refused",),
    ),
    Mutant(
        "steps_are_taken_before_the_module_has_run", "s2/integrations/lazy.py",
        "self._loader.exec_module(module)\n        _take(module.__name__, module)",
        "_take(module.__name__, module)\n        self._loader.exec_module(module)",
        ("test_lazy.py::test_a_step_is_taken_behind_a_module_that_is_imported_later_and_at_once_for_one_that_is_there",),
    ),
    Mutant(
        "a_rope_beside_those_by_kind_is_ignored", _MODELING,
        'if by_kind and {**rope, **by_kind["dense"]} != rope:',
        "if False:",
        ("test_transformers.py::test_a_rope_beside_those_by_kind_of_layer_is_refused",),
    ),
    Mutant(
        "theta_beside_those_by_kind_is_lost", _MODELING,
        'self.rope_theta = complete.get("rope_theta", 10000.0) if outside is None else outside',
        "pass",
        ("test_transformers.py::test_every_part_of_a_model_comes_there_and_back",),
    ),
)  # fmt: skip
