# ruff: noqa: E402 -- nothing can be imported where megatron-core is missing
"""GPTModel with S2 core attention is our model: logits, losses, gradients, ranks; what it cannot do is refused."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.core", reason="megatron-core is not installed (the extra `megatron`)")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from check_megatron import Ranks, core_attention, gpt_model, halves, megatron_loss, one_rank, our_loss, train
from check_megatron import batches as packed_batches
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from s2.attention import LayerLayout, s2_attention
from s2.integrations.megatron import (
    S2CoreAttention,
    S2SelfAttention,
    from_megatron,
    get_s2_block_spec,
    get_s2_layer_spec,
    gpt_model_arguments,
    to_megatron,
    transformer_config,
    with_s2_attention,
)
from s2.model import ModelConfig, Transformer
from s2.model.hf import load_config, load_pretrained, load_weights, save_pretrained
from s2.training.optim import OptimizerConfig

SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "attention_layout": "L1V4+dense1", "block_size": 16,
    "initializer_range": 0.1, "rope_theta": 5e4,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    with one_rank("cpu"):
        yield


def our_config(**changes):
    return ModelConfig(**{**SIZES, **changes})


def our_model(**changes):
    torch.manual_seed(0)
    model = Transformer(our_config(**changes))
    for parameter in model.parameters():  # norms and biases too: a lost one must show
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tokens(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def heads(*shape, kv_heads=2, seed=0):
    """q, k, v `[*shape, heads, 8]`."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, n, 8, generator=draw) for n in (6, kv_heads, kv_heads)]


# ---------------------------------------------------------------- one model


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_layout": "dense"},
        {"attention_layout": "L1V4+sink1+dense1", "tie_word_embeddings": True},
        {"attention_layout": "dense|L1V3", "qkv_bias": True},
        {"attention_layout": "2*dense|4*L1V3", "qk_norm": True, "head_dim": 12},
        {"num_key_value_heads": 1, "rope_scaling": LINEAR},
        {"num_key_value_heads": 6, "rope_scaling": LLAMA3},
        {"rope_scaling": YARN},
        {
            "rope_scaling": {
                **YARN,
                "original_max_position_embeddings": 256,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
                "truncate": False,
                "beta_fast": 4.0,
                "beta_slow": 1.5,
            },
            "head_dim": 16,
        },
    ],
    ids=lambda changes: "-".join(changes),
)
@torch.no_grad()
def test_logits_are_ours_and_the_weights_come_back(changes):
    ours = our_model(**changes)
    theirs = gpt_model(ours)
    ids = tokens(2, 150)
    torch.testing.assert_close(logits(theirs, ids), ours(ids), rtol=1e-4, atol=1e-4)
    back = from_megatron(theirs.state_dict(), ours.config)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(x, back[name]) for name, x in ours.state_dict().items())


@torch.no_grad()
def test_a_block_spec_and_a_layout_that_has_been_read_do_the_same():
    ours = our_model()
    made = transformer_config(ours.config, use_cpu_initialization=True)
    ids = tokens(1, 100)
    expected = ours(ids)
    for spec in (
        get_s2_block_spec(made, "L1V4+dense1", 16),
        get_s2_layer_spec(made, "L1V4+dense1", 16),
        get_s2_layer_spec(made, LayerLayout.parse("L1V4+dense1", 3, 16)),
    ):
        torch.testing.assert_close(logits(gpt_model(ours, spec), ids), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_dense_layout_is_megatrons_own_attention():
    ours = our_model(attention_layout="dense")
    own = gpt_model(ours, get_gpt_layer_local_spec(normalization="RMSNorm"))
    ids = tokens(2, 70)
    hidden = torch.ones(1, 1, 70, 70, dtype=torch.bool).triu(1)
    expected = own(ids, torch.arange(70).expand_as(ids), hidden)
    torch.testing.assert_close(logits(gpt_model(ours), ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
def test_losses_of_training_steps_are_ours(packed):
    ours = our_model()
    theirs = gpt_model(ours)
    rows = packed_batches(ours.config, 130, 6, "cpu")
    assert any(len(row.cu_seqlens) > 3 for row in rows)
    optimizer = OptimizerConfig(lr=0.3)  # after a warm-up of 500 steps

    def whole(batch):
        total, count = ours(batch.input_ids, labels=batch.labels)
        return total / count

    expected = train(ours, partial(our_loss, ours) if packed else whole, rows, optimizer)["loss"]
    got = train(theirs, partial(megatron_loss, theirs, packed=packed), rows, optimizer)["loss"]
    assert expected[-1] < expected[0] - 0.1  # it learns
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize(
    "settings",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ],
    ids=["full", "core_attn"],
)
def test_recomputing_gives_the_same_gradients(settings, packed, monkeypatch):
    ours = our_model()
    calls = []
    forward = S2CoreAttention.forward
    monkeypatch.setattr(
        S2CoreAttention, "forward", lambda self, *args, **kwargs: calls.append(self) or forward(self, *args, **kwargs)
    )
    (row,) = packed_batches(ours.config, 100, 1, "cpu")
    gradients = []
    for changes in ({}, settings):
        model = gpt_model(ours, **changes)
        megatron_loss(model, row, packed=packed).backward()
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    assert len(calls) == 3 + 6  # the second model attends twice
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=0)


# ---------------------------------------------------------------- the core attention


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_documents_attend_as_alone_and_padding_changes_nothing(layer):
    core = core_attention(our_config(), layer, 0, 1)
    q, k, v = heads(90)
    borders = torch.tensor([0, 37, 37, 90], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders.clone())
    got = core(q, k, v, None, packed_seq_params=packed)
    alone = [core(*(x[a:b, None] for x in (q, k, v)), None)[:, 0] for a, b in ((0, 37), (37, 90))]
    assert got.shape == (90, 48)
    torch.testing.assert_close(got, torch.cat(alone))
    real = torch.tensor([0, 30, 30, 75], dtype=torch.int32)  # 7 and 8 tokens of padding behind documents
    padded = PackedSeqParams("thd", real, real, borders, borders)
    torch.testing.assert_close(core(q, k, v, None, packed_seq_params=padded), got)


def test_a_layers_pattern_and_scale_are_the_ops():
    config, (q, k, v) = our_config(), heads(100, 2)
    for layer, rotation in ((0, 0), (1, 0), (2, 1)):
        core = core_attention(config, layer, 0, 1)
        core.softmax_scale = 0.3
        arguments = [x.transpose(0, 1) for x in (q, k, v)]
        expected = s2_attention(*arguments, config.layout[layer], rotation=rotation, softmax_scale=0.3)
        assert torch.equal(core(q, k, v, None), expected.transpose(0, 1).reshape(100, 2, 48))


def test_the_output_can_be_viewed_as_a_matrix(monkeypatch):
    q, k, v = heads(20, 3)
    monkeypatch.setattr("s2.integrations.megatron.core_attention.s2_attention", lambda q, *_, **__: q.contiguous())
    assert core_attention(our_config(), 0, 0, 1)(q, k, v, None).is_contiguous()


def test_softmax_scale_comes_from_the_config():
    made = transformer_config(our_config(), softmax_scale=0.3, use_cpu_initialization=True)
    layer = build_module(get_s2_layer_spec(made, "dense"), config=made, layer_number=1)
    assert layer.self_attention.core_attention.softmax_scale == 0.3


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_see_the_blocks_of_their_heads(ranks):
    config = our_config(num_attention_heads=8, num_key_value_heads=4, hidden_size=64, attention_layout="L1V4")
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(100, 1, n, 8, generator=draw) for n in (8, 4, 4))
    for layer in range(3):
        whole = core_attention(config, layer, 0, 1)(q, k, v, None).view_as(q)
        parts = []
        for rank in range(ranks):
            held = [x[:, :, [rank * 4 // ranks]] if ranks > 4 else x.chunk(ranks, 2)[rank] for x in (k, v)]
            core = core_attention(config, layer, rank, ranks)
            parts.append(core(q.chunk(ranks, 2)[rank], *held, None).view(100, 1, -1, 8))
        torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_halves_that_differ_from_the_whole_are_seen(monkeypatch):
    assert max(halves(our_config(), 100, "cpu", torch.float32).values()) < 1e-6
    monkeypatch.setattr("check_megatron.Ranks.rank", lambda self: 0)  # both think they are the first
    assert halves(our_config(attention_layout="L1V2"), 100, "cpu", torch.float32)["L1V2, rotation 0"] > 0.1


@pytest.mark.parametrize(("vp_stage", "expected"), [(0, 2), (1, 4)])
def test_layers_are_counted_over_pipeline_and_virtual_stages(vp_stage, expected):
    config = our_config(num_hidden_layers=4, attention_layout="L1V4+dense0,2")
    made = transformer_config(
        config,
        use_cpu_initialization=True,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = Ranks(1, 2)
    layer = build_module(
        get_s2_layer_spec(made, config.layout), config=made, layer_number=1, pg_collection=groups, vp_stage=vp_stage
    )
    core = layer.self_attention.core_attention
    assert (core.layer_number, str(core.pattern), core.rotation) == (expected, "L1V4", expected // 2 - 1)
    assert len(get_s2_block_spec(made, config.layout, vp_stage=vp_stage, pp_rank=1).layer_specs) == 1


def test_two_gloo_ranks_have_our_losses_and_gradients(tmp_path):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "integrations" / "megatron_ranks.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout.count("agreed")) == (0, 2), done.stderr[-3000:]


# ---------------------------------------------------------------- masks


def causal(length):
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


def test_a_causal_mask_is_taken_and_another_refused():
    core, (q, k, v) = core_attention(our_config(), 0, 0, 1), heads(40, 1)
    mask = causal(40)
    for _ in range(2):  # the second time without another look
        assert torch.equal(core(q, k, v, mask), core(q, k, v, None))
    mask[..., 30:, :5] = True  # a document's border
    other_length, additive = causal(39), mask.float()
    for wrong in (mask, other_length, additive):
        with pytest.raises(ValueError, match=r"attention_mask \[1, 1, .*packed_seq_params"):
            core(q, k, v, wrong)


def test_queries_may_be_the_last_of_longer_keys():
    core, (q, k, v) = core_attention(our_config(), 0, 0, 1), heads(40, 1)
    whole = core(q, k, v, None)
    tail = core(q[-9:], k, v, None, attn_mask_type=AttnMaskType.causal_bottom_right)
    torch.testing.assert_close(tail, whole[-9:])
    torch.testing.assert_close(core(q[-1:], k, v, None, attn_mask_type=AttnMaskType.no_mask), whole[-1:])
    with pytest.raises(ValueError, match="9 queries and 40 keys must be as many"):
        core(q[-9:], k, v, None)
    for kind in (AttnMaskType.no_mask, AttnMaskType.padding, AttnMaskType.arbitrary):
        with pytest.raises(ValueError, match=f"attn_mask_type={kind.name} must be causal"):
            core(q, k, v, None, attn_mask_type=kind)


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        ({"qkv_format": "bshd"}, "qkv_format='bshd' must be 'thd'"),
        ({"cu_seqlens_q": None}, "lacks cu_seqlens_q"),
        ({"cu_seqlens_kv": torch.tensor([0, 9, 40])}, "cu_seqlens_kv must be cu_seqlens_q"),
        ({"cu_seqlens_kv": torch.tensor([0, 40])}, "cu_seqlens_kv must be cu_seqlens_q"),
        ({"local_cp_size": 2}, "local_cp_size=2 must be 1"),
    ],
)
def test_packed_documents_that_are_not_taken(packed, said):
    core, (q, k, v) = core_attention(our_config(), 0, 0, 1), heads(40)
    borders = torch.tensor([0, 10, 40], dtype=torch.int32)
    settings = {"qkv_format": "thd", "cu_seqlens_q": borders, "cu_seqlens_kv": borders, **packed}
    with pytest.raises(ValueError, match=said):
        core(q, k, v, None, packed_seq_params=PackedSeqParams(**settings))


def test_masks_and_biases_beside_documents_are_refused():
    core, (q, k, v) = core_attention(our_config(), 0, 0, 1), heads(40)
    borders = torch.tensor([0, 40], dtype=torch.int32)
    packed = PackedSeqParams("thd", borders, borders)
    with pytest.raises(ValueError, match="attention_mask must be None where packed_seq_params"):
        core(q, k, v, causal(40), packed_seq_params=packed)
    with pytest.raises(ValueError, match="attn_mask_type=no_mask must be causal"):
        core(q, k, v, None, AttnMaskType.no_mask, packed_seq_params=packed)
    with pytest.raises(ValueError, match="attention_bias must be None"):
        core(q, k, v, None, attention_bias=torch.zeros(1), packed_seq_params=packed)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_dropout", 0.1), ("context_parallel_size", 2), ("window_size", (8, 0)),
        ("softmax_type", "learnable"), ("attn_logit_softcapping", 30.0), ("qk_clip", True),
        ("log_max_attention_logit", True), ("fp8_dot_product_attention", True), ("fp8_multi_head_attention", True),
        ("batch_invariant_mode", True), ("flash_decode", True), ("multi_latent_attention", True),
        ("experimental_attention_variant", "dsa"), ("mtp_num_layers", 1), ("is_hybrid_model", True),
    ],
)  # fmt: skip
def test_settings_that_patterns_do_not_have_are_refused(key, value):
    made = transformer_config(our_config())
    setattr(made, key, value)
    with pytest.raises(ValueError, match=rf"^S2 attention: {key}=.* must be "):
        build_core(made)


def build_core(made, *args, **changes):
    settings = {"layout": our_config().layout, "num_kv_heads": 2, "pg_collection": SimpleNamespace(tp=Ranks(0, 1))}
    defaults = (1, AttnMaskType.causal, "self")
    return S2CoreAttention(made, *args, *defaults[len(args) :], **{**settings, **changes})


@pytest.mark.parametrize(
    ("args", "changes", "said"),
    [
        ((1, AttnMaskType.causal, "cross"), {}, "attention_type='cross'"),
        ((1, AttnMaskType.padding), {}, "attn_mask_type=padding must be causal"),
        ((4,), {}, "layer_number=4 must be from 1 to the layout's 3"),
        ((), {"attention_dropout": 0.1}, "attention_dropout=0.1 must be 0"),
        ((), {"layout": LayerLayout.parse("L1V2", 4)}, "'L1V2' is of 4 layers, but num_layers=3"),
        ((), {"layout": LayerLayout.parse("3*dense|W2", 3)}, "rules for 4 heads, but the model has 2 KV heads and 6"),
        ((), {"pg_collection": SimpleNamespace(tp=Ranks(0, 3))}, "tensor parallel size 3 must divide"),
        (
            (),
            {"layout": LayerLayout.parse("3*dense|3*W2", 3), "pg_collection": SimpleNamespace(tp=Ranks(0, 6))},
            "rules for query heads, so tensor parallel size 6",
        ),
    ],
)
def test_modules_that_do_not_fit_the_model_are_refused(args, changes, said):
    with pytest.raises(ValueError, match=said.replace("*", r"\*")):
        build_core(transformer_config(our_config()), *args, **changes)


def test_specs_refuse_other_layouts_and_other_attention():
    made = transformer_config(our_config())
    with pytest.raises(ValueError, match="is of 4 layers, but num_layers=3"):
        get_s2_layer_spec(made, LayerLayout.parse("L1V2", 4))
    with pytest.raises(ValueError, match="dense layer 3 does not exist"):
        get_s2_block_spec(made, "L1V2+dense3")
    with pytest.raises(ValueError, match="rules for 4 heads"):
        get_s2_layer_spec(made, "3*dense|W2")
    latent = get_gpt_layer_local_spec(multi_latent_attention=True)
    with pytest.raises(ValueError, match=r"the spec's self_attention is .*MLASelfAttention"):
        with_s2_attention(latent, made, our_config().layout)
    with pytest.raises(ValueError, match="needs Transformer Engine"):
        get_s2_layer_spec(made, "dense", use_transformer_engine=True)


def test_dynamic_batching_which_goes_past_the_core_attention_is_refused():
    layer = gpt_model(our_model()).decoder.layers[0].self_attention
    assert type(layer) is S2SelfAttention
    with pytest.raises(ValueError, match="dynamic batching attends to every key"):
        layer.flash_decode_and_prefill(*[None] * 10)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"dense": YARN, "sparse": None}, "is by kind of layer, but Megatron's GPTModel rotates all layers alike"),
        ({**LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings=64 .* must be 8192"),
        ({**LLAMA3, "low_freq_factor": 2.0}, "low_freq_factor=2.0 .* must be 1"),
        ({**YARN, "attention_factor": 1.3}, "attention_factor=1.3 must be null"),
    ],
)
def test_scaled_positions_that_megatron_does_not_have_are_refused(scaling, said):
    config = our_config(rope_scaling=scaling)
    for function in (transformer_config, gpt_model_arguments):
        with pytest.raises(ValueError, match=said):
            function(config)


# ---------------------------------------------------------------- weights


def test_weights_that_do_not_fit_are_refused():
    ours = our_model()
    config, state = ours.config, ours.state_dict()
    theirs = to_megatron(state, config)
    name = "model.layers.1.self_attn.k_proj.weight"
    for function, whole, wrong in (
        (to_megatron, state, name),
        (from_megatron, theirs, "decoder.layers.1.self_attention.linear_qkv.weight"),
    ):
        with pytest.raises(ValueError, match=f"tensor '{wrong}' of shape .* is missing"):
            function({key: x for key, x in whole.items() if key != wrong}, config)
        with pytest.raises(ValueError, match=rf"tensor '{wrong}' has shape \[1, 48\], but the config asks for"):
            function({**whole, wrong: whole[wrong][:1]}, config)
        with pytest.raises(ValueError, match=r"unexpected tensors \['other'\]"):
            function({**whole, "other": whole[wrong]}, config)
    tied = config.replace(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight, but the config ties them"):
        to_megatron(state, tied)
    with pytest.raises(ValueError, match=r"output_layer.weight is not embedding.word_embeddings.weight"):
        from_megatron(theirs, tied)
    with pytest.raises(ValueError, match="do not divide by 5 ranks"):
        to_megatron(state, config, tp_size=5)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"tp_rank={rank} must be one of the 2 ranks"):
            to_megatron(state, config, tp_size=2, tp_rank=rank)
    for wrong, said in (
        ({"vocab_size": 64.0}, r"vocab_size=64\.0 must be a whole number"),
        ({"tp_size": "2"}, "tp_size='2' must be a whole number"),
        ({"tp_size": True}, "tp_size=True must be a whole number"),
        ({"tp_size": 0}, "tp_size=0 must be at least 1"),
        ({"tp_size": 2, "tp_rank": None}, "tp_rank=None must be a whole number"),
    ):
        with pytest.raises(ValueError, match=said):
            to_megatron(state, config, **wrong)
    with pytest.raises(ValueError, match="vocab_size=60 must be at least the model's 61"):
        to_megatron(state, config, vocab_size=60)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_goes_through_gpt_model_into_a_folder(tied, tmp_path):
    ours = our_model(tie_word_embeddings=tied)
    save_pretrained(ours, ours.config, tmp_path / "a", dtype=torch.float32)
    config = load_config(tmp_path / "a")
    made = transformer_config(config, use_cpu_initialization=True)
    theirs = GPTModel(made, get_s2_layer_spec(made, config.layout), **gpt_model_arguments(config))
    theirs.load_state_dict(to_megatron(load_weights(tmp_path / "a", config), config))
    save_pretrained(from_megatron(theirs.state_dict(), config), config, tmp_path / "b", dtype=torch.float32)
    back = load_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(x, back[name]) for name, x in ours.state_dict().items())


def test_a_padded_vocabulary_is_cut_off_again():
    ours = our_model()
    padded = to_megatron(ours.state_dict(), ours.config, vocab_size=64)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert padded[name].shape == (64, 48) and not padded[name][61:].any()
    back = from_megatron(padded, ours.config)
    assert all(torch.equal(x, back[name]) for name, x in ours.state_dict().items())


class NormedLinear(ColumnParallelLinear):
    """A linear layer with its norm in it, as Transformer Engine has it."""

    def __init__(self, input_size, *args, config, **kwargs):
        super().__init__(input_size, *args, config=config, **kwargs)
        self.eps, self.layer_norm_weight = config.layernorm_epsilon, torch.nn.Parameter(torch.ones(input_size))

    def forward(self, x):
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


@torch.no_grad()
def test_a_spec_of_fused_layers_keeps_them_and_its_weights_have_its_names():
    ours = our_model()
    made = transformer_config(ours.config, use_cpu_initialization=True)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    parts.self_attention.submodules.linear_qkv = NormedLinear
    mlp = parts.mlp.submodules if isinstance(parts.mlp, ModuleSpec) else parts.mlp.keywords["submodules"]
    mlp.linear_fc1 = NormedLinear
    weights = partial(to_megatron, config=ours.config, use_transformer_engine=True)
    theirs = gpt_model(ours, with_s2_attention(spec, made, ours.config.layout), weights)
    ids = tokens(1, 90)
    torch.testing.assert_close(logits(theirs, ids), ours(ids), rtol=1e-4, atol=1e-4)
    state = {**theirs.state_dict(), "decoder.layers.0.mlp.linear_fc1._extra_state": torch.empty(0)}
    back = from_megatron(state, ours.config)
    assert all(torch.equal(x, back[name]) for name, x in ours.state_dict().items())
