"""The benchmark of generation without a GPU: what it runs, and what its page says of the figures."""

import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as `python scripts/bench_generate.py` has it

import bench_generate

from s2.model import ModelConfig
from s2.model.layouts import kv_bytes_per_token

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "attention_layout": "L1V2", "block_size": 16,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps({"model": {"config": SIZES}}))
    return path


def test_every_layout_is_timed_at_every_length(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_generate, "STEPS", 2)
    argv = ["--device", "cpu", "--recipe", str(recipe), "--layouts", "dense,L1V2+dense0,1", "--lengths", "32,64"]
    argv += ["--chunk", "32", "--most", "2", "--output", str(tmp_path / "out")]
    record = bench_generate.run(bench_generate.parse_arguments(argv), argv)
    assert [(row["name"], row["seq_len"]) for row in record["rows"]] == [
        (layout, length) for layout in ("dense", "L1V2+dense0,1") for length in (32, 64)
    ]
    for row in record["rows"]:
        assert row["status"] == "ok" and not row["note"] and row["largest_batch"] == 2
        assert min(row["first_token_s"], row["decode_ms"], row["batch_ms"]) > 0
        assert [at["length"] for at in row["trace"]] == ([] if row["seq_len"] == 32 else [32, 64])
    (page,) = (tmp_path / "out").glob("*-generate.md")
    assert page.with_suffix(".png").stat().st_size > 1000 and json.loads(page.with_suffix(".json").read_text())["rows"]
    text = page.read_text()
    assert "## First token" in text and text.count("| L1V2+dense0,1 |") == 6


def test_no_two_caches_are_there_at_once(recipe, tmp_path, monkeypatch):
    """The peak of a prompt would hold both, and a dense model at 128k run out of memory."""
    alive, most = weakref.WeakSet(), []

    class Counted(bench_generate.KVCache):
        def __init__(self, *args, **kwargs):
            gc.collect()
            most.append(len(alive))
            super().__init__(*args, **kwargs)
            alive.add(self)

    monkeypatch.setattr(bench_generate, "KVCache", Counted)
    argv = ["--device", "cpu", "--recipe", str(recipe), "--layouts", "dense", "--lengths", "32,64", "--most", "2"]
    argv += ["--output", str(tmp_path / "out")]
    bench_generate.run(bench_generate.parse_arguments(argv), argv)
    assert set(most) == {0} and len(most) >= 8  # each length twice, then one sequence, then the largest batch


@pytest.mark.parametrize(("recipe", "ending"), [("7b", "+dense"), ("demo", "-inter")])
def test_without_layouts_the_recipe_is_beside_dense_and_beside_itself_all_sparse(recipe, ending):
    configs = bench_generate.read_configs(RECIPES / recipe / "pretrain.yaml", None, 1 << 17)
    layouts = [config.attention_layout for config in configs]
    own = layouts[1]
    assert ending in own and layouts == ["dense", own, own.split(ending)[0]]
    assert not any(pattern.is_dense for pattern in configs[2].layout)
    assert {config.max_position_embeddings for config in configs} == {1 << 17}


def test_ratios_are_to_the_dense_model_of_the_same_length():
    row = {
        "status": "ok",
        "note": "",
        "seq_len": 1024,
        "prefill_gib": 3.0,
        "cache_gib": 2.0,
        "floor_ms": 1.0,
        "flops": 4.0,
    }
    fast = row | {"name": "L1V2", "first_token_s": 0.5, "decode_ms": 2.0, "largest_batch": 8, "batch_ms": 4.0}
    slow = row | {"name": "dense", "first_token_s": 2.0, "decode_ms": 5.0, "largest_batch": 2, "batch_ms": 4.0}
    other = slow | {"seq_len": 2048, "first_token_s": 9.0}
    rows = [each | {"batch_floor_ms": 3.0} for each in (fast, slow, other)]
    rows[0]["flops"] = 1.0
    tables = [bench_generate.table({"rows": rows}, of) for of in ("first token", "batch 1", "the largest batch")]
    first, alone, most = ([c.strip() for c in t.splitlines()[2].split("|")[1:-1]] for t in tables)
    assert first == ["1k", "L1V2", "0.50", "2,048", "4.00", "4.00", "3.0", ""]
    assert alone == ["1k", "L1V2", "1", "2.0", "2.00", "500", "2.50", "0.50", ""]
    assert most == ["1k", "L1V2", "8", "16.0", "4.00", "2,000", "4.00", "0.75", ""]


def test_the_largest_batch_is_what_fits_beside_the_reserve():
    config = ModelConfig(**SIZES | {"max_position_embeddings": 4096})
    each = bench_generate.bytes_a_sequence(config, 2048)
    assert bench_generate.largest_batch(config, 2048, 5 * each + 60, 1000, 256) == 5
    assert bench_generate.largest_batch(config, 2048, 5 * each + 59, 1000, 256) == 4
    assert bench_generate.largest_batch(config, 2048, 5 * each, 0, 3) == 3
    assert bench_generate.largest_batch(config, 2048, 10, 1000, 3) == 0


def test_the_ceiling_reads_weights_and_what_is_kept_once():
    config = ModelConfig(**SIZES | {"max_position_embeddings": 8192})
    parameters = 100_000
    found = bench_generate.ceilings(config, 4096, 3, parameters, 2.0)
    kept = 3 * 4096 * kv_bytes_per_token(config, 4096)
    assert found["ms"] * 2e9 == pytest.approx(2 * (parameters - 128 * 32) + kept)
    tied = config.replace(tie_word_embeddings=True)  # the table is the head, which is read
    assert bench_generate.ceilings(tied, 4096, 3, parameters, 2.0)["ms"] - found["ms"] == pytest.approx(
        2 * 128 * 32 / 2e9
    )


def test_layers_of_a_layout_are_no_layouts():
    split = bench_generate.split_layouts
    assert split("dense, L1V15+dense0,1,L4V24+dense10-22,L1V15") == [
        "dense",
        "L1V15+dense0,1",
        "L4V24+dense10-22",
        "L1V15",
    ]


def test_what_is_wrong_is_said_before_anything_is_computed(recipe, tmp_path):
    for change, sentence in (("L1V", "L1V"), ("dense,L2V2|L1V2|W1", "3 per-head rules|2")):
        argv = ["--device", "cpu", "--recipe", str(recipe), "--layouts", change, "--output", str(tmp_path)]
        with pytest.raises(ValueError, match=sentence):
            bench_generate.run(bench_generate.parse_arguments(argv), argv)
    assert not list(tmp_path.glob("*.md"))


def test_the_cache_that_is_decoded_from_holds_the_length():
    config = ModelConfig(**SIZES | {"max_position_embeddings": 256})
    cache = bench_generate.filled(config, 2, 100, "cpu")
    assert cache.lengths == (100, 100)
    with torch.device("cpu"):
        model = bench_generate._random_model(config)
    assert bench_generate.decode_ms(model, cache, {}) > 0 and cache.lengths[0] == 100 + bench_generate.STEPS + 3
