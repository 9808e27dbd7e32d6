"""Batches against brute force, and which rank gets which row."""

import itertools

import numpy as np
import pytest
import torch

from data.datamodule import PackedDataModule
from data.shards.loader import Collate, RankSampler
from tests.data.shard_factory import random_documents, write_shards

LENGTHS = [5, 300, 2, 2, 77, 1000, 13, 64, 1, 250, 3, 128]


def brute_force(samples, S, document_mask):
    """input_ids, labels [B, S] and the unpadded borders, token by token."""
    ids, labels, borders = [], [], [0]
    for windows in samples:
        for tokens, starts in windows:
            opens = set(starts.tolist())
            for t in range(S // len(windows)):
                known = t + 1 < len(tokens) and (t + 1) not in opens
                ids.append(int(tokens[t]) if t < len(tokens) else 0)
                labels.append(int(tokens[t + 1]) if known else -100)
                if document_mask and t in opens:
                    borders.append(len(ids) - 1)
            borders.append(len(ids))
    return torch.tensor(ids).view(-1, S), torch.tensor(labels).view(-1, S), borders


@pytest.fixture
def folders(tmp_path):
    write_shards(tmp_path / "train", random_documents(LENGTHS * 3, seed=1))
    write_shards(tmp_path / "heldout", random_documents(LENGTHS, seed=2))
    return tmp_path


def datamodule(folders, **overrides):
    settings = {
        "seq_len": 32,
        "micro_batch_size": 2,
        "mixture": [{"path": str(folders / "train")}],
        "validation": [{"name": "heldout", "path": str(folders / "heldout")}],
        "num_workers": 0,
    }
    return PackedDataModule(**settings | overrides)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("curriculum", [None, [{"seq_len": 8, "tokens": 1000}, {"seq_len": 16, "tokens": 1e3}]])
def test_batches_equal_brute_force(folders, document_mask, curriculum):
    dm = datamodule(folders, document_mask=document_mask, micro_batch_size=3, curriculum=curriculum)
    for step, batch in enumerate(itertools.islice(dm.train_dataloader(), 40)):
        ids, labels, borders = brute_force([dm.rows[i] for i in range(step * 3, step * 3 + 3)], 32, document_mask)
        assert torch.equal(batch["input_ids"], ids)
        assert torch.equal(batch["labels"], labels)
        assert batch["position"].shape == ()
        assert batch["position"] == step * 3
        if borders == [0, 32, 64, 96]:
            assert "cu_seqlens" not in batch
            continue
        cu_seqlens = batch["cu_seqlens"]
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens[: len(borders)].tolist() == borders
        assert (cu_seqlens[len(borders) :] == 96).all()
        assert len(cu_seqlens) % 64 == 1
        assert len(cu_seqlens) - len(borders) < 64
    if curriculum:
        assert [len(dm.rows[i]) for i in (0, 30, 31, 61, 62, 10**6)] == [4, 4, 2, 2, 1, 1]


def test_many_documents_still_fit_the_padded_borders():
    starts = np.arange(1, 129)
    batch = Collate(128, True)([(0, [(np.ones(129, dtype=np.int64), starts)])])
    assert batch["cu_seqlens"].tolist() == list(range(129))
    assert (batch["labels"] == -100).all()


def test_rows_of_one_document_each_need_no_borders():
    row = [(np.arange(17), np.zeros(0, dtype=np.int64))]
    assert "cu_seqlens" not in Collate(16, True)([(0, row), (1, row)])
    half = [(np.arange(9), np.zeros(0, dtype=np.int64))] * 2
    batch = Collate(16, False)([(0, row), (1, half)])
    assert batch["cu_seqlens"][:5].tolist() == [0, 16, 24, 32, 32]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seq_len", [None, 50])
def test_held_out_pass_has_every_target_once_on_any_number_of_ranks(folders, world_size, seq_len, monkeypatch):
    validation = [{"name": "h", "path": str(folders / "heldout"), "seq_len": seq_len, "min_tokens": 2}]
    dm = datamodule(folders, validation=validation)
    seen, batches = [], set()
    for rank in range(world_size):
        monkeypatch.setattr(dm, "_rank", lambda rank=rank: (rank, world_size))
        [loader] = dm.val_dataloader()
        batches.add(len(list(loader)))
        assert len(loader) in batches
        for batch in loader:
            assert batch["input_ids"].shape[1] == (seq_len or 32)
            seen += batch["labels"][batch["labels"] != -100].tolist()
    documents = [d for d in random_documents(LENGTHS, seed=2) if len(d) >= 2]
    assert sorted(seen) == sorted(int(t) for d in documents for t in d[1:])
    assert len(batches) == 1, "ranks must do the same number of batches"


def test_first_batches_of_a_held_out_pass_are_the_same_for_any_number_of_ranks():
    rows = {
        world_size: {
            index
            for rank in range(world_size)
            for index in list(RankSampler(rank, world_size, 12 // world_size, lambda: 0, 100))[: 2 * 12 // world_size]
        }
        for world_size in (1, 2, 4)
    }
    assert rows[1] == rows[2] == rows[4] == set(range(24))


@pytest.mark.parametrize("max_windows", [1, 7, 10_000])
def test_a_limited_held_out_set_is_the_same_windows_for_any_ranks_and_micro_batch(folders, monkeypatch, max_windows):
    def targets(world_size, rows):
        validation = [{"name": "h", "path": str(folders / "heldout"), "micro_batch_size": rows}]
        validation[0]["max_windows"] = max_windows
        dm, seen = datamodule(folders, validation=validation), []
        for rank in range(world_size):
            monkeypatch.setattr(dm, "_rank", lambda rank=rank: (rank, world_size))
            [loader] = dm.val_dataloader()
            seen += [row[row != -100].tolist() for batch in loader for row in batch["labels"]]
        return sorted(filter(None, seen))

    alone = targets(1, 1)
    assert len(alone) == max_windows or max_windows == 10_000
    for world_size, rows in [(1, 4), (2, 1), (3, 2), (8, 3)]:
        assert targets(world_size, rows) == alone


@pytest.mark.parametrize("start", [0, 17])
def test_training_rows_follow_the_global_order_on_any_number_of_ranks(start):
    for world_size, micro_batch_size in [(1, 4), (2, 2), (4, 1), (3, 5)]:
        ranks = [iter(RankSampler(r, world_size, micro_batch_size, lambda: start)) for r in range(world_size)]
        rows = [next(rank) for _ in range(60 // world_size) for rank in ranks for _ in range(micro_batch_size)]
        assert rows == list(range(start, start + len(rows)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_batches_are_the_same_for_1_2_and_8_ranks(folders, num_workers, monkeypatch):
    curriculum = [{"seq_len": 8, "tokens": 2000}]

    def global_batches(world_size):
        """The first ten batches of 8 rows, put together from what each rank reads."""
        parts = []
        for rank in range(world_size):
            dm = datamodule(folders, num_workers=num_workers, micro_batch_size=8 // world_size, curriculum=curriculum)
            monkeypatch.setattr(dm, "_rank", lambda rank=rank: (rank, world_size))
            parts.append([b["input_ids"] for b in itertools.islice(dm.train_dataloader(), 10)])
        return [torch.cat(ranks) for ranks in zip(*parts, strict=True)]

    alone = global_batches(1)
    for world_size in (2, 8):
        for one, many in zip(alone, global_batches(world_size), strict=True):
            assert torch.equal(one, many)


def test_fifty_random_resumptions_are_bit_identical(folders):
    curriculum = [{"seq_len": 8, "tokens": 3000}]
    whole = list(itertools.islice(datamodule(folders, curriculum=curriculum).train_dataloader(), 400))
    state = datamodule(folders, curriculum=curriculum).state_dict()
    for step in np.random.default_rng(0).choice(399, size=50, replace=False).tolist():
        resumed = datamodule(folders, curriculum=curriculum)
        resumed.load_state_dict(state | {"consumed_samples": 2 * step})
        for batch, expected in zip(resumed.train_dataloader(), whole[step : step + 2], strict=False):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_workers_do_not_change_the_order(folders):
    def first(num_workers):
        loader = datamodule(folders, num_workers=num_workers).train_dataloader()
        return [batch["input_ids"] for batch in itertools.islice(loader, 20)]

    for alone, together in zip(first(0), first(2), strict=True):
        assert torch.equal(alone, together)


def test_wrong_settings_name_their_key(folders, tmp_path):
    with pytest.raises(ValueError, match=r"data\.mixture\[0\]: unknown key 'wieght'; .* \(did you mean 'weight'\?\)"):
        datamodule(folders, mixture=[{"path": "x", "wieght": 1}])
    with pytest.raises(ValueError, match=r"data\.validation\[0\]: missing key 'name'"):
        datamodule(folders, validation=[{"path": "x"}])
    with pytest.raises(ValueError, match="the name 'a' occurs twice"):
        datamodule(folders, validation=[{"name": "a", "path": "x"}, {"name": "a", "path": "y"}])
    with pytest.raises(ValueError, match=r"data\.seq_len: expected a whole number >= 1, got 0"):
        datamodule(folders, seq_len=0)
    with pytest.raises(ValueError, match=r"data\.curriculum\[0\]\.seq_len: windows of 5 do not fill a row of 32"):
        datamodule(folders, curriculum=[{"seq_len": 5, "tokens": 100}])
    with pytest.raises(ValueError, match=r"data\.curriculum\[0\]\.tokens: 31 is less than a row of 32"):
        datamodule(folders, curriculum=[{"seq_len": 8, "tokens": 31}])
    with pytest.raises(ValueError, match=r"data\.mixture: empty"):
        datamodule(folders, mixture=None)
    with pytest.raises(ValueError, match=r"data\.mixture\[0\]\.path: .*nowhere does not exist"):
        datamodule(folders, mixture=[{"path": str(tmp_path / "nowhere")}]).setup()
    with pytest.raises(ValueError, match=r"data\.mixture\[0\]: none of the 36 documents"):
        datamodule(folders, mixture=[{"path": str(folders / "train"), "min_tokens": 5000}]).setup()
    write_shards(folders / "foreign", random_documents([100]), tokenizer="b")
    with pytest.raises(ValueError, match="tokenized by different tokenizers"):
        datamodule(folders, validation=[{"name": "v", "path": str(folders / "foreign")}]).setup()


def test_what_is_trained_on_is_not_held_out(folders):
    (folders / "link").symlink_to(folders / "train")
    for path in (folders / "train", f"{folders}/train/", folders / "link", folders / "heldout" / ".." / "train"):
        with pytest.raises(ValueError, match=r"data\.validation\[1\]\.path: .* is trained on too \(mixture\[0\]\)"):
            datamodule(folders, validation=[{"name": "a", "path": "x"}, {"name": "b", "path": str(path)}])
    train = {"path": str(folders / "train")}
    same = [{"source": "a"}, {"source": "a"}], [{}, {"source": "a"}], [{"max_tokens": 9}, {"min_tokens": 9}]
    apart = [{"source": "a"}, {"source": "b"}], [{"max_tokens": 8}, {"min_tokens": 9}]
    for mixture, heldout in same:
        with pytest.raises(ValueError, match="is trained on too"):
            datamodule(folders, mixture=[train | mixture], validation=[{"name": "v"} | train | heldout])
    for mixture, heldout in apart:
        datamodule(folders, mixture=[train | mixture], validation=[{"name": "v"} | train | heldout])


def test_what_fills_retrieval_documents_that_are_trained_on_is_not_held_out(folders):
    (folders / "link").symlink_to(folders / "heldout")

    def section(filler, trained):
        retrieval = {"documents": 5, "facts": [1, 2], "chars": [100, 200], "filler": str(folders / filler)}
        return {
            "prepare": {
                "output": str(folders / "made"),
                "sources": [{"path": "retrieval", "retrieval": retrieval}],
                "tokenizer": {"path": str(folders / "tokenizer.json")},
            },
            "mixture": [{"path": str(folders / path)} for path in ("train", *trained)],
            "validation": [{"name": "v", "path": str(folders / "heldout")}],
        }

    for filler in ("heldout", "link"):
        with pytest.raises(ValueError, match=r"data\.validation: .*heldout is trained on too \(the filler of the retr"):
            datamodule(folders, **section(filler, ["made/train"]))
    datamodule(folders, **section("train", ["made/train"]))
    scored = section("heldout", [])  # retrieval documents that are scored alone
    scored["validation"].append({"name": "made", "path": str(folders / "made" / "heldout")})
    datamodule(folders, **scored)


def test_vocabulary_and_tokenizer_are_checked(folders):
    dm = datamodule(folders)
    assert dm.vocab_size == 500
    dm.check_vocab_size(512)
    with pytest.raises(ValueError, match=r"model\.config\.vocab_size: 499 is smaller than the tokenizer's 500"):
        dm.check_vocab_size(499)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: the tokenizer of .*train is missing"):
        _ = dm.tokenizer_file
    assert (dm.bos_token_id, dm.eos_token_id) == (0, 1)


def test_bits_per_byte_counts_every_target_over_the_bytes(folders):
    documents = random_documents(LENGTHS, seed=2)
    ratio = sum(len(d) - 1 for d in documents) / sum(2 * len(d) for d in documents)
    assert datamodule(folders).bits_per_byte("heldout", float(np.log(2))) == pytest.approx(ratio)
    with pytest.raises(ValueError, match="no validation set 'other'; there are: heldout"):
        datamodule(folders).unigram_loss("other")
