"""The gate between two stages: the checkpoint that a stage goes on from has been measured, and is good enough.

`eval.gate` measures it and writes `results/gate.json` into its run folder; here that is only read, and held against the
thresholds of the recipe as they are now (`recipes/<recipe>/gates/<stage>.yaml`). What it said when a stage began stays
in that stage's run folder (`gate-before.json`), whatever a resume is started with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2.files import read_json
from s2.model.hf import fingerprint
from s2.recipe import load_recipe

BEFORE = "gate-before.json"
THRESHOLDS = ("max", "min", "max_rise", "max_drop")  # of a check, one of them
_SAID = ("check", "task", "metric", "kind", "length", "from", "to", "value", "base", *THRESHOLDS)


def check_gate(init_from: str | None, gate: str, recipe: Path) -> dict[str, Any]:
    """What the gate of `init_from` (runs/<recipe>/<stage>/hf) says when a stage begins from there.

    Args:
        gate: `run.gate`.
        recipe: the stage's recipe file; thresholds are looked for beside its folder, then in recipes/.

    Returns:
        A record for JSON. `state`: "passed"; "missed": a check is not passed; "absent": not measured; "invalid": of
        other weights or thresholds, or not readable; "none": there is no gate. `asked`: run.gate. `said`: a sentence.
        Where there is a gate also `checkpoint` and its `fingerprint`, the `thresholds` file and its `digest`, `file`
        (gate.json) and its `checks`.

    Raises:
        ValueError: gate is "required" and the state is not "passed"; says why, and the commands that go on.
    """
    if init_from is None:
        return {"state": "none", "asked": gate, "said": ""}
    folder = Path(init_from)
    file, thresholds = folder.parent / "results" / "gate.json", thresholds_of(folder, recipe)
    if gate != "required" and thresholds is None and not file.is_file():
        return {"state": "none", "asked": gate, "said": ""}
    about: dict[str, Any] = {"asked": gate, "checkpoint": init_from, "fingerprint": fingerprint(folder)}
    about |= {"thresholds": thresholds and str(thresholds)}
    found = about | _verdict(folder, file, thresholds, about["fingerprint"])
    if gate == "required" and found["state"] != "passed":
        measure = f"`make gate RECIPE={folder.parent.parent.name} CKPT={folder}` measures it"
        first = {"missed": f"train it further, then {measure} again", "absent": measure}
        raise ValueError(
            f"run.gate=required: {found['said']}; {first.get(found['state'], f'{measure} again')}, and "
            f"ARGS=run.gate=ignore begins from it all the same, which the run records"
        )
    return found


def _verdict(folder: Path, file: Path, thresholds: Path | None, weights: str) -> dict[str, Any]:
    if not file.is_file():
        return {"state": "absent", "said": f"{folder} has not been measured, {file} is missing"}
    found: dict[str, Any] = {"state": "invalid", "file": str(file)}
    try:
        gate = read_json(file)
    except (OSError, ValueError) as error:
        return found | {"said": f"{file} is no record of a gate ({error})"}
    if wrong := what_is_wrong(gate):
        return found | {"said": f"{file} {wrong}"}
    checks, measured = gate["checks"], gate.get("fingerprint")
    taken = [check for check in checks if "unmeasured" not in check]
    missed = [_said(check) for check in taken if not holds(check)]
    left_out = [_said(check) for check in checks if "unmeasured" in check]
    found |= {"digest": gate.get("config_digest"), "checks": checks}
    if measured != weights:
        return found | {"said": f"{file} is of other weights than {folder} has now"}
    try:
        if thresholds and thresholds_digest(thresholds) != found["digest"]:
            own = gate.get("config", "others")
            return found | {"said": f"{file} was measured with the thresholds of {own}, not with {thresholds} as it is"}
        if thresholds and (wrong := _other_checks(checks, thresholds)):
            return found | {"said": f"{file} has other checks than {thresholds}: {wrong}"}
    except (ValueError, TypeError, AttributeError) as error:
        return found | {"said": f"{thresholds}: {error}"}
    if missed or not taken:
        said = f"{folder} has not passed its gate ({file}): {'; '.join(missed) or 'no check is passed'}"
        return found | {"state": "missed", "said": said}
    without = f"; not measured: {'; '.join(left_out)}" if left_out else ""
    return found | {"state": "passed", "said": f"{folder} has passed its gate ({file}){without}"}


def holds(check: Mapping[str, Any]) -> bool:
    """Whether the `value` of a check in gate.json keeps its threshold, and where that is `max_rise` or `max_drop`,
    beside the `base` checkpoint's. What is no finite number (null in JSON) does not.

    Raises:
        ValueError: a check without a threshold, or with several; a figure that is no number. KeyError: no figure.
    """
    given = [key for key in THRESHOLDS if check.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"a check with {' and '.join(given) or 'no threshold'}, expected one of {', '.join(THRESHOLDS)}"
        )
    [threshold] = given
    names = ["value", "base", threshold] if threshold in ("max_rise", "max_drop") else ["value", threshold]
    for name in names:
        if check[name] is not None and (isinstance(check[name], bool) or not isinstance(check[name], int | float)):
            raise ValueError(f"{name} is {json.dumps(check[name])}, expected a number")
    value, *base, limit = (math.nan if check[name] is None else check[name] for name in names)
    figure = value - sum(base)
    if not math.isfinite(figure):
        return False
    if threshold in ("max", "max_rise"):
        return figure <= limit
    return figure >= limit if threshold == "min" else -figure <= limit


def what_is_wrong(gate: Any) -> str:
    """Why the content of a gate.json is no record of one, or what it says has passed against its own figures; "" where
    nothing is wrong."""
    try:
        for check in gate["checks"]:
            if "unmeasured" not in check:
                is_right = check["passed"] is holds(check)
            else:  # of tasks alone, whose rows are elsewhere
                is_right = check["check"] == "task" and check["value"] is None and check["passed"] is None
            if not is_right:
                said = f"passed {json.dumps(check['passed'])}"
                return f"contradicts itself: {_said(check)} is recorded as {said}; a check is judged by its figures"
        together = all(holds(check) for check in gate["checks"] if "unmeasured" not in check)
        if gate["passed"] is not together:
            return f"contradicts itself: passed is {json.dumps(gate['passed'])}, and its checks say otherwise"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is no record of a gate ({error})"
    return ""


def _other_checks(checks: Sequence[Mapping[str, Any]], thresholds: Path) -> str:
    """How the checks of gate.json differ from those of a YAML in what is not a length; "" where they do not."""
    recipe, names = load_recipe(thresholds), ("task", "metric", "kind", *THRESHOLDS)
    wanted = [
        {"check": kind} | {key: each[key] for key in names if each.get(key) is not None}
        for kind, section in (("loss", "loss"), ("needle", "needle"), ("task", "tasks"))
        for each in recipe.get(section) or ()
    ]
    if len(checks) != len(wanted):
        return f"{len(checks)}, and there are {len(wanted)}"
    pairs = ((check, each) for check, each in zip(checks, wanted, strict=True) if not each.items() <= check.items())
    return next((f"{_said(check)}, and there it is {_said(each)}" for check, each in pairs), "")


def _said(check: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {check[key]}" for key in _SAID if check.get(key) is not None)


def thresholds_of(folder: Path, recipe: Path) -> Path | None:
    """The YAML of what the checkpoint runs/<recipe>/<stage>/hf has to show, if there is one."""
    below = Path(folder.parent.parent.name, "gates", f"{folder.parent.name}.yaml")
    places = (recipe.absolute().parent.parent / below, Path("recipes") / below)
    return next((place for place in places if place.is_file()), None)


def thresholds_digest(file: Path) -> str:
    """16 hex digits of the content of a YAML of thresholds, comments and order aside. Raises as `load_recipe`."""
    return hashlib.sha256(json.dumps(load_recipe(file), sort_keys=True).encode()).hexdigest()[:16]


def recorded(folder: Path) -> dict[str, Any]:
    """What the gate said when the stage in a run folder began; state "unknown" where nothing readable says it."""
    file = folder / BEFORE
    try:
        found = read_json(file)
        if isinstance(found, dict) and isinstance(found.get("said"), str) and isinstance(found.get("state"), str):
            return found
        wrong = "is no record of one"
    except (OSError, ValueError):
        wrong = "cannot be read" if file.is_file() else "is missing"
    return {"state": "unknown", "said": f"what the gate said at the beginning is not known, {file} {wrong}"}


def gate_warning(record: Mapping[str, Any] | None) -> str:
    """A line about a stage that has begun from a checkpoint whose gate was not passed, or passed in part; "" of others
    and where nothing is recorded."""
    if not record or record["state"] in ("none", "unknown"):
        return ""
    if record["state"] == "passed":
        left_out = [_said(check) for check in record.get("checks", ()) if "unmeasured" in check]
        return f"the gate before this stage was passed without {'; '.join(left_out)}" if left_out else ""
    return f"begun with run.gate={record['asked']} although {record['said']}"
