"""Rotations to begin an extension with: each measured as a checkpoint that has it, also beyond the trained length."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
import transformers

from eval.checkpoint import Checkpoint
from eval.needle_prompts import Needle, Prompt
from eval.rope import STEPS, Jumps, best, figure_of, flattest, main, name, parse, raised, usual, within
from eval.untrained import Texts
from s2.model.config import ModelConfig
from s2.model.hf import load_pretrained, save_pretrained
from s2.model.rope import rope_frequencies
from tests.eval.small_checkpoint import make_checkpoint, prose

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("rope") / "hf", layout="L1V4+sink1+dense0")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "prose.jsonl"
    file.write_text("".join(f"{json.dumps({'text': prose(120, seed)})}\n" for seed in range(3)))
    return file


def run(folder, text, output, *arguments):
    to = ["--haystack", str(text), "--output", str(output), "--device", "cpu", "--needles", "2"]
    main(["--ckpt", str(folder), *to, *arguments])
    return json.loads((output / "rope.json").read_text())


def config(**changed):
    return ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, attention_layout="dense", block_size=64,
        **changed,
    )  # fmt: skip


def test_each_rotation_is_measured_as_a_checkpoint_that_has_it(folder):
    """Also where the texts are longer than the checkpoint was trained for, and after another rotation."""
    checkpoint = Checkpoint.load(folder, "cpu")
    rows = [torch.randint(2, 512, (401,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(2)]
    needles = Needle("a", "1", 10.0, 40, slice(380, 386)), Needle("b", "2", 50.0, 200, slice(395, 401))
    texts, given = Texts([rows[0]], [Prompt(rows[1], needles, True, 40)], rows=1), []
    for rotation in (
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_theta": 1e4, "rope_scaling": YARN},
        {"rope_theta": 1e4, "rope_scaling": {"dense": YARN, "sparse": None}},
    ):
        changed = rotation | {"max_position_embeddings": 512}
        losses = texts.losses(checkpoint, checkpoint.config.replace(**changed))
        model = load_pretrained(folder, overrides=changed)

        def mean(row, part, model=model):
            scores = model(torch.tensor([row])).log_softmax(-1)[0, part.start - 1 : part.stop - 1]
            return -scores[torch.arange(len(scores)), torch.tensor(row[part])].mean().item()

        answers = [mean(rows[1], needle.answer) for needle in needles]
        wanted = mean(rows[0], slice(1, 401)), sum(answers) / 2
        assert (losses.text, losses.answers) == pytest.approx(wanted, abs=1e-4)
        given.append(losses.text)
    assert len({round(loss, 3) for loss in given}) == 3


def test_the_command_measures_at_each_length_and_names_the_best(folder, text, tmp_path, capsys):
    found = run(folder, text, tmp_path, "--lengths", "256,512", "--n", "2")
    said = capsys.readouterr().out
    own = Checkpoint.open(folder, "cpu").config
    assert [step["rotation"] for step in found["steps"]] == usual(own, 512)
    for step in found["steps"]:
        assert step["losses"].keys() == {"256", "512"}
        for length, each in step["losses"].items():
            assert each.keys() == {"text", "answers", "exact"}, length
        assert len(step["jumps"]) == len(found["distances"]) and len(set(step["jumps"])) > STEPS // 4
    assert found["distances"] == [512 * k // STEPS for k in range(STEPS // 2, STEPS + 1)]
    texts = {(step["losses"]["256"]["text"], step["losses"]["512"]["text"]) for step in found["steps"]}
    assert len(texts) == len(found["steps"]), "no two rotations give the same losses"
    chosen = best(found)
    sums = {
        name(step["rotation"]): sum(step["losses"]["512"][k] for k in ("text", "answers")) for step in found["steps"]
    }
    assert sums[name(chosen)] == min(sums.values())
    assert f"least at 512, text and answers together: {name(chosen)}\n" in said
    worst = {name(step["rotation"]): max(step["jumps"]) for step in found["steps"]}
    assert worst[name(flattest(found))] == min(worst.values())
    assert f"least at the worst distance: {name(flattest(found))}\n" in said
    assert (tmp_path / "rope.md").read_text() in said
    lines = [line.strip().removeprefix("model.config: ") for line in said.splitlines() if "model.config: " in line]
    assert [parse(line, own) for line in lines] == [chosen, flattest(found)], "the lines can be put into a recipe"
    assert (tmp_path / "rope.png").read_bytes()[:4] == b"\x89PNG"
    *by_length, last = figure_of(found).axes
    for line, step in zip(last.lines, found["steps"], strict=True):
        assert line.get_xydata().tolist() == list(map(list, zip(found["distances"], step["jumps"], strict=True)))
    for axes, key in zip(by_length, ("text", "answers"), strict=True):
        drawn = [line.get_xydata().tolist() for line in axes.lines[1:]]
        assert drawn == [[[n, step["losses"][str(n)][key]] for n in (256, 512)] for step in found["steps"]]


def test_positions_jump_to_each_distance(folder, tmp_path):
    """As transformers computes a text whose tokens from halfway between fact and answer on stand that much later."""
    checkpoint = Checkpoint.load(folder, "cpu")
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for fact, answer in ((20, slice(90, 96)), (31, slice(80, 87)), (5, slice(91, 94))):
        tokens = torch.randint(2, 512, (answer.stop,), generator=generator).tolist()
        tokens += torch.randint(2, 512, (96 - len(tokens),), generator=generator).tolist()
        prompts.append(Prompt(tokens, (Needle("a", "1", 10.0, fact, answer),), True, fact))
    changed = {"rope_theta": 500.0, "max_position_embeddings": 4096, "attention_layout": "dense"}
    found = Jumps(prompts, [96, 200, 4000], rows=2).losses(checkpoint, checkpoint.config.replace(**changed))
    ours = load_pretrained(folder, overrides=changed)
    saved = save_pretrained(ours, ours.config, tmp_path / "hf", dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    for distance, loss in zip([96, 200, 4000], found, strict=True):
        wanted = []
        for prompt in prompts:
            fact, answer = prompt.needles[0].position, prompt.needles[0].answer
            middle = (fact + answer.start) // 2
            positions = [*range(middle), *(i + distance - (answer.start - fact) for i in range(middle, 96))]
            assert positions[answer.start] - positions[fact] == distance
            with torch.no_grad():
                logits = model(torch.tensor([prompt.tokens]), position_ids=torch.tensor([positions])).logits
            wanted.append(
                F.cross_entropy(logits[0, answer.start - 1 : answer.stop - 1], torch.tensor(prompt.tokens[answer]))
            )
        assert loss == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-4)
    assert len({round(loss, 3) for loss in found}) == 3


def test_a_layout_is_measured_as_a_checkpoint_that_has_it(folder, text, tmp_path):
    command = ("--lengths", "512", "--n", "2", "--rope", "{rope_theta: 2.0e+4}")
    own = run(folder, text, tmp_path / "own", *command)
    as_own = run(folder, text, tmp_path / "same", *command, "--layout", "L1V4+sink1+dense0")
    dense = run(folder, text, tmp_path / "dense", *command, "--layout", "dense")
    assert as_own == own and dense["attention_layout"] == "dense"
    assert (tmp_path / "dense" / "rope.md").read_text().rstrip().endswith("Layout: dense")
    assert [step["losses"] for step in dense["steps"]] != [step["losses"] for step in own["steps"]]
    model = load_pretrained(folder, overrides={"attention_layout": "dense"})
    saved = save_pretrained(model, model.config, tmp_path / "hf", folder / "tokenizer.json", torch.float32)
    assert run(saved, text, tmp_path / "saved", *command)["steps"] == dense["steps"]
    with pytest.raises(ValueError, match=r"--layout L1V4\+sink1\+dense7: .*dense layer 7 does not exist"):
        run(folder, text, tmp_path / "bad", *command, "--layout", "L1V4+sink1+dense7")


def test_without_lengths_the_trained_one_twice_and_four_times_are_measured(folder, text, tmp_path):
    found = run(folder, text, tmp_path, "--n", "2", "--rope", "{rope_theta: 2.0e+4}")
    assert found["lengths"] == [256, 512, 1024] and len(found["steps"]) == 2


def test_a_run_that_is_interrupted_goes_on_and_others_are_added(folder, text, tmp_path, monkeypatch):
    measure, calls = Texts.losses, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    command = folder, text, tmp_path, "--lengths", "512", "--n", "2"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Texts, "losses", interrupted)
        run(*command)
    before = json.loads((tmp_path / "rope.json").read_text())
    assert len(before["steps"]) == 2
    monkeypatch.setattr(Texts, "losses", interrupted)
    whole = run(*command)
    assert whole["steps"][:2] == before["steps"] and len(calls) == 1 + len(whole["steps"])
    more = run(*command, "--rope", "{rope_theta: 777}", "--rope", "{rope_theta: 777.0}")
    assert more["steps"][:-1] == whole["steps"] and len(calls) == 2 + len(whole["steps"])
    assert more["steps"][-1]["rotation"] == {"rope_theta": 777.0, "rope_scaling": None}


def test_what_other_texts_have_given_is_kept_aside(folder, text, tmp_path, capsys):
    first = run(folder, text, tmp_path, "--lengths", "256", "--n", "2")
    second = run(folder, text, tmp_path, "--lengths", "256", "--n", "2", "--seed", "1")
    assert first["texts"] != second["texts"]
    assert json.loads((tmp_path / "rope.json.1").read_text()) == first
    assert (tmp_path / "rope.md.1").is_file() and (tmp_path / "rope.png.1").is_file()
    assert "rope.json is of another checkpoint, layout or text" in capsys.readouterr().out


def test_the_base_is_raised_until_the_slowest_pair_turns_slower_by_the_factor():
    theta, dims = raised(1e5, 4.0, 64), torch.arange(0, 64, 2) / 64
    slower = theta**dims / 1e5**dims
    assert slower[0] == 1 and slower[-1].item() == pytest.approx(4, rel=5e-3)
    assert theta == 418_000, "three digits are what a recipe says"


@pytest.mark.parametrize(
    "theta,trained,factor", [(1e5, 8192, 4.0), (1e4, 2048, 2.0), (5e5, 8192, 16.0), (1e4, 131072, 2.0)]
)
def test_the_highest_base_keeps_every_angle_within_the_trained_ones(theta, trained, factor):
    """What has not turned once in the trained length turns no further in the longer one."""
    before, after = (rope_frequencies(128, base, None)[0] for base in (theta, within(theta, factor, trained)))
    slow = before * trained < 2 * torch.pi
    assert (after * trained * factor <= before * trained)[slow].all()
    assert slow.any() == (trained < 1e5)
    if slow.any():
        assert (after * trained * factor)[slow].max() > 0.5 * (before * trained)[slow].max(), "and hardly less"


def test_what_is_tried_stretches_the_trained_length_to_the_longest():
    own = {"rope_theta": 1e5, "rope_scaling": None}
    assert usual(config(rope_theta=1e5), 8192) == usual(config(rope_theta=1e5), 100) == [own]
    tried = usual(config(rope_theta=1e5), 32768)
    assert tried[0] == own and len({name(each) for each in tried}) == len(tried) == 10
    kinds = [(each["rope_scaling"] or {}).get("rope_type") for each in tried]
    assert kinds == [None, None, None, "linear", "llama3", "yarn", "yarn", "yarn", "yarn", "yarn"]
    for each in tried[3:]:
        scaling = each["rope_scaling"]
        length = scaling.get("original_max_position_embeddings", 8192)
        assert length * scaling["factor"] in (32768, 2 * 16384)
        config(**each)  # valid
    assert {each["rope_theta"] for each in tried} == {1e5, raised(1e5, 4, 64), raised(1e5, 2, 64), within(1e5, 4, 8192)}
    yarns_own = rope_frequencies(64, 1e5, tried[5]["rope_scaling"])[1]
    factor = tried[-1]["rope_scaling"]["attention_factor"]
    assert factor == pytest.approx(1 + (yarns_own - 1) / 2, abs=1e-3)
    scaled = config(rope_theta=1e5, rope_scaling=YARN)
    assert [each["rope_scaling"] for each in usual(scaled, 32768)] == [YARN] * 3, "whose factor counts from before it"


def test_names_say_what_differs():
    def said(**rotation):
        return name({"rope_theta": 1e5, "rope_scaling": None} | rotation)

    assert said() == said(rope_scaling={"rope_type": "default"}) == "theta 100000"
    assert said(rope_theta=2e6, rope_scaling=YARN) == "theta 2e+06, yarn 2 from 256"
    assert said(rope_scaling=YARN | {"attention_factor": 1.07, "factor": 1.0}) == "theta 100000, times 1.07"
    assert said(rope_scaling=YARN | {"factor": 1.0}) == "theta 100000"
    assert said(rope_scaling=YARN | {"attention_factor": 1.0}) == "theta 100000, yarn 2 from 256 times 1"
    assert said(rope_scaling={"rope_type": "linear", "factor": 4.0}) == "theta 100000, linear 4"
    steep = {"beta_fast": 4, "beta_slow": None, "truncate": False}
    assert said(rope_scaling=YARN | steep) == "theta 100000, yarn 2 from 256 beta_fast 4 truncate False"
    assert said(rope_scaling={"dense": YARN, "sparse": None}) == "theta 100000, dense yarn 2 from 256"
    plain = {"rope_type": "default", "rope_theta": 2e6}
    assert (
        said(rope_scaling={"dense": plain, "sparse": YARN}) == "theta 100000, dense theta 2e+06, sparse yarn 2 from 256"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{rope_theta: [", "not YAML"),
        ("8.0", "expected a mapping of rope_theta and rope_scaling"),
        ("{}", "expected a mapping"),
        ("{theta: 2.0e+5}", "expected a mapping"),
        ("{1: 2}", "expected a mapping"),
        ("{rope_theta: 1.0, rope_theta: 2.0}", "the key 'rope_theta' stands twice"),
        ("{rope_theta: no}", "expected a number, got 'no'"),
        ("{rope_theta: -1}", "rope_theta"),
        ("{rope_scaling: {rope_type: yarn, factor: 4}}", "original_max_position_embeddings"),
        ("{rope_scaling: {rope_type: spiral}}", "spiral"),
        ("{rope_scaling: 4}", "rope_scaling"),
    ],
)
def test_rotations_that_no_model_can_have_are_refused(given, said):
    with pytest.raises(ValueError, match=rf"^--rope {re.escape(given)}: .*{said}"):
        parse(given, config())


def test_a_rotation_is_read_as_a_recipe_reads_it():
    assert [parse(text, config())["rope_theta"] for text in ("{rope_theta: 2e5}", "{rope_theta: 200_000}")] == [2e5] * 2


def test_lengths_and_texts_that_cannot_be_read_are_refused_before_anything_is_written(folder, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(prose(3))
    for more, said in (
        (["--lengths", "1,256"], "--lengths 1,256: expected at least 2 tokens each"),
        (["--lengths", "8x"], "--lengths 8x: '8x' is no length"),
        (
            ["--lengths", "512", "--documents", str(short)],
            "--lengths 512: no document of .*short.txt has so many tokens",
        ),
        (["--lengths", "512", "--haystack", str(short)], "--lengths 512: the haystack short.txt has only"),
        (["--n", "1"], "--n 1: expected at least 2"),
        (["--needles", "0"], "--needles 0: expected at least 1"),
        (["--needles", "16"], "--lengths 256, 16 to a prompt: length 256 leaves no room for a haystack: 16 needle"),
    ):
        with pytest.raises(ValueError, match=said):
            run(folder, text, tmp_path / "results", *more)
    assert not (tmp_path / "results").exists()
