"""Experiments as commands: plans, the queue of runs, carried results and the page."""

from __future__ import annotations

import json
import os
import signal
import sys
import tarfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import results  # noqa: E402
from results_pack import pack, unpack  # noqa: E402
from results_plan import load_plan  # noqa: E402
from results_queue import Queue, status  # noqa: E402

from data.prepare.spec import PrepareSpec  # noqa: E402
from s2.ending import FailureError  # noqa: E402
from s2.model.config import ModelConfig  # noqa: E402
from s2.recipe import differences  # noqa: E402

MODEL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_layout": "L1V2", "block_size": 16,
}  # fmt: skip
RECIPE = {
    "seed_everything": 7,
    "run": {"recipe": "x", "stage": "x"},
    "model": {"config": MODEL},
    "data": {
        "class_path": "data.datamodule.PackedDataModule",
        "init_args": {"seq_len": 64, "micro_batch_size": 1, "mixture": [{"path": "shards/train"}]},
    },
    "trainer": {"max_steps": 4},
}
WORK = """
import json, pathlib, sys
folder, word = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
with (folder / "calls").open("a") as calls:
    calls.write(word + "\\n")
"""


def write_plan(folder: Path, body: str, arms: list[dict], **more) -> Path:
    """A plan of one stage, the program `body` with the arm's folder and {word}; it leaves <arm>/out."""
    program = folder / "work.py"
    program.write_text(WORK + textwrap.dedent(body))
    stage = {"name": "work", "command": ["python", str(program), "{arm}", "{word}"], "leaves": ["{arm}/out"]}
    plan = {"name": "test", "root": str(folder / "runs"), "inputs": {"word": "go"}, "stages": [stage], "arms": arms}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan | more))
    return path


def run(path: Path, minutes: float | None = None, gpus: tuple = (None,), only: tuple = (), overrides=()) -> Queue:
    about = {"launched": "results.py", "commit": "abc", "versions": {"torch": "9"}, "device": "the CPU", "data": {}}
    queue = Queue(load_plan(str(path), overrides).jobs(only), gpus, minutes, about, lambda line: None, pause=0.02)
    queue.run()
    return queue


# ---------------------------------------------------------------- plans


def test_overrides_of_a_stage_hold_for_all_arms_and_an_arms_for_its_own(tmp_path):
    stages = [{"name": "train", "recipe": RECIPE, "overrides": ["trainer.max_steps=5"]}]
    arms = [{"name": "a"}, {"name": "b", "overrides": ["model.config.attention_layout=dense"]}]
    path = write_plan(tmp_path, "", arms, stages=stages)
    a, b = (jobs[0] for jobs in load_plan(str(path), ["root=elsewhere"]).jobs().values())
    assert [job.recipe["trainer"]["max_steps"] for job in (a, b)] == [5, 5]
    assert [job.recipe["model"]["config"]["attention_layout"] for job in (a, b)] == ["L1V2", "dense"]
    assert b.recipe["run"] == {"recipe": "b", "stage": "train", "root": "elsewhere"}
    assert b.words[-1] == "elsewhere/b/train.yaml"
    a.check()


def test_inputs_stand_in_commands_and_lists_are_spliced(tmp_path):
    arms = [{"name": "a"}, {"name": "b", "inputs": {"word": ["{where}", 2], "where": "{arm}/hf"}}]
    jobs = load_plan(str(write_plan(tmp_path, "", arms))).jobs()
    assert jobs["a"][0].command[-1] == "go" and jobs["a"][0].command[0] == "python"
    assert jobs["b"][0].command[-2:] == [f"{tmp_path}/runs/b/hf", "2"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arms": [{"name": "a"}, {"name": "a"}]}, r"arms: .*names of their own, got \['a', 'a'\]"),
        ({"baseline": "dens"}, "baseline: 'dens' is none of the arms a"),
        ({"arms": [{"name": "a", "stages": ["trian"]}]}, r"arms\[0\]: stage 'trian' is none of work"),
        ({"arms": [{"name": "a", "overides": []}]}, r"arms\[0\]: unknown key 'overides'.*did you mean 'overrides'"),
        ({"stages": [{"name": "x"}]}, r"stages\[0\].*'x' needs either a recipe or a command"),
        ({"stages": [{"name": "x", "command": ["true"]}]}, r"stages\[0\].leaves: "),
        ({"inputs": {}}, r"arm a, stage work: \{word\} is none of the plan's inputs arm, root"),
    ],
)
def test_a_wrong_plan_names_what_is_wrong(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_plan(str(write_plan(tmp_path, "", **{"arms": [{"name": "a"}], **change}))).jobs()


def test_a_recipe_is_refused_before_anything_runs(tmp_path):
    wrong = RECIPE | {"model": {"config": MODEL | {"attention_layout": "L1W2"}}}
    far = RECIPE | {"model": {"init_from": str(tmp_path / "none")}}
    for recipe, error, sentence in (
        (wrong, ValueError, "arm a, stage train: model.config: .*L1W2"),
        (far, FileNotFoundError, "arm a, stage train: model.init_from=.*none has no config.json"),
        (RECIPE | {"trainer": {"max_stps": 4}}, ValueError, "trainer.max_stps"),
    ):
        path = write_plan(tmp_path, "", [{"name": "a"}], stages=[{"name": "train", "recipe": recipe}])
        with pytest.raises(error, match=sentence):
            results.main([str(path), "--dry-run"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "error", "sentence"),
    [
        (["--haystack", "nowhere.jsonl"], FileNotFoundError, r"--haystack nowhere\.jsonl: no such file or folder"),
        (
            ["--documents", "{data}/train"],
            FileNotFoundError,
            r"--documents .*data/train: no such file or folder; see /",
        ),
        (
            ["--qa", "{questions}"],
            FileNotFoundError,
            r"--qa q\.jsonl: .*name another by inputs\.questions=<path>; ",
        ),
        (["--parts", "needles"], ValueError, r"--parts needles: expected some of"),
        (["--lenghts", "2k"], ValueError, r"unrecognized arguments: --lenghts 2k$"),
        (["--needle-n", "few"], ValueError, r"argument --needle-n: invalid int value: 'few'$"),
    ],
)
def test_a_command_that_could_not_run_after_training_is_refused_before_it(words, error, sentence, tmp_path):
    suite = ["python", "-m", "eval.suite", "--ckpt", "{arm}/train/hf"]
    stage = {"name": "evaluate", "leaves": ["{arm}/train/results/suite*.json"]}
    data = {"output": "{data}", "sources": [str(tmp_path / "*.yaml")], "tokenizer": {"path": "t.json"}}
    inputs = {"data": str(tmp_path / "data"), "questions": "q.jsonl"}
    stages = [{"name": "train", "recipe": RECIPE}, stage | {"command": suite + words}]
    path = write_plan(tmp_path, "", [{"name": "a"}], stages=stages, inputs=inputs)
    with pytest.raises(error, match=f"arm a, stage evaluate: {sentence}"):
        results.main([str(path), "--dry-run"])
    stages[1]["command"] = [*suite, "--documents", "{data}/train"]  # which the plan prepares
    path = write_plan(tmp_path, "", [{"name": "a"}], stages=stages, inputs=inputs, data={"corpus": data})
    assert results.main([str(path), "--dry-run"]) == 0


def test_sources_that_the_plan_does_not_prepare_are_refused_before_they_are_missed(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = load_plan(
        "smollm2", [f"inputs.checkpoint={ROOT / 'recipes/demo/start'}", "data.corpus.sources=[texts/books.jsonl.gz]"]
    )
    job = plan.jobs(["dense"])["dense"][0]
    with pytest.raises(
        ValueError, match=r"arm dense, stage train: data\.mixture\[1\]\.source: 'books' is none of .*name"
    ):
        job.check(list(plan.specs.values()))


def test_data_that_is_there_and_was_made_otherwise_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    values = {"output": "out", "sources": ["corpus.jsonl"], "heldout_fraction": 0.5}
    values["tokenizer"] = {"path": str(ROOT / "recipes/demo/start/tokenizer.json")}
    results.prepare_data({"corpus": PrepareSpec.parse(values)})
    results.prepare_data({"corpus": PrepareSpec.parse(values)})
    results.prepare_data({"corpus": PrepareSpec.parse(values | {"seed": 4})})
    same, other = capsys.readouterr().out.splitlines()[1:]
    assert same == "data.corpus: out is there"
    assert other == "data.corpus: out is there, made with other settings (there != asked): seed: 0 != 4"


def test_an_unknown_experiment_or_arm_names_those_that_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipes/experiments/patern/plan.yaml; there are patterns"):
        load_plan("patern")
    with pytest.raises(ValueError, match="--only b: test has the arms a"):
        load_plan(str(write_plan(tmp_path, "", [{"name": "a"}]))).jobs(["b"])


@pytest.mark.parametrize("name", ["patterns", "scale", "scale-32k", "smollm2"])
def test_the_arms_of_a_shipped_experiment_differ_in_their_attention_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig(**shape).to_hf_dict()))
    (tmp_path / "tokenizer.json").write_bytes((ROOT / "recipes/demo/start/tokenizer.json").read_bytes())
    plan = load_plan(name, [f"inputs.checkpoint={tmp_path}", f"root={tmp_path / 'runs'}"])
    jobs = plan.jobs()
    assert all(spec.seed is not None for spec in plan.specs.values())
    for job in (job for each in jobs.values() for job in each):
        job.check(list(plan.specs.values()))
    trained = [{job.stage: job.recipe for job in each if job.recipe} for each in jobs.values()]
    trained = [each for each in trained if each]
    allowed = {"run.recipe", "model.init_from", "model.config.attention_layout", "model.config.block_size"}
    for other in trained[1:]:
        assert {key for key, _, _ in differences(trained[0], other)} <= {f"{s}.{k}" for s in other for k in allowed}
    layouts = {(r["model"]["config"].get("attention_layout"), r["model"]["config"].get("block_size"))
               for each in trained for r in list(each.values())[:1]}  # fmt: skip
    assert len(layouts) == len(trained)


# ---------------------------------------------------------------- the queue

LEAVE = "(folder / 'out').write_text('done')"


def test_what_is_finished_is_not_run_again(tmp_path):
    path = write_plan(tmp_path, LEAVE, [{"name": "a"}, {"name": "b"}])
    run(path, only=("a",))
    assert not run(path).left
    assert [(tmp_path / "runs" / arm / "calls").read_text() for arm in "ab"] == ["go\n", "go\n"]
    record = json.loads((tmp_path / "runs/a/work.run.json").read_text())
    assert record["exit_code"] == 0 and record["commit"] == "abc" and record["command"][-1] == "go"


def test_a_recipe_that_is_finished_and_now_another_is_refused(tmp_path):
    path = write_plan(tmp_path, "", [{"name": "a"}], stages=[{"name": "train", "recipe": RECIPE}])
    job = load_plan(str(path)).jobs()["a"][0]
    (job.folder / "train").mkdir(parents=True)
    (job.folder / "train" / "summary.json").write_text("{}")
    record = {"command": job.words, "attempts": [{"began": "2026-01-02T03:04:05", "exit_code": 0}], "exit_code": 0}
    record |= {"seconds": 1.0, "commit": "abc", "device": "the CPU", "versions": {}, "data": {}}
    job.record_file.write_text(json.dumps(record | {"recipe": job.recipe}))
    job.check()
    moved = load_plan(str(path), ["root=elsewhere"]).jobs()["a"][0]
    job.record_file.write_text(json.dumps(record | {"recipe": moved.recipe, "root": "elsewhere"}))
    job.check()
    with pytest.raises(ValueError, match=r"finished with trainer.max_steps=4, and the plan says 9"):
        load_plan(str(path), ["stages.0.recipe.trainer.max_steps=9"]).jobs()["a"][0].check()


def changed_command(path: Path, *words: str) -> list[str]:
    """Overrides with which the stage's command ends in other words."""
    command = yaml.safe_load(path.read_text())["stages"][0]["command"]
    return [f"stages.0.command={json.dumps([*command, *words])}"]


def test_a_command_that_is_finished_and_now_another_is_refused(tmp_path):
    path = write_plan(tmp_path, LEAVE, [{"name": "a"}, {"name": "b"}])
    run(path, only=("a",))
    where = r"a/work.run.json: arm a, stage work is finished with"
    page, limit = ["--output", str(tmp_path / "page")], changed_command(path, "--limit", "5")
    for overrides, sentence in (
        (["inputs.word=stop"], rf"{where} `go`, and the plan says `stop`; give the arm another name"),
        (limit, rf"{where} `nothing there`, and the plan says `--limit 5`"),
    ):
        for more in ([], ["--only", "b"], ["--page"], ["--dry-run"]):
            with pytest.raises(ValueError, match=sentence):
                results.main([str(path), *overrides, *more, *page])
    assert not (tmp_path / "runs/b").exists() and not (tmp_path / "page").exists()
    assert status(load_plan(str(path), ["inputs.word=stop"]).jobs())[0][2].endswith("otherwise than the plan says now")
    (tmp_path / "runs/a/work").mkdir()
    (tmp_path / "runs/a/work/summary.json").write_text("{}")
    stages = [{"name": "work", "recipe": RECIPE}]
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"stages": stages}))
    with pytest.raises(ValueError, match=f"{where} a command, and the plan says a training recipe"):
        load_plan(str(path)).jobs()["a"][0].check()


@pytest.mark.parametrize("interpreter", ["python", "/elsewhere/.venv/bin/python3.11", sys.executable])
def test_another_interpreter_is_no_other_command(tmp_path, interpreter):
    path = write_plan(tmp_path, LEAVE, [{"name": "a"}])
    run(path)
    file = tmp_path / "runs/a/work.run.json"
    record = json.loads(file.read_text())
    assert record["command"][0] == "python"
    file.write_text(json.dumps(record | {"command": [interpreter, *record["command"][1:]]}))
    load_plan(str(path)).jobs()["a"][0].check()
    with pytest.raises(ValueError, match=r"finished with `--limit 5`, and the plan says `--limit 6`"):
        file.write_text(json.dumps(record | {"command": [interpreter, *record["command"][1:], "--limit", "5"]}))
        load_plan(str(path), changed_command(path, "--limit", "6")).jobs()["a"][0].check()


def test_a_stopped_run_goes_on_and_a_failed_arm_does_not_hold_up_the_others(tmp_path):
    body = """
    tries = len((folder / "calls").read_text().split())
    if folder.name == "stopped" and tries == 1: sys.exit(75)
    if folder.name == "broken": sys.exit("error: it is broken")
    (folder / "out").write_text("done")
    """
    path = write_plan(tmp_path, body, [{"name": "broken"}, {"name": "stopped"}, {"name": "fine"}])
    queue = run(path)
    assert list(queue.failed) == ["broken"] and "work.log ends: error: it is broken" in queue.failed["broken"]
    rows = {row[0]: row[2] for row in status(load_plan(str(path)).jobs())}
    assert rows["broken"] == "exit code 1" and rows["stopped"] == "stopped" and rows["fine"].startswith("done in")
    assert not run(path, only=("stopped",)).left
    record = json.loads((tmp_path / "runs/stopped/work.run.json").read_text())
    assert [attempt["exit_code"] for attempt in record["attempts"]] == [75, 0]


def test_each_gpu_runs_one_arm_at_a_time(tmp_path):
    body = """
    import os, time
    (folder / "began").write_text(str(time.time()))
    time.sleep(0.3)
    (folder / "out").write_text(os.environ["CUDA_VISIBLE_DEVICES"] + " " + str(time.time()))
    """
    run(write_plan(tmp_path, body, [{"name": name} for name in "abc"]), gpus=(0, 1))
    ends = {arm: (tmp_path / "runs" / arm / "out").read_text().split() for arm in "abc"}
    began = {arm: float((tmp_path / "runs" / arm / "began").read_text()) for arm in "abc"}
    assert sorted(ends[arm][0] for arm in "ab") == ["0", "1"]
    assert began["b"] < float(ends["a"][1]) and began["c"] > min(float(ends[arm][1]) for arm in "ab")


def test_with_a_time_limit_an_arm_is_begun_only_where_it_fits(tmp_path):
    arms = [{"name": "long", "minutes": {"work": 30}}, {"name": "short", "minutes": {"work": 3}}]
    queue = run(write_plan(tmp_path, LEAVE, arms), minutes=10)
    assert queue.waiting == ["long"] and list(queue.left) == ["long"]
    assert (tmp_path / "runs/short/out").is_file() and not (tmp_path / "runs/long").exists()


def test_told_to_stop_it_has_its_runs_save_and_what_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("results_queue.SAVING", 1.0)
    body = """
    import signal, time
    def save(*_):
        (folder / "saved").write_text("yes")
        if folder.name == "good": sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    (folder / "ready").write_text("yes")
    while True: time.sleep(0.05)
    """
    path = write_plan(tmp_path, body, [{"name": "good"}, {"name": "deaf"}, {"name": "later"}])

    def stop():
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if all((tmp_path / "runs" / arm / "ready").is_file() for arm in ("good", "deaf")):
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    queue = run(path, gpus=(0, 1))
    thread.join()
    assert list(queue.left) == ["good", "deaf", "later"] and not queue.failed
    codes = [
        json.loads((tmp_path / "runs" / arm / "work.run.json").read_text())["exit_code"] for arm in ("good", "deaf")
    ]
    assert codes == [75, -9] and (tmp_path / "runs/deaf/saved").is_file()
    assert not (tmp_path / "runs/later").exists()


# ---------------------------------------------------------------- carrying results, and the page


def here_and_there(tmp_path: Path) -> list[list[str]]:
    """Overrides with which a plan is another machine's."""
    return [[f"root={tmp_path}/{name}/runs"] for name in ("here", "there")]


def test_results_are_carried_without_weights_and_merged_into_what_is_there(tmp_path):
    body = LEAVE + "\nfor name in ('work/hf/m.safetensors', 'work/checkpoints/x', 'work/summary.json'):\n" + (
        "    (folder / name).parent.mkdir(parents=True, exist_ok=True)\n    (folder / name).write_text(sys.argv[2])\n"
    )  # fmt: skip
    path, (here, there) = write_plan(tmp_path, body, [{"name": "a"}, {"name": "b"}]), here_and_there(tmp_path)
    plan = load_plan(str(path), here)
    run(path, only=("a",), overrides=here)
    run(path, only=("a", "b"), overrides=there)
    assert pack(load_plan(str(path), there), tmp_path / "b.tar.gz") == 10
    (tmp_path / "here/runs/a/work/summary.json").write_text("mine")
    added = unpack(plan, tmp_path / "b.tar.gz")
    assert sorted(added) == [f"b/{name}" for name in ("calls", "out", "work.log", "work.run.json", "work/summary.json")]
    assert all(jobs[0].is_done for jobs in plan.jobs().values())
    plan.jobs()["b"][0].check()  # run with another root
    assert (tmp_path / "here/runs/a/work/summary.json").read_text() == "mine"


def test_carried_results_of_another_command_are_refused_before_any_is_added(tmp_path):
    path, (here, there) = write_plan(tmp_path, LEAVE, [{"name": "a"}, {"name": "b"}]), here_and_there(tmp_path)
    run(path, overrides=there)
    pack(load_plan(str(path), there), tmp_path / "x.tar.gz")
    sentence = r"x.tar.gz: a/work.run.json: arm a, stage work is finished with `go`, and the plan says `stop`"
    with pytest.raises(ValueError, match=sentence):
        unpack(load_plan(str(path), [*here, "inputs.word=stop"]), tmp_path / "x.tar.gz")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "there/runs/a", "./a")
    with pytest.raises(ValueError, match=sentence):
        unpack(load_plan(str(path), [*here, "inputs.word=stop"]), tmp_path / "x.tar.gz")
    assert not (tmp_path / "here").exists()


def test_arms_of_a_tar_file_are_taken_one_by_one(tmp_path):
    """From the results of another plan too, where the arm's stages are this plan's; repacked by tar as well, which
    names folders."""
    path, (here, there) = write_plan(tmp_path, LEAVE, [{"name": "a"}, {"name": "b"}]), here_and_there(tmp_path)
    run(path, overrides=there)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "there/runs/a", "a")
        tar.add(tmp_path / "there/runs/b", "old")
    plan = load_plan(str(path), here)
    with pytest.raises(ValueError, match=r"'old' is no arm of test \(a, b\); --only leaves it out"):
        unpack(plan, tmp_path / "x.tar.gz")
    with pytest.raises(ValueError, match=r"--only b: .*x.tar.gz has the arms a, old"):
        unpack(plan, tmp_path / "x.tar.gz", ["b"])
    added = unpack(plan, tmp_path / "x.tar.gz", ["a"])
    assert added and {name.split("/")[0] for name in added} == {"a"}
    assert not (tmp_path / "here/runs/old").exists() and plan.jobs()["a"][0].is_done
    assert pack(load_plan(str(path), there), tmp_path / "b.tar.gz", only=["b"]) == len(added)


@pytest.mark.parametrize("name", ["../a/x", "/a/x", "other/x", "x"])
def test_a_tar_file_of_something_else_is_refused(tmp_path, name):
    plan = load_plan(str(write_plan(tmp_path, "", [{"name": "a"}])))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match=r"is no file of an arm|is no arm of test"):
        unpack(plan, tmp_path / "x.tar")
    with pytest.raises(ValueError, match="not a tar file of results"):
        unpack(plan, tmp_path / "plan.yaml")


def test_the_page_is_made_of_what_is_there_and_names_what_is_missing(tmp_path, capsys):
    body = """
    import json
    score = {"good": 1.0, "base": 0.0}.get(folder.name)
    if score is None: sys.exit("error: no luck")
    out = folder / "work" / "results"
    out.mkdir(parents=True)
    samples = [{"id": f"64/0/{i}", "length": 64, "depth": 0, "scores": {"exact": float(i > 3 or score)}}
               for i in range(8)]
    (out / "needle.json").write_text(json.dumps({"kind": "needle", "settings": {}, "samples": samples,
                                                 "checkpoint": folder.name, "summary": {"exact": {}}}))
    (folder / "out").write_text("done")
    """
    path = write_plan(tmp_path, body, [{"name": name} for name in ("good", "bad", "base")], baseline="base")
    page = tmp_path / "page"
    with pytest.raises(FailureError, match=r"bad work: exit code 1; .*error: no luck"):
        results.main([str(path), "--output", str(page)])
    text = (page / "README.md").read_text()
    assert "1 of 3 arms" in text and "- bad: missing work" in text
    assert "1.000 (0.676 to 1.000) [+0.5 (+0.039 to +0.76)*]" in text
    found = json.loads((page / "results.json").read_text())
    assert {row["arm"]: row["n"] for row in found["figures"]} == {"good": 8, "base": 8}
    assert (page / "work-needle.png").is_file()
    again = tmp_path / "again"
    elsewhere = ["--import", str(page / "runs.tar.gz"), "--output", str(again), f"root={again}/runs"]
    assert results.main([str(path), *elsewhere]) == 0
    assert not list(again.rglob("*.log"))
    for each in page.iterdir():
        assert (again / each.name).read_bytes() == each.read_bytes(), each.name
    (page / "README.md").write_text("my own")
    with pytest.raises(ValueError, match=r"README.md was not written by this program"):
        results.main([str(path), "--page", "--output", str(page)])
    assert results.main([str(path), "--status"]) == 0 and "done in" in capsys.readouterr().out
