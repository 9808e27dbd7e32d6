"""The gate between two stages: the checkpoint that a stage goes on from has been measured, and is good enough.

`eval.gate` measures it and writes `results/gate.json` into its run folder; here that is only read.
"""

from __future__ import annotations

from pathlib import Path

from s2.files import read_json
from s2.model.hf import fingerprint

_SAID = (
    *("check", "task", "metric", "kind", "length", "from", "to"),
    *("value", "base", "max", "min", "max_rise", "max_drop"),
)


def check_gate(init_from: str, gate: str) -> str:
    """A line about the gate of `init_from` (runs/<recipe>/<stage>/hf), empty where it has none and needs none.

    Args:
        gate: `run.gate`.

    Raises:
        ValueError: gate is "required" and there is no gate.json of these very weights in which all checks are passed;
            names the check that is not, or the command that measures them.
    """
    folder = Path(init_from)
    file = folder.parent / "results" / "gate.json"
    if gate != "required" and not file.is_file():
        return ""
    wrong = _objection(folder, file)
    if not wrong:
        return f"{folder} has passed its gate ({file})"
    if gate == "required":
        raise ValueError(f"run.gate=required: {wrong}; run.gate=ignore goes on all the same")
    return f"run.gate=ignore: {wrong}"


def _objection(folder: Path, file: Path) -> str:
    command = f"make gate RECIPE={folder.parent.parent.name} CKPT={folder}"
    if not file.is_file():
        return f"{folder} has not been measured, {file} is missing; run `{command}`"
    try:
        gate = read_json(file)
        checks, passed, measured = gate["checks"], gate["passed"], gate["fingerprint"]
        missed = [check for check in checks if not check["passed"]]
        found = [", ".join(f"{key} {check[key]}" for key in _SAID if check.get(key) is not None) for check in missed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{file} is no record of a gate ({error}); run `{command}`"
    if found or not passed or not checks:
        return f"{folder} has not passed its gate ({file}): {'; '.join(found) or 'it has no check'}"
    if measured != fingerprint(folder):
        return f"{file} is of other weights than {folder} has now; run `{command}`"
    return ""
