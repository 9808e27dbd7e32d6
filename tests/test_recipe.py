"""Recipes mean the same wherever they are read."""

from pathlib import Path
from typing import Any

import pytest

from eval.gate import GateConfig
from s2.recipe import apply_overrides, dump_yaml, load_recipe, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-1", 0.5),
        ("1.5e+3", 1500.0),
        ("8e6", 8e6),
        (".5", 0.5),
        ("3.", 3.0),
        ("12_000_000", 12_000_000),
        ("010", 10),
        ("0x10", 16),
        ("-.inf", float("-inf")),
        ("true", True),
        ("false", False),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("True", "True"),
        ("2024-01-31", "2024-01-31"),
        ("12:30:45", "12:30:45"),
        ("null", None),
        ("~", None),
        ("", None),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


def test_what_is_dumped_reads_back_the_same() -> None:
    value = {"a": "no", "b": "1e5", "c": 1e-05, "d": None, "e": True, "f": "2024-01-01", "g": [1, "2"], "h": ".5"}
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", ":2: .*'c' stands twice"),
        ("a: 1\na: 2\n", ":2: .*'a' stands twice"),
        (f"a: {'9' * 5000}\n", ":1: .*too many digits"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\nb: !!bool maybe\n", ":2: .*'maybe' is no bool"),
        ("a: !!float x\n", ":1: .*'x' is no float"),
        ("a: !!timestamp x\n", ":1: .*'x' is no timestamp"),
        ("a: &a\n  b: *a\n", "not valid YAML: .*alias"),
        (f"a: {'[' * 3000}{']' * 3000}\n", "not valid YAML: .*nested too deeply"),
        ("- 1\n", "a mapping of keys"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


def test_merge_keys_stay_overridable(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("base: &b {x: 1, y: 2}\nuse: {<<: *b, y: 3}\n")
    assert load_recipe(file)["use"] == {"x": 1, "y": 3}


def test_overrides_are_read_like_recipes() -> None:
    recipe: dict[str, Any] = {"data": {"class_path": "x", "init_args": {"mixture": [{"weight": 1}]}}}
    assert apply_overrides(recipe, ["data.mixture.0.weight=5e-1", "run.note=no"]) == [
        "data.mixture.0.weight",
        "run.note",
    ]
    assert recipe["data"]["init_args"]["mixture"][0]["weight"] == 0.5 and recipe["run"]["note"] == "no"


def test_an_override_below_an_anchor_leaves_what_the_alias_names(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("mixture: [&part {path: a}]\nvalidation: [*part]\n")
    recipe = load_recipe(file)
    apply_overrides(recipe, ["mixture.0.path=b"])
    assert recipe == {"mixture": [{"path": "b"}], "validation": [{"path": "a"}]}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources.0.keep=1", r"data\.sources\.0 is 'a' and has no keys"),
        ("data.sources.\N{SUPERSCRIPT TWO}=b", "no index"),
        ("other.x=1", r"other\.init_args is \['y'\], not a mapping"),
        (f"data.n={'9' * 5000}", r"^.{0,200}the value is not valid YAML$"),
        (f"data.n={'[' * 3000}", r"^.{0,200}the value is not valid YAML$"),
    ],
)
def test_an_override_that_leads_nowhere_is_named(override: str, words: str) -> None:
    recipe: dict[str, Any] = {"data": {"sources": ["a"]}, "other": {"class_path": "x.X", "init_args": ["y"]}}
    with pytest.raises(ValueError, match=words):
        apply_overrides(recipe, [override])


def test_an_override_fills_empty_init_args() -> None:
    recipe: dict[str, Any] = {"data": {"class_path": "x.X", "init_args": None}}
    apply_overrides(recipe, ["data.seq_len=64"])
    assert recipe["data"]["init_args"] == {"seq_len": 64}


def test_an_override_takes_the_place_of_the_entry_of_a_list() -> None:
    recipe: dict[str, Any] = {"betas": [0.9, 0.95, 0.99]}
    apply_overrides(recipe, ["betas.1=0.5"])
    assert recipe == {"betas": [0.9, 0.5, 0.99]}


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo/pretrain", "demo/extend-2k", "smollm2/extend-8k", "smollm2/extend-32k"):
        Path(f"recipes/{name}.yaml").parent.mkdir(parents=True, exist_ok=True)
        Path(f"recipes/{name}.yaml").write_text("run: {}\n")
    for name, said in (
        ("smollm2/pretrain", "; recipes/smollm2 has extend-32k.yaml, extend-8k.yaml"),
        ("demo/pretrian", "; did you mean recipes/demo/pretrain.yaml?"),
        ("nope/pretrain", "; there are recipes/demo, recipes/smollm2"),
        ("smolm2/extend-8k", "; did you mean recipes/smollm2?"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            load_recipe(Path(f"recipes/{name}.yaml"))
        assert str(error.value) == f"recipe recipes/{name}.yaml does not exist{said}"


def test_a_gate_that_is_not_there_names_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipes/a/gates").mkdir(parents=True)
    Path("recipes/a/gates/pretrain.yaml").write_text("loss: []\n")
    with pytest.raises(
        FileNotFoundError, match=r"no gate recipes/b/gates/x\.yaml: .*; there are recipes/a/gates/pretr"
    ):
        GateConfig.load(Path("recipes/b/gates/x.yaml"))
