"""lm-eval's tasks, loaded with two corrections that hold for all of them, from the hub and from local files."""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetGenerationError
from jinja2 import UndefinedError
from lm_eval import utils
from lm_eval.api.metrics import weighted_mean, weighted_perplexity
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

_TEMPLATES = 1024  # that are kept
# Of lm-eval's warnings, by logger, those that look like faults and say what is meant to be: that a task makes its rows
# itself, and that some of its metrics are of some of them.
_MEANT = {
    "lm_eval.api.task": "{}: Custom kwargs can be passed to",
    "lm_eval.evaluator_utils": "[{}] Metrics were not scored on the same number of documents",
}


class CorrectedTasks(TaskManager):
    """A TaskManager whose tasks
      - never show a document's own answer among its few-shot examples: where these come from the evaluated split,
        lm-eval leaves the document out only if the task's YAML names that split for both;
      - have an infinite perplexity per word where it is too large for a number, as for texts without spaces, whose
        words are whole documents; lm-eval's fails after all the scoring.

    Args:
        num_fewshot: what the tasks will be run with, to refuse what their examples are too few for.
        data_dir: where local files come from, for messages.
    """

    def __init__(self, *args: Any, num_fewshot: int | None = None, data_dir: Path | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_fewshot, self._data_dir = num_fewshot, data_dir

    def load(self, task_list: Any) -> Any:
        """As lm-eval's. Raises ValueError for more few-shot examples than there are documents for, local files without
        the columns of a task, and a package that a task needs and that is not installed."""
        try:
            loaded = super().load(task_list)
        except ImportError as error:
            raise ValueError(f"--tasks {', '.join(task_list)}: a package is missing: {error}") from None
        except ConnectionError as error:
            raise ConnectionError(f"{error}; --data-dir FOLDER (make: EVAL_DATA=FOLDER) reads local files") from None
        except (KeyError, UndefinedError, DatasetGenerationError) as error:
            if self._data_dir is None:
                raise
            reason = f"{type(error).__name__}: {error.__cause__ or error}"
            raise ValueError(
                f"--data-dir {self._data_dir}: rows are not as {', '.join(task_list)} need them ({reason}); they have"
                " to have the columns of the hub dataset"
            ) from None
        for name, task in loaded["tasks"].items():
            if not isinstance(task, ConfigurableTask):
                continue
            _leave_own_document_out(task)
            aggregations = task.aggregation()
            for metric, aggregate in aggregations.items():
                if aggregate is weighted_perplexity:
                    aggregations[metric] = perplexity_per_unit
            if (shots := self._shots(task)) and hasattr(task, "sampler"):
                available = len(task.sampler.df) - (task.fewshot_cfg.split == task.config.test_split)
                if shots > available:
                    raise ValueError(
                        f"--num-fewshot {shots}: task {name} has only {available} documents to take examples from"
                    )
        return loaded

    def _shots(self, task: Any) -> int:
        own = task.config.num_fewshot
        if task.OUTPUT_TYPE == "loglikelihood_rolling" or own == 0:
            return 0  # as lm-eval has it, a task that says 0 stays at 0
        return (own if self._num_fewshot is None else self._num_fewshot) or 0


@contextmanager
def quiet_about(tasks: Collection[str]) -> Iterator[None]:
    """Within, lm-eval does not warn of what is meant to be in these tasks (`_MEANT`)."""

    def silenced(begin: str) -> Callable[[logging.LogRecord], bool]:
        begins = tuple(map(begin.format, tasks))
        return lambda record: not str(record.msg).startswith(begins)

    filters = [(logging.getLogger(name), silenced(begin)) for name, begin in _MEANT.items()]
    for logger, keeps in filters:
        logger.addFilter(keeps)
    try:
        yield
    finally:
        for logger, keeps in filters:
            logger.removeFilter(keeps)


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Within, lm-eval compiles each template of a task once. By itself it does so for each document and use, a
    millisecond every time, 19,000 times for 5,000 documents of five tasks."""
    environment = utils.env
    environment.from_string = lru_cache(_TEMPLATES)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string


def _leave_own_document_out(task: Any) -> None:
    """Name the evaluated split as the test split and as that of the examples, where they come from it: then lm-eval
    leaves out what equals the document."""
    config, fewshot = task.config, task.fewshot_cfg
    evaluated = config.test_split or config.validation_split
    if fewshot.split is not None:
        split = fewshot.split
    elif config.fewshot_config is not None and fewshot.samples is not None:
        return  # examples of the task's own, of no split
    else:
        split = config.training_split or config.validation_split or config.test_split
    if split == evaluated:
        fewshot.split = config.test_split = evaluated


def perplexity_per_unit(items: Sequence[tuple[float, float]]) -> float:
    """exp of the loss per word or byte; items are (log-likelihood, number of units). Infinite where a float ends."""
    try:
        return math.exp(-weighted_mean(items))
    except OverflowError:
        return math.inf
