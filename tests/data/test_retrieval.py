"""Synthetic retrieval documents: the same everywhere, answerable from their own text, and not what is evaluated."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.corpus import retrieval
from data.corpus.retrieval import Retrieval, document
from data.corpus.sources import Source
from data.corpus.tokenizer import TextTokenizer
from data.datamodule import PackedDataModule
from data.prepare import prepare, prepare_all
from data.prepare.part import Task
from data.prepare.run import changed_sources
from data.prepare.spec import PrepareSpec
from data.section import prepare_section
from data.shards import TokenShards
from eval import needle_prompts
from s2.settings import SettingError


def facts(text):
    """(body, {number: how often it stands in the body}, numbers that the questions end with)"""
    body, _, questions = text.rpartition("\n\n")
    answers = [re.findall(r"\d+", line)[-1] for line in questions.split("\n")]
    return body, answers


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filler")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"Line {i} of a long and quiet text about boats." for i in range(3000)))
    spec = {
        "output": str(folder / "data"),
        "sources": [str(corpus)],
        "tokenizer": {"train": {"vocab_size": 300, "sample_bytes": 20_000}},
        "heldout_fraction": 0,
    }
    prepare(PrepareSpec.parse(spec))
    return folder / "data"


def test_every_answer_stands_once_before_its_question():
    settings = Retrieval(documents=200, facts=(1, 12))
    for number in range(200):
        body, answers = facts(document(settings, number))
        stated = re.findall(r"\d+", body)
        assert sorted(stated) == sorted(answers) and 1 <= len(answers) <= 12


def test_facts_and_questions_come_in_several_wordings():
    """Of one and the same fact too: whoever repeats the statement word by word does not answer every question."""
    settings = Retrieval(documents=100, facts=(6, 6))
    repeated = total = 0
    for number in range(100):
        body, _, questions = document(settings, number).rpartition("\n\n")
        repeated += sum(question in body.split("\n") for question in questions.split("\n"))
        total += 6
    assert 0.05 < repeated / total < 0.5


def test_a_document_depends_on_settings_seed_and_number_alone(filler):
    source = Source(
        path="retrieval",
        retrieval={"documents": 40, "facts": [1, 3], "chars": [300, 900], "filler": str(filler / "train")},
    )
    whole = list(source.documents())
    parts, _ = source.parts(part_bytes=2000)
    assert len(parts) > 3 and [d for part in parts for d in source.read(part)] == whole
    assert len({d.text for d in whole}) == len({d.id for d in whole}) == 40
    other = Source(path="retrieval", retrieval={"documents": 40, "facts": [1, 3], "seed": 1})
    assert not {d.text for d in other.documents()} & {d.text for d in whole}


def test_filler_fills_up_to_the_length_asked_for_and_facts_lie_at_every_depth(filler):
    settings = Retrieval(documents=300, facts=(1, 1), chars=(2000, 3000), filler=str(filler / "train"))
    depths = []
    for number in range(300):
        text = document(settings, number)
        assert 1900 <= len(text) <= 3000
        body, answers = facts(text)
        assert body.count("long and quiet text") > 20
        depths.append(re.search(rf"\b{answers[0]}\b", body).start() / len(body))
    assert np.histogram(depths, bins=5, range=(0, 1))[0].min() > 30


def test_a_share_of_the_documents_begins_with_a_fact(filler):
    settings = Retrieval(documents=200, facts=(1, 2), chars=(2000, 3000), opening=0.3, filler=str(filler / "train"))
    first = [document(settings, number).split("\n")[0] for number in range(200)]
    assert 40 < sum("quiet text" not in line for line in first) < 80
    with pytest.raises(SettingError, match="opening"):
        Retrieval(documents=1, facts=(1, 1), opening=0.3)


def test_lists_lie_scattered_among_filler_and_are_given_again_line_by_line(filler):
    settings = Retrieval(
        documents=60, facts=(20, 40), recite=True, tokens=(2500, 3500), filler=str(filler / "train"), seed=3
    )
    tokenizer, reordered, kinds, gaps = TextTokenizer(filler / "tokenizer.json"), 0, set(), []
    for number in range(60):
        text = document(settings, number)
        assert 2400 <= len(tokenizer.encode_documents([text])[0]) <= 3500
        body, _, again = text.rpartition("\n\n")
        stated = [line for line in body.split("\n") if "quiet text" not in line]
        assert sorted(stated) == sorted(again.split("\n")) and 20 <= sum(len(line.split()) for line in stated) <= 40
        assert all(4 <= len(line.split()) <= 19 for line in stated)
        reordered += stated != again.split("\n")
        gaps += [len(body) - body.index(line) for line in stated]
        kinds |= {(item.isalpha(), item.isdigit(), "-" in item) for line in stated for item in line.split()}
    assert reordered > 30 and len(kinds) == 3 and min(gaps) < 1000 < 4000 < max(gaps)


def test_the_first_item_of_a_list_stands_in_no_other(filler):
    """Of a thousand made-up names many would be alike."""
    settings = Retrieval(documents=3, facts=(1000, 1000), recite=True, chars=(1, 1), filler=str(filler / "train"))
    for number in range(3):
        items = document(settings, number).rpartition("\n\n")[0].split()
        assert len(items) == len(set(items)) == 1000


def test_documents_of_so_many_tokens_fit_a_window(filler):
    """Framed, as they are stored: what is cut asks for facts that stand in another window."""
    settings = Retrieval(documents=60, facts=(1, 9), rounds=(1, 2), tokens=(900, 1500), filler=str(filler / "train"))
    texts = [document(settings, number) for number in range(60)]
    lengths = [len(ids) for ids in TextTokenizer(filler / "tokenizer.json").encode_documents(texts)]
    assert min(lengths) >= 850 and max(lengths) <= 1500 and max(lengths) - min(lengths) > 300


def test_lines_that_never_fit_are_given_up(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("\n".join("a long line " * 300 for _ in range(40)))
    spec = {
        "output": str(tmp_path / "data"),
        "sources": [str(tmp_path / "long.txt")],
        "tokenizer": {"train": {"vocab_size": 300, "sample_bytes": 20_000}},
        "heldout_fraction": 0,
    }
    prepare(PrepareSpec.parse(spec))
    read = []
    some = retrieval._Filler._some
    monkeypatch.setattr(retrieval._Filler, "_some", lambda self, *args: read.append(args) or some(self, *args))
    settings = Retrieval(documents=1, facts=(1, 1), tokens=(300, 300), filler=str(tmp_path / "data" / "train"))
    assert "a long line" not in document(settings, 0)
    assert len(read) == retrieval._TRIES


@pytest.mark.parametrize("length", [{"tokens": (200, 1500)}, {"chars": (200, 1500)}])
def test_a_filler_without_lines_that_fit_is_refused_before_any_document_is_made(tmp_path, filler, length):
    """Else the documents are their facts and questions alone, whatever length was asked for."""
    (tmp_path / "long.txt").write_text("\n".join("a long line " * 300 for _ in range(40)))
    (tmp_path / "one.txt").write_text("a text of one line " * 3000)
    for name in ("long", "one"):
        spec = {
            "output": str(tmp_path / name),
            "sources": [str(tmp_path / f"{name}.txt")],
            "tokenizer": {"path": str(filler / "tokenizer.json")},
            "heldout_fraction": 0,
        }
        prepare(PrepareSpec.parse(spec))
        wanted = {"documents": 4, "facts": [1, 2], "filler": str(tmp_path / name / "train"), **length}
        retrieval_spec = spec | {
            "output": str(tmp_path / "out"),
            "sources": [{"path": "retrieval", "retrieval": wanted}],
        }
        with pytest.raises(ValueError, match=r"filler .*has a whole line of less than 1,500 (tokens|characters)"):
            prepare(PrepareSpec.parse(retrieval_spec))
        assert not (tmp_path / "out" / "train").exists()
    Retrieval(documents=1, facts=(1, 1), filler=str(filler / "train"), **length).check()


def test_no_wording_key_or_filler_of_the_evaluations_occurs():
    """A model trained on these documents is measured on other sentences about other things."""
    text = "\n".join(document(Retrieval(documents=2000, facts=(1, 8)), number) for number in range(2000)).lower()
    words, asked = set(re.findall(r"[a-z]+", text)), set(needle_prompts._COLOURS) | set(needle_prompts._THINGS)
    assert not words & {"magic", "pass", "passkey", "remember"}
    assert not words & asked
    syllable = f"(?:{'|'.join(retrieval._CONSONANTS)})(?:{'|'.join(retrieval._VOWELS)})"
    spelled = {word for word in asked if re.fullmatch(f"(?:{syllable}){{1,2}}[klmnrst]?", word)}
    assert spelled <= retrieval._NOT_NAMES  # made-up names cannot meet them either
    assert "magic number" not in text and "pass key" not in text and not re.search(r"number of the .* is \d", text)
    for sentence in needle_prompts.FILLER:
        assert sentence.strip().lower() not in text


def test_prepares_like_any_source_beside_the_corpus_it_is_filled_from(filler, tmp_path):
    spec = {
        "output": str(tmp_path / "retrieval"),
        "sources": [
            {"path": "retrieval", "name": "dense", "retrieval": {"documents": 30, "facts": [2, 6]}},
            {
                "path": "retrieval",
                "name": "hidden",
                "retrieval": {"documents": 20, "facts": [1, 2], "chars": [500, 900], "filler": str(filler / "train")},
            },
        ],
        "tokenizer": {"path": str(filler / "tokenizer.json")},
        "heldout_fraction": 0.2,
    }
    prepare(PrepareSpec.parse(spec))
    train, heldout = TokenShards(tmp_path / "retrieval" / "train"), TokenShards(tmp_path / "retrieval" / "heldout")
    assert train.sources == heldout.sources == ["dense", "hidden"]
    assert len(train.offsets) + len(heldout.offsets) - 2 == 50


def test_documents_whose_filler_was_prepared_anew_are_told_of_and_made_again_where_they_were_begun(
    filler, tmp_path, capsys
):
    """What is held out now may lie in them."""
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": f"Line {i} of a text\n" * 30}) + "\n" for i in range(200))
    )
    text = {
        "output": str(tmp_path / "data"),
        "sources": [str(tmp_path / "corpus.jsonl")],
        "tokenizer": {"path": str(filler / "tokenizer.json")},
        "heldout_fraction": 0.2,
    }
    wanted = {"documents": 40, "facts": [1, 2], "chars": [300, 400], "filler": str(tmp_path / "data" / "train")}
    made = {
        "output": str(tmp_path / "made"),
        "sources": [{"path": "retrieval", "retrieval": wanted}],
        "tokenizer": {"path": str(filler / "tokenizer.json")},
        "heldout_fraction": 0.2,
        "workers": 1,
    }

    def both(seed):
        return [PrepareSpec.parse(text | {"seed": seed}), PrepareSpec.parse(made)]

    prepare_all(both(seed=0))
    task = Task(PrepareSpec.parse(made), 0, PrepareSpec.parse(made).sources[0].parts()[0][0])
    begun = task.depends_on
    capsys.readouterr()
    prepare_all(both(seed=0))
    assert capsys.readouterr().err == ""
    shutil.rmtree(tmp_path / "data")
    assert changed_sources(PrepareSpec.parse(made)) == []  # on a machine that has the documents alone
    prepare_all(both(seed=1))
    assert f"the filler {tmp_path}/data/train was prepared anew; going on with" in capsys.readouterr().err
    assert task.depends_on != begun


def test_a_share_of_a_recipe_is_prepared_mixed_in_and_scored_and_none_is_as_if_it_were_not_there(filler, tmp_path):
    retrieval = {
        "share": 0.25,
        "prepare": {
            "output": str(tmp_path / "retrieval"),
            "sources": [{"path": "retrieval", "retrieval": {"documents": 60, "facts": [2, 4]}}],
            "tokenizer": {"path": str(filler / "tokenizer.json")},
            "heldout_fraction": 0.1,
        },
    }
    mixture = [{"path": str(filler / "train"), "weight": 3.0}]
    given = {"seq_len": 64, "micro_batch_size": 4, "mixture": mixture, "validation": [], "num_workers": 0}
    data = PackedDataModule(**given, retrieval=retrieval)
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 64) and data.validation_names == ["retrieval"]
    assert [each.weight for each in data.components] == [3.0, 1.0]
    shares = {Path(each.component).parent.name: each.asked for each in data.passes(64 * 4000)}
    assert shares["retrieval"] / sum(shares.values()) == pytest.approx(0.25, abs=0.01)
    off, without = (PackedDataModule(**given, retrieval=value) for value in (retrieval | {"share": 0}, None))
    assert off.rows.fingerprint() == without.rows.fingerprint() and off.prepared == []


def test_prepare_makes_the_documents_where_a_recipe_or_an_override_says_their_share(filler, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    source = "{path: retrieval, retrieval: {documents: 9, facts: [1, 2]}}"
    recipe.write_text(
        f"data: {{retrieval: {{share: 0, prepare: {{output: {tmp_path}/out, sources: [{source}], "
        f"tokenizer: {{path: {filler}/tokenizer.json}}}}}}}}"
    )
    with pytest.raises(ValueError, match="nothing to prepare"):
        prepare_section(recipe)
    [spec] = prepare_section(recipe, ["data.retrieval.share=0.1"])
    assert spec.output == f"{tmp_path}/out"
    with pytest.raises(ValueError, match=r"recipe.yaml: data.retrieval.share: .*from 0 to below 1.*1.5"):
        prepare_section(recipe, ["data.retrieval.share=1.5"])


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"documents": 0, "facts": [1, 2]}, "documents: expected a whole number >= 1, got 0"),
        ({"documents": 5, "facts": [3, 2]}, r"facts: expected \[least, most\] with 1 <= least <= most <= 1,000, got"),
        ({"documents": 5, "facts": 3}, r"facts: expected a list, got 3"),
        ({"documents": 5, "facts": [1, 2], "chars": [10, 20]}, r"tokens \(or chars\) and filler belong together"),
        ({"documents": 5, "facts": [1, 2], "filler": "x"}, r"tokens \(or chars\) and filler belong together"),
        ({"documents": 5, "facts": [1, 2], "tokens": [9, 9], "chars": [9, 9], "filler": "x"}, "give one"),
        ({"documents": 5, "facts": [1, 2], "tokens": [9, 8], "filler": "x"}, r"tokens: expected \[least, most\]"),
        ({"documents": 5, "facts": [1, 2], "fillers": "x"}, "unknown key 'fillers'"),
        (None, "settings of a source with `path: retrieval`"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Source(path="retrieval", retrieval=settings)


def test_a_filler_that_is_no_shard_folder_stops_before_any_work(tmp_path):
    settings = {"documents": 5, "facts": [1, 2], "chars": [100, 200], "filler": str(tmp_path / "nowhere")}
    spec = {
        "output": str(tmp_path / "out"),
        "sources": [{"path": "retrieval", "retrieval": settings}],
        "tokenizer": {"train": {"vocab_size": 300, "sample_bytes": 1000}},
    }
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare(PrepareSpec.parse(spec))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="settings of a source with `path: retrieval`"):
        Source(path="corpus.txt", retrieval={"documents": 5, "facts": [1, 2]})
