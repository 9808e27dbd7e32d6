"""The report repeats the numbers of the files, says how sure differences are, and names what is missing."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from eval.differences import unpaired
from eval.report import rates, scores, settings
from eval.report.__main__ import main
from eval.report.glance import glance
from eval.report.page import missing
from eval.report.run import labels, read_run, read_runs
from s2.files import write_json
from s2.inference import KVCache
from s2.model.config import ModelConfig
from s2.model.flops import matmul_parameters
from s2.model.hf import fingerprint
from tests.eval.runs import MODEL, RECIPE, make_run, write_positions, write_ruler
from tests.eval.sweeps import write_results


def pair(tmp_path, **second):
    return make_run(tmp_path / "demo" / "a", score=0.0, acc=0.2, loss=3.5), make_run(tmp_path / "demo" / "b", **second)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_both_pages_have_every_section_and_the_html_needs_no_other_file(tmp_path):
    other = copy.deepcopy(RECIPE)
    other["model"]["config"]["attention_layout"] = "1*dense|1*L2V4<32V8"
    runs = pair(tmp_path, recipe=other)
    for run, right in zip(runs, (18, 9), strict=True):
        write_ruler(run / "results" / "ruler.json", right)
        write_positions(run / "results" / "positions.json", shift=right / 10)
    (runs[1] / "gate.json").write_text(
        '{"checks": [{"check": "needle", "length": 512, "value": 0.5, "min": 0.9, "passed": false}], "passed": false}'
    )
    main([*map(str, runs), "--output", str(tmp_path / "report.html")])
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        *("Who sees what", "Settings", "Loss", "Loss by position", "Needle in a haystack", "RULER"),
        *("Gate to the next stage", "Downstream tasks", "Speed and memory", "Environment", "What is missing"),
    ]
    assert all(f">{heading}</h2>" in page for heading in headings)
    assert "<title>Side by side: demo/a, demo/b</title>" in page and "width=device-width" in page
    assert "<td>1*dense|1*L2V4&lt;32V8</td>" in page  # no emphasis, no cell of its own
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 7 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"(href|src)=\"(?!#|data:)|@import|url\(", page)
    links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(links) == 7 and all((tmp_path / link).stat().st_size > 1000 for link in links)
    assert "| demo/b | needle | 512 | 0.500 | min 0.9 | **not passed** |" in text


def test_a_page_that_somebody_else_wrote_is_not_replaced(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    (tmp_path / "page.md").write_text("# My project")
    with pytest.raises(ValueError, match=r"page\.md was not written by this program; choose another --output"):
        main([str(run), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.md").read_text() == "# My project" and not (tmp_path / "page.html").exists()
    (tmp_path / "page.md").unlink()
    for _ in range(2):  # its own it replaces
        main([str(run), "--output", str(tmp_path / "page.html")])


def test_wrong_use_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; expected something like runs/demo/extend-2k"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no results yet"):
        read_run(tmp_path / "empty")
    with pytest.raises(ValueError, match="several runs need --output"):
        main([str(tmp_path), str(tmp_path)])
    with pytest.raises(ValueError, match=r"page\.txt: a page ends in \.html or \.md"):
        main([str(tmp_path), "--output", "page.txt"])


def test_the_front_picture_has_its_table_as_markdown_beside_it(tmp_path):
    runs = pair(tmp_path)
    main([*map(str, runs), "--front", str(tmp_path / "front.png"), "--names", "dense", "hybrid"])
    text = (tmp_path / "front.md").read_text()
    assert text.startswith("![needles found by length and depth: dense, hybrid](front.png)")
    assert "| needles found at 1k | 0.500 (0.09 to 0.91) | 1.000 (0.34 to 1.00) |" in text
    with pytest.raises(ValueError, match="2 to 4 runs have room side by side, and 1 are named"):
        main([str(runs[0]), "--front", str(tmp_path / "front.png")])
    (runs[1] / "results" / "needle.json").rename(runs[1] / "results" / "needle-n1.json")
    with pytest.raises(
        ValueError, match=r"no sweep of one name for a single needle .*demo/a: needle; demo/b: needle-n1"
    ):
        main([*map(str, runs), "--front", str(tmp_path / "front.png")])


def test_the_front_picture_shows_the_single_needle_of_all_runs(tmp_path, monkeypatch):
    runs = pair(tmp_path)
    for run in runs:  # as long, and before `needle` in the alphabet; longer
        for name, length, kind in (("needle-a", 1024, "multi-key"), ("needle-b", 4096, "multi-value")):
            cells = {(length, depth): 0.0 for depth in (0, 100)}
            write_results(run / "results" / f"{name}.json", cells, settings={"haystack": "prose", "kind": kind})
    drawn = []
    monkeypatch.setattr("eval.heatmap.draw", lambda sweeps, *args, **options: drawn.extend(sweeps))
    main([*map(str, runs), "--front", str(tmp_path / "front.png")])
    assert [(max(sweep.lengths), sweep.mean()) for sweep in drawn] == [(1024, 0.5), (1024, 1.0)]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_labels_are_the_shortest_that_tell_runs_apart(tmp_path):
    paths = [Path(path) for path in ("/demo/ext", "/A/demo/ext", "/A/x/ext")]
    assert labels(paths) == ["/demo/ext", "A/demo/ext", "x/ext"]
    assert labels([Path("/runs/demo/ext")]) == ["demo/ext"]
    for name in ("A/demo/ext", "B/demo/ext"):
        make_run(tmp_path / name)
    with pytest.raises(ValueError, match="--names same same: 1 different names for 2 runs"):
        read_runs([tmp_path / "A/demo/ext", tmp_path / "B/demo/ext"], ["same", "same"])
    twice = [tmp_path / "A/demo/ext", tmp_path / "B/demo/ext", tmp_path / "A/demo/../demo/ext"]
    assert [run.name for run in read_runs(twice)] == ["A/demo/ext", "B/demo/ext"]


def test_results_of_other_weights_are_left_out_and_named(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text(json.dumps(ModelConfig(**MODEL).to_hf_dict()))
    (run / "hf" / "model.safetensors").write_bytes(b"weights")
    now = fingerprint(run / "hf")
    write_results(run / "results" / "needle.json", {(512, 0): 0.5}, fingerprint="earlier")
    write_results(run / "results" / "needle-n1.json", {(512, 0): 1.0}, n=1, fingerprint=now)
    write_results(run / "results" / "needle.old1.json", {(512, 0): 1.0})  # as earlier versions set sweeps aside
    write_json(run / "results" / "ruler.json", {"kind": "ruler", "samples": []})
    (found,) = read_runs([run / "hf"])
    assert list(found.needle) == ["needle-n1"] and found.fingerprint == now and found.model is not None
    (said,) = missing([found])
    assert "- Left out of demo/a: needle.json (of other weights than the run has now)" in said
    assert "- Left out of demo/a: ruler.json (not finished)" in said


def test_results_brought_here_without_their_weights_are_taken(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text(json.dumps(ModelConfig(**MODEL).to_hf_dict()))
    write_results(run / "results" / "needle.json", {(512, 0): 0.5}, fingerprint="of the weights there")
    (found,) = read_runs([run])
    assert list(found.needle) == ["needle"] and not found.left_out


def test_a_gate_is_read_as_it_is_written(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    checks = [
        {"check": "loss", "length": 8192, "from": 0, "max_rise": 0.02, "value": 3.0, "base": 2.99, "passed": True},
        {
            "check": "needle",
            "kind": "single",
            "length": 8192,
            "max_drop": 0.02,
            "value": 0.9,
            "base": 1.0,
            "passed": False,
        },
        {"check": "task", "task": "piqa", "min": 0.6, "value": None, "passed": None, "unmeasured": "no rows"},
    ]
    write_json(run / "results" / "gate.json", {"kind": "gate", "passed": False, "checks": checks})
    text = scores.gate(read_runs([run]))
    assert "| loss | 8k, 0 to 8,192 | 3.000 | max_rise 0.02 of 2.99 | passed |" in text
    assert "| needle single | 8k | 0.900 | max_drop 0.02 of 1 | **not passed** |" in text
    assert "| task piqa |  | - | min 0.6 | not measured: no rows |" in text
    write_json(run / "results" / "gate.json", {"kind": "gate", "passed": True, "checks": checks[1:]})
    (read,) = read_runs([run])
    assert not read.gate and read.left_out == (
        "gate.json (contradicts itself: passed is true, and its checks say otherwise)",
    )


def test_a_stage_that_began_past_a_missed_gate_says_so_in_a_line(tmp_path):
    """From summary.json, and before there is one from the run folder; a stage from random weights has none."""
    missed = {"state": "missed", "asked": "ignore", "said": "runs/a/pretrain/hf has not passed its gate", "checks": []}
    passed = {"state": "passed", "asked": "required", "said": "runs/a/pretrain/hf has passed its gate", "checks": []}
    runs = [make_run(tmp_path / "demo" / name) for name in "abcd"]
    write_json(runs[0] / "summary.json", {"gate_before": missed})
    write_json(runs[1] / "gate-before.json", passed)
    write_json(runs[2] / "gate-before.json", {"state": "none", "asked": "ignore", "said": ""})
    said = "begun with run.gate=ignore although runs/a/pretrain/hf has not passed its gate"
    text = "\n".join(settings.settings(read_runs(runs)))
    assert f"| gate before | {said} | **passed** | **none** | not recorded |" in text.replace("\\_", "_")
    assert "gate before" not in "\n".join(settings.settings(read_runs(runs[2:])))


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    run = make_run(tmp_path / "demo" / "a", recipe=None)
    (said,) = missing(read_runs([run]))
    for what in (
        "config.yaml",
        "summary.json",
        "environment.json",
        "exported weights",
        "eval.ruler --ckpt",
        "positions",
    ):
        assert what in said
    assert "needles" not in said and "training log" not in said
    assert "- demo/a has no exported weights here (hf/)\n" in said and " no the " not in said
    runs = read_runs([run])
    assert (
        rates.environment(runs)[-1]
        == "Not recorded: device, commit, training, evaluation, seeds, weights (fingerprint), versions."
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"])
def test_a_checkpoint_is_another_one_whichever_byte_of_it_differs(tmp_path, name):
    for file in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors"):
        (tmp_path / file).write_bytes(bytes(3 << 20))
    before = fingerprint(tmp_path)
    with (tmp_path / name).open("r+b") as stream:
        stream.seek(3 << 19)
        stream.write(b"1")
    assert fingerprint(tmp_path) != before


def test_broken_files_are_named(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    odd = run / "results" / "odd.json"
    odd.write_text('{"results": {"x": {"acc,none": 0.5}}, "s2": {"tasks": ["x"]}}')
    with pytest.raises(ValueError, match=r"odd\.json: not as eval\.lm writes it \('versions' is missing"):
        read_run(run)
    odd.write_text("{")
    with pytest.raises(ValueError, match=r"odd\.json, line 1: not valid JSON"):
        read_run(run)
    odd.unlink()
    with (run / "logs" / "metrics.csv").open("a") as stream:
        stream.write("30,3000,1,3.")  # cut short by a kill
    assert read_run(run).last("train/loss") == 4.0
    with (run / "logs" / "metrics.csv").open("a") as stream:
        stream.write("0x,1,1,1,1,1,1\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 5: not a row of the training log"):
        read_run(run)


# --- settings, rates --------------------------------------------------------------------------------------------------


def test_what_differs_is_marked_and_the_share_of_synthetic_documents_is_said(tmp_path):
    other = copy.deepcopy(RECIPE)
    other["model"]["optimizer"]["lr"] = 0.002
    other["trainer"]["gradient_clip_val"] = 0.5
    other["data"]["init_args"]["mixture"][1]["weight"] = 0.0
    text = "\n".join(settings.settings(read_runs(pair(tmp_path, recipe=other))))
    assert "| synthetic retrieval documents | 25.0% of the tokens | **none** |" in text
    assert "| data | 75.0% d/web/train<br>25.0% d/facts/train | **100.0% d/web/train<br>0.0% d/facts/train** |" in text
    assert "| learning rate | 0.001, cosine" in text and "| **0.002, cosine" in text
    assert "| trainer.gradient_clip_val | 1.0 | **0.5** |" in text
    assert "| attention | L2V4-inter, blocks of 16 | L2V4-inter, blocks of 16 |" in text


def test_synthetic_documents_are_counted_in_the_shards_where_those_are_there(tmp_path):
    recipe = copy.deepcopy(RECIPE)
    shards = tmp_path / "mixed" / "train"
    recipe["data"]["init_args"]["mixture"] = [{"path": str(shards)}, {"path": "elsewhere/train"}]
    run = make_run(tmp_path / "demo" / "a", recipe=recipe)
    assert settings.synthetic(read_run(run)) is None
    shards.mkdir(parents=True)
    sources = [{"path": "web", "tokens": 300}, {"path": "retrieval", "name": "made", "tokens": 100}]
    write_json(shards / "manifest.json", {"sources": sources})
    assert settings.synthetic(read_run(run)) == "at least 12.5% of the tokens; not recorded of elsewhere/train"
    # as trained, where the summary says it, and not as weighted; of one source, its own
    parts = [{"component": f"{shards}, source made, documents of 9 or more tokens", "asked": 60}]
    write_json(run / "summary.json", {"data": [*parts, {"component": str(shards), "asked": 40}]})
    assert settings.synthetic(read_run(run)) == "70.0% of the tokens"
    # and as recorded, wherever the shards are now
    recorded = [{"component": "/data/retrieval-x/train", "asked": 60, "synthetic": 0.0}]
    recorded += [{"component": str(shards), "asked": 40, "synthetic": 0.5}]
    write_json(run / "summary.json", {"data": recorded})
    assert settings.synthetic(read_run(run)) == "20.0% of the tokens"


def test_a_share_of_retrieval_documents_beside_the_mixture_is_counted(tmp_path):
    recipe = copy.deepcopy(RECIPE)
    recipe["data"]["init_args"]["mixture"].pop()
    spec = {"output": "d/added", "sources": [{"path": "retrieval"}]}
    recipe["data"]["init_args"]["retrieval"] = {"share": 0.1, "prepare": spec}
    assert settings.synthetic(read_run(make_run(tmp_path / "demo" / "a", recipe=recipe))) == "10.0% of the tokens"


def test_mfu_is_said_by_each_definition(tmp_path):
    recipe = copy.deepcopy(RECIPE)
    recipe["model"]["config"]["attention_layout"] = "dense"
    (run,) = read_runs([make_run(tmp_path / "demo" / "a", recipe=recipe)])
    model, seq_len = ModelConfig(**recipe["model"]["config"]), 512
    weights, pair_flops = 6 * matmul_parameters(model), 12 * 4 * 4 * 16  # layers, heads, head_dim
    causal, square = weights + pair_flops * (seq_len + 1) / 2, weights + pair_flops * seq_len
    assert rates.full_square(run) == pytest.approx(0.5 * square / causal)  # 0.5: the median of mfu_executed
    text = "\n".join(rates.speed([run]))
    for row in ("MFU, executed | 50.0%", "MFU, dense-equivalent | 60.0%", "MFU, full square | ", "time | 2.02 hours"):
        assert f"| {row}" in text
    assert "| tokens/s a device | 200 |" in text


def test_the_kv_cache_of_both_numbers_is_what_the_cache_here_holds(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "demo" / "a")])
    text, size = "\n".join(rates.speed([run])), 1024
    config, dense = (ModelConfig(**MODEL | {"attention_layout": layout}) for layout in ("L2V4-inter", "dense"))
    sparse, full = (KVCache.bytes_for(each, 1, size, torch.bfloat16) / size for each in (config, dense))
    assert sparse < 0.7 * full and full > 4 * 2 * 2 * 16 * 2  # layers, KV heads, keys and values, head_dim, bytes
    assert f"| KV cache a token at 1k | {sparse:.0f} B ({full:.0f} B) |" in text
    assert "It keeps what a later query can see" in text and "which is everything" not in text
    assert rates.kv_cache(size, run) == f"{sparse:.0f} B"


def test_the_record_beside_a_run_says_where_it_was_made(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    record = {"device": "NVIDIA H200", "commit": "abc123", "versions": {"torch": "2.13"}, "command": ["python", "x y"]}
    record["earlier"] = [record | {"commit": "abc122"}]
    write_json(tmp_path / "demo" / "a.run.json", record)
    write_json(run / "results" / "suite.json", {"parts": [{"command": "python -m eval.needle --ckpt a"}]})
    text = rates.environment(read_runs([run]))[0]
    for row in (
        "device | NVIDIA H200",
        "commit | abc122, then abc123",
        "torch | 2.13",
        "training | `python 'x y'`",
        "seeds | 7, data 0",
    ):
        assert f"| {row} |" in text
    assert "| evaluation | `python -m eval.needle --ckpt a` |" in text


def test_a_run_on_the_cpu_is_not_said_to_be_in_the_recipes_precision(tmp_path):
    recipe = copy.deepcopy(RECIPE)
    recipe["trainer"]["precision"] = "bf16-mixed"
    run = make_run(tmp_path / "demo" / "a", recipe=recipe)
    assert "| precision, strategy | bf16-mixed, " in settings.settings(read_runs([run]))[0]
    write_json(run / "environment.json", {"device": "CPU, 2 cores"})
    assert "| 32-true on the CPU (recipe: bf16-mixed), " in settings.settings(read_runs([run]))[0]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_held_out_losses_are_compared_on_the_same_text_alone(tmp_path):
    other = copy.deepcopy(RECIPE)
    other["data"]["init_args"]["validation"][0]["max_windows"] = 8
    runs = pair(tmp_path)
    text = "\n".join(scores.heldout(read_runs(runs)))
    assert "| web | 3.500 | 3.000<br>-0.500 |" in text and "without an interval" in text
    third = make_run(tmp_path / "demo" / "c", recipe=other)
    assert "| web | other text in demo/c | 3.500 | 3.000 |" in "\n".join(scores.heldout(read_runs([runs[0], third])))


def test_held_out_sets_with_a_slash_in_their_names_stay_apart(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    (run / "logs" / "metrics.csv").write_text("step,tokens,val/web/long/loss,val/web/short/loss\n10,100,3.5,4.5\n")
    text = scores.heldout(read_runs([run]))[0]
    assert "| web/long | 3.500 |" in text and "| web/short | 4.500 |" in text


def test_needles_are_compared_by_length_and_pairing_is_said(tmp_path):
    one, two = pair(tmp_path)
    text = "\n".join(scores.needle(read_runs([one, two]), "needle"))
    assert "| 512 | 2 | 0.500 (0.09 to 0.91) | 1.000 (0.34 to 1.00)<br>+0.500" in text
    assert "| all: teacher-forced token accuracy | 4 | 0.500 (0.15 to 0.85) | 0.500 (0.15 to 0.85)<br>+0.000" in text
    assert "| worst depth |  | 0.000 at 100 % | 1.000 at 0 % |" in text and "(demo/b paired by question)" in text
    write_results(two / "results" / "needle.json", {(512, 0): 1.0}, n=3, settings={"haystack": "another"})
    text = "\n".join(scores.needle(read_runs([one, two]), "needle"))
    assert f"1.000 (0.44 to 1.00)<br>{unpaired(0.5, 2, 1.0, 3)}" in text and "(demo/b unpaired)" in text


def test_sweeps_under_other_conditions_are_looked_at_apart(tmp_path):
    one, two = pair(tmp_path)
    write_results(one / "results" / "needle-n1.json", {(512, 0): 1.0}, n=1)
    write_results(one / "results" / "needle-n2.json", {})  # begun, nothing done yet
    runs = read_runs([one, two])
    assert list(runs[0].needle) == ["needle", "needle-n1"] and "needle-n2.json (not finished)" in runs[0].left_out
    assert ["needles found at 512: n1", "1.000 (0.21 to 1.00)", settings.UNKNOWN] in glance(runs)


def test_ruler_is_paired_where_the_prompts_are_the_same(tmp_path):
    one, two = pair(tmp_path)
    write_ruler(one / "results" / "ruler.json", 18)
    write_ruler(two / "results" / "ruler.json", 9)
    text = "\n".join(scores.ruler(read_runs([one, two]), "ruler"))
    assert "| vt | 512 | 20 | 0.900 (0.70 to 0.97) | 0.450 (0.26 to 0.66)<br>**-0.450 (-0.63 to -0.19)** |" in text
    assert "| effective length |  |  | none (512) | none (512) |" in text and "(demo/b paired by question)" in text
    assert "- demo/a: bos exactly one, cut 3" in text
    write_ruler(two / "results" / "ruler.json", 9, prompt="other")
    text = "\n".join(scores.ruler(read_runs([one, two]), "ruler"))
    assert f"**{unpaired(0.9, 20, 0.45, 20)}**" in text and "(demo/b unpaired)" in text


def test_losses_by_position_are_paired_over_documents(tmp_path):
    one, two = pair(tmp_path)
    write_positions(one / "results" / "positions.json")
    write_positions(two / "results" / "positions.json", shift=0.25)
    content = json.loads((one / "results" / "positions.json").read_text())
    about = {"n": 3, "bos": "exactly one", "cut": 3}  # as earlier versions counted longer documents
    write_json(one / "results" / "positions.json", content | {"conditions": about})
    text = "\n".join(scores.positions(read_runs([one, two]), "positions"))
    assert text.endswith("- demo/a: n 3, bos exactly one")
    # exp of 4 and 5; 100 (exp(0.25) - 1)
    assert (
        "| all, perplexity | 90.000 (54.60 to 148.41) | 90.000 (54.60 to 148.41)<br>**+28.403 (+28.40 to +28.40) %**"
        in text
    )
    assert "difference to demo/a in nats a token, of perplexities in percent, with its 95 % interval" in text
    assert "| 128 | 64 to 128 | 4.000 (3.00 to 5.00) | 4.250 (3.00 to 5.00)<br>**+0.250 (+0.25 to +0.25)** |" in text


def test_a_checkpoint_of_others_beside_a_run_has_its_own_model_and_no_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = Path("models/a")
    others.mkdir(parents=True)
    (others / "config.json").write_text(json.dumps(ModelConfig(**MODEL).to_hf_dict()))
    evaluated = make_run(Path("runs/eval/models-a"), recipe=None)
    (evaluated / "logs/metrics.csv").unlink()
    runs = read_runs([others, make_run(tmp_path / "b")])
    assert runs[0].folder == evaluated and runs[0].model == ModelConfig(**MODEL)
    text = "\n".join(settings.settings(runs))
    assert "other keys of the recipes are alike" in text and "Other keys that differ" not in text
