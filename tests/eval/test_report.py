"""The report page repeats the numbers of the result files and links their pictures."""

import json
import math

import pytest

from eval.report import RunResults, main

SETTINGS = {"haystack": "prose", "needles": 1, "distractors": 0}


def make_run(folder, score=1.0, acc=0.25, loss=3.0):
    results = folder / "results"
    results.mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "logs" / "metrics.csv").write_text(
        "step,tokens,train/loss,val/web/loss,val/web/perplexity\n"
        "10,1000,5.0,,\n"
        f"10,1000,,{loss + 1},{math.exp(loss + 1)}\n"
        f"20,2000,,{loss},{math.exp(loss)}\n"
    )
    samples = [
        {
            "id": f"{length}/{depth}",
            "length": length,
            "depth": depth,
            "scores": {"exact": score if depth else 1.0},
        }
        for length in (512, 1024)
        for depth in (0, 100)
    ]
    needle = {"kind": "needle", "checkpoint": folder.name, "train_length": 1024, "settings": SETTINGS}
    (results / "needle.json").write_text(json.dumps(needle | {"samples": samples}))
    (results / "needle.png").write_bytes(b"")
    (results / "needle.old1.json").write_text(json.dumps(needle | {"samples": samples[:1]}))
    lm = {
        "results": {"piqa": {"alias": "piqa", "acc,none": acc, "acc_stderr,none": 0.0123}},
        "versions": {"piqa": 1.0},
        "n-shot": {"piqa": 5},
        "higher_is_better": {"piqa": {"acc": True}},
        "s2": {
            "tasks": ["piqa"],
            "max_length": 1024,
            "bos": "yes (<|bos|>)",
            "limit": None,
            "cut_inputs": "none",
        },
    }
    (results / "lm-piqa.json").write_text(json.dumps(lm))
    return folder


def test_page_of_one_run_has_losses_needle_and_lm_eval_table(tmp_path):
    run = make_run(tmp_path / "demo" / "extend-2k", score=0.5)
    main([str(run)])
    page = (run / "results" / "README.md").read_text()
    assert "| step | tokens | web |" in page and "| 20 | 2,000 | 3.000 |" in page
    assert "| demo/extend-2k | 0.750 | 0.750 | 0.500 at 100% |" in page
    assert "![needle heatmap of demo/extend-2k](needle.png)" in page
    assert "|piqa |      1|none  |     5|acc   |↑  | 0.25|±  |0.0123|" in page
    assert "piqa: max_length 1024, BOS yes (<|bos|>), limit none, cut inputs: none" in page
    assert page.count("## Needle") == 1  # results set aside are left out


def test_several_runs_stand_side_by_side(tmp_path):
    one = make_run(tmp_path / "demo" / "pretrain", score=0.0, acc=0.2, loss=3.5)
    two = make_run(tmp_path / "demo" / "extend-2k", score=1.0, acc=0.3)
    main([str(one), str(two), "--output", str(tmp_path / "demo" / "README.md")])
    page = (tmp_path / "demo" / "README.md").read_text()
    assert "| set | demo/pretrain | demo/extend-2k |" in page and "| web | 3.500 | 3.000 |" in page
    assert "| piqa | 5 | acc | 0.2000 ± 0.0123 | 0.3000 ± 0.0123 |" in page
    assert "| demo/pretrain | 0.500 | 0.500 | 0.000 at 100% |" in page
    assert "](extend-2k/results/needle.png)" in page


def test_missing_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; expected something like runs/demo/extend-2k"):
        RunResults.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no results yet"):
        RunResults.read(tmp_path / "empty")
    with pytest.raises(ValueError, match="several runs need --output"):
        main([str(tmp_path), str(tmp_path)])
    broken = make_run(tmp_path / "broken")
    (broken / "results" / "lm-piqa.json").write_text("{")
    with pytest.raises(ValueError, match=r"lm-piqa.json, line 1: not valid JSON"):
        RunResults.read(broken)
