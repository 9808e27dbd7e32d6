"""What a recipe says is taken as its types say, or refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from lightning.pytorch import Callback, Trainer

from data.datamodule import PackedDataModule
from s2.model.config import ModelConfig
from s2.settings import Check, SettingError, Settings, convert, instantiate, parameters, read
from s2.training.config import names_in_source


@dataclass(frozen=True)
class Inner(Settings):
    size: int
    share: Annotated[float, Check("a number below 1", lambda x: x < 1)] = 0.5


@dataclass(frozen=True)
class Outer(Settings):
    inner: Inner
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (5e6, int, 5_000_000),
        (1.0, int | float, 1.0),
        (1, int | float, 1),
        (None, int | None, None),
        ([1, 2.5], tuple[float, float], (1, 2.5)),
        ({"size": 3}, Inner | None, Inner(3)),
        ("x", Any, "x"),
        ({"a": 1}, Mapping[str, Any], {"a": 1}),
    ],
)
def test_a_value_is_taken_as_its_type_says(value: Any, hint: Any, expected: Any) -> None:
    found = convert(value, hint, "key")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"size": True}}, "outer.inner.size: expected a whole number, got True"),
        ({"inner": {"size": 1.5}}, "outer.inner.size: expected a whole number, got 1.5"),
        ({"inner": {"size": 1, "share": 2}}, "outer.inner.share: expected a number below 1, got 2"),
        ({"inner": {"size": 1, "shar": 2}}, "outer.inner: unknown key 'shar'; known keys: size, share"),
        ({"inner": {}}, "outer.inner: missing key 'size'"),
        ({"inner": {"size": 1}, "kind": "c"}, "outer.kind: expected a or b, got 'c'"),
        ({"inner": {"size": 1}, "pair": [1]}, r"outer.pair: expected a list of 2, got \[1\]"),
        ({"inner": {"size": 1}, "pair": [1, "x"]}, r"outer.pair\[1\]: expected a number, got 'x'"),
        ({"inner": 7}, "outer.inner: expected a mapping of settings, got 7"),
        (None, "outer: expected a mapping of settings, got None"),
    ],
)
def test_what_is_wrong_names_its_place(values: Any, message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        read(Outer, values, "outer")


def test_a_place_in_a_file_stays_as_it_is_written() -> None:
    with pytest.raises(SettingError, match=r"^\./x\.yaml: data\.inner\.size: expected a whole number"):
        read(Outer, {"inner": {"size": "x"}}, "./x.yaml: data")


def test_an_object_is_made_of_its_class_path() -> None:
    section = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {"log_momentum": True}}
    assert instantiate(section, Callback, "callback").log_momentum is True
    with pytest.raises(SettingError, match=r"callback\.log_momentum: expected true or false, got 'yes'"):
        instantiate({**section, "init_args": {"log_momentum": "yes"}}, Callback, "callback")


class Untyped:
    def __init__(self, plain, unknown: "NoSuchType" = 1, count: int = 2, **rest):  # type: ignore[name-defined]  # noqa: F821
        self.given = (plain, unknown, count, rest)


def test_what_no_annotation_says_is_taken_as_it_is() -> None:
    section = {"class_path": f"{__name__}.Untyped", "init_args": {"plain": "x", "unknown": [1], "other": {}}}
    assert instantiate(section, Untyped, "here").given == ("x", [1], 2, {"other": {}})


def test_an_object_is_an_option_among_classes() -> None:
    hint = parameters(Trainer)["plugins"].annotation
    section = {"class_path": "lightning.pytorch.plugins.environments.LightningEnvironment"}
    assert type(convert(section, hint, "plugins")).__name__ == "LightningEnvironment"


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        ("lightning.pytorch.trainer.trainer", Trainer),
        ("s2.model.config", ModelConfig),
        ("data.datamodule", PackedDataModule),
    ],
)
def test_the_source_of_a_class_says_what_the_class_takes(module: str, cls: type) -> None:
    assert names_in_source(module, cls.__name__) == list(parameters(cls))
