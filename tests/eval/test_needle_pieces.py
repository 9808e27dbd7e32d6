"""Needles whose prompts begin alike, or are read in pieces: less is computed at once, and scores are the same."""

import itertools
import operator
from collections import defaultdict

import pytest

from eval import samples
from eval.checkpoint import Checkpoint
from eval.grid import Grid
from eval.haystack import Haystack
from eval.needle import Prompts, run_sweep, score
from eval.needle_prompts import build_prompt
from s2.inference import KVCache
from s2.inference.folder import load_tokenizer
from tests.eval.small_checkpoint import make_checkpoint, prose


class Watched:
    """A checkpoint whose prefix caches are kept to look at."""

    def __init__(self, checkpoint):
        self.max_length, self.caches, self._make = checkpoint.max_length, [], checkpoint.prefix_cache
        self.predict_last, self.generate = checkpoint.predict_last, checkpoint.generate

    def prefix_cache(self, rows, length):
        self.caches.append(self._make(rows, length))
        return self.caches[-1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_checkpoint(tmp_path_factory.mktemp("pieces") / "hf"))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack.from_texts([prose(300, 1)], tokenizer, "prose")


@pytest.fixture(scope="module", params=["L2V4-inter", "L1V3+sink1"])
def sharing(request, tmp_path_factory):
    """A checkpoint that reads prompts in pieces, with and without dense layers."""
    return make_checkpoint(tmp_path_factory.mktemp("sharing") / "hf", request.param, max_length=512)


@pytest.mark.parametrize("kind", ["single", "multi-query", "distractors"])
def test_prompts_that_share_a_haystack_score_the_same_computed_at_once_and_anew(
    sharing, haystack, tokenizer, tmp_path, kind
):
    """Keys and values of a shared beginning are computed once, and scores are those of whole forward passes."""
    checkpoint = Checkpoint.load(sharing, "cpu", prefill_chunk=100)
    prompts = Prompts(
        haystack, tokenizer, 0, Grid((420, 500), (0.0, 20.0, 40.0, 60.0, 100.0), 3, kind=kind, shared=True)
    )
    reader = Watched(checkpoint)
    results = run_sweep(reader, prompts, tmp_path / "needle.json", {}, generate=False, batch_tokens=1000)
    read_whole = Checkpoint.load(sharing, "cpu")
    whole, most = [], 0
    for length, indices in itertools.product((420, 500), ((0, 1), (2,))):  # as many rows as a batch has
        firsts = defaultdict(list)
        for sample in prompts.grid.samples():
            if sample["length"] == length and sample["index"] in indices:
                prompt = prompts.build(sample)
                [record] = score(read_whole, tokenizer, [prompt], generate=False)
                whole.append(sample | {"prompt": samples.digest(prompt.tokens)} | record)
                firsts[sample["depth"]].append(prompt.first)
        shared = sorted(map(min, firsts.values()))[:-1]
        most += len(indices) * (len(firsts) * (length - 1) - sum(shared))
    key = operator.itemgetter("id")
    assert sorted(results["samples"], key=key) == sorted(whole, key=key)
    fed = sum(cache.computed * cache.batch_size for cache in reader.caches)
    assert 0.95 * most < fed <= most


def test_a_sweep_in_a_shared_haystack_holds_the_shrunk_cache_and_reads_pieces(haystack, tokenizer, tmp_path):
    """With every key held, a million tokens of a 1.3B would take 192 GiB."""
    checkpoint = Checkpoint.load(make_checkpoint(tmp_path / "hf", "L1V8", max_length=2048), "cpu", prefill_chunk=128)
    prompts = Prompts(haystack, tokenizer, 0, Grid((2048,), (0.0, 50.0, 100.0), 1, shared=True))
    reader, forward, widths = Watched(checkpoint), checkpoint.model.forward, []
    checkpoint.model.forward = lambda ids, **more: widths.append(ids.shape[1]) or forward(ids, **more)
    run_sweep(reader, prompts, tmp_path / "needle.json", {}, batch_tokens=2048)
    assert max(widths) == 128
    config, dtype = checkpoint.config, checkpoint.dtype
    dense = KVCache.bytes_for(config.replace(attention_layout="dense"), 1, 2048, dtype)
    [cache] = reader.caches
    assert KVCache.bytes_for(config, 1, 2048, dtype) < cache.num_bytes < 0.17 * dense


@pytest.mark.parametrize("layout", ["dense", "L2V4-inter", "L1V3+sink1"])
def test_prompts_read_in_pieces_have_the_tokens_of_one_pass(haystack, tokenizer, tmp_path, layout):
    path = make_checkpoint(tmp_path / "hf", layout)
    rows = [build_prompt(haystack, tokenizer, 0, length=250, depth=40, seed=seed).tokens for seed in "ab"]
    whole, widths = Checkpoint.load(path, "cpu"), []
    for chunk in (249, 100, 17):
        pieces = Checkpoint.load(path, "cpu", prefill_chunk=chunk)
        forward = pieces.model.forward
        pieces.model.forward = lambda ids, _of=forward, **more: widths.append(ids.shape[1]) or _of(ids, **more)
        assert pieces.predict_last(rows, 60) == whole.predict_last(rows, 60)
        assert pieces.generate(rows, 5) == whole.generate(rows, 5)
        assert max(widths) == chunk
        widths.clear()
