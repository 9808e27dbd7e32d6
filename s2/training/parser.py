"""LightningCLI for recipes: which keys there are, and one clear sentence when one is wrong."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from s2.recipe import unknown_key_message
from s2.training.module import PretrainModule
from s2.training.run import RunConfig

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
        try:
            self.config = parser.parse_object(args)
        except ArgumentError as error:
            raise ValueError(self._explain(str(error), parser, args)) from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return super().instantiate_trainer(**self.trainer_extras(self.config_init), **kwargs)

    def _explain(self, text: str, parser: LightningArgumentParser, recipe: dict[str, Any]) -> str:
        path = [key for key in re.findall(r'Parser key "([^"]+)"', text) if not key.endswith("class_path")]
        if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
            path = [match[1], match[2]]
            return unknown_key_message(".".join(path), self._known(parser, recipe), self.source, self.overridden)
        if match := re.search(r"Option '([^']+)' is not accepted", text):
            path.append(match[1])
            return unknown_key_message(".".join(path), self._known(parser, recipe), self.source, self.overridden)
        if match := re.search(r"the following arguments are required: (\S+)", text):
            return f"{self.source}: the key {match[1]} is missing"
        if match := re.search(r"(Expected an? .+?)\. Got value: (.*)", text):
            wanted = re.sub(r"<class '(\w+)'>", r"\1", match[1]).replace("typing.", "").replace("Expected", "expected")
            return f"{'.'.join(path)}={match[2].strip()} in {self.source}: {wanted}"
        if match := re.search(r"Problem with given class_path '([^']+)':\s*(.+)", text):
            return f"{'.'.join(path)}.class_path={match[1]} in {self.source}: {match[2]}"
        return f"{self.source}: {' '.join(text.split('Given value')[0].split())}"

    def _known(self, parser: LightningArgumentParser, recipe: dict[str, Any]) -> set[str]:
        known = {action.dest for action in parser._actions if action.dest not in ("help", "config")}
        for key, value in recipe.items():
            if isinstance(value, dict) and "class_path" in value:
                module, _, name = value["class_path"].rpartition(".")
                parameters = inspect.signature(getattr(import_module(module), name)).parameters
                known |= {f"{key}.{parameter}" for parameter in parameters}
        return known
