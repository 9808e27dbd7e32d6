"""The report page repeats the numbers of the result files and links their pictures."""

import json
import math
from pathlib import Path

import pytest

from eval.checkpoint import fingerprint
from eval.report import RunResults, labels, main
from tests.eval.sweeps import write_results

SETTINGS = {"haystack": "prose", "needles": 1, "distractors": 0}


def lm_results(acc=0.25, **about):
    return {
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
            **about,
        },
    }


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
    (results / "lm-piqa.json").write_text(json.dumps(lm_results(acc)))
    return folder


def test_page_of_one_run_has_losses_needle_and_lm_eval_table(tmp_path):
    run = make_run(tmp_path / "demo" / "extend-2k", score=0.5)
    main([str(run)])
    page = (run / "results" / "README.md").read_text()
    assert "| step | tokens | web |" in page and "| 20 | 2,000 | 3.000 |" in page
    assert "| demo/extend-2k | 0.750 (0.30 to 0.95) | 0.750 | 0.750 | 0.500 at 100% |" in page
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
    assert "| demo/pretrain | 0.500 (0.15 to 0.85) | 0.500 | 0.500 | 0.000 at 100% |" in page
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


def side_by_side(tmp_path, *runs):
    page = tmp_path / "page.md"
    main([*map(str, runs), "--output", str(page)])
    return page.read_text()


def test_runs_with_the_same_last_names_keep_their_own_numbers(tmp_path):
    one = make_run(tmp_path / "A" / "demo" / "ext", score=0.0, acc=0.2, loss=3.5)
    two = make_run(tmp_path / "B" / "demo" / "ext", score=1.0, acc=0.3)
    three = make_run(tmp_path / "B" / "demo" / "pre", score=1.0, acc=0.4)
    page = side_by_side(tmp_path, one, two, three)
    assert "| set | A/demo/ext | B/demo/ext | demo/pre |" in page and "| web | 3.500 | 3.000 | 3.000 |" in page
    assert "| piqa | 5 | acc | 0.2000 ± 0.0123 | 0.3000 ± 0.0123 | 0.4000 ± 0.0123 |" in page
    assert "| A/demo/ext | 0.500" in page and "| B/demo/ext | 1.000" in page


def test_labels_are_the_shortest_that_tell_runs_apart():
    paths = [Path(path) for path in ("/demo/ext", "/A/demo/ext", "/A/x/ext")]
    assert labels(paths) == ["/demo/ext", "A/demo/ext", "x/ext"]
    assert labels([Path("/runs/demo/ext")]) == ["demo/ext"]


def test_a_run_that_is_named_twice_is_one_column(tmp_path):
    one = make_run(tmp_path / "demo" / "a")
    two = make_run(tmp_path / "demo" / "b")
    assert "| set | demo/a | demo/b |" in side_by_side(tmp_path, one, two, tmp_path / "demo" / ".." / "demo" / "a")


def test_a_quick_look_does_not_take_the_full_results_place(tmp_path):
    one, two = make_run(tmp_path / "demo" / "a", acc=0.2), make_run(tmp_path / "demo" / "b", acc=0.3)
    (one / "results" / "lm-piqa-limit5.json").write_text(json.dumps(lm_results(0.8, limit=5)))
    page = side_by_side(tmp_path, one, two)
    assert "| piqa | 5 | acc | no limit | 0.2000 ± 0.0123 | 0.3000 ± 0.0123 |" in page
    assert "| piqa | 5 | acc | limit 5 | 0.8000 ± 0.0123 | - |" in page


def test_results_under_several_conditions_say_what_differs(tmp_path):
    one, two = make_run(tmp_path / "demo" / "a", acc=0.2), make_run(tmp_path / "demo" / "b", acc=0.3)
    (two / "results" / "lm-piqa-2k.json").write_text(json.dumps(lm_results(0.4, max_length=2048)))
    page = side_by_side(tmp_path, one, two)
    assert "| piqa | 5 | acc | max_length 1024 | 0.2000 ± 0.0123 | 0.3000 ± 0.0123 |" in page
    assert "| piqa | 5 | acc | max_length 2048 | - | 0.4000 ± 0.0123 |" in page


def test_runs_of_different_lengths_stand_in_one_row(tmp_path):
    one, two = make_run(tmp_path / "demo" / "a", acc=0.2), make_run(tmp_path / "demo" / "b")
    (two / "results" / "lm-piqa.json").write_text(json.dumps(lm_results(0.4, max_length=2048)))
    assert "| piqa | 5 | acc | 0.2000 ± 0.0123 | 0.4000 ± 0.0123 |" in side_by_side(tmp_path, one, two)


def test_sweeps_under_other_conditions_have_tables_of_their_own(tmp_path):
    one, two = make_run(tmp_path / "demo" / "a", score=0.0), make_run(tmp_path / "demo" / "b")
    write_results(one / "results" / "needle-n1.json", {(512, 0): 1.0}, n=1)
    write_results(one / "results" / "needle-n2.json", {})  # begun, nothing done yet
    page = side_by_side(tmp_path, one, two)
    assert "## Needle in a haystack\n" in page and "## Needle in a haystack: n1\n" in page and "n2" not in page
    assert "| demo/a | 0.500" in page and "| demo/a | 1.000 (0.21 to 1.00)" in page


def test_results_of_other_weights_are_left_out_and_named(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    now = fingerprint(run / "hf")
    write_results(run / "results" / "needle.json", {(512, 0): 0.5}, fingerprint="earlier")
    write_results(run / "results" / "needle-n1.json", {(512, 0): 1.0}, n=1, fingerprint=now)
    main([str(run / "hf")])
    page = (run / "results" / "README.md").read_text()
    assert "## Needle in a haystack: n1" in page and "0.500" not in page
    assert "Left out of demo/a, since they are of other weights than it has now: needle.json" in page


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors"])
def test_a_checkpoint_is_another_one_whichever_byte_of_it_differs(tmp_path, name):
    for file in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors"):
        (tmp_path / file).write_bytes(bytes(3 << 20))
    before = fingerprint(tmp_path)
    with (tmp_path / name).open("r+b") as stream:
        stream.seek(3 << 19)
        stream.write(b"1")
    assert fingerprint(tmp_path) != before


def test_a_table_without_what_makes_one_is_named(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    (run / "results" / "odd.json").write_text('{"results": {"x": {"acc,none": 0.5}}, "s2": {"tasks": ["x"]}}')
    with pytest.raises(ValueError, match=r"odd\.json: not as eval\.lm writes it \('versions' is missing"):
        main([str(run)])


def test_a_page_that_somebody_else_wrote_is_not_replaced(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(ValueError, match=r"README\.md was not written by this program; choose another --output"):
        main([str(run), "--output", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == "# My project"
    (tmp_path / "README.md").write_text("# Results of demo/a\n")  # as earlier versions began it
    for _ in range(2):
        main([str(run), "--output", str(tmp_path / "README.md")])
    assert "| web |" in (tmp_path / "README.md").read_text()


def test_held_out_sets_with_a_slash_in_their_names_stay_apart(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    (run / "logs" / "metrics.csv").write_text("step,tokens,val/web/long/loss,val/web/short/loss\n10,100,3.5,4.5\n")
    main([str(run)])
    page = (run / "results" / "README.md").read_text()
    assert "| step | tokens | web/long | web/short |" in page and "| 10 | 100 | 3.500 | 4.500 |" in page


def test_a_broken_row_of_the_training_log_is_named(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    with (run / "logs" / "metrics.csv").open("a") as stream:
        stream.write("30,3000,,3.0x,2\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 5: not a row of the training log"):
        main([str(run)])


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path):
    run = make_run(tmp_path / "demo" / "a")
    with (run / "logs" / "metrics.csv").open("a") as stream:
        stream.write("30,3000,,3.")
    main([str(run)])
    assert "| 20 | 2,000 | 3.000 |" in (run / "results" / "README.md").read_text()


def test_a_page_in_html_has_the_pictures_in_it(tmp_path):
    one, two = make_run(tmp_path / "demo" / "a"), make_run(tmp_path / "demo" / "b")
    (one / "results" / "needle.png").write_bytes(b"picture")
    main([str(one), str(two), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "<td>web</td>" in page and "<title>Side by side: demo/a, demo/b</title>" in page
    assert "data:image/png;base64,cGljdHVyZQ==" in page and 'png"' not in page
