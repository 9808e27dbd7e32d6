"""Run an experiment: prepare its data once, run its arms over the GPUs at hand, and make the page of its results.

    python scripts/results.py patterns                        # or: make results NAME=patterns
    python scripts/results.py patterns --dry-run              # what would be run, in which order
    python scripts/results.py patterns --only dense,s2 --minutes 27        # stops in time; the same command goes on
    python scripts/results.py patterns --status               # what another process is doing
    python scripts/results.py patterns --export day1.tar.gz   # results without weights, to carry to another machine
    python scripts/results.py patterns --import day1.tar.gz   # adds them to what is here, and makes the page
    python scripts/results.py patterns --import day1.tar.gz --only dense     # of its arms, this one

The plan is recipes/experiments/<name>/plan.yaml (scripts/results_plan.py says what is in it); `key=value` overrides its
keys: `data.corpus.sources='[/data/*.parquet]'`. Each arm runs on one GPU. The page is docs/results/<date>-<name>/ (with
a number behind it where the page of other runs is there), made of whatever arms are there, and names those that are
missing.

Exit codes: 0 everything is done, 1 an arm failed (its log says why), 75 the time is over, or stopped: start it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results_collect import collect
from results_pack import pack, require_ours, unpack
from results_page import ARCHIVE, page_folder, shards, write
from results_plan import Job, Plan, load_plan, lost_weights, shown
from results_queue import Queue, status

from data.prepare.run import check, prepare
from data.prepare.spec import PrepareSpec
from data.shards.reader import MANIFEST, read_manifest
from s2 import ending
from s2.ending import FailureError
from s2.locks import lock
from s2.tables import markdown

TITLES = {
    "curves": "Losses over tokens and over minutes",
    "positions": "Held-out loss by position",
    "speed": "Quality at the longest length trained on against the time of all layers' attention",
}


class Unfinished(Exception):  # noqa: N818 -- not an error: it can go on
    """The time is over, or the process was told to stop."""

    exit_code = ending.STOPPED


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", help="of the experiment, or a plan's YAML file")
    add("overrides", nargs="*", metavar="key=value", help="keys of the plan")
    add("--only", default="", help="arms to run, pack or add, separated by commas (default: all, in the plan's order)")
    add("--gpus", type=int, help="GPUs to use (default: all at hand; without any, the CPU)")
    add("--minutes", type=float, help="stop by then: what runs is saved, arms that do not fit are not begun")
    add("--output", type=Path, help="folder of the page (default: docs/results/<date>-<name>)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check the plan and show it")
    what.add_argument("--data-only", action="store_true", help="stop when the data is prepared")
    what.add_argument("--status", action="store_true", help="where the arms stand")
    what.add_argument("--page", action="store_true", help="only make the page")
    what.add_argument("--export", type=Path, metavar="FILE.tar.gz")
    what.add_argument("--import", type=Path, metavar="FILE.tar.gz", dest="add")
    args = parser.parse_intermixed_args(argv)
    for option, least in (("gpus", 1), ("minutes", 0)):
        value = getattr(args, option)
        if value is not None and not (value >= least and value > 0):
            parser.error(f"--{option} {value:g}: expected a number above 0")
    return args


def prepare_data(specs: Mapping[str, PrepareSpec]) -> None:
    """Prepare what is missing. Folders that are finished are taken as they are, wherever they were made; how the plan
    would make them otherwise is said."""
    missing = {}
    for name, spec in specs.items():
        manifests = [folder / MANIFEST for folder in spec.folders.values()]
        if not all(map(Path.is_file, manifests)):
            missing[name] = spec
            continue
        changed = spec.changes(read_manifest(manifests[0].parent)["settings"])
        note = f", made with other settings (there != asked): {'; '.join(changed[:3])}" if changed else ""
        print(f"data.{name}: {spec.output} is there{note}", flush=True)
    check(list(missing.values()))
    for name, spec in missing.items():
        print(f"data.{name}: preparing {spec.output}", flush=True)
        prepare(spec)


def data_folders(plan: Plan) -> dict[str, Path]:
    return {name: spec.folders["train"] for name, spec in plan.specs.items()}


def gpus_at_hand(asked: int | None) -> list[int | None]:
    """Indices of the GPUs to use, [None] for the CPU. Raises ValueError where there are not so many."""
    import torch

    there = torch.cuda.device_count()
    if asked is not None and asked > there:
        raise ValueError(f"--gpus {asked}: there are {there} here")
    return list(range(asked or there)) or [None]


def check_gpus(jobs: Mapping[str, Sequence[Job]], gpus: Sequence[int | None]) -> None:
    """Raises ValueError where there is no GPU, and an arm that is left trains on one."""
    left = [job for each in jobs.values() for job in each if job.recipe is not None and not job.is_done]
    needy = [job for job in left if (job.recipe or {}).get("trainer", {}).get("accelerator") != "cpu"]
    if needy and list(gpus) == [None]:
        arms = ", ".join(dict.fromkeys(job.arm for job in needy))
        raise ValueError(
            f"there is no GPU here, and {arms} would train on one ({needy[0].stage}: {needy[0].minutes:g} minutes); a "
            f"recipe that says trainer.accelerator=cpu trains on a CPU, and --data-only, --dry-run, --status, --page, "
            f"--import and --export need none"
        )


def show(jobs: Mapping[str, Sequence[Job]], gpus: int) -> None:
    """The plan as a table, with commands."""
    rows, left = [], 0.0
    for job in (job for each in jobs.values() for job in each):
        left += 0 if job.is_done else job.minutes
        state = "done" if job.is_done else f"{job.minutes:g} min"
        layout = ((job.recipe or {}).get("model") or {}).get("config", {}).get("attention_layout", "")
        rows.append([job.arm, job.stage, state, layout or shown(job.words)[:100]])
    print(markdown(["arm", "stage", "minutes", "layout, or command"], rows))
    print(f"{left:g} minutes on one GPU are left, {left / gpus:.0f} on {gpus}")


def make_page(plan: Plan, asked: str, jobs: Mapping[str, Sequence[Job]], output: Path | None) -> Path | None:
    """The page of what is there; None where nothing is. asked: the plan's name or file, as the command gave it."""
    results = collect(jobs, plan.baseline, plan.also)
    if not results["arms"]:
        return None
    began = [a["began"] for each in results["arms"].values() for r in each["stages"].values() for a in r["attempts"]]
    results = {"name": plan.name, "plan": asked, "made": time.strftime("%Y-%m-%d"), "about": plan.about, **results}
    folder = output or page_folder(Path("docs/results", f"{max(began)[:10]}-{plan.name}"), results)
    page = write(plan, results, folder, TITLES)
    pack(plan, page.with_name(ARCHIVE), figures_only=True)
    return page


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    plan = load_plan(args.name, args.overrides)
    only = [name for name in args.only.split(",") if name]
    jobs = plan.jobs(only)
    if args.status:
        print(markdown(["arm", "stage", "state", "progress"], status(jobs)))
        return ending.DONE
    if args.export:
        require_ours(args.export)
        print(f"{args.export}: {pack(plan, args.export, only=only)} files")
        return ending.DONE
    for job in (job for each in plan.jobs().values() for job in each):
        job.check_done()  # of arms that are not run now too: the page shows them
    if args.add:
        with lock(_root(plan)):
            print(f"{len(unpack(plan, args.add, only))} new files in {plan.root}")
        for lost in filter(None, map(lost_weights, plan.jobs().values())):
            print(lost)
    if args.add or args.page:
        print(make_page(plan, args.name, plan.jobs(), args.output) or f"{plan.root} holds no results yet")
        return ending.DONE
    specs = plan.specs
    for job in (job for each in jobs.values() for job in each):
        job.check(list(specs.values()))
    for lost in filter(None, map(lost_weights, jobs.values())):
        raise ValueError(lost)
    gpus = gpus_at_hand(args.gpus)
    if args.dry_run:
        show(jobs, len(gpus))
        return ending.DONE
    if not args.data_only:
        check_gpus(jobs, gpus)
    with lock(_root(plan)):
        began = time.monotonic()
        prepare_data(specs)
        if args.data_only:
            return ending.DONE
        launched = shown(["python", "scripts/results.py", *(sys.argv[1:] if argv is None else argv)])
        about = {"experiment": plan.name, "launched": launched, **_machine(), "data": shards(data_folders(plan))}
        left = None if args.minutes is None else args.minutes - (time.monotonic() - began) / 60
        queue = Queue(jobs, gpus, left, about, lambda line: print(line, flush=True))
        queue.run()
        print(make_page(plan, args.name, plan.jobs(), args.output) or "nothing is finished, so there is no page yet")
    if queue.failed:
        raise FailureError("; ".join(f"{arm} {why}" for arm, why in queue.failed.items()))
    if queue.left:
        raise Unfinished(f"stopped with {', '.join(queue.left)} unfinished; the same command goes on")
    return ending.DONE


def _machine() -> dict[str, Any]:
    from s2.training.environment import environment  # torch, which --status and --dry-run do without

    here = environment()
    return {"commit": here["commit"] or "unknown", "versions": here["versions"], "device": here["device"]}


def _root(plan: Plan) -> Path:
    root = Path(plan.root)
    root.mkdir(parents=True, exist_ok=True)
    return root


if __name__ == "__main__":
    ending.run(main)
