"""vLLM's memory manager with pages that are freed: what every query of every step sees is there, with prefixes found
again, pages used anew and requests that come and go; and no more is held than is said."""

import dataclasses
import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from s2.attention import LayerLayout, Pattern

pytest.importorskip("vllm.v1.core.kv_cache_manager", reason="needs vLLM 0.24")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_configs,
    get_max_concurrency_for_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from s2.integrations.vllm import cache
from s2.integrations.vllm.cache import ShardedSpec
from tests.inference.test_cache_bytes import LLAMA, SMOLLM2
from tests.inference.test_cache_bytes import LONGEST as LONGEST_OF_RECIPES
from tests.inference.test_cache_bytes import config_of as config_of_recipe

BLOCK, STEP, LONGEST = 16, 96, 1024
KV_HEADS = 3


def vllm_config(pages):
    """As far as the memory manager reads it."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=LONGEST, original_max_model_len=LONGEST),
        cache_config=SimpleNamespace(num_gpu_blocks_override=pages, enable_prefix_caching=True),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=STEP, disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        kv_transfer_config=None,
        speculative_config=None,
    )


def spec_of(rule, **changes):
    size = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float16} | changes
    if rule.is_dense:
        return FullAttentionSpec(**size)
    return ShardedSpec(**size, rule=rule, max_num_batched_tokens=STEP)


def config_of(layout, num_layers, pages):
    """What vLLM makes of a model's layers, and the rule of each of them."""
    return config_in(LayerLayout.parse(layout, num_layers, BLOCK), KV_HEADS, pages, 1 << 40)


def config_in(layout, kv_heads, pages, num_bytes, **size):
    """Likewise, of heads of another size, in so many bytes."""
    cache.register()
    specs, rules = {}, {}
    for layer, (pattern, rotation) in enumerate(zip(layout.patterns, layout.rotations, strict=True)):
        for head, rule in enumerate(pattern.rules(kv_heads, layer=rotation)):
            name = f"model.layers.{layer}.self_attn.attn.kv_head{head}"
            specs[name], rules[name] = spec_of(rule, **size), rule
    (config,) = get_kv_cache_configs(vllm_config(pages), [specs], [num_bytes])
    return config, rules


def concurrency(layout, pages):
    """Sequences of the greatest length that vLLM says it can run at once."""
    return get_max_concurrency_for_kv_cache_config(vllm_config(pages), config_of(layout, 4, pages)[0])


def groups_of(layout, num_layers, pages):
    """`(manager, rule of each group)`."""
    config, rules = config_of(layout, num_layers, pages)
    manager = KVCacheManager(
        config, LONGEST, scheduler_block_size=BLOCK, hash_block_size=BLOCK, max_num_batched_tokens=STEP
    )
    found = []
    for group in config.kv_cache_groups:
        assert len({rules[name] for name in group.layer_names}) == 1, "heads of one rule share a table"
        found.append(rules[group.layer_names[0]])
    assert sum(len(group.layer_names) for group in config.kv_cache_groups) == KV_HEADS * num_layers
    return manager, found


class Server:
    """Schedules as vLLM does and keeps in `memory` what stands in each page: the tokens up to its end, and its group.
    Pages are written token by token, so that a page with a hole in it shows."""

    def __init__(self, manager, rules):
        init_none_hash(sha256)
        self.manager, self.rules, self.memory, self.number = manager, rules, {}, itertools.count()
        self.hasher = get_request_block_hasher(BLOCK, sha256)

    def request(self, tokens):
        parameters = SamplingParams(max_tokens=LONGEST)
        return Request(f"r{next(self.number)}", list(tokens), parameters, None, block_hasher=self.hasher)

    def begin(self, request, most=STEP):
        """The first step of a request: how many tokens were found, or None where there is no room."""
        found, count = self.manager.get_computed_blocks(request)
        new = min(most, request.num_tokens - count)
        got = self.manager.allocate_slots(request, new, count, found, full_sequence_must_fit=True)
        if got is None:
            return None
        request.num_computed_tokens = count
        self.run(request, new)
        return count

    def go_on(self, request, most=STEP):
        new = min(most, request.num_tokens - request.num_computed_tokens)
        if self.manager.allocate_slots(request, new) is None:
            return False
        self.run(request, new)
        return True

    def run(self, request, new):
        begin, tokens = request.num_computed_tokens, tuple(request.all_token_ids)
        tables = self.manager.get_block_ids(request.request_id)
        for group, (table, rule) in enumerate(zip(tables, self.rules, strict=True)):
            for position in range(begin, begin + new):
                page = table[position // BLOCK]
                assert page != 0, "new tokens have pages"
                slots = self.memory.setdefault(page, {})
                slots[position % BLOCK] = (group, tokens[: position + 1])
            mask = rule.mask(-(-(begin + new) // BLOCK))
            for query in range(begin // BLOCK, -(-(begin + new) // BLOCK)):
                for block in mask[query].nonzero()[:, 0].tolist():
                    for position in range(block * BLOCK, min((block + 1) * BLOCK, begin + new)):
                        held = self.memory.get(table[block], {}).get(position % BLOCK)
                        assert held == (group, tokens[: position + 1]), (rule, query, block)
        request.num_computed_tokens += new
        self.check_memory(request)

    def check_memory(self, request):
        blocks = self.manager.get_blocks(request.request_id).blocks
        for pages, manager in zip(blocks, self.manager.coordinator.single_type_managers, strict=True):
            if isinstance(manager.kv_cache_spec, ShardedSpec):
                held = sum(not page.is_null for page in pages)
                assert held <= manager.kv_cache_spec.most_pages(request.num_tokens)


LAYOUTS = (
    "L2V3+dense1",
    "L2V4<10+dense1-2",
    "L1V5-inter",
    "L2V4",
    "L1V2<6V4+sink1",
    "W3+sink1",
    "dense|W2|L1V3",
    "L2V6+sink2+dense0,3",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_queries_see_is_there(layout, seed):
    draw = random.Random(seed)
    server = Server(*groups_of(layout, 4, pages=700))
    prefixes = [[draw.randrange(99) for _ in range(draw.choice([100, 200, 320]))] for _ in range(3)]
    running, found, refused = [], 0, 0
    for _ in range(120):
        if len(running) < 4:
            prompt = draw.choice(prefixes)[: draw.choice([80, 176, 320])] + [
                draw.randrange(99) for _ in range(draw.randrange(90))
            ]
            request = server.request(prompt)
            count = server.begin(request, draw.choice([STEP, 33]))
            if count is None:
                refused += 1
            else:
                running.append(request)
                found += count
        for request in list(running):
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(draw.randrange(99))
            if not server.go_on(request, draw.choice([STEP, 16, 50])) or draw.random() < 0.08:
                server.manager.free(request)
                running.remove(request)
    assert found > 0, "prefixes were found"
    for request in running:
        server.manager.free(request)
    assert server.manager.block_pool.get_num_free_blocks() == 699, "all pages but the null page are free again"


def test_a_long_request_holds_what_its_last_queries_see_and_frees_the_rest():
    manager, rules = groups_of("L2V4+dense0", 4, pages=2000)
    server = Server(manager, rules)
    request = server.request(range(1000))
    server.begin(request)
    while request.num_computed_tokens < 1000:
        server.go_on(request)
    manager.remove_skipped_blocks(request.request_id, 1000)
    for pages, rule in zip(manager.get_blocks(request.request_id).blocks, rules, strict=True):
        seen = rule.mask(63)[62].tolist()
        assert [not page.is_null for page in pages] == seen, rule


def test_a_request_is_admitted_whose_keys_were_never_there_all_at_once():
    layout, kept = "L1V8", 3 * 4 * ((64 - 1) // 8 + 2 + STEP // BLOCK + 1)
    manager, rules = groups_of(layout, 4, pages=kept + 1)
    assert kept < len(rules) * 64, "fewer pages than there are blocks of all groups"
    server = Server(manager, rules)
    request = server.request(range(LONGEST))
    assert server.begin(request) == 0
    while request.num_computed_tokens < LONGEST:
        assert server.go_on(request), "no page is missing on the way"


@pytest.mark.parametrize(
    ("recipe", "sizes", "kept", "freed", "more", "groups"),
    [
        ("1.3b/pretrain.yaml", {}, 4.2, 21.5, 16.2, 17),
        ("7b/pretrain.yaml", {}, 1.6, 7.7, 6.5, 38),
        ("llama3.1-8b/extend-8k.yaml", LLAMA, 6.2, 23.1, 20.2, 20),
        ("smollm2/extend-8k.yaml", SMOLLM2, 35.6, 117.1, 101.5, 18),
    ],
)
def test_sequences_of_128k_tokens_in_100_gib(monkeypatch, recipe, sizes, kept, freed, more, groups):
    """The table of docs/inference.md; `pytest -s` prints it."""
    model, found = config_of_recipe(recipe, sizes), []
    monkeypatch.setattr(f"{__name__}.LONGEST", LONGEST_OF_RECIPES)
    for step, each in ((2048, model.replace(attention_layout="dense")), (2048, model), (8192, model)):
        monkeypatch.setattr(f"{__name__}.STEP", step)
        size = {"block_size": model.block_size, "head_size": model.head_dim, "dtype": torch.bfloat16}
        config, _ = config_in(each.layout, model.num_key_value_heads, None, 100 << 30, **size)
        found.append(get_max_concurrency_for_kv_cache_config(vllm_config(None), config))
    print(f"| {recipe} | {' | '.join(f'{value:.1f}' for value in found)} | {len(config.kv_cache_groups)} |")
    assert found == pytest.approx([kept, freed, more], abs=0.051) and len(config.kv_cache_groups) == groups


@pytest.mark.parametrize("layout", ["L2V4<20+dense0", "L2V4<20", "L1V6+dense1-2"])
def test_as_many_long_requests_run_as_vllm_says(layout):
    needed = 100_000 / concurrency(layout, 100_000)
    pages = int(3.1 * needed)
    assert 3 <= concurrency(layout, pages) < 3.2
    server = Server(*groups_of(layout, 4, pages))
    requests = [server.request([nth] * LONGEST) for nth in range(3)]
    assert [server.begin(request) for request in requests] == [0, 0, 0]
    peak = 0
    while any(request.num_computed_tokens < LONGEST for request in requests):
        assert all(server.go_on(r) for r in requests if r.num_computed_tokens < LONGEST), "no page is missing"
        peak = max(peak, pages - server.manager.block_pool.get_num_free_blocks())
    assert peak > 0.7 * pages, "and it does not say too little"


@pytest.mark.parametrize("spec", ["L2V3", "L2V3<11", "W3", "L1V2<6V4+sink1", "L1V9+sink2"])
def test_the_longest_prefix_whose_seen_pages_are_there(spec, seed):
    rule = Pattern.parse(spec, BLOCK).rules(2)[1]
    draw, most = random.Random(seed), 40
    for _ in range(200):
        kept = rule.mask(most + 1)[most].tolist()
        there = [draw.random() < draw.choice([0.3, 0.9, 1.0]) or kept[b] for b in range(most)]
        for _ in range(draw.randrange(3)):
            there[draw.randrange(most)] = False
        pages = [SimpleNamespace(number=b) for b in range(most)]
        pool = SimpleNamespace(
            null_block=None, get_cached_block=lambda b, groups, t=there, p=pages: [p[b]] * len(groups) if t[b] else None
        )
        limit = draw.randrange(most * BLOCK)
        hits = cache.ShardedManager.find_longest_cache_hit(
            range(most), limit, [0, 3], pool, spec_of(rule), False, alignment_tokens=BLOCK
        )
        mask = rule.mask(most + 1)
        fitting = [n for n in range(limit // BLOCK + 1) if all(there[b] for b in range(n) if mask[n, b])]
        assert len(hits[0]) == len(hits[1]) == max(fitting)
        seen = mask[len(hits[0]), : len(hits[0])].tolist()
        assert hits[0] == hits[1] == [pages[b] if see else None for b, see in enumerate(seen)]


@pytest.mark.parametrize(("spec", "most_asked"), [("L8V16", 136), ("L8V16<1024", 72), ("L1V15+sink1", 138)])
def test_a_long_prefix_is_looked_up_where_it_is_seen(spec, most_asked, seed):
    """Not block by block: a scheduler does it for every group of every request."""
    rule, most, draw = Pattern.parse(spec, BLOCK).rules(16)[3], 2048, random.Random(seed)
    missing, asked = set(), []

    def get(block, groups):
        asked.append(block)
        return None if block in missing else [block] * len(groups)

    def look_up():
        asked.clear()
        pool = SimpleNamespace(null_block=None, get_cached_block=get)
        (hit,) = cache.ShardedManager.find_longest_cache_hit(
            range(most), most * BLOCK, [0], pool, spec_of(rule), False, alignment_tokens=BLOCK
        )
        return len(hit)

    assert look_up() == most and len(asked) <= most_asked
    missing.update(range(700, most))
    assert 700 <= look_up() < 716 and len(asked) <= most_asked + 20
    missing.update(draw.sample(range(most), 200))
    look_up()
    assert len(asked) <= most + most // 10, "about once each, whatever is missing"


def test_eagle_and_context_parallelism_are_refused():
    spec = spec_of(Pattern.parse("L2V3", BLOCK).rules(3)[0])
    with pytest.raises(NotImplementedError, match="EAGLE"):
        cache.ShardedManager.find_longest_cache_hit([], 0, [0], None, spec, True, alignment_tokens=BLOCK)


def test_layers_that_attend_alike_share_tables_and_dense_ones_have_their_own():
    _, rules = groups_of("L2V3+dense1", 4, pages=300)  # three residues of three layers, and three heads of one layer
    assert len(rules) == 4 and sum(rule.is_dense for rule in rules) == 1


def test_a_spec_says_what_a_page_takes_and_how_many_a_request():
    spec = spec_of(Pattern.parse("L2V4+sink1", BLOCK).rules(3)[0])
    assert spec.page_size_bytes == 2 * BLOCK * 8 * 2
    assert spec.most_pages(40) == 3, "never more than there are blocks"
    assert spec.most_pages(100 * BLOCK) == 2 + 1 + -(-98 // 4) + STEP // BLOCK + 1
    assert spec != dataclasses.replace(spec, rule=Pattern.parse("L2V4+sink1", BLOCK).rules(3)[2])
