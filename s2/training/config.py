"""A recipe as typed settings, checked without importing torch or Lightning: a mistake should not wait for seconds.

What only torch and Lightning know (layouts of attention, names of strategies) is checked in `s2.training.stage`.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal

from s2 import settings
from s2.recipe import unknown_key_message
from s2.settings import Check, Positive, Settings
from s2.training.optim import OptimizerConfig, ScheduleConfig

_Name = Annotated[
    str,
    Check(
        "a folder name: letters, digits, '-', '_', and '.' among them",
        lambda name: re.fullmatch(r"[\w.\-]+", name) and name.strip("."),
    ),
]
_Seed = bool | Annotated[int, Check(f"0 to {2**32 - 1}", lambda seed: 0 <= seed < 2**32)]

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


@dataclass
class RunConfig(Settings):
    """How a stage is run; what it trains is said by the other keys.

    Attributes:
        recipe: first folder level below `root`, for example 1.3b.
        stage: second level, for example pretrain or extend-32k.
        root: where runs live; `~` is the home folder.
        resume: `auto` continues from the newest complete checkpoint, `never` starts over (the old run moves aside).
        tokens_per_step: global batch in tokens. Gradient accumulation follows from it, so the same recipe takes
            the same optimizer steps on any number of GPUs. trainer.accumulate_grad_batches is for None.
        validate_every: optimizer steps between validations; the first and the last step are always validated.
        checkpoint_every: optimizer steps between checkpoints; the last step always writes one. None: nothing is saved,
            neither checkpoints nor the export, as when only rates and memory are measured; only then may
            trainer.max_time end the stage before trainer.max_steps.
        keep_checkpoints: newest checkpoints kept.
        max_skipped_steps: so many steps in a row whose gradient is not finite, or whose loss jumps, end the run.
        loss_spike_factor: a step whose loss is over so many times the running mean is skipped. None: none is.
        gate: `required`: a stage begins only from a checkpoint (`model.init_from`) that has passed its gate
            (`s2.training.gate`); `ignore`: from any.
        slurm_requeue: stopped by SLURM's warning signal or time limit, put the job back into the queue after the
            checkpoint (see `s2.training.slurm`).
    """

    recipe: _Name
    stage: _Name
    root: str = "runs"
    resume: Literal["auto", "never"] = "auto"
    tokens_per_step: Positive | None = None
    validate_every: Positive = 500
    checkpoint_every: Positive | None = 1000
    keep_checkpoints: Positive = 2
    max_skipped_steps: Positive = 10
    loss_spike_factor: Annotated[float, Check("a number above 1, or null", lambda x: 1 < x < math.inf)] | None = None
    gate: Literal["required", "ignore"] = "ignore"
    slurm_requeue: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root = os.path.expanduser(self.root)

    @property
    def folder(self) -> Path:
        """<root>/<recipe>/<stage>"""
        return Path(self.root) / self.recipe / self.stage

    def accumulation(self, sequences_per_micro_batch: int, seq_len: int, world_size: int) -> int | None:
        """Micro-batches per optimizer step that make up `tokens_per_step`, or None where that is not set. Raises
        ValueError where it is not a whole number of micro-batches over all ranks."""
        if self.tokens_per_step is None:
            return None
        wanted = self.tokens_per_step
        tokens = sequences_per_micro_batch * seq_len * world_size
        if wanted < tokens or wanted % tokens:
            raise ValueError(
                f"run.tokens_per_step={wanted} must be a multiple of {tokens} = data.micro_batch_size "
                f"{sequences_per_micro_batch} x data.seq_len {seq_len} x {world_size} ranks"
            )
        return wanted // tokens


@dataclass(frozen=True)
class ModelSection(Settings):
    """What is trained, and how.

    Attributes:
        config: keys of `s2.model.config.ModelConfig`; with `init_from`, those to change.
        init_from: Hugging Face folder to start from (an earlier stage's `hf/`, or a Llama, Mistral, Qwen2 or Qwen3 of
            others, which an `attention_layout` in `config` makes sparse); None starts from random weights. The export
            keeps its token ids and tokenizer; without it the ids are the data's. `config` has the last word.
        optimizer: AdamW.
        schedule: learning rate over the run.
        activation_checkpointing: see `s2.model.recompute`.
        compile: torch.compile each block.
    """

    config: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is not None:
            object.__setattr__(self, "init_from", os.path.expanduser(self.init_from))


@dataclass(frozen=True)
class _TrainerLimits(Settings):
    """Of the arguments of Lightning's Trainer those that it would take and ignore, stumble over later, or end a stage
    by before it is finished."""

    max_steps: Positive  # a stage ends there
    max_epochs: Annotated[Any, Check("null or -1, trainer.max_steps says it", lambda x: x in (None, -1))] = None
    limit_train_batches: Annotated[
        Any, Check("null, trainer.max_steps says it", lambda x: x is None or (isinstance(x, float) and x == 1))
    ] = None
    gradient_clip_val: (
        Annotated[float, Check("a number >= 0 (0 clips nothing)", lambda x: 0 <= x < math.inf)] | None
    ) = None
    accumulate_grad_batches: Positive | None = None
    log_every_n_steps: Positive | None = None
    val_check_interval: Annotated[Any, Check("null, run.validate_every says it", lambda x: x is None)] = None
    default_root_dir: Annotated[Any, Check("null, run.root says it", lambda x: x is None)] = None
    check_val_every_n_epoch: Annotated[
        Any, Check("null or 1, run.validate_every says it", lambda x: x in (None, 1))
    ] = None
    overfit_batches: Annotated[Any, Check("0; for few texts name them in data.mixture", lambda x: not x)] = 0.0
    fast_dev_run: Annotated[
        Any, Check("false; for a few steps set trainer.max_steps and run.checkpoint_every=null", lambda x: not x)
    ] = False
    barebones: Annotated[
        Any, Check("false; run.checkpoint_every=null saves nothing, trainer.logger=false logs less", lambda x: not x)
    ] = False


@dataclass(frozen=True)
class Origin:
    """Where the keys of a recipe come from, for messages."""

    file: Path
    overridden: Sequence[str] = ()  # keys that were set on the command line
    known: set[str] = field(default_factory=set)  # keys that there are, for hints

    @contextmanager
    def named(self) -> Iterator[None]:
        """Have errors about keys, and about files that they name, say where the key stands."""
        with self.keys_named():
            try:
                yield
            except (ValueError, FileNotFoundError) as error:
                if type(error) not in (ValueError, FileNotFoundError) or error.args[1:]:
                    raise  # of another kind, or the system's own
                raise type(error)(f"{self.file}: {error}") from error

    @contextmanager
    def keys_named(self) -> Iterator[None]:
        """The same for errors about keys alone, where there may be others that are not the recipe's."""
        try:
            yield
        except settings.UnknownKeyError as error:
            before = f"{error.key}." if error.key else ""
            known = {f"{before}{name}" for name in error.known}
            if not before or any(key.startswith(before) for key in self.known):
                known |= self.known  # it may belong into another section
            raise ValueError(unknown_key_message(f"{before}{error.name}", known, self.file, self.overridden)) from None
        except settings.SettingError as error:
            wrong = re.sub(r"\[(\d+)\]", r".\1", error.key)  # as a command line has it
            is_given = any(re.match(rf"{re.escape(key)}(?![\w-])", wrong) for key in self.overridden)
            raise ValueError(f"{self.file}: {error}{' (on the command line)' if is_given else ''}") from error


@dataclass(frozen=True)
class StageConfig:
    """All of a recipe."""

    run: RunConfig
    model: ModelSection
    data: dict[str, Any]  # class_path and init_args of the datamodule
    trainer: dict[str, Any]  # arguments of Lightning's Trainer
    seed_everything: bool | int
    origin: Origin


def read_stage(recipe: Mapping[str, Any], source: Path, overridden: Sequence[str] = ()) -> StageConfig:
    """The settings of a recipe, of which the keys `overridden` were set on the command line and the others in the file
    `source`. Raises ValueError: in one sentence, which key is wrong, where it stands and what would be right."""
    origin = Origin(source, overridden)
    with origin.named():
        sections = {key: _mapping(recipe.get(key, {}), key) for key in ("run", "model", "trainer", "data")}
        init_args = _mapping(sections["data"].get("init_args", {}), "data.init_args")
        with settings.below("data"):
            data_class = settings.class_path(sections["data"])
        known = {
            "run": list(settings.parameters(RunConfig)),
            "model": list(settings.parameters(ModelSection)),
            "model.optimizer": list(settings.parameters(OptimizerConfig)),
            "model.schedule": list(settings.parameters(ScheduleConfig)),
            "model.config": names_in_source("s2.model.config", "ModelConfig"),
            "trainer": names_in_source("lightning.pytorch.trainer.trainer", "Trainer"),
            "data": names_in_source(*data_class),
        }
        origin.known.update(f"{key}.{name}" for key, names in known.items() for name in names)
        origin.known.update({*sections, "seed_everything"})
        for key, value in recipe.items():
            if key not in origin.known:
                below = f".{next(iter(value))}" if isinstance(value, Mapping) and value else ""
                raise settings.UnknownKeyError("", f"{key}{below}", [])
        run = settings.read(RunConfig, sections["run"], "run")
        model = settings.read(ModelSection, sections["model"], "model")
        for key, values in (("model.config", model.config), ("data", init_args), ("trainer", sections["trainer"])):
            settings.check_names(values, known[key] or list(values), key)
        trainer = TRAINER_DEFAULTS | sections["trainer"]
        ours = {name: trainer[name] for name in settings.parameters(_TrainerLimits) if name in trainer}
        trainer |= settings.arguments(ours, _TrainerLimits, "trainer")
        _check_together(run, trainer)
        seed = settings.convert(recipe.get("seed_everything", 1234), _Seed, "seed_everything")
        model.schedule.factor(0, trainer["max_steps"])  # refuses a warmup beyond the end
    return StageConfig(run, model, sections["data"], trainer, seed, origin)


def _check_together(run: RunConfig, trainer: Mapping[str, Any]) -> None:
    """Raises SettingError for arguments of the Trainer that `run` leaves nothing to say."""
    given = trainer.get("accumulate_grad_batches")
    if run.tokens_per_step is not None and given not in (None, 1):  # 1: Lightning's default, as config.yaml has it
        raise settings.SettingError(
            "trainer.accumulate_grad_batches",
            f"{given} would be ignored, it follows from run.tokens_per_step={run.tokens_per_step}; name one of them",
        )
    if run.checkpoint_every is not None and trainer.get("max_time") is not None:
        raise settings.SettingError(
            "trainer.max_time",
            f"{trainer['max_time']} ends a stage before trainer.max_steps={trainer['max_steps']}, which only a run "
            f"that saves nothing may do (run.checkpoint_every=null); SIGTERM stops any other with a checkpoint to "
            f"go on from, as in `timeout 1h <command>`",
        )


def names_in_source(module: str, name: str) -> list[str]:
    """What a class takes, from the source of a module that is not imported: the parameters of its `__init__`, or the
    fields of a dataclass of settings. Empty where that does not tell."""
    first, *rest = module.split(".")
    spec = PathFinder.find_spec(first)
    places = (spec.submodule_search_locations if spec else None) or []
    files = [file for place in places if (file := Path(place, *rest).with_suffix(".py")).is_file()]
    try:
        body = ast.parse(files[0].read_text(encoding="utf-8")).body if files else []
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    for cls in (node for node in body if isinstance(node, ast.ClassDef) and node.name == name):
        for item in cls.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                names = [each.arg for each in (*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs)]
                return [] if item.args.kwarg else names[1:]
        if [ast.unparse(base) for base in cls.bases] == ["Settings"]:
            return [ast.unparse(item.target) for item in cls.body if isinstance(item, ast.AnnAssign)]
    return []


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise settings.SettingError(key, f"expected a mapping of keys, got {'null' if value is None else repr(value)}")
    return dict(value)
