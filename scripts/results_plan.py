"""Plans of experiments: which runs are compared, on which data, and what each of them consists of.

A plan is a YAML file (`recipes/experiments/<name>/plan.yaml`):

    name: patterns
    about: what is compared, and what a reader has to know of it
    root: runs/experiments/patterns        # everything that the runs write
    baseline: dense                        # the arm that differences are taken from
    also: import                           # a second one for tasks and losses, whatever stage it has them of
    front: [dense, hybrid]                 # arms of front.png: needle heatmaps side by side, a table below
    inputs: {haystack: some/text}          # names for `{haystack}` in recipes and commands; a list is spliced in
    data:                                  # `data.prepare` sections by name, prepared once for all arms
      corpus: {output: ..., sources: [...], tokenizer: {...}}   # or the path of a plan that has them
    stages:                                # of every arm, in this order
      - {name: train, minutes: 7, recipe: {...}}      # a training recipe, in full or the path of one
      - name: evaluate
        command: [python, -m, eval.suite, --ckpt, "{arm}/train/hf", ...]
        leaves: ["{arm}/train/results/suite*.json"]
    arms:
      - {name: dense, overrides: [model.config.attention_layout=dense]}

`{arm}` is the arm's folder, <root>/<arm>; a stage that trains has its run folder in <root>/<arm>/<stage>. `minutes` is
what a stage takes on one GPU: with a time limit an arm is begun only where all of it fits. Overrides (`key=value`) of a
stage hold for all arms, those of an arm for all of its stages that train; an arm may leave out stages and set `inputs`
of its own.
"""

from __future__ import annotations

import glob
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from itertools import pairwise, takewhile, zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar

from results_record import checked

from data.prepare.spec import PrepareSpec
from data.section import DATAMODULE, DataSection, check_source
from s2.files import read_json
from s2.model.config import ModelConfig
from s2.model.hf import load_config
from s2.recipe import apply_overrides, differences, load_recipe
from s2.settings import Check, SettingError, Settings, Weight, below, convert, read
from s2.training.config import read_stage

EXPERIMENTS = Path("recipes/experiments")
MOST_IN_FRONT = 4  # arms side by side in front.png
_READS = ("--haystack", "--documents", "--data-dir", "--qa", "--ckpt", "--config")  # options of commands
_Name = Annotated[str, Check("a name of letters, digits, '-', '_' and '.'", lambda s: re.fullmatch(r"\w[\w.\-]*", s))]


@dataclass(frozen=True, kw_only=True)
class Stage(Settings):
    """A step of every arm: `recipe` (a mapping, or the path of one) is trained with `overrides`, or `command` is run,
    which is done once each pattern of `leaves` names a file. minutes: on one GPU."""

    name: _Name
    recipe: Any = None
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    minutes: Weight = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.recipe is None) == (not self.command):
            raise SettingError("", f"stage {self.name!r} needs either a recipe or a command")
        if not isinstance(self.recipe, Mapping | str | None):
            raise SettingError("recipe", f"expected a mapping of keys, or the path of a recipe, got {self.recipe!r}")
        if bool(self.command) != bool(self.leaves):
            raise SettingError("leaves", f"stage {self.name!r}: the files that tell that its command is done")


@dataclass(frozen=True, kw_only=True)
class Arm(Settings):
    """One of the things compared. stages: which of the plan's it has (default: all); minutes: where a stage takes other
    ones than the plan says."""

    name: _Name
    about: str = ""
    overrides: tuple[str, ...] = ()
    stages: tuple[str, ...] | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    minutes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        with below("minutes"):
            for stage, minutes in self.minutes.items():
                convert(minutes, Weight, stage)


@dataclass(frozen=True, kw_only=True)
class Plan(Settings):
    """See the module."""

    name: _Name
    stages: tuple[Stage, ...]
    arms: tuple[Arm, ...]
    root: Annotated[str, Check("a folder", lambda s: s.strip())]
    about: str = ""
    baseline: str | None = None
    also: str | None = None
    front: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    file: ClassVar[Path | None] = None  # that it was read from

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, names in (("stages", [s.name for s in self.stages]), ("arms", [a.name for a in self.arms])):
            if not names or len(set(names)) < len(names):
                raise SettingError(what, f"expected one or more, with names of their own, got {names}")
        stages, arms = {stage.name for stage in self.stages}, {arm.name for arm in self.arms}
        for i, arm in enumerate(self.arms):
            if unknown := (set(arm.stages or ()) | set(arm.minutes)) - stages:
                raise SettingError(f"arms[{i}]", f"stage {min(unknown)!r} is none of {', '.join(sorted(stages))}")
        named = [("baseline", self.baseline), ("also", self.also), *(("front", name) for name in self.front)]
        for what, name in named:
            if name is not None and name not in arms:
                raise SettingError(what, f"{name!r} is none of the arms {', '.join(sorted(arms))}")
        if self.also is not None and self.also == self.baseline:
            raise SettingError("also", f"{self.also!r} is the baseline; name another arm")
        if self.front and not 2 <= len(set(self.front)) == len(self.front) <= MOST_IN_FRONT:
            raise SettingError("front", f"expected 2 to {MOST_IN_FRONT} different arms, got {list(self.front)}")

    @property
    def specs(self) -> dict[str, PrepareSpec]:
        """What is to be prepared, by name."""
        names = {"root": self.root} | self.inputs
        data = _filled(self.data, names, f"{self.name}: data")
        return {name: PrepareSpec.parse(values, f"data.{name}") for name, values in data.items()}

    def jobs(self, only: Sequence[str] = ()) -> dict[str, list[Job]]:
        """The stages of each arm, in order. Raises ValueError for an arm that is not there, or a bad recipe."""
        names = [arm.name for arm in self.arms]
        if unknown := [name for name in only if name not in names]:
            raise ValueError(f"--only {unknown[0]}: {self.name} has the arms {', '.join(names)}")
        return {
            arm.name: [self._job(arm, stage) for stage in self.stages if arm.stages is None or stage.name in arm.stages]
            for arm in self.arms
            if not only or arm.name in only
        }

    def _job(self, arm: Arm, stage: Stage) -> Job:
        where = f"{self.file or self.name}: arm {arm.name}, stage {stage.name}"
        folder = Path(self.root) / arm.name
        values = {"arm": str(folder), "root": self.root} | self.inputs | arm.inputs
        for _ in range(3):  # they may name each other
            values = {key: _filled(value, values, where) for key, value in values.items()}
        recipe = None
        if stage.recipe is not None:
            recipe = load_recipe(Path(stage.recipe)) if isinstance(stage.recipe, str) else stage.recipe
            recipe = _filled(recipe, values, where)
            if not isinstance(run := recipe.get("run") or {}, Mapping):
                raise ValueError(f"{where}: recipe.run: expected a mapping of keys, got {run!r}")
            recipe = {**recipe, "run": {**run, "root": self.root, "recipe": arm.name, "stage": stage.name}}
            apply_overrides(recipe, _filled([*stage.overrides, *arm.overrides], values, where))
        words, leaves = (_filled(list(each), values, where) for each in (stage.command, stage.leaves))
        command = [str(word) for word in words]
        minutes = float(arm.minutes.get(stage.name, stage.minutes))
        inputs = {key: value for key, value in values.items() if key in self.inputs and key not in arm.inputs}
        plan = str(self.file or self.name)
        return Job(arm.name, stage.name, folder, recipe, command, tuple(leaves), minutes, plan, inputs)


@dataclass(frozen=True)
class Job:
    """A stage of an arm, ready to run.

    Attributes:
        folder: <root>/<arm>; there <stage>.run.json is the record, <stage>.log what was said, <stage>.yaml the recipe.
        recipe: of a stage that trains, as it is trained.
        command: of other stages; the word `python` stands for this interpreter.
        plan: its file.
        inputs: of the plan, by name, as recipe and command have them; those that the arm sets are not among them.
    """

    arm: str
    stage: str
    folder: Path
    recipe: dict[str, Any] | None
    command: list[str]
    leaves: tuple[str, ...]
    minutes: float
    plan: str = "the plan"
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return str(self.folder.parent)

    @property
    def record_file(self) -> Path:
        return self.folder / f"{self.stage}.run.json"

    @property
    def recipe_file(self) -> Path:
        return self.folder / f"{self.stage}.yaml"

    @property
    def log_file(self) -> Path:
        return self.folder / f"{self.stage}.log"

    @property
    def weights(self) -> Path:
        """What a stage that trains exports."""
        return self.folder / self.stage / "hf"

    def reads(self, exports: Iterable[Path]) -> Path | None:
        """Which of these folders of weights it reads, None where it reads none of them or has a checkpoint to go on
        from. `--config` of a command takes the config alone."""
        if self.recipe is not None:
            if any((self.folder / self.stage / "checkpoints").glob("step-*")):
                return None
            named = [str((self.recipe.get("model") or {}).get("init_from"))]
        else:
            named = [word for option, word in pairwise(["", *self.command]) if option != "--config"]
        return next((folder for folder in exports if any(Path(word) == folder for word in named)), None)

    @property
    def words(self) -> list[str]:
        """The command line, as records keep it."""
        return self.command or ["python", "-m", "s2.training.cli", str(self.recipe_file)]

    @property
    def record(self) -> dict[str, Any]:
        """What is known of its runs so far; {} before the first. Raises ValueError for a file that is no record."""
        return checked(read_json(self.record_file), str(self.record_file)) if self.record_file.is_file() else {}

    @property
    def is_done(self) -> bool:
        """Whether its last run ended well and what it leaves is there."""
        if self.record.get("exit_code") != 0:
            return False
        if self.recipe is not None:
            return (self.folder / self.stage / "summary.json").is_file()
        return all(glob.glob(pattern) for pattern in self.leaves)

    def check(self, prepared: Sequence[PrepareSpec] = ()) -> None:
        """Raises ValueError, FileNotFoundError for a recipe that cannot be trained or a command that has nothing to
        read, and as `check_done`. prepared: the plan's data."""
        if self.recipe is None:
            self._check_command([spec.output for spec in prepared])
        else:
            read_stage(self.recipe, self.recipe_file)
            self._check_data(prepared)
            model = self.recipe.get("model") or {}
            source, where = model.get("init_from"), f"arm {self.arm}, stage {self.stage}: model"
            if source is None or Path(source, "config.json").is_file():
                base = {} if source is None else asdict(load_config(source))
                ModelConfig.from_dict({**base, **(model.get("config") or {})}, f"{where}.config")
            elif not Path(source).is_relative_to(self.folder):  # no earlier stage makes it
                raise FileNotFoundError(
                    f"{where}.init_from={source} has no config.json{self._other(source, 'a Hugging Face folder')}"
                )
        self.check_done()

    def _check_data(self, prepared: Sequence[PrepareSpec]) -> None:
        """The recipe's section, and whether the plan's data has the sources that it takes of it."""
        data, where = (self.recipe or {})["data"], f"arm {self.arm}, stage {self.stage}: data"
        if data["class_path"] != DATAMODULE:
            return
        section = read(DataSection, data.get("init_args") or {}, where)
        for part in ("mixture", "validation"):
            for i, each in enumerate(getattr(section, part) or ()):
                check_source(each.path, each.source, prepared, f"{where}.{part}[{i}].source")

    def _check_command(self, prepared: Sequence[str]) -> None:
        """What a command would say when the stages before it have run."""
        where = f"arm {self.arm}, stage {self.stage}"
        if self.is_done:
            return
        reads = _READS
        if self.command[:3] == ["python", "-m", "eval.suite"]:
            from eval import suite  # torch

            said = io.StringIO()
            try:
                with redirect_stderr(said):  # of argparse, which then leaves
                    texts = suite.texts(suite.read_arguments(self.command[3:]))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            except SystemExit:
                raise ValueError(f"{where}: {said.getvalue().rpartition('error: ')[2].strip()}") from None
            reads = ("--ckpt", *texts)
        for option, word in pairwise(self.command):
            is_made = any(map(Path(word).is_relative_to, (self.root, *prepared)))
            if option in reads and not is_made and not Path(word).exists():
                raise FileNotFoundError(f"{where}: {option} {word}: no such file or folder{self._other(word)}")

    def _other(self, value: str, what: str = "another") -> str:
        """How to name something else than `value`: by the input that has it, where one has."""
        names = [f"inputs.{name}=<path>" for name, each in self.inputs.items() if each == value]
        how = f"name {what} by {' and '.join(names)}; " if names else ""
        return f"; {how}see {self.plan}"

    def check_done(self) -> None:
        """Raises ValueError for a stage that was finished with another recipe or command: figures of two settings do
        not go under one name."""
        if self.is_done:
            self.check_record(self.record, str(self.record_file))

    def check_record(self, record: Mapping[str, Any], source: str) -> None:
        """Raises ValueError, naming what differs, for a record of a stage that ended well with another recipe or
        command than the plan has now. Which interpreter it was, and in which root, is all the same."""
        if record.get("exit_code") != 0 or not (changed := self._changed(record)):
            return
        raise ValueError(
            f"{source}: arm {self.arm}, stage {self.stage} is finished with {changed[0]}, and the plan says "
            f"{changed[1]}; give the arm another name, or the plan another root"
        )

    def _changed(self, record: Mapping[str, Any]) -> tuple[str, str] | None:
        """What a record says and what the plan says, where they differ."""
        recipe, words = (_moved(record.get(key), record.get("root"), self.root) for key in ("recipe", "command"))
        if (recipe is None) != (self.recipe is None):
            old, new = ("a command" if each is None else "a training recipe" for each in (recipe, self.recipe))
            return old, new
        if self.recipe is not None:
            found = differences(recipe, self.recipe)
            return (f"{found[0][0]}={found[0][1]!r}", repr(found[0][2])) if found else None
        # records of earlier versions name the interpreter by its path
        pairs = zip_longest(words or (), self.command)
        words = ["python" if new == "python" and re.fullmatch(r".*/python[\d.]*", old or "") else old
                 for old, new in pairs if old is not None]  # fmt: skip
        return None if words == self.command else _where_they_differ(words, self.command)


def lost_weights(jobs: Sequence[Job]) -> str | None:
    """What keeps an arm from going on: a stage that is left reads weights of a finished one that are not here. None
    where nothing does."""
    lost = {
        job.weights: job for job in jobs if job.recipe and job.is_done and not any(job.weights.glob("*.safetensors"))
    }
    for job in (job for job in jobs if not job.is_done):
        source, folders = job.reads(lost), list[str]()
        while source is not None and str(source.parent) not in folders:  # what it was trained from is not here either
            folders.append(str(source.parent))
            source = lost[source].reads(lost)
        if folders:
            return (
                f"arm {job.arm}, stage {job.stage}: the weights that it reads are not in {folders[0]}/hf (--export "
                f"leaves weights behind); to train them again remove {' and '.join(folders)}, or leave the arm out "
                "with --only"
            )
    return None


def _moved(value: Any, old: str | None, new: str) -> Any:
    """What a record says, as it would be in another root; earlier versions do not record theirs."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    if old is None or not isinstance(value, str):
        return value
    return re.sub(rf"(?<![\w.\-/]){re.escape(old)}(?![\w.\-])", lambda _: new, value)


def _where_they_differ(old: Sequence[str], new: Sequence[str]) -> tuple[str, str]:
    """The words of two commands between those that they begin and end with alike; a value with its option."""
    same = list(takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    begin = len(same) - (bool(same) and same[-1][0].startswith("-"))
    ends = zip(reversed(old[begin:]), reversed(new[begin:]), strict=False)
    end = len(list(takewhile(lambda pair: pair[0] == pair[1], ends)))
    first, second = (shown(words[begin : len(words) - end]) or "nothing there" for words in (old, new))
    return f"`{first}`", f"`{second}`"


def shown(words: Sequence[str]) -> str:
    """A command as it is typed."""
    return " ".join(word if word.replace("/", "").replace(".", "").replace("-", "").replace("_", "").isalnum()
                    else json.dumps(word) for word in words)  # fmt: skip


def load_plan(name: str, overrides: Sequence[str] = ()) -> Plan:
    """The plan of that name (`EXPERIMENTS`), or in that YAML file, after `key=value` overrides.

    Raises FileNotFoundError where there is none, ValueError naming what is wrong in it.
    """
    path = Path(name) if name.endswith(".yaml") else EXPERIMENTS / name / "plan.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.parent.name for each in EXPERIMENTS.glob("*/plan.yaml")))
        raise FileNotFoundError(f"no plan {path}; there are {known or 'none here'}")
    values = load_recipe(path)
    if isinstance(values.get("data"), str):
        values["data"] = load_recipe(Path(values["data"])).get("data")
    apply_overrides(values, overrides)
    try:
        plan = read(Plan, values | {
            "stages": tuple(read(Stage, s, f"stages[{i}]") for i, s in enumerate(_listed(values, "stages"))),
            "arms": tuple(read(Arm, a, f"arms[{i}]") for i, a in enumerate(_listed(values, "arms"))),
        }, "")  # fmt: skip
    except SettingError as error:
        raise ValueError(f"{path}: {error}") from error
    object.__setattr__(plan, "file", path)
    return plan


def _listed(values: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(found := values.get(key), list):
        raise SettingError(key, f"expected a list, got {found!r}")
    return found


def _filled(value: Any, names: Mapping[str, Any], where: str) -> Any:
    """`value` with names in braces replaced by what they stand for."""
    if isinstance(value, dict):
        return {key: _filled(item, names, where) for key, item in value.items()}
    if isinstance(value, list):
        spliced: list[Any] = []
        for item in value:
            whole = re.fullmatch(r"\{(\w+)\}", item) if isinstance(item, str) else None
            if whole and isinstance(names.get(whole[1]), list):
                spliced += names[whole[1]]
            else:
                spliced.append(_filled(item, names, where))
        return spliced
    if not isinstance(value, str):
        return value

    def named(match: re.Match[str]) -> str:
        if match[1] not in names:
            raise ValueError(f"{where}: {match[0]} is none of the plan's inputs {', '.join(sorted(names))}")
        return str(names[match[1]])

    return re.sub(r"\{(\w+)\}", named, value)
