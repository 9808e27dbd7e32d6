"""The page of an experiment of two trained stages: second reference, books, difference heatmaps, the front picture."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import results  # noqa: E402
import results_heatmaps  # noqa: E402
import results_page  # noqa: E402
from results_collect import Figure, difference  # noqa: E402
from results_plan import Job, load_plan, lost_weights  # noqa: E402

from eval.positions import summarise  # noqa: E402
from s2.files import write_json  # noqa: E402
from s2.model.config import ModelConfig  # noqa: E402
from s2.model.flops import flops_per_token, matmul_parameters  # noqa: E402

MODEL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "attention_layout": "dense", "block_size": 16,
}  # fmt: skip
LAYOUTS = {"dense": "dense", "hybrid": "L1V2+dense0"}
RIGHT = {"import": 6, "dense": 4, "hybrid": 5}  # answers of 10
LOSS = {"dense": 3.0, "hybrid": 3.1}


def recipe(seq_len: int) -> dict:
    data = {"seq_len": seq_len, "micro_batch_size": 1, "mixture": [{"path": "/data/retrieval-x/web/train"}]}
    return {
        "model": {"config": MODEL | {"max_position_embeddings": seq_len}},
        "data": {"class_path": "data.datamodule.PackedDataModule", "init_args": data},
        "trainer": {"max_steps": 4},
    }


def finish(job: Job, hybrid: bool) -> None:
    """What a stage leaves, as if it had run."""
    run = job.folder / job.stage
    about = {
        "commit": "abc",
        "versions": {"torch": "9"},
        "device": "the CPU",
        "data": {},
        "launched": 'results.py plan --minutes 9 "a.b=[x, y]" c=1',
    }
    record = {"root": job.root, "command": job.words, "recipe": job.recipe, "exit_code": 0, "seconds": 60.0}
    write_json(job.record_file, record | about | {"attempts": [{"began": "2026-12-01T10:00:00", "exit_code": 0}]})
    for pattern in job.leaves:
        write_json(Path(pattern), {})
    if job.recipe is None:
        return
    component = {"component": "/data/retrieval-x/web/train", "asked": 400, "available": 400, "passes": 1.0}
    summary = {"tokens": 400, "seconds": 60.0, "memory_gib": 1.0, "data": [component | {"synthetic": 0.25}]}
    heldout = {"books": {"loss": 3.0 + hybrid}}
    write_json(run / "summary.json", summary | {"validation": heldout})
    layout = {"attention_layout": LAYOUTS["hybrid" if hybrid else "dense"]}
    write_json(run / "hf" / "config.json", ModelConfig(**job.recipe["model"]["config"] | layout).to_hf_dict())
    rows = "".join(f"{i},{100 * i},{15 * i},3,200,0.4\n" for i in range(1, 5))
    (run / "logs").mkdir()
    header = "step,tokens,seconds,train/loss,tokens_per_second_per_device,mfu_executed\n"
    (run / "logs" / "metrics.csv").write_text(header + rows)


def evaluate(folder: Path, arm: str, lengths: tuple[int, ...], source: str | None = None) -> None:
    found = folder / "results"
    cells = [(length, depth, i) for length in lengths for depth in (0, 50, 100) for i in range(4)]
    for kind in ("single", "multi-key"):
        samples = [
            {"id": f"{length}/{depth}/{i}", "length": length, "depth": depth, "prompt": f"{length} {depth} {i}",
             "scores": {"exact": float(kind == "single" and (arm == "dense" or i > 0))}} for length, depth, i in cells
        ]  # fmt: skip
        content = {"kind": "needle", "settings": {"kind": kind}, "checkpoint": arm, "summary": {"exact": {}}}
        write_json(found / f"needle-{'' if kind == 'single' else 'a-'}x.json", content | {"samples": samples})
    if arm in LOSS:
        for name in (None, source):
            of = {} if name is None else {"source": name}
            documents = [
                {"id": f"{length}/{i}", "length": length, "prompt": f"d{i}",
                 "losses": [[0, length, length - 1, LOSS[arm] + i / 10 - (name is not None)]]}
                for length in lengths for i in range(3)
            ]  # fmt: skip
            content = {"kind": "positions", "settings": of, "samples": documents, "summary": summarise(documents)}
            write_json(found / f"positions{name or ''}.json", content)
    tasks = {task: [int(i < RIGHT[arm]) for i in range(10)] for task in ("piqa", "arc")}
    lm = {
        "s2": {},
        "results": {task: {"acc,none": sum(right) / 10, "acc_stderr,none": 0.1} for task, right in tasks.items()},
        "documents": {task: {"digest": "d", "scores": {"acc,none": right}} for task, right in tasks.items()},
    }  # fmt: skip
    write_json(found / "lm-x.json", lm)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A finished experiment: train at 64, extend to 128; `import` has been evaluated alone, at 64."""
    tmp_path = tmp_path_factory.mktemp("experiment")
    command = {"command": ["true"], "leaves": ["{arm}/train/results/suite.json"]}
    stages = [
        {"name": "train", "recipe": recipe(64)},
        {"name": "evaluate", **command},
        {"name": "extend", "recipe": recipe(128)},
    ]
    arms = [{"name": "import", "stages": ["evaluate"]}, {"name": "dense"}]
    arms += [{"name": "hybrid", "overrides": [f"model.config.attention_layout={LAYOUTS['hybrid']}"]}]
    plan = {"name": "test", "root": str(tmp_path / "runs"), "baseline": "dense", "also": "import"}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan | {"front": ["dense", "hybrid"], "stages": stages, "arms": arms}))
    for arm, jobs in load_plan(str(path)).jobs().items():
        for job in jobs:
            finish(job, arm == "hybrid")
        evaluate(tmp_path / "runs" / arm / "train", arm, (32, 64), "books")
        if arm != "import":
            evaluate(tmp_path / "runs" / arm / "extend", arm, (64, 128), "books")
    return path


@pytest.fixture(scope="module")
def page(path) -> tuple[str, dict]:
    """Its text, and its figures."""
    assert results.main([str(path), "--page", "--output", str(path.parent / "page")]) == 0
    found = json.loads((path.parent / "page" / "results.json").read_text())["figures"]
    rows = {(r["arm"], r["stage"], r["task"], r["length"], r["metric"]): r for r in found}
    return (path.parent / "page" / "README.md").read_text(), rows


def test_a_page_of_other_runs_of_the_same_day_stays(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert results.main([str(path), "--page"]) == 0
    [first] = Path("docs/results").iterdir()
    mine = json.loads((first / "results.json").read_text())
    for each in mine["arms"].values():
        for record in each["stages"].values():
            record["attempts"][0]["began"] = "2020-01-01T00:00:00+0000"
    (first / "results.json").write_text(json.dumps(mine))
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    for _ in range(2):  # and a page that is made again stays where it is
        assert results.main([str(path), "--page"]) == 0
        assert {file.name: file.read_bytes() for file in first.iterdir()} == before
        assert {folder.name for folder in Path("docs/results").iterdir()} == {first.name, f"{first.name}-2"}


def test_tasks_and_losses_are_compared_with_a_second_arm_across_stages(page):
    text, rows = page
    mean = rows["hybrid", "extend", "mean of 2", None, "acc_norm or acc"]
    assert mean["from_also"]["difference"] == pytest.approx(-0.1) and mean["from_also"]["paired"]
    assert mean["from_baseline"]["difference"] == pytest.approx(0.1) and mean["from_baseline"]["paired"]
    assert rows["dense", "extend", "piqa", None, "acc"]["from_also"]["difference"] == pytest.approx(-0.2)
    assert "from_also" not in rows["import", "train", "piqa", None, "acc"]
    assert "from_also" not in rows["hybrid", "train", "single", 64, "exact"]
    assert "In braces: difference from import, in whichever stage that was measured." in text
    assert "{-0.1 (" in text


def test_perplexity_has_its_interval_and_a_relative_difference(page):
    text, rows = page
    row = rows["hybrid", "extend", "loss of books", 128, "perplexity"]
    loss = rows["hybrid", "extend", "loss of books", 128, "nats/token"]
    assert row["value"] == pytest.approx(math.exp(2.2), rel=1e-4) and loss["value"] == pytest.approx(2.2)
    assert row["interval"] == pytest.approx([math.exp(end) for end in loss["interval"]])
    less = row["from_baseline"]
    assert less["difference"] == pytest.approx(100 * math.expm1(0.1)) and less["unit"] == "%" and less["paired"]
    assert less["interval"] == pytest.approx([100 * math.expm1(0.1)] * 2, abs=1e-3)  # the same of each document
    assert rows["hybrid", "extend", "loss", 128, "perplexity"]["value"] == pytest.approx(math.exp(3.2), rel=1e-4)
    assert "[+10.5 % (+10.5 to +10.5)*]" in text and "Differences of perplexities are relative." in text


def test_an_unpaired_perplexity_is_compared_by_its_interval():
    def perplexity(loss, half):
        ends = [math.exp(loss - half), math.exp(loss + half)]
        return Figure("x", "positions", "loss", 64, "perplexity", math.exp(loss), interval=ends, is_exponential=True)

    found = difference(perplexity(3.1, 0.03), perplexity(3.0, 0.04))
    assert found["difference"] == pytest.approx(100 * math.expm1(0.1)) and not found["paired"]
    assert found["interval"] == pytest.approx([100 * math.expm1(0.05), 100 * math.expm1(0.15)], abs=1e-3)


def test_differences_without_an_interval_are_said_to_be(page):
    text, _ = page
    losses = text.split("## Losses of the training log, after train")[1].split("##")[0]
    assert "4.000 [+1]" in losses and "A difference without an interval is one of means" in losses


@pytest.mark.parametrize(("arms", "in_columns"), [(3, True), (7, True), (8, False)])
def test_arms_are_columns_where_more_figures_are_compared_than_fit_beside_them(arms, in_columns):
    """Twelve figures; beside each other, the lengths of one task follow one another."""
    names = [f"arm{i}" for i in range(arms)]
    rows = [
        vars(Figure("extend", "ruler", task, length, "score", 10 * number + length / 1024, n=20)) | {"arm": arm}
        for number, arm in enumerate(names)
        for length in (1024, 2048, 4096)
        for task in ("vt", "cwe", "fwe", "qa")
    ]
    *tables, note = results_page._tables(rows, {"arms": dict.fromkeys(names), "baseline": "arm0"}, "")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for table in tables for line in table.splitlines()]
    assert note == "n = 20 a figure." and len(tables) == (1 if in_columns else 2)
    if in_columns:
        assert cells[0] == ["", *names] and [row[0][:7] for row in cells[2:6]] == [
            "vt @1k,",
            "vt @2k,",
            "vt @4k,",
            "cwe @1k",
        ]
        assert [row[2] for row in cells[2:5]] == ["11", "12", "14"]
    else:
        assert cells[0][:3] == ["arm", "vt @1k, score", "cwe @1k, score"] and len(cells[0]) == 9
        assert cells[3][:2] == ["arm1", "11"]


def test_mfu_is_said_by_each_definition(page):
    text, rows = page
    executed, square = (rows["hybrid", "train", f"MFU, {of}", None, "median"] for of in ("executed", "full square"))
    config = ModelConfig(**MODEL | {"attention_layout": LAYOUTS["hybrid"]})
    theirs = 6 * matmul_parameters(config) + 12 * 2 * 4 * 8 * 64  # layers, heads, head_dim, tokens
    assert square["value"] == pytest.approx(0.4 * theirs / flops_per_token(config, 64, executed=True))
    assert executed["value"] == pytest.approx(0.4) and "MFU, full square, median" in text


def test_needles_are_drawn_side_by_side_and_less_the_baseline(path, page):
    text, _ = page
    for stage in ("train", "extend"):
        all_arms = "dense, import, hybrid" if stage == "train" else "dense, hybrid"
        said = f"needles found by length and depth, after {stage}: {all_arms}"
        less = f"needles found, after {stage}, minus dense: {all_arms.removeprefix('dense, ')}"
        for name, words in ((f"{stage}-needle-x.png", said), (f"{stage}-needle-x-minus-dense.png", less)):
            assert f"![{words}]({name})" in text and (path.parent / "page" / name).stat().st_size > 10_000


def test_the_front_picture_has_the_longest_sweep_of_its_arms_above_a_table(path, page, monkeypatch):
    text, _ = page
    assert (path.parent / "page" / "front.png").stat().st_size > 10_000
    assert "![needles found by length and depth, after extend: dense, hybrid](front.png)" in text
    table = {line.split(" | ")[0]: line for line in text.split("(front.png)")[1].split("##")[0].splitlines()}
    assert "| 1.000 (0.758 to 1.000) | 0.750 (0.468 to 0.911) [-0.25 (" in table["| needles found at 64"]
    assert "| needles found at 128" in table and "| needles found at 32" not in table
    assert "| dense, blocks of 16 | L1V2+dense0, blocks of 16 |" in table["| attention"]
    assert "| train 25.0%, extend 25.0% |" in table["| of them synthetic retrieval documents"]
    books = next(label for label in table if label.startswith("| perplexity of books at 64, "))
    assert re.fullmatch(r"\| perplexity of books at 64, \d+ documents", books) and "[+10.5 % (" in table[books]
    every = [label.split(",")[0] for label in table if label.startswith("| perplexity")]
    assert every == [f"| perplexity {of} at {n}" for of in ("of all held-out documents", "of books") for n in (64, 128)]
    assert "{-0.1 (" in table["| accuracy, mean of 2 tasks"]
    assert "| train 200, extend 200 |" in table["| tokens/s per GPU"]
    assert "[ ] minus dense, { } minus import, with 95 % intervals" in table["| differences"]
    drawn = []
    monkeypatch.setattr(results_heatmaps, "draw", lambda sweeps, picture, names, table: drawn.append((sweeps, table)))
    plan, found = load_plan(str(path)), json.loads((path.parent / "page" / "results.json").read_text())
    results_heatmaps.front(plan, found, path.parent / "page")
    [(sweeps, shown)] = drawn
    assert [sweep.lengths for sweep in sweeps] == [[64, 128]] * 2
    assert [sweep.mean() for sweep in sweeps] == [1.0, 0.75]  # of the single needle
    assert {f"| {line[0]}" for line in shown} < set(table)
    monkeypatch.setattr(results_heatmaps, "_sweeps", lambda plan: {("extend", "needle"): {"dense": "x"}})
    said = "front.png is not there: no needle sweep has been made of all of dense, hybrid."
    assert results_heatmaps.front(plan, found, path.parent / "page") == said
    assert results_heatmaps.front(load_plan(str(path), ["front=[]"]), found, path.parent / "page") == ""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("also=imprt", "also: 'imprt' is none of the arms dense, hybrid, import"),
        ("also=dense", "also: 'dense' is the baseline; name another arm"),
        ("front=[dense, hybird]", "front: 'hybird' is none of the arms"),
        ("front=[dense]", r"front: expected 2 to 4 different arms, got \['dense'\]"),
    ],
)
def test_references_and_front_are_arms(path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_plan(str(path), [change])


def test_an_arm_that_was_carried_half_finished_says_what_it_takes_to_go_on(path, tmp_path, capsys):
    plan, runs = yaml.safe_load(path.read_text()), tmp_path / "runs" / "dense"
    for name, option in (("speed", "--config"), ("score", "--ckpt")):  # a config is there, weights are not
        command = ["true", option, "{arm}/extend/hf"]
        plan["stages"].append({"name": name, "command": command, "leaves": ["{arm}/" + name]})
    plan["stages"][2]["recipe"]["model"] |= {"init_from": "{arm}/train/hf"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan | {"root": str(tmp_path / "runs"), "front": []}))
    jobs = load_plan(str(tmp_path / "plan.yaml")).jobs()["dense"]
    for job in jobs[:2]:
        finish(job, False)
    assert lost_weights(jobs) == (
        f"arm dense, stage extend: the weights that it reads are not in {runs}/train/hf (--export leaves weights"
        f" behind); to train them again remove {runs}/train, or leave the arm out with --only"
    )
    (runs / "extend" / "checkpoints" / "step-2").mkdir(parents=True)
    assert lost_weights(jobs) is None  # it goes on from there, and what follows waits for it
    (runs / "extend" / "checkpoints" / "step-2").rmdir()
    finish(jobs[2], False)
    sentence = (
        f"arm dense, stage score: the weights that it reads are not in {runs}/extend/hf (--export leaves weights"
        f" behind); to train them again remove {runs}/extend and {runs}/train, or leave the arm out with --only"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        results.main([str(tmp_path / "plan.yaml"), "--only", "dense", "--dry-run"])
    results.main([str(tmp_path / "plan.yaml"), "--export", str(tmp_path / "x.tar.gz")])
    results.main([str(tmp_path / "plan.yaml"), "--import", str(tmp_path / "x.tar.gz"), "--output", str(tmp_path / "p")])
    assert sentence in capsys.readouterr().out
    (runs / "extend" / "hf" / "model.safetensors").write_bytes(b"")
    results.main([str(tmp_path / "plan.yaml"), "--only", "dense", "--dry-run"])
    assert lost_weights(jobs) is None


def test_the_command_that_makes_the_page_again_has_the_keys_of_the_last_one(path, page):
    again = f'`python scripts/results.py {path} --import "<this folder>/runs.tar.gz" "a.b=[x, y]" "c=1"`'
    assert again in page[0].replace('"' + str(path) + '"', str(path))
