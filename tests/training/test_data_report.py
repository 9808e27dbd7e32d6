"""What a run says of its data before the first step: passes over each component, and text that tokens lack."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers

from data.corpus.sources import LOST
from data.corpus.tokenizer import DROPPED, UNKNOWN
from data.datamodule import PackedDataModule
from data.prepare import prepare
from s2.training.summary import data_report
from tests.data.preparing import spec
from tests.data.shard_factory import random_documents, write_shards


def test_passes_are_said_and_repetition_is_warned_of(tmp_path):
    large = write_shards(tmp_path / "large", random_documents([100] * 100, seed=1))
    small = write_shards(tmp_path / "small", random_documents([100] * 4, seed=2))
    mixture = [{"path": str(large), "weight": 3}, {"path": str(small), "weight": 1, "min_tokens": 50}]
    data = PackedDataModule(32, 2, mixture=mixture, validation=[])
    rare, repeated, warning = data_report(data, 32 * 400).split("\n")
    assert rare.startswith(f"data: {large}: ") and " tokens of 10,000, " in rare
    assert repeated.startswith(f"data: {small}, documents of 50 or more tokens: ") and " tokens of 400, " in repeated
    asked = [int(line.split(": ")[2].split(" ")[0].replace(",", "")) for line in (rare, repeated)]
    assert sum(asked) == 32 * 400
    passes = {each.component: each.passes for each in data.passes(32 * 400)}
    assert passes[f"{small}, documents of 50 or more tokens"] > 5
    assert "documents of 50 or more tokens" in warning and warning.startswith("warning: data is repeated")
    assert "warning" not in data_report(data, 32)


def test_text_that_the_tokenizer_cannot_express_is_counted_and_said(tmp_path):
    corpus = tmp_path / "c.jsonl"
    rows = [{"text": f"abc é abc {i % 2}"} for i in range(60)] + [{"text": "abc \ud800 b"}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alphabet = {token: i for i, token in enumerate(["<|eos|>", "<unk>", *"abc01? "])}
    for name, settings, kind in (("unk", {"unk_token": "<unk>"}, UNKNOWN), ("drop", {}, DROPPED)):
        tokenizer = Tokenizer(models.BPE(alphabet, [], **settings))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<|eos|>"])
        tokenizer.save(str(tmp_path / f"{name}.json"))
        output = tmp_path / name
        prepare(spec(corpus, output, tokenizer={"path": str(tmp_path / f"{name}.json")}))
        manifest = json.loads((output / "train" / "manifest.json").read_text())
        assert manifest["sources"][0]["skipped"] == {kind: 60, LOST: 1}
        assert manifest["tokenizer"]["unk_id"] == (1 if name == "unk" else None)
        data = PackedDataModule(8, 1, mixture=[{"path": str(output / "train")}], validation=[])
        never, said = data_report(data, 8).split("\n")[-2:]
        assert said == f"warning: not in the tokens: {output / 'train'}, source c: 1 {LOST}, 60 {kind}"
        assert never.startswith("warning: not in the tokens: ") and "line ends, tabs, runs of spaces, spaces (" in never
