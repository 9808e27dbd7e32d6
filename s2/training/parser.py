"""LightningCLI for recipes: which keys there are, and one clear sentence when one is wrong."""

from __future__ import annotations

import difflib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

from s2.recipe import unknown_key_message
from s2.training.module import PretrainModule
from s2.training.run import RunConfig
from s2.training.strategy import STRATEGIES

# What the run folder, the schedule and the resume logic rely on.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # the training sequence is endless: max_steps ends a stage
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": -1,  # the whole validation before step 1: the number to beat
    "use_distributed_sampler": False,  # the datamodule deals out rows by rank itself
    "enable_progress_bar": False,  # `TrainingLog` has one that counts optimizer steps
    "enable_model_summary": False,
    "log_every_n_steps": 10,
}


class RecipeCLI(LightningCLI):
    """Parses a resolved recipe and builds module, datamodule and trainer.

    Args:
        recipe: keys after overrides.
        source: the file they came from, for messages.
        overridden: keys set on the command line, for messages.
        trainer_extras: Trainer arguments that are objects (callbacks, loggers, plugins) made from the run config.
    """

    def __init__(self, recipe: dict[str, Any], source: Path, overridden: Iterable[str], trainer_extras: Any) -> None:
        self.source, self.overridden = source, list(overridden)
        self.trainer_extras = trainer_extras
        super().__init__(
            PretrainModule,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=1234,
            parser_kwargs={"exit_on_error": False},
            trainer_defaults=TRAINER_DEFAULTS,
            run=False,
            args=recipe,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunConfig, "run")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Turn jsonargparse's nested reports into one line.

        Raises:
            ValueError: names the key, where it stands and what would be right.
        """
        for key, value in self._booleans(parser, args):
            if isinstance(value, str):  # jsonargparse would take yes and on for true
                raise ValueError(f"{key}={value} in {self.source}: expected true or false")
        for key in self._nulls(parser, args):  # which it would hand on
            raise ValueError(
                f"{key}=null in {self.source}: it needs a value; where there is a default, leave the key out"
            )
        seed = args.get("seed_everything")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything={seed} in {self.source}: expected 0 to {2**32 - 1}")
        try:
            self.config = parser.parse_object(args)
        except ArgumentError as error:
            raise ValueError(self._explain(str(error), parser, args)) from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        extras = self.trainer_extras(self.config_init)
        try:
            return super().instantiate_trainer(**extras, **kwargs)
        except (TypeError, ImportError) as error:  # Lightning's, of devices and accelerators that there are not
            raise ValueError(f"trainer in {self.source}: {error}") from error

    def _explain(self, text: str, parser: LightningArgumentParser, recipe: dict[str, Any]) -> str:
        path = [key for key in re.findall(r'Parser key "([^"]+)"', text) if not key.endswith("class_path")]
        if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
            path = [match[1], match[2]]
            return unknown_key_message(".".join(path), self._known(parser, recipe), self.source, self.overridden)
        if match := re.search(r"Option '([^']+)' is not accepted", text):
            path.append(match[1])
            return unknown_key_message(".".join(path), self._known(parser, recipe), self.source, self.overridden)
        if match := re.search(r"the following arguments are required: ([^\s,]+)", text):
            return f"{self.source}: the key {match[1]} is missing"
        if match := re.search(r"Problem with given class_path '([^']+)':\s*(?!\s|Parser key)(.+)", text):
            problem = " ".join(match[2].split(" - Expected")[0].split())
            return f"{'.'.join(path)}.class_path={match[1]} in {self.source}: {problem}"
        if match := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", text):
            return f"{'.'.join(path)}.class_path={match[1]} in {self.source}: expected a subclass of {match[2]}"
        if wanted := _wanted(text):
            value = match[1].strip() if (match := re.search(r"Got value: (.*)", text)) else _value(recipe, path)
            return f"{'.'.join(path)}={value} in {self.source}: expected {wanted}"
        return f"{self.source}: {' '.join(text.split('Given value')[0].split())}"

    def instantiate_classes(self) -> None:
        """Build module, datamodule and trainer.

        Raises:
            ValueError: what a class says of its arguments, without jsonargparse's list of types around it.
        """
        check_strategy(self.config.trainer.strategy, self.source)
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(_own_words(str(error))) from error

    def _booleans(self, parser: LightningArgumentParser, recipe: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Keys that are true or false and nothing else, with what the recipe says of them."""
        for action in parser._actions:
            if getattr(action, "_typehint", None) is bool or getattr(action, "type", None) is bool:
                yield action.dest, _value(recipe, [action.dest])
        for key, value in recipe.items():
            for name, parameter in _parameters(value).items():
                if parameter.annotation in (bool, "bool"):
                    yield f"{key}.{name}", value.get("init_args", {}).get(name)

    def _nulls(self, parser: LightningArgumentParser, recipe: dict[str, Any]) -> Iterator[str]:
        """Keys that the recipe sets to null though their type has none."""
        for action in parser._actions:
            kind = getattr(action, "_typehint", None)
            if kind is None or kind is Any or type(None) in get_args(kind):
                continue
            section, _, name = action.dest.rpartition(".")
            found = _value(recipe, [section])
            if isinstance(found, dict) and name in found and found[name] is None:
                yield action.dest

    def _known(self, parser: LightningArgumentParser, recipe: dict[str, Any]) -> set[str]:
        known = {action.dest for action in parser._actions if action.dest not in ("help", "config")}
        for key, value in recipe.items():
            known |= {f"{key}.{parameter}" for parameter in _parameters(value)}
        return known


def _parameters(section: Any) -> Mapping[str, inspect.Parameter]:
    """Of the class that a section of a recipe names; none where it names none that there is."""
    if not isinstance(section, dict) or not isinstance(section.get("class_path"), str):
        return {}
    module, _, name = section["class_path"].rpartition(".")
    try:
        return inspect.signature(getattr(import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return {}


_TYPES = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
_TYPES |= {"tuple": "a list", "list": "a list", "dict": "a mapping"}


def check_strategy(name: Any, source: Path) -> None:
    """Refuse a strategy that Lightning has no name for.

    Raises:
        ValueError: names ours, and the closest.
    """
    known = [*STRATEGIES, "auto", *StrategyRegistry.available_strategies()]
    if isinstance(name, str) and name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"trainer.strategy={name} in {source}: {hint}There are auto, {', '.join(STRATEGIES)}")


def _wanted(text: str) -> str:
    """What jsonargparse expected, of all types that it tried, in words; "" where it does not say."""
    words: list[str] = []
    for found in re.findall(r"Expected an? (.+?)(?=\.? *(?:Got value|- Expected|\n|$))", text):
        for name in re.findall(r"<class '(?:\w+\.)*(\w+)'>", found):
            words.append(_TYPES.get(name, name))
        for values in re.findall(r"Literal\[(.*?)\]", found):
            words += [value.strip().strip("'") for value in values.split(",")]
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" or {words[-1]}" if words else ""


def _value(recipe: Any, path: list[str]) -> Any:
    for part in ".".join(path).split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe


def _own_words(text: str) -> str:
    """Of a report over all types of a union, what a class itself said."""
    bullets = re.findall(r"^\s*- (.+(?:\n(?!\s*- |\s*Given value).+)*)", text, flags=re.MULTILINE)
    own = [" ".join(bullet.split()) for bullet in bullets if not bullet.startswith("Expected a")]
    if problem := next((re.match(r"Problem with given class_path '([^']+)': *(.+)", line) for line in own), None):
        return f"class_path={problem[1]}: {problem[2]}"
    return own[0] if own else text
