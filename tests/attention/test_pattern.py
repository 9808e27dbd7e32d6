"""Patterns: the mask against the written definition, closed forms against brute force, errors that name the culprit."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2.attention import LayerLayout, Pattern
from s2.attention.call import Call
from s2.attention.kernels.triton.documents import document_tiles
from s2.attention.schedule import has_closed_form, key_lists, query_lists, rule_schedule
from tests.attention.checks import call_with

SPECS = ("dense", "W1", "W5", "L1V3", "L2V4", "L3V8+sink1", "W4+sink3", "L4V24", "L8V1")


def written_definition(local, stride, sinks, residue, num_blocks):
    mask = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for i in range(num_blocks):
        for b in range(i + 1):
            strided = stride is not None and b % stride == residue
            mask[i, b] = i - b < local or strided or b < sinks
    return mask


@pytest.mark.parametrize(("heads", "layer"), [(4, 0), (6, 0), (2, 0), (2, 1), (2, 5)])
def test_block_mask_is_the_written_definition(heads, layer):
    stride, local, sinks = 4, 2, 1
    mask = Pattern.parse("L2V4+sink1").block_mask(19, heads, layer=layer)
    for h in range(heads):
        residue = h * stride // heads if heads >= stride else (h + layer * heads) % stride
        assert torch.equal(mask[h], written_definition(local, stride, sinks, residue, 19)), f"head {h}"


def test_stride_one_is_dense_and_no_stride_is_a_window():
    dense = torch.tril(torch.ones(9, 9, dtype=torch.bool))
    assert Pattern.parse("L3V1").is_dense
    assert torch.equal(Pattern.parse("L3V1").block_mask(9, 2), dense.expand(2, -1, -1))
    window = dense & ~torch.tril(torch.ones(9, 9, dtype=torch.bool), diagonal=-4)
    assert torch.equal(Pattern.parse("W4").block_mask(9, 1)[0], window)


def test_context_ranges_use_each_stride_in_its_range():
    pattern = Pattern.from_ranges(2, [(2, 6), (4, None)])
    mask = pattern.block_mask(30, 4)
    for h in range(4):
        for i in range(30):
            for b in range(i + 1):
                d = i - b
                keep = d < 2 or (d < 6 and b % 2 == h % 2) or (d >= 6 and b % 4 == h)
                assert mask[h, i, b] == keep, (h, i, b)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("seq_len", [1, 15, 16, 100, 333])
def test_density_counts_visible_token_pairs(spec, seq_len):
    pattern = Pattern.parse(spec, block_size=16)
    blocks = -(-seq_len // 16)
    index = torch.arange(seq_len)
    mask = pattern.block_mask(blocks, 3)[:, index // 16][:, :, index // 16] & (index[None, :] <= index[:, None])
    assert pattern.visible_pairs(seq_len, 3) == mask.sum(dim=(1, 2)).tolist()
    assert pattern.density(seq_len, 3) == pytest.approx(
        mask.float().mean().item() * seq_len**2 * 2 / (seq_len * (seq_len + 1))
    )


def test_density_at_128k_matches_the_known_figures():
    for spec, expected in (("L1V15", 0.068), ("L8V16", 0.070), ("L16V8", 0.139), ("L4V24", 0.045)):
        assert Pattern.parse(spec).density(131072, 32) == pytest.approx(expected, abs=1.5e-3)


@settings(max_examples=60, deadline=None)
@given(
    local=st.integers(1, 5),
    strides=st.lists(st.integers(2, 9), min_size=0, max_size=2),
    sinks=st.integers(0, 3),
    heads=st.integers(1, 9),
    layer=st.integers(0, 3),
)
def test_kv_efficiency_closed_form_agrees_with_the_definition(local, strides, sinks, heads, layer):
    ends = [local + 3, None] if len(strides) == 2 else [None]
    pattern = Pattern.from_ranges(local, list(zip(strides, ends, strict=False)), sinks=sinks)
    num_blocks = 60
    mask = pattern.block_mask(num_blocks, heads, layer=layer)
    contiguous = True
    for h in range(heads):
        for b in range(num_blocks):
            seen = mask[h, b:, b]
            run = int(seen.int().cumprod(0).sum())
            contiguous &= int(seen.sum()) == run
    assert pattern.is_kv_efficient(num_blocks, heads, layer=layer) == contiguous
    if pattern.is_kv_efficient():
        assert contiguous, "nested strides must be KV-efficient at every length"


def test_a_random_mask_is_not_kv_efficient():
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, [1, 4], 1] = True
    assert not Pattern.from_mask(mask).is_kv_efficient()


@pytest.mark.parametrize(("stride", "heads"), [(4, 4), (24, 32), (15, 16), (16, 32), (3, 7)])
def test_heads_cover_the_context_when_there_are_enough(stride, heads):
    pattern = Pattern.parse(f"L1V{stride}")
    assert pattern.union_coverage(3 * stride, heads) == 1.0
    assert pattern.layers_to_cover(heads) == 1


@pytest.mark.parametrize(("stride", "heads", "layers"), [(24, 16, 2), (16, 8, 2), (15, 4, 4), (24, 5, 5)])
def test_rotated_layers_cover_the_context_together(stride, heads, layers):
    pattern = Pattern.parse(f"L1V{stride}")
    assert pattern.union_coverage(3 * stride, heads) < 1.0
    assert pattern.union_coverage(3 * stride, heads, num_layers=layers) == 1.0
    assert pattern.layers_to_cover(heads) == layers


def test_a_window_never_covers_the_context():
    assert Pattern.parse("W3").layers_to_cover(8) is None


def test_masks_by_context_range_are_combined():
    near, far = torch.ones(1, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8, dtype=torch.bool)
    far[0, :, 2] = True
    near[0, 3, 2] = False  # where the far one has True, but is not asked
    mask = Pattern.from_masks([(near, 2), (far, None)]).block_mask(8, 1)[0]
    for i in range(8):
        for b in range(i + 1):
            assert mask[i, b] == (near[0, i, b] if i - b < 2 else b == 2)


@st.composite
def rule_patterns(draw, block_size):
    end = local = draw(st.integers(1, 9))
    ranges = []
    for stride in draw(st.lists(st.integers(1, 40), max_size=4)):
        end += draw(st.integers(1, 50))
        ranges.append((stride, end))
    if ranges and draw(st.booleans()):
        ranges[-1] = (ranges[-1][0], None)
    sinks = draw(st.sampled_from([0, 0, 1, 70]))
    try:
        return Pattern.from_ranges(local, ranges, block_size=block_size, sinks=sinks)
    except ValueError:
        return Pattern.parse("dense", block_size)


@st.composite
def all_patterns(draw):
    block_size = draw(st.sampled_from([16, 32, 64, 128, 256]))
    if draw(st.booleans()):
        return draw(rule_patterns(block_size))
    runs = draw(st.lists(st.tuples(rule_patterns(block_size), st.integers(1, 3)), min_size=1, max_size=4))
    return Pattern.per_head([pattern for pattern, count in runs for _ in range(count)])


@settings(max_examples=200, deadline=None)
@given(all_patterns())
def test_parse_reads_what_patterns_print(pattern):
    again = Pattern.parse(str(pattern), pattern.block_size)
    assert again == pattern and str(again) == str(pattern)
    heads = len(pattern.heads) or 3
    assert again.rules(heads, layer=1) == pattern.rules(heads, layer=1)
    layout = LayerLayout.parse(f"{pattern}-inter+dense0", 4, pattern.block_size)
    assert [layout[i] == pattern or layout[i].is_dense for i in range(4)] == [True] * 4 and layout[2] == pattern


@pytest.mark.parametrize(
    ("spec", "heads"),
    [
        ("dense|W16|L8V16", ["dense", "W16", "L8V16"]),
        ("2*dense|6*L8V16+sink1", ["dense"] * 2 + ["L8V16+sink1"] * 6),
        ("L8V4<64V16|W2", [Pattern.from_ranges(8, [(4, 64), (16, None)]), "W2"]),
        ("1*L1V4", ["L1V4"]),
        ("W2|W2", ["W2", "W2"]),
    ],
)
def test_heads_are_spelled_one_after_the_other(spec, heads):
    wanted = Pattern.per_head([head if isinstance(head, Pattern) else Pattern.parse(head) for head in heads])
    assert Pattern.parse(spec) == wanted


def test_equal_patterns_are_equal_and_keys_tell_others_apart():
    assert Pattern.parse("L8V16") == Pattern.parse("L8V16") != Pattern.parse("L8V16", 32)
    assert Pattern.per_head([Pattern.parse("W2"), Pattern.parse("dense")]) != Pattern.parse("W2")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Pattern.parse("L8W16"), "'L8W16': expected 'V<stride>', at character 3 ('W16')"),
        (lambda: Pattern.parse("W2|L0V4"), "window is 0 blocks, but must be at least 1, at character 4 ('L0V4')"),
        (lambda: Pattern.parse("L4V0"), "stride 0"),
        (lambda: Pattern.parse("L4V2<4"), "the range up to distance 4 must reach beyond 4 blocks"),
        (lambda: Pattern.parse("L4V8+sinkx"), "at character 5 ('+sinkx')"),
        (lambda: Pattern.parse("2*dense|"), "expected 'dense', 'W<blocks>' or 'L<blocks>V<stride>', at its end"),
        (lambda: Pattern.parse("W2|0*dense"), "must be at least 1, and at most 65536, at character 4 ('0*dense')"),
        (lambda: Pattern.parse("mask"), "masks have no spelling"),
        (lambda: Pattern.parse(""), "''"),
        (lambda: Pattern.parse(8), "must be a string such as 'L8V16', got 8"),
        (lambda: Pattern.parse("L4V8", block_size=48), "block_size=48"),
        (lambda: Pattern.parse("L4V8").block_mask(4, 0), "num_kv_heads=0"),
        (lambda: Pattern.parse("L4V8").block_mask(-1, 1), "num_blocks=-1"),
        (lambda: Pattern.parse("L4V8").density(0), "seq_len=0"),
        (lambda: Pattern.from_ranges(4, [(2, 3)]), "distance 3"),
        (lambda: Pattern.from_ranges(4, [(2, 8)], sinks=-1), "sinks=-1"),
        (lambda: Pattern.from_mask(torch.ones(2, 3, 4, dtype=torch.bool)), "[2, 3, 4]"),
        (lambda: Pattern.from_mask(torch.ones(2, 3, 3)), "float32"),
        (lambda: Pattern.from_mask(torch.ones(2, 3, 3, dtype=torch.bool)).block_mask(4, 2), "3 blocks"),
        (lambda: Pattern.from_mask(torch.ones(2, 3, 3, dtype=torch.bool)).block_mask(3, 4), "2 heads"),
        (lambda: Pattern.per_head([Pattern.parse("W2")] * 2).block_mask(3, 3), "2 per-head"),
        (lambda: Pattern.per_head([Pattern.parse("W2"), Pattern.parse("W2", 32)]), "[32, 64]"),
    ],
)
def test_errors_name_what_is_wrong(make, names):
    with pytest.raises(ValueError) as error:
        make()
    assert names in str(error.value)


def test_rule_schedules_stay_small_at_any_length():
    table = rule_schedule(call_with(Pattern.parse("L8V16"), 32), 32, torch.device("cpu")).table
    assert table.numel() * table.element_size() <= 32 * 64


def test_strides_that_do_not_nest_go_through_lists():
    assert has_closed_form(Pattern.from_ranges(1, [(2, 8), (4, None)]))
    assert not has_closed_form(Pattern.from_ranges(1, [(2, 8), (3, None)]))


LISTED = ["L2V3", "W3+sink2", "L2V3<7V9", "L2V2<5V3<9+sink1", "L1V4<5V6+sink7", "L3V4<12V6<20+sink3", "L1V2<6V3+sink4",
          "dense|W2", "L2V3|L2V3+sink2|W4|L1V4<6V6"]  # fmt: skip


@pytest.mark.parametrize("spec", [*LISTED, "mask"])
def test_block_lists_name_exactly_the_kept_blocks(spec, seed):
    rng = random.Random(f"{seed} {spec}")
    for _ in range(10):
        n = rng.randint(1, 30)
        own = Pattern.from_mask(torch.rand(3, n, n) < 0.4) if spec == "mask" else Pattern.parse(spec)
        total, first = 3 if spec == "mask" else len(own.heads) or rng.randint(1, 6), rng.randint(0, n)
        offset = rng.randint(0, total - 1)
        heads = rng.randint(1, total - offset)
        call = call_with(own, heads, head_offset=offset, total=total)
        mask = own.block_mask(n, total)[offset : offset + heads]
        mask[:, :first] = False
        for lists_of, rows in ((key_lists, mask), (query_lists, mask.transpose(1, 2))):
            lists = lists_of(call, n, heads, torch.device("cpu"), first)
            assert torch.equal(lists.blocks, rows.nonzero()[:, 2].int())
            ends = rows.sum(2).flatten().cumsum(0).view(heads, n).int()
            begins = torch.cat([torch.zeros(1), ends.flatten()[:-1]]).view(heads, n).int()
            assert torch.equal(lists.offsets[:, :-1], begins) and torch.equal(lists.offsets[:, 1:], ends)


def test_lists_of_rules_make_no_mask(monkeypatch):
    """What is made grows with what is seen: here of a million tokens."""
    monkeypatch.setattr(Call, "block_mask", None)
    lists = key_lists(call_with(Pattern.parse("L4V4<64V6"), 2), 16384, 2, torch.device("cpu"), 16384 - 128)
    assert 2 * 128 * 16000 // 6 < len(lists.blocks) < 2 * 128 * 16384 // 5


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=8),
    tile=st.sampled_from([16, 32, 64]),
    block=st.sampled_from([1, 16, 64]),
    extra=st.integers(0, 2),
)
def test_document_tiles_cover_every_document_once(lengths, tile, block, extra):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    table, num_tiles = document_tiles(borders, sum(lengths), tile, block=block, extra=extra)
    entries = [tuple(entry) for entry in table.tolist()]
    assert len(entries) == num_tiles
    wanted = [
        (begin, length, i)
        for begin, length in zip(borders.tolist(), lengths, strict=False)
        for i in range(-(-(-(-length // block) * block) // tile) + extra if length else 0)
    ]
    assert entries[: len(wanted)] == wanted
    assert all(length == 0 for _, length, _ in entries[len(wanted) :])


@pytest.mark.parametrize("spec", (*SPECS, "L2V2<5V4+sink1", "L1V2<4V3", "W2+sink9"))
def test_how_many_key_blocks_a_query_sees(spec):
    for rule in Pattern.parse(spec).rules(3, layer=1):
        mask = rule.mask(60)
        for num_blocks in (1, 2, 5, 33, 60):
            seen = int(mask[:num_blocks].sum(dim=1).max())
            assert seen <= rule.most_visible(num_blocks) <= min(num_blocks, seen + rule.sinks + len(rule.levels))
