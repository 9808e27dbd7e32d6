"""Choosing the layers that stay dense: the one that matters, measured as the layout itself would be."""

import json

import pytest
import torch

from eval.checkpoint import Checkpoint
from eval.heldout import read_texts
from eval.layers import Texts, check_layout, choose, main
from s2.inference.folder import load_tokenizer
from s2.model.hf import load_pretrained, save_pretrained
from s2.model.layouts import ranges
from tests.eval.small_checkpoint import make_checkpoint, prose


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "prose.jsonl"
    file.write_text("".join(f"{json.dumps({'text': prose(60, seed)})}\n" for seed in range(4)))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text):
    """Dense, four layers, of which the third alone attends, and has learnt to by a text's every token."""
    folder = make_checkpoint(tmp_path_factory.mktemp("layers") / "hf", layout="dense", layers=4)
    model = load_pretrained(folder)
    attention = [block.self_attn for block in model.model.blocks]
    with torch.no_grad():
        for layer in (0, 1, 3):
            attention[layer].o_proj.weight.zero_()
    read = next(read_texts(text))
    ids = torch.tensor([load_tokenizer(folder).encode(read, add_special_tokens=False).ids[:256]])
    optimizer = torch.optim.Adam(attention[2].parameters(), lr=1e-2)
    for _ in range(30):
        loss, count = model(ids[:, :-1], labels=ids[:, 1:])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    made = folder.parent / "third"
    save_pretrained(model.state_dict(), model.config, made, folder / "tokenizer.json", dtype=torch.float32)
    return made


def run(folder, text, output, *arguments):
    main(["--ckpt", str(folder), "--haystack", str(text), "--output", str(output), "--device", "cpu", *arguments])
    return json.loads((output / "layers.json").read_text())


def test_the_layer_that_attends_stays_dense_and_restores_the_checkpoint(folder, text, tmp_path, capsys):
    found = run(folder, text, tmp_path, "--layout", "W1+sink1", "--dense", "2", "--length", "256", "--n", "4")
    first, second = found["steps"]
    assert first["layer"] == 2 and first["layout"] == "W1+sink1+dense2"
    assert first["losses"] == pytest.approx(found["as_it_is"], abs=1e-5) != pytest.approx(found["sparse"], abs=1e-3)
    assert first["tried"]["0"] == pytest.approx(found["sparse"], abs=1e-5)
    assert set(second["tried"]) == {"0", "1", "3"}
    assert second["layout"] == f"W1+sink1+dense{ranges(sorted((2, second['layer'])))}"
    said = capsys.readouterr().out
    assert f"attention_layout: {second['layout']}" in said and (tmp_path / "layers.md").read_text() in said


def test_each_layout_is_measured_as_a_checkpoint_that_has_it(folder):
    """Documents in every predicted token, prompts in the answer alone, whatever the batch."""
    checkpoint = Checkpoint.load(folder, "cpu")
    rows = [torch.randint(2, 512, (97,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
    texts = Texts(rows[:2], [(rows[2], 5), (rows[0], 7)], rows=2)
    [step] = choose(checkpoint, texts, "L1V4", 1)
    one_by_one = Texts(texts.documents, texts.prompts, rows=1)
    chosen = one_by_one.losses(checkpoint, checkpoint.config.replace(attention_layout=step["layout"])).to_dict()
    assert chosen == pytest.approx(step["losses"], abs=1e-5)
    assert step["losses"] == step["tried"][str(step["layer"])]
    for layer, tried in step["tried"].items():
        model = load_pretrained(folder, overrides={"attention_layout": f"L1V4+dense{layer}"})

        def mean(row, count, model=model):
            scores = model(torch.tensor([row[:-1]])).log_softmax(-1)[0, -count:]
            return -scores[torch.arange(count), torch.tensor(row[-count:])].mean().item()

        assert tried["text"] == pytest.approx((mean(rows[0], 96) + mean(rows[1], 96)) / 2, abs=1e-4)
        assert tried["answers"] == pytest.approx((mean(rows[2], 5) + mean(rows[0], 7)) / 2, abs=1e-4)
        assert tried["text"] + tried["answers"] >= step["losses"]["text"] + step["losses"]["answers"] - 1e-5


@pytest.mark.parametrize(
    ("layout", "count", "said"),
    [
        ("L1V8+dense1", 1, "--layout L1V8\\+dense1: name the sparse pattern alone"),
        ("L1V8-inter", 1, "name the sparse pattern alone"),
        ("dense", 1, "name the sparse pattern alone"),
        ("L1V8", 0, "--dense 0: expected 1 to 3 layers"),
        ("L1V8", 4, "--dense 4: expected 1 to 3 layers"),
        ("L1V", 1, "attention_layout"),
    ],
)
def test_what_cannot_be_chosen_is_refused(folder, layout, count, said):
    with pytest.raises(ValueError, match=said):
        check_layout(layout, Checkpoint.open(folder, "cpu").config, count)


def test_a_length_beyond_the_texts_or_the_model_is_refused_before_anything_is_read(folder, text, tmp_path):
    with pytest.raises(ValueError, match="--lengths 512: the checkpoint reads at most 256"):
        run(folder, text, tmp_path, "--layout", "L1V8", "--dense", "1", "--length", "512")
    with pytest.raises(ValueError, match="--n 1: expected at least 2"):
        run(folder, text, tmp_path, "--layout", "L1V8", "--dense", "1", "--n", "1")
