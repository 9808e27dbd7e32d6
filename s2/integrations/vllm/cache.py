"""The pages of KV heads with one rule, for vLLM's memory manager: those that no later query sees are freed while their
request runs, and a prefix is found again if the pages that its next query sees are still there.

vLLM has one table of pages for a group of layers. To it each KV head is a layer of its own (`layer`), so that heads of
all layers with the same rule share tables.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from s2.attention import HeadRule
from s2.attention.regions import Region, regions_of


@dataclass(frozen=True, kw_only=True)
class ShardedSpec(AttentionSpec):
    """Cache of KV heads that attend by `rule`. Specs with equal rules share tables.

    Attributes:
        rule: the heads'.
        max_num_batched_tokens: new tokens of a step, at most: their pages are there beside the older ones.
    """

    rule: HeadRule
    max_num_batched_tokens: int

    def most_pages(self, num_tokens: int) -> int:
        """That a request of so many tokens holds at any time, at most."""
        pages = -(-num_tokens // self.block_size)
        step = -(-self.max_num_batched_tokens // self.block_size) + 1
        return min(pages, self.rule.most_visible(pages) + step)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.most_pages(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers may share one table."""
        return all(spec == self for spec in kv_cache_specs.values())


class ShardedManager(SingleTypeKVCacheManager):
    """Pages of requests in heads with one rule."""

    kv_cache_spec: ShardedSpec

    def __init__(self, kv_cache_spec: ShardedSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._freed: dict[str, int] = {}  # block of the next query when pages of a request were last freed

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """The pages of a prefix that was found; those that its next query does not see are null already."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        self._freed[request_id] = len(new_computed_blocks)

    def remove_skipped_blocks(self, request_id: str, total_computed_tokens: int) -> None:
        """Frees the pages that queries from token `total_computed_tokens` on do not see."""
        pages = self.req_to_blocks.get(request_id)
        if not pages:
            return
        query, before = min(total_computed_tokens // self.block_size, len(pages)), self._freed.get(request_id, 0)
        if query <= before:
            return
        self._freed[request_id] = query
        regions, lost = _regions(self.kv_cache_spec.rule), set[int]()
        for nth, region in enumerate(regions):
            begin, end = before - region.far + 1, query - region.far + 1
            gone = set(region.blocks(begin, end))
            for farther in regions[nth + 1 :]:  # from there some are seen still
                gone.difference_update(farther.blocks(begin, end))
            lost |= gone
        freed = [block for block in sorted(lost, reverse=True) if not pages[block].is_null]
        self.block_pool.free_blocks([pages[block] for block in freed])
        for block in freed:
            pages[block] = self._null_block

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._freed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
    ) -> int:
        """Pages to take from the pool for `num_tokens` tokens; with `apply_admission_cap` for a whole request, whose
        pages are not all there at once."""
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        new = max(-(-num_tokens // self.block_size) - held, 0)
        if request_id in self.num_cached_block:  # it runs: no prefix is found any more
            return new
        if apply_admission_cap:
            found = sum(not block.is_null for block in new_computed_blocks)
            new = min(new, max(self.kv_cache_spec.most_pages(num_tokens) - found, 0))
        return new + self._get_num_evictable_blocks(new_computed_blocks)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[list[KVCacheBlock], ...]:
        """The longest prefix of whole blocks of which there is every page that queries behind it see. Other pages are
        null, also those that are there."""
        assert isinstance(kv_cache_spec, ShardedSpec)
        if drop_eagle_block or dcp_world_size * pcp_world_size > 1:
            raise NotImplementedError("EAGLE and context parallelism do not go with pages that are freed")
        step = alignment_tokens // kv_cache_spec.block_size
        longest = max_length // kv_cache_spec.block_size // step * step
        regions = _regions(kv_cache_spec.rule)[::-1]  # where one that sees far lacks a page, the prefix is much shorter
        found: dict[int, Sequence[KVCacheBlock]] = {}
        begun = [longest] * len(regions)  # of each region the blocks from there on are found, as far as they are seen

        def missing() -> int | None:
            """A block without a page that a query behind the prefix sees. Queries between see it, too."""
            for nth, region in enumerate(regions):
                seen = _seen(region, longest)
                unknown = range(seen.start, min(seen.stop, begun[nth]), seen.step)
                begun[nth] = min(seen.start, begun[nth])
                for block in unknown:
                    pages = block_pool.get_cached_block(block_hashes[block], kv_cache_group_ids)
                    if pages is None:
                        return block
                    found[block] = pages
            return None

        while longest and (block := missing()) is not None:
            longest = block // step * step
        hits: tuple[list[KVCacheBlock], ...] = tuple([block_pool.null_block] * longest for _ in kv_cache_group_ids)
        for region in regions:
            for block in _seen(region, longest):
                for hit, page in zip(hits, found[block], strict=True):
                    hit[block] = page
        return hits

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0  # nothing is computed once for several requests


@functools.cache
def _regions(rule: HeadRule) -> tuple[Region, ...]:
    """By how far they see; sinks are the first."""
    return regions_of(rule)


def _seen(region: Region, query: int) -> range:
    """Blocks of a region before `query` that a query in that block sees."""
    return region.blocks(query - region.far + 1, query - max(region.near, 1) + 1)


def register() -> None:
    """Makes vLLM manage `ShardedSpec`."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # its own kinds: it only registers them if there are none
    KVCacheSpecRegistry.register(ShardedSpec, ShardedManager)
