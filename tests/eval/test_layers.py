"""Choosing the layers that stay dense: the one that matters, measured as the layout itself would be."""

import json

import pytest
import torch

from eval.checkpoint import Checkpoint
from eval.heldout import read_texts
from eval.layers import check_layout, choose, figure_of, main
from eval.needle_prompts import Needle, Prompt
from eval.untrained import Texts
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


def asking(tokens, count):
    """A prompt of tokens whose last `count` are the answer."""
    return Prompt(tokens, (Needle("key", "1", 0.0, 0, slice(len(tokens) - count, len(tokens))),), True, 0)


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
    texts = Texts(rows[:2], [asking(rows[2], 5), asking(rows[0], 7)], rows=2)
    [step] = choose(checkpoint, texts, checkpoint.config.replace(attention_layout="L1V4"), 1)
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


@pytest.mark.parametrize("layout", ["L1V4+sink1", "dense|L1V3"])
def test_layers_below_are_computed_once_and_give_the_losses_of_whole_passes(folder, layout, monkeypatch):
    """Residues rotate anew from the changed layer on."""
    checkpoint = Checkpoint.load(folder, "cpu")
    rows = [torch.randint(2, 512, (150,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(2)]
    texts = Texts(rows, [asking(rows[1], 9)], rows=2)
    sparse = checkpoint.config.replace(attention_layout=layout)
    layers, computed = checkpoint.model.model.blocks, []
    for layer in layers:
        monkeypatch.setattr(layer, "forward", lambda *args, f=layer.forward: computed.append(f) or f(*args))
    first, second = choose(checkpoint, texts, sparse, 2)
    tried = [range(4), [layer for layer in range(4) if layer != first["layer"]]]
    passes = [max(layers) + sum(4 - layer for layer in layers) for layers in tried]  # up to the last, and on from each
    assert len(computed) == 2 * sum(passes), "documents and prompts are a batch each"
    for step, before in ((first, []), (second, [first["layer"]])):
        for layer, tried in step["tried"].items():
            config = sparse.replace(attention_layout=f"{layout}+dense{ranges(sorted([*before, int(layer)]))}")
            assert texts.losses(checkpoint, config).to_dict() == pytest.approx(tried, abs=1e-5)


def test_a_run_that_is_interrupted_goes_on_with_the_layers_that_it_has(folder, text, tmp_path, monkeypatch, capsys):
    command = folder, text, tmp_path, "--layout", "L1V8+sink1", "--length", "256", "--n", "4", "--dense"
    whole = run(folder, text, tmp_path / "whole", *command[3:], "2")
    measure, calls = Texts.losses_from, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # as it is, sparse, the first layer
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Texts, "losses_from", interrupted)
        run(*command, "2")
    assert json.loads((tmp_path / "layers.json").read_text())["steps"] == whole["steps"][:1]
    assert f"| {whole['steps'][0]['layout']} |" in (tmp_path / "layers.md").read_text()
    calls.clear()
    monkeypatch.setattr(Texts, "losses_from", interrupted)
    assert run(*command, "2") == whole and len(calls) == 1
    assert run(*command, "1") == whole and len(calls) == 1
    assert f"attention_layout: {whole['steps'][0]['layout']}\n" in capsys.readouterr().out


def test_the_picture_has_the_losses_of_every_layer_that_was_tried(folder, text, tmp_path):
    found = run(folder, text, tmp_path, "--layout", "W1+sink1", "--dense", "2", "--length", "256", "--n", "4")
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
    [axes] = figure_of(found).axes
    tried, chosen = axes.lines[2], axes.lines[3]
    second = found["steps"][1]
    losses = {int(layer): losses["text"] + losses["answers"] for layer, losses in second["tried"].items()}
    assert dict(zip(*tried.get_data(), strict=True)) == losses
    assert chosen.get_xydata().tolist() == [[second["layer"], min(losses.values())]]
    assert axes.lines[5].get_ydata()[0] == found["as_it_is"]["text"] + found["as_it_is"]["answers"]


def test_what_another_layout_has_given_is_kept_aside(folder, text, tmp_path, capsys):
    command = "--dense", "1", "--length", "256", "--n", "4", "--layout"
    first = run(folder, text, tmp_path, *command, "W1+sink1")
    table = (tmp_path / "layers.md").read_text()
    second = run(folder, text, tmp_path, *command, "W1+sink1", "--block-size", "32")
    assert (first["block_size"], second["block_size"]) == (16, 32)
    assert second["sparse"]["text"] < first["sparse"]["text"], "a window of 32 tokens sees more than one of 16"
    assert json.loads((tmp_path / "layers.json.1").read_text()) == first
    assert (tmp_path / "layers.md.1").read_text() == table and (tmp_path / "layers.png.1").is_file()
    assert "layers.json is of another checkpoint, layout or text; kept as layers.json.1" in capsys.readouterr().out


def test_a_table_of_others_is_kept_and_damaged_results_are_named(folder, text, tmp_path, capsys):
    (tmp_path / "layers.md").write_text("my notes")
    command = "--layout", "W1+sink1", "--dense", "1", "--length", "256", "--n", "4"
    found = run(folder, text, tmp_path, *command)
    assert (tmp_path / "layers.md.1").read_text() == "my notes"
    assert "layers.md is there without layers.json; kept as layers.md.1" in capsys.readouterr().out
    del found["steps"][0]["tried"]
    for damaged in (found, found | {"steps": 1}):
        (tmp_path / "layers.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"layers\.json: not as it was written \(steps, each with .*tried\)"):
            run(folder, text, tmp_path, *command)


def test_fewer_documents_than_asked_for_are_counted(folder, text, tmp_path, capsys):
    found = run(folder, text, tmp_path, "--layout", "W1", "--dense", "1", "--length", "256", "--n", "5")
    assert (found["documents"], found["prompts"]) == (4, 5)
    assert f"{text}: documents of 256 tokens or more: 4, of --n 5" in capsys.readouterr().out
    assert "Documents: 4, prompts: 5" in (tmp_path / "layers.md").read_text()


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
    sparse = "--layout", "L1V8", "--dense", "1"
    short = tmp_path / "short.txt"
    short.write_text(prose(3))
    for more, said in (
        (["--length", "512"], "--length 512: the checkpoint reads 2 to 256"),
        (["--length", "1"], "--length 1: the checkpoint reads 2 to 256"),
        (["--length", "8x"], "--length: '8x' is no length"),
        (["--documents", str(short)], "--length 256: no document of .*short.txt has so many tokens"),
        (["--haystack", str(short)], "--length 256: the haystack short.txt has only"),
        (["--n", "1"], "--n 1: expected at least 2"),
        (["--batch-tokens", "0"], "--batch-tokens 0: expected at least 1"),
        (["--block-size", "17"], "block_size"),
    ):
        with pytest.raises(ValueError, match=said):
            run(folder, text, tmp_path / "results", *sparse, *more)
    assert not (tmp_path / "results").exists()
