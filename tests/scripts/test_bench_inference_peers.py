"""The inference benchmark beside peers without a GPU and without peers: what they are given, by stand-ins written from
their documentation, what rows and tables say, and that what is missing is a row."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as `python scripts/bench_inference_peers.py` has it

import bench_inference_peers
import decode_calls
import peer_calls
import peer_decode
import peer_inputs
import peer_report
import peer_selection
from bench_kernels import Skipped
from peer_report import Shape

from s2.attention import Pattern, s2_attention
from s2.attention.decode import visible_slots

SPECS = ("L2V3+sink1", "L1V4", "dense", "W3", "L1V2<5V4+sink2", "1*dense|1*L2V3|2*W2")
TIMING = bench_inference_peers.Timing(1, 1)


def attend(q, k, v, seen):
    """q [n, Hq, D], k and v [S, H, D], seen bool [n, S]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,shd->hns", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hns,shd->nhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def gather(pages, lists, row, layout):
    """Keys of a row of a page table."""
    found = pages[lists.indices[lists.indptr[row] : lists.indptr[row + 1]].long()]
    return (found if layout == "NHD" else found.transpose(1, 2)).flatten(0, 1)


class Wrapper:
    def __init__(self, workspace, way="auto", **options):
        self.way, self.options = way, options

    def reset_workspace_buffer(self, *_):
        pass


class Ragged(Wrapper):
    def plan(self, qo, kv, heads, kv_heads, head_dim, *, causal, q_data_type, kv_data_type):
        assert causal and qo.tolist() == kv.tolist()

    def run(self, q, k, v):
        return attend(q, k, v, torch.ones(len(q), len(k), dtype=torch.bool).tril())


class BlockSparse(Wrapper):
    def plan(self, indptr, indices, rows, columns, r, c, heads, kv_heads, head_dim, *, causal, **dtypes):
        assert causal and (self.way in ("fa2", "fa3")) and kv_heads == 1
        self.lists, self.block = peer_selection.Lists(indptr, indices), r

    def run(self, q, k, v):
        out = torch.empty_like(q)
        for row, queries in enumerate(q.split(self.block)):
            keys, values = (gather(x.unflatten(0, (-1, self.block)), self.lists, row, "NHD") for x in (k, v))
            ends = torch.arange(len(keys)) <= torch.arange(len(keys) - len(queries), len(keys))[:, None]
            out[row * self.block : (row + 1) * self.block] = attend(queries, keys, values, ends)
        return out


class Decode(Wrapper):
    def plan(self, indptr, indices, last, heads, kv_heads, head_dim, page, *, q_data_type, kv_data_type):
        if "paged_kv_indices_buffer" in self.options:
            self.options["paged_kv_indices_buffer"].copy_(indices)
            indices = self.options["paged_kv_indices_buffer"]
        self.lists, self.last, self.page = peer_selection.Lists(indptr, indices), last, page

    def run(self, q, kept):
        if self.options["use_tensor_cores"] and q.shape[1] == 1:
            raise RuntimeError("one head")
        found = []
        for row in range(len(q)):
            keys, values = (gather(x, self.lists, row, self.way) for x in kept)
            size = len(keys) - self.page + int(self.last[row])
            found.append(attend(q[row : row + 1], keys[:size], values[:size], torch.ones(1, size, dtype=torch.bool)))
        return torch.cat(found)


def convert(lengths, columns, diagonals, tokens, *_):
    """Tiles and columns of each row of tiles, as MInference's converter counts them: the tiles that a diagonal begins
    in, moved to the row's end."""
    tiles, single = [], []
    for mine, lines in zip(columns[0].tolist(), diagonals[0].tolist(), strict=True):
        for end in range(64, tokens + 64, 64):
            starts = sorted({max(end - d, 64) - 64 for d in lines if d < end})
            covered = {t for start in starts for t in range(start, start + 64)}
            tiles.append(-(-len(covered) // 64))
            single.append(sum(c < end - 64 and c not in covered for c in mine))
    shape = (1, len(columns[0]), -1)
    return torch.tensor(tiles).view(shape), None, torch.tensor(single).view(shape), None


def vertical_slash(q, k, v, columns, diagonals):
    tokens, seen = q.shape[2], []
    at = torch.arange(tokens)
    for mine, lines in zip(columns[0], diagonals[0], strict=True):
        seen.append(torch.isin(at, mine) | torch.isin(at[:, None] - at, lines))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(torch.stack(seen) & (at <= at[:, None]))[None])


STAND_INS = {
    "flashinfer": SimpleNamespace(
        BatchPrefillWithRaggedKVCacheWrapper=Ragged, BlockSparseAttentionWrapper=BlockSparse,
        BatchDecodeWithPagedKVCacheWrapper=Decode,
    ),
    peer_calls.MINFERENCE: SimpleNamespace(
        convert_vertical_slash_indexes=convert, vertical_slash_sparse_attention=vertical_slash, sparse_attn_func=None
    ),
}  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch):
    """Peers on the CPU in float32; calls take two milliseconds."""

    def library(name):
        if name not in STAND_INS:
            raise Skipped(f"{name} does not import")
        return STAND_INS[name]

    monkeypatch.setattr(peer_calls, "library", library)
    monkeypatch.setattr(peer_calls, "_workspace", lambda _: torch.empty(0))
    for module in (bench_inference_peers, peer_decode):
        monkeypatch.setattr(module, "DTYPE", torch.float32)
        monkeypatch.setattr(module, "median_ms", lambda call, _: (call(), 2.0)[1])
        monkeypatch.setattr(module, "free_memory", lambda: None)
    monkeypatch.setattr(bench_inference_peers, "graph_ms", lambda call, _: (call(), 0.002)[1])


# ---------------------------------------------------------------- what is attended to


@pytest.mark.parametrize("spec", SPECS)
def test_block_lists_are_the_pattern(spec):
    pattern, blocks = Pattern.parse(spec), 19
    lists = peer_selection.block_lists(pattern, 4, blocks)
    mask = torch.zeros(4 * blocks, 4 * blocks, dtype=torch.bool)
    for row in range(4 * blocks):
        listed = lists.indices[lists.indptr[row] : lists.indptr[row + 1]].long()
        assert listed[-1] == row and bool((listed.diff() > 0).all()), "the diagonal block last"
        mask[row, listed] = True
    assert torch.equal(mask, torch.block_diag(*pattern.block_mask(blocks, 4)).bool())
    assert lists.indptr.dtype == lists.indices.dtype == torch.int32


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [16, 16 * 19, 16 * 18 + 5])
def test_kept_pages_are_the_slots_that_the_newest_token_sees(spec, length):
    for group in [decode_calls.kept(spec, 4, length, 16)] if "|" not in spec else []:
        pages = peer_selection.kept_pages(group, 2, length, 16)
        seen = visible_slots(group.table, torch.tensor([length], dtype=torch.int32), group.num_blocks * 16, 16, 1)[
            0, :, 0
        ]
        for row in range(8):
            listed = pages.indices[pages.indptr[row] : pages.indptr[row + 1]] - row * group.num_blocks
            slots = torch.zeros(group.num_blocks, 16, dtype=torch.bool)
            slots[listed.long()] = True
            slots[listed[-1], int(pages.last_length[row]) :] = False
            assert torch.equal(slots.flatten(), seen[row % 4])


def test_quest_takes_the_pages_with_the_highest_bounds():
    batch, pages, heads, group, dim = 2, 12, 3, 2, 8
    keys = torch.randn(batch, pages, heads, 16, dim)
    q = torch.randn(batch, heads * group, dim)
    rows = q.unflatten(1, (heads, group)).flatten(0, 1)
    chosen = peer_selection.quest_pages(rows, peer_selection.page_bounds(keys), 4)
    places = peer_selection.first_places(batch, heads, pages, q.device) + heads * chosen
    flat = keys.flatten(0, 2)
    for row in range(batch * heads):
        b, h = divmod(row, heads)
        high, low = keys[b, :, h].amax(1), keys[b, :, h].amin(1)
        bounds = torch.stack([torch.maximum(x * high, x * low).sum(-1) for x in rows[row]]).amax(0)
        wanted = {pages - 1, *bounds[:-1].topk(3).indices.tolist()}
        assert set(chosen[row].tolist()) == wanted
        for page, place in zip(chosen[row], places[row], strict=True):
            assert torch.equal(flat[place], keys[b, page, h])


def test_lines_are_those_with_most_of_the_last_queries():
    q, k = torch.randn(200, 4, 16), torch.randn(200, 2, 16)
    columns, diagonals = peer_selection.line_scores(q, k)
    keys = k.repeat_interleave(2, dim=1)
    scores = torch.einsum("nhd,shd->hns", q[-64:], keys) / 4
    query, key = torch.arange(136, 200)[:, None], torch.arange(200)
    probs = scores.masked_fill(key > query, float("-inf")).softmax(-1)
    torch.testing.assert_close(columns, probs.sum(1))
    for distance in (0, 1, 63, 64, 150, 199):
        torch.testing.assert_close(diagonals[:, distance], (probs * (query - key == distance)).sum((1, 2)))
    vertical, slash = peer_selection.lines((columns, diagonals), 40, 50)
    assert vertical.shape == (4, 40) and slash.shape == (4, 50)
    for found in (vertical, slash):
        assert all(set(range(30)) <= set(row) for row in found.tolist())
    rest = set(columns[0, 30:].topk(10).indices.add(30).tolist())
    assert set(vertical[0].tolist()) == {*range(30), *rest}


def test_pairs_of_lines_are_those_that_are_computed():
    """Near diagonals alone fill a band of tiles: each row of tiles has its own and the one before."""
    lines = torch.zeros(1, 1, 1, dtype=torch.int32), torch.tensor([[[100, 64, 0]]], dtype=torch.int32)
    tiles, _, single, _ = convert(None, *lines, 256)
    assert tiles.tolist() == [[[1, 2, 3, 3]]] and single.tolist() == [[[0, 0, 1, 1]]]
    assert peer_selection.line_pairs(tiles, single) == 9 * 4096 - 4 * 64 * 63 / 2 + 2 * 64


def test_as_many_lines_as_do_not_exceed_the_pairs():
    asked = []

    def count(vertical, slash):
        asked.append((vertical, slash))
        return 10.0 * slash + vertical

    vertical, slash = peer_selection.lines_for(5000.0, count, 4096)
    assert count(vertical, slash) <= 5000 < count(vertical, slash + 1) and vertical == round(slash * 1000 / 6096)
    assert peer_selection.lines_for(1.0, count, 4096) == (30, 30)
    for pairs in (400.0, 5000.0, 20_000.0, 1e9):
        asked.clear()
        _, slash = peer_selection.lines_for(pairs, count, 131_072)
        assert max(number for _, number in asked) <= 2 * slash, "the buffer grows with what is asked for"


# ---------------------------------------------------------------- rows


def drawn(shape, head_dim=128):
    return peer_inputs.draw(shape.length, shape.heads, shape.kv_heads, 0, "cpu", torch.float32, head_dim)


def test_prefill_peers_compute_our_function_under_our_pattern(stand_ins):
    shape = Shape(4, 2, 512)
    inputs = drawn(shape)
    rows = {r["name"]: r for r in bench_inference_peers.prefill_rows(shape, inputs, ["L2V3+sink1"], TIMING)}
    ours, fa2, fa3, lines = (
        rows[name] for name in ("ours, L2V3+sink1", "FlashInfer, L2V3+sink1, fa2", "FlashInfer, L2V3+sink1, fa3",
                                "MInference, pairs of L2V3+sink1")
    )  # fmt: skip
    assert rows["dense, cuDNN"]["status"] == "failed"
    assert rows["FlashInfer, dense"]["error"] < 1e-5 and rows["FlashInfer, dense"]["difference"] is None
    assert 0.01 < ours["error"] < 1.5 and ours["time"] == 2.0
    for row in (fa2, fa3):
        assert row["difference"] < 1e-5 and row["error"] == pytest.approx(ours["error"], rel=1e-3)
        assert row["share"] == ours["share"]
    assert 0.5 * ours["share"] < lines["share"] <= ours["share"] and lines["alone"] == 2.0
    assert "its Triton kernel, keys repeated 2 times before" in lines["note"] and "diagonals" in lines["note"]
    assert 0 < lines["error"] < 1.5


def test_minference_gives_the_lines_that_are_chosen(stand_ins):
    inputs = drawn(Shape(4, 2, 256))
    attend_to, _ = peer_calls.minference(inputs.q, inputs.k, inputs.v)
    every = torch.arange(256).expand(4, 256)
    out = attend_to(every, every)
    at = torch.arange(256)
    torch.testing.assert_close(out, peer_inputs.full_attention(inputs.q, inputs.k, inputs.v, at), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
def test_decode_peers_read_the_keys_that_we_keep(stand_ins, heads, kv_heads, monkeypatch):
    monkeypatch.setattr(decode_calls, "DTYPE", torch.float32)
    shape, layouts = Shape(heads, kv_heads, 64 * 11, 3), ["L2V3+sink1", "L1V4"]
    keys = peer_decode.Keys.make(shape, None, layouts, "cpu")
    found = peer_decode.decode_rows(shape, keys, layouts, lambda calls: (calls[0](), 5.0)[1], TIMING)
    rows = {row["name"]: row for row in found}
    assert len(rows) == 9 and rows["FlashInfer, all keys"]["error"] < 1e-5
    kernel = "tensor cores" if heads > kv_heads else "tensor cores: RuntimeError: one head; CUDA cores"
    for layout in layouts:
        ours, theirs, quest = (
            rows[f"{name} {layout}"] for name in ("ours,", "FlashInfer, keys of", "Quest by FlashInfer, keys as")
        )
        assert theirs["difference"] < 1e-5 and theirs["error"] == pytest.approx(ours["error"], rel=1e-3)
        assert ours["error"] > 1e-3 and theirs["note"] == kernel
        assert 0 < quest["error"] < 1.2 and quest["alone"] == quest["time"] == 5.0
        assert abs(quest["share"] - ours["share"]) < 16 / shape.length
        itself = rows[f"Quest, keys as {layout}"]
        assert itself["status"] == "skipped" and "one sequence" in itself["note"]
    for layout in layouts:  # the same error as the training kernel's last row
        last = []
        for n in range(shape.batch):
            inputs = peer_inputs.draw(shape.length, heads, kv_heads, n, "cpu", torch.float32, queries=1)
            q = torch.zeros(1, shape.length, heads, 128)
            q[0, -1] = inputs.q[-1]
            last.append(s2_attention(q, inputs.k[None], inputs.v[None], Pattern.parse(layout))[0, -1])
        assert keys.error(torch.stack(last)) == pytest.approx(rows[f"ours, {layout}"]["error"], rel=1e-3)


def test_quest_with_every_page_is_full_attention(stand_ins):
    shape = Shape(4, 2, 256, 2)
    keys = peer_decode.Keys.make(shape, None, ["L1V4"], "cpu")
    made = shape.row("x")
    out = peer_decode._quest(made, shape, keys, 16, lambda calls: (calls[-1](), 1.0)[1])
    assert keys.error(out) < 1e-5


def test_peers_that_are_missing_are_rows_with_the_reason(monkeypatch):
    for module in (bench_inference_peers, peer_decode):
        monkeypatch.setattr(module, "DTYPE", torch.float32)
    monkeypatch.setattr(bench_inference_peers, "median_ms", lambda *_: 1.0)
    shape = Shape(4, 2, 256)
    rows = list(bench_inference_peers.prefill_rows(shape, drawn(shape), ["L1V4"], TIMING))
    missing = [row for row in rows if "FlashInfer" in row["name"] or "MInference" in row["name"]]
    assert len(missing) == 4 and {row["status"] for row in missing} == {"skipped"}
    assert all("does not import: ModuleNotFoundError" in row["note"] for row in missing)
    with pytest.raises(Skipped, match="quest does not import"):
        peer_calls.quest(torch.zeros(32, 128), torch.zeros(64, 32, 128), torch.zeros(64, 32, 128), 2)
    with pytest.raises(Skipped, match="not 32/8"):
        peer_calls.quest(torch.zeros(32, 128), torch.zeros(64, 8, 128), torch.zeros(64, 8, 128), 2)


# ---------------------------------------------------------------- the run


def test_tables_set_rows_beside_dense_ones():
    shape, decode = Shape(32, 8, 32768), Shape(32, 8, 32768, 16, "a layer")
    rows = [
        shape.row("dense, cuDNN") | {"time": 12.0, "share": 1.0, "error": 0.002},
        shape.row("ours, L1V15") | {"time": 1.5, "share": 0.07, "error": 0.31},
        shape.row("MInference, pairs of L1V15") | {"status": "skipped", "note": "not there"},
        decode.row("FlashInfer, all keys") | {"time": 480.0, "share": 1.0, "error": 0.001},
        decode.row("Quest") | {"time": 60.0, "alone": 45.25, "difference": 0.002},
    ]
    page = peer_report.parts({"rows": rows})
    assert page[0] == "## Prefill" and page[2] == "## Decode, a layer"
    assert page[1].splitlines()[2:] == [
        "| 32/8 | 32,768 | dense, cuDNN | 100.0 | 12.000 | - | 1.00 | 0.002 | - |  |",
        "| 32/8 | 32,768 | ours, L1V15 | 7.0 | 1.500 | - | 8.00 | 0.31 | - |  |",
        "| 32/8 | 32,768 | MInference, pairs of L1V15 | - | skipped | - | - | - | - | not there |",
    ]
    assert page[3].splitlines()[-1] == "| 32/8 | 16 | 32,768 | Quest | - | 60.0 | 45.2 | 8.00 | - | 0.002 |  |"


def test_shapes_begin_with_those_of_the_file():
    args = bench_inference_peers.parse_arguments(["--heads", "8/2", "--lengths", "128", "--batches", "1,4"])
    given = peer_inputs.Inputs(torch.zeros(1000, 6, 128), *torch.zeros(2, 1000, 3, 128))
    found = list(bench_inference_peers.shapes(args, given, "a"))
    assert found[:4] == [Shape(6, 3, 960, 0, "a"), *(Shape(6, 3, n, 1, "a") for n in (960, 704, 448))]
    assert found[4:] == [Shape(8, 2, 128, batch) for batch in (0, 1, 4)]
    assert len(list(bench_inference_peers.shapes(bench_inference_peers.parse_arguments([]), None, ""))) == 16


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--lengths", "100"], "100 is not a multiple of 64"),
        (["--parts", "train"], "there is no 'train'"),
        (["--layouts", "Q1"], "Q1"),
        (["--heads", "8"], "'8' is not"),
    ],
)
def test_bad_arguments_are_named(words, named, capsys):
    with pytest.raises(SystemExit):
        bench_inference_peers.parse_arguments(words)
    assert named in capsys.readouterr().err


def test_a_run_writes_its_rows_and_leaves_out_what_has_no_time(stand_ins, monkeypatch, tmp_path):
    file = tmp_path / "x.safetensors"
    shapes = {"q": (256, 4, 64), "k": (256, 2, 64), "v": (256, 2, 64)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, file, {"source": "a layer"})
    words = ["--heads", "2/1", "--batches", "2", "--lengths", "192", "--layouts", "L1V2", "--tensors", str(file)]
    words += ["--output", str(tmp_path)]
    args = bench_inference_peers.parse_arguments(words)
    args.device, args.seconds = "cpu", 3.5
    clock = iter([0.0, 1.0, 2.0, 3.0, 3.2, 3.4, 7.0, 8.0, 9.0])
    for module, name, stand_in in (
        (bench_inference_peers, "parse_arguments", lambda: args),
        (bench_inference_peers, "perf_counter", lambda: next(clock)),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_name", lambda: "GPU 9"),
        (torch.cuda, "empty_cache", lambda: None),
        (sys, "argv", ["bench_inference_peers.py", *words]),
    ):
        monkeypatch.setattr(module, name, stand_in)
    bench_inference_peers.main()
    (page,) = tmp_path.glob("*-gpu-9-inference-peers.md")
    record = json.loads(page.with_suffix(".json").read_text())
    rows = record["rows"]
    assert [(row["source"], row["batch"], row["seq_len"]) for row in rows if "FlashInfer, " in row["name"]][:1] == [
        ("a layer", 0, 256)
    ]
    assert rows[-1]["note"] == "no time left" and rows[-1]["batch"] == 2 and rows[-1]["seq_len"] == 192
    assert sum(row["name"] == "all" for row in rows) == 1
    text = page.read_text()
    assert "## Decode, a layer" in text and "## Prefill\n" in text and "drawn with a sink" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_inference_peers.py"])
    with pytest.raises(ValueError, match="needs a CUDA device"):  # the exit code of bad input, not of a crash
        bench_inference_peers.main()
