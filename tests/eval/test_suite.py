"""The suite and the gate: each part's figures come together, nothing runs twice, thresholds hold or not."""

import json
import shutil

import pytest

from eval import gate, lm, needle, suite
from eval.gate import GateConfig
from eval.haystack import Haystack
from s2 import files
from s2.inference.folder import load_tokenizer
from s2.inference.prefill import PREFILL_CHUNK
from s2.training.gate import thresholds_digest
from tests.eval.small_checkpoint import make_checkpoint, prose


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("suite") / "hf", max_length=512, layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    (data / "essays.txt").write_text(prose(600, 3))
    (data / "books.jsonl").write_text("".join(f"{json.dumps({'text': prose(60, i)})}\n" for i in range(4)))
    return data


def run_suite(folder, data, output, *more):
    command = ["--ckpt", str(folder), "--device", "cpu", "--output", str(output), "--tasks", "s2_passkey"]
    command += ["--haystack", str(data / "essays.txt"), "--documents", str(data / "books.jsonl")]
    command += ["--lengths", "400,512", "--depths", "0,100", "--needle-n", "1", "--ruler-n", "1"]
    suite.main([*command, "--ruler-tasks", "niah_single_2", *more])
    [file] = output.glob("suite-*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def test_the_loss_of_one_source_is_asked_for_beside_that_of_all_documents(folder, tmp_path):
    words = ["--ckpt", str(folder), "--parts", "positions", "--document-source", "books", "--documents", "shards"]
    (_, _, every), (_, name, one) = suite.plan(suite.read_arguments(words), [512], tmp_path)
    assert one == [*every, "--source", "books"] and name == "loss by position, books"
    row = {"length": 512, "loss": 3.0, "documents": 4, "interval": [2.0, 4.0]}
    content = {"settings": {"source": "books"}, "summary": {"lengths": [row]}}
    assert [each["task"] for each in suite.rows_of("positions", content)] == ["loss of books"]


def test_the_size_of_pieces_goes_to_those_who_read_prompts_and_only_if_it_is_set(folder, tmp_path):
    """What is not set is no part of a command, by which the suite knows what it has done."""
    words = ["--ckpt", str(folder), "--tasks", "s2_passkey"]
    usual = suite.plan(suite.read_arguments(words), [512], tmp_path)
    assert suite.plan(suite.read_arguments([*words, "--prefill-chunk", str(PREFILL_CHUNK)]), [512], tmp_path) == usual
    assert "--prefill-chunk" not in {word for *_, each in usual for word in each}
    other = suite.plan(suite.read_arguments([*words, "--prefill-chunk", "512"]), [512], tmp_path)
    for (part, _, before), (_, _, after) in zip(usual, other, strict=True):
        assert after == before + (["--prefill-chunk", "512"] if part != "positions" else [])


def test_one_command_runs_every_part_and_brings_them_together(folder, data, tmp_path, monkeypatch, capsys):
    first, text = run_suite(folder, data, tmp_path, "--kinds", "single,passkey")
    assert [part["part"] for part in first["parts"]] == ["positions", "ruler", "needle", "needle", "lm"]
    assert all((tmp_path / part["file"]).is_file() for part in first["parts"])
    rows = {(row["part"], row["task"], row["length"], row["metric"]): row for row in first["rows"]}
    for key, n in {
        ("needle", "passkey", 512, "exact"): 2,
        ("ruler", "mean", 400, "all"): 1,
        ("positions", "loss", 512, "nats/token"): 4,
        ("lm", "s2_passkey", None, "acc"): 40,
        ("lm", "s2_passkey", None, "acc_256"): 20,  # of one length alone
    }.items():
        assert rows[key]["n"] == n and len(rows[key]["interval"]) == 2
    assert rows["positions", "loss", 512, "nats/token"]["higher_is_better"] is False
    kept = json.loads((tmp_path / first["parts"][-1]["file"]).read_text())
    assert len(kept["documents"]["s2_passkey"]["scores"]["acc,none"]) == 40 and "samples" not in kept
    for line in ("| needle, passkey (exact) |", "| RULER mean (%) |", "| loss (nats/token) |", "| s2_passkey | acc |"):
        assert line in text
    monkeypatch.setattr(lm, "S2LM", None)  # nothing is evaluated again
    monkeypatch.setattr("s2.inference.folder.load_pretrained", None)
    again, _ = run_suite(folder, data, tmp_path, "--kinds", "single,passkey")
    assert again["rows"] == first["rows"]
    table = tmp_path / first["parts"][-1]["file"]
    assert f"{table}: there already, of this checkpoint\n" in capsys.readouterr().out
    table.write_text(json.dumps(kept | {"s2": kept["s2"] | {"lm_eval": "0.1"}}))
    with pytest.raises(TypeError, match="not callable"):  # a table of another lm-eval is made anew
        run_suite(folder, data, tmp_path, "--kinds", "single,passkey")


def test_suite_and_gate_share_a_haystack_over_depths_where_they_are_told_to(folder, data, tmp_path):
    """The file has another name and other settings, so that its prompts are never taken for those of another."""
    for shared in (False, True):
        more = ["--shared-haystack"] if shared else []
        results, _ = run_suite(folder, data, tmp_path / f"suite-{shared}", "--parts", "needle", *more)
        config = write_config(
            data, tmp_path / "gate.yaml", f"shared_haystack: {str(shared).lower()}\nneedle: [{{length: 400, min: 0}}]\n"
        )
        [check] = gate.check_gate(folder, config, tmp_path / f"gate-{shared}", ["--device", "cpu"])["checks"]
        for output, name in (("suite", results["parts"][0]["file"]), ("gate", check["file"])):
            written = json.loads((tmp_path / f"{output}-{shared}" / name).read_text())
            assert written["settings"]["shared_haystack"] is shared is ("-shared-" in name)


def test_parts_that_read_one_haystack_tokenise_it_once(folder, data, tmp_path, monkeypatch):
    read = []
    from_texts = Haystack.from_texts
    monkeypatch.setattr(needle, "_haystacks", {})
    monkeypatch.setattr(Haystack, "from_texts", lambda *args: read.append(args[2]) or from_texts(*args))
    texts = shutil.copytree(data, tmp_path / "data")
    options = ["--parts", "ruler,needle", "--kinds", "single,multi-key"]
    run_suite(folder, texts, tmp_path / "first", *options)
    assert read == ["essays.txt"]
    (texts / "essays.txt").write_text(prose(601, 3))
    again, _ = run_suite(folder, texts, tmp_path / "second", *options)
    digests = {json.loads((tmp_path / "second" / p["file"]).read_text())["settings"]["haystack_digest"]
               for p in again["parts"]}  # fmt: skip
    tokenizer = load_tokenizer(folder)
    assert len(read) == 2 and digests == {from_texts([prose(601, 3)], tokenizer, "essays.txt").digest}


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (["--parts", "needles"], ValueError, "--parts needles: expected some of positions, ruler"),
        (["--lengths", "1k"], ValueError, "--lengths 1024: the checkpoint reads at most 512 tokens"),
        (["--haystack", "nowhere.txt"], FileNotFoundError, "nowhere.txt: no such file"),
        (["--part", "1/2"], ValueError, "split it with --processes"),
        (["--parts", "lm", "--tasks", ""], ValueError, "--parts lm: name the tasks with --tasks"),
        (["--ruler-tasks", "vtt"], ValueError, "^--ruler-tasks vtt: expected some of"),
        (["--ruler-tasks", "cwe", "--lengths", "200"], ValueError, r"no room for cwe.* or the task \(--ruler-tasks\)$"),
        (["--ruler-n", "0"], ValueError, "^--ruler-n 0: expected at least 1"),
        (["--needle-n", "0"], ValueError, "^--needle-n 0: expected at least 1"),
        (["--document-source", "x"], ValueError, "^--document-source x: .* is no shard folder"),
        (["--lengths", "64,512"], ValueError, "--lengths 64: no room for niah_single_2"),
        (["--depths", "0,101"], ValueError, "101"),
        (["--limit", "-1"], SystemExit, "2"),
    ],
)
def test_the_suite_refuses_bad_input_before_any_part(folder, data, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        run_suite(folder, data, tmp_path / "out", *arguments)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("chosen", "needed"),
    [
        (["--parts", "positions"], ["--documents"]),
        (["--parts", "ruler", "--ruler-tasks", "niah_single_2"], ["--haystack"]),
        (["--parts", "needle"], ["--haystack"]),
        (["--parts", "needle", "--kinds", "passkey"], []),
        (["--parts", "needle,positions", "--kinds", "passkey, single"], ["--haystack", "--documents"]),
        (["--parts", "lm", "--tasks", "s2_passkey"], []),
    ],
)
def test_only_the_texts_that_the_chosen_parts_read_are_asked_for(folder, data, tmp_path, monkeypatch, chosen, needed):
    """Of a checkpoint without held-out documents near it; what no part reads may be missing."""
    given = {"--haystack": str(data / "essays.txt"), "--documents": str(data / "books.jsonl")}
    monkeypatch.setitem(suite.PARTS, "lm", lambda words: lambda: pytest.fail("ran"))  # its texts are asked for above
    for part in ("positions", "ruler", "needle"):
        ready = suite.PARTS[part]
        monkeypatch.setitem(suite.PARTS, part, lambda words, ready=ready: ready(words) and (lambda: pytest.fail("ran")))
    command = ["--ckpt", str(folder), "--device", "cpu", "--output", str(tmp_path), "--lengths", "400", *chosen]
    unread = [word for option in given if option not in needed for word in (option, str(tmp_path / "nowhere"))]
    read = {option: [option, given[option]] for option in needed}
    with pytest.raises(pytest.fail.Exception, match="ran"):
        suite.command([*command, *unread, *(word for words in read.values() for word in words)])
    for option in needed:
        others = [word for name, words in read.items() if name != option for word in words]
        given_by = rf"has no held-out shards near it .* {option} FILE \(make: {option.strip('-').upper()}=FILE\)$"
        with pytest.raises(FileNotFoundError, match=given_by):
            suite.command([*command, *others])
        with pytest.raises(FileNotFoundError, match=f"{option} nowhere: no such file"):
            suite.command([*command, *others, option, "nowhere"])


def write_config(data, file, text):
    file.write_text(f"documents: {data / 'books.jsonl'}\nhaystack: {data / 'essays.txt'}\nneedle_n: 1\n{text}")
    return file


def test_a_gate_holds_each_figure_against_its_threshold(folder, data, tmp_path, monkeypatch, capsys):
    """A checkpoint compared with itself has not risen; what is missed is said, and everything is in gate.json."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "base")
    config = write_config(
        data,
        tmp_path / "gate.yaml",
        f"base: {tmp_path / 'base'}\n"
        "loss:\n- {length: 256, max: 100}\n- {length: 512, from: 256, to: 512, max_rise: 0}\n"
        "needle:\n- {length: 512, min: 0.5}\ntasks:\n- {task: s2_passkey, metric: acc, min: 0}\n",
    )
    command = ["--ckpt", str(folder), "--device", "cpu", "--output", str(tmp_path / "out"), "--config", str(config)]
    with pytest.raises(ValueError, match=r"gate\.json: 1 of 4 checks are not passed"):
        gate.main(command)
    written = json.loads((tmp_path / "out/gate.json").read_text())
    assert [check["passed"] for check in written["checks"]] == [True, True, False, True] and not written["passed"]
    loss, part, needle, task = written["checks"]
    assert part["base"] == part["value"] and part["n"] == 4 and part["from"] == 256 and loss["max"] == 100
    assert needle["value"] < 0.5 == needle["min"] and needle["n"] == 11 and task["n"] == 40
    assert "| needle single 512 | 0 | min 0.5 | missed |" in capsys.readouterr().out
    config.write_text(config.read_text().replace("min: 0.5", "min: 0"))
    gate.main(command)
    assert json.loads((tmp_path / "out/gate.json").read_text())["passed"] is True


def test_a_gate_asks_for_no_file_that_no_check_reads(folder, tmp_path):
    """And before any figure is taken for those that one does."""
    unread = "base: nowhere\nhaystack: nowhere\ndocuments: nowhere\ndata_dir: nowhere\nlimit: 2\n"
    (tmp_path / "gate.yaml").write_text(f"{unread}tasks: [{{task: s2_passkey, min: 0}}]\n")
    [check] = gate.check_gate(folder, tmp_path / "gate.yaml", tmp_path, ["--device", "cpu"])["checks"]
    assert check["passed"] is True
    (tmp_path / "gate.yaml").write_text(f"{unread}tasks: [{{task: s2_passkey, max_drop: 0}}]\n")
    with pytest.raises(FileNotFoundError, match="checkpoint nowhere: no such folder"):
        gate.check_gate(folder, tmp_path / "gate.yaml", tmp_path, ["--device", "cpu"])
    for check, said in (
        ("loss: [{length: 256, max: 9}]", "gate.yaml: documents: nowhere: no such file"),
        ("needle: [{length: 256, min: 0}]", "gate.yaml: haystack: nowhere: no such file"),
        (
            "needle: [{length: 256, min: 0}]\nhaystack: null",
            r"has no held-out shards near it .* `haystack: FILE` in .*gate\.yaml$",
        ),
        ("needle: [{length: 1k, min: 0}]", r"gate\.yaml: length 1024: the checkpoint reads at most 512"),
    ):
        text = unread.replace("haystack: nowhere\n", "") if "null" in check else unread
        (tmp_path / "gate.yaml").write_text(f"{text}{check}\ntasks: [{{task: s2_passkey, min: 0}}]\n")
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            gate.check_gate(folder, tmp_path / "gate.yaml", tmp_path / "new", ["--device", "cpu"])
    assert not (tmp_path / "new").exists()


def test_the_loss_of_some_positions_is_theirs_alone(folder, data, tmp_path):
    text = "loss:\n- {length: 256, from: 64, to: 128, max: 100}\n- {length: 256, from: 64, max: 100}\n"
    config = write_config(data, tmp_path / "gate.yaml", text)
    first, second = gate.check_gate(folder, config, tmp_path, ["--device", "cpu"])["checks"]
    [row] = json.loads((tmp_path / first["file"]).read_text())["summary"]["lengths"]
    buckets = {bucket["from"]: bucket for bucket in row["buckets"]}
    assert first["value"] == buckets[64]["loss"] and first["interval"] == buckets[64]["interval"]
    expected = (64 * buckets[64]["loss"] + 128 * buckets[128]["loss"]) / 192
    assert second["value"] == pytest.approx(expected, abs=1e-4)


def test_the_gate_keeps_the_losses_by_bucket_and_the_digest_of_its_thresholds(folder, data, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    text = f"base: {tmp_path / 'base'}\nloss:\n- {{length: 256, max_rise: 0}}\n- {{length: 512, max: 100}}\n"
    config = write_config(data, tmp_path / "gate.yaml", text)
    written = gate.check_gate(folder, config, tmp_path, ["--device", "cpu"])
    first, second = files.read_json(tmp_path / written["checks"][0]["file"])["summary"]["lengths"]
    assert {key: written["loss"][key] for key in ("256", "512")} == {"256": first, "512": second}
    assert first["buckets"][-1]["from"] == 128 and list(written["loss"]["base"]) == ["256"]  # what is compared with it
    assert written["loss"]["base"]["256"]["buckets"] == first["buckets"]
    assert written["config_digest"] == thresholds_digest(config)


def test_a_gate_on_a_metric_that_is_better_the_lower_it_is_stops_a_worse_model(folder, data, tmp_path, monkeypatch):
    """Bits per byte that rise are missed, those that fall pass, and thresholds that would have it the other way round
    are refused before anything is scored."""
    base = shutil.copytree(folder, tmp_path / "base")
    text = f"base: {base}\ntasks:\n"
    for metric, threshold in (("bits_per_byte", "max_rise: 0.01"), ("word_perplexity", "max: 900")):
        text += f"- {{task: s2_heldout, metric: {metric}, {threshold}}}\n"
    config = write_config(data, tmp_path / "gate.yaml", text)
    own, before = {}, {"bits_per_byte": 2.0, "word_perplexity": 800.0}

    def scored(words):
        figures = before if str(base) in words else own
        content = {
            "results": {"s2_heldout": {f"{metric},none": value for metric, value in figures.items()}},
            "higher_is_better": {"s2_heldout": dict.fromkeys(figures, False)},
            "documents": {},
        }
        files.write_json(tmp_path / "lm.json", content)
        return tmp_path / "lm.json"

    monkeypatch.setattr(lm, "command", scored)
    for bits, perplexity, passed in ((3.0, 1000.0, False), (1.0, 800.0, True)):
        own |= {"bits_per_byte": bits, "word_perplexity": perplexity}
        checks = gate.check_gate(folder, config, tmp_path / "out", ["--device", "cpu"])["checks"]
        assert [check["passed"] for check in checks] == [passed, passed]
    assert checks[0]["base"] == 2.0 and "base" not in checks[1]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"better the lower it is; .*, not min: 5"):
        patch.setattr(lm, "is_higher_better", lambda task, metric: None)  # a group: its results say so
        text = "tasks:\n- {task: s2_heldout, metric: bits_per_byte, min: 5}\n"
        gate.check_gate(folder, write_config(data, tmp_path / "gate.yaml", text), tmp_path / "out", ["--device", "cpu"])
    monkeypatch.setattr(lm, "command", None)
    for task, metric, threshold, said in (
        ("s2_heldout", "bits_per_byte", "max_drop: 0.01", "better the lower it is; expected max or max_rise"),
        ("lambada_openai", "perplexity", "min: 5", "better the lower it is; expected max or max_rise"),
        ("s2_passkey", "acc", "max_rise: 0.01", "better the higher it is; expected min or max_drop"),
    ):
        text = f"base: {base}\ntasks:\n- {{task: {task}, metric: {metric}, {threshold}}}\n"
        config = write_config(data, tmp_path / "gate.yaml", text)
        monkeypatch.setattr(lm, "unavailable", lambda tasks, data_dir: {})
        with pytest.raises(ValueError, match=rf"gate\.yaml: tasks: {metric} of {task} is {said}, not {threshold}"):
            gate.check_gate(folder, config, tmp_path / "out", ["--device", "cpu"])


def test_the_direction_of_a_metric_is_what_lm_eval_says_of_it():
    assert lm.is_higher_better("piqa", "acc") is True and lm.is_higher_better("lambada_openai", "perplexity") is False
    assert lm.is_higher_better("wikitext", "bits_per_byte") is False  # whose YAML does not say
    assert lm.is_higher_better("s2_passkey", "acc_512") is True and lm.is_higher_better("mmlu", "acc") is None


def test_a_gate_reads_local_tasks_and_says_which_it_had_no_rows_for(folder, data, tmp_path, capsys):
    (tmp_path / "rows/piqa").mkdir(parents=True)
    row = {"goal": "eat", "sol1": "with a spoon", "sol2": "with a saw", "label": 0}
    (tmp_path / "rows/piqa/validation.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    tasks = "tasks:\n- {task: piqa, min: 0}\n- {task: arc_easy, min: 0.2}\n"
    config = write_config(data, tmp_path / "gate.yaml", tasks)
    command = ["--ckpt", str(folder), "--device", "cpu", "--output", str(tmp_path / "out"), "--config", str(config)]
    gate.main([*command, "--data-dir", str(tmp_path / "rows")])
    written = files.read_json(tmp_path / "out/gate.json")
    piqa, arc = written["checks"]
    assert written["passed"] is True and written["data_dir"] == str(tmp_path / "rows")
    assert piqa["passed"] is True and piqa["n"] == 3
    assert arc["value"] is None and arc["passed"] is None and "no folder for task 'arc_easy'" in arc["unmeasured"]
    assert "| task arc_easy acc | - | min 0.2 | not measured: --data-dir" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "rows/piqa")
    with pytest.raises(ValueError, match=r"gate\.yaml: nothing can be measured: .*'piqa'.*'arc_easy'"):
        gate.main([*command, "--data-dir", str(tmp_path / "rows")])


def test_a_task_that_the_hub_does_not_give_is_left_out(monkeypatch):
    def load(self, names):
        if "piqa" in names:
            raise ConnectionError("Couldn't reach 'baber/piqa'")

    monkeypatch.setattr("eval.task_manager.CorrectedTasks.load", load)
    assert lm.unavailable(["arc_easy", "piqa", "s2_passkey"], None) == {"piqa": "Couldn't reach 'baber/piqa'"}
    assert lm.unavailable(["s2_passkey"], None) == {}
    with pytest.raises(ValueError, match="did you mean piqa"):
        lm.unavailable(["piqaa"], None)


@pytest.mark.parametrize(
    "text,message",
    [
        ("", r"no check: expected loss, needle or tasks"),
        ("loss: [{length: 256}]", r"loss\.0: expected one of max and max_rise"),
        ("loss: [{length: 256, from: 100, max: 3}]", r"loss\.0: from: 100 is no border of the buckets \[0, 64, 128"),
        ("loss: [{length: 256, max_rise: 1}]", "base: max_rise and max_drop need a checkpoint"),
        ("needle: [{length: 256, min: 1, kind: two}]", r"needle\.0\.kind: .*'single'"),
        ("loss: [{length: 256, max: .inf}]", r"loss\.0\.max: .*finite number; it is inf"),
        ("needle: [{length: 256, min: .nan}]", r"needle\.0\.min: .*finite number; it is nan"),
        ("tasks: [{task: piqa, min: x}]", r"tasks\.0\.min: .*number.*; it is 'x'"),
        ("tasks: [{task: piqa, min: 62}]", r"tasks\.0: min: 62, and acc is a share, from 0 to 1"),
        ("loss: [{length: 256, max: '9'}]", r"loss\.0\.max: .*number; it is '9'"),
        ("loss: [{length: 256, max: true}]", r"loss\.0\.max: .*number; it is True"),
        ("loss: [{length: 256, max: -1}]", r"loss\.0\.max: .*greater than or equal to 0; it is -1"),
        ("loss: [{length: 256, from: false, max: 3}]", r"loss\.0\.from: 'False' is no length"),
        ("needle: [{length: 256, min: 2}]", r"needle\.0\.min: .*less than or equal to 1; it is 2"),
        ("needle: [{length: 256, max_drop: 5}]", r"needle\.0\.max_drop: .*less than or equal to 1; it is 5"),
        ("needle: [{length: 256, min: 1}]\nneedle_n: '5'", r"needle_n: .*integer; it is '5'"),
        ("needle: [{length: 256, min: 1}]\nlimit: true", r"limit: .*integer; it is True"),
        ("needle: [{length: 256, min: 1}]\nshared_haystack: 1", r"shared_haystack: .*boolean; it is 1"),
        ("needles: []", r"needles: .*not permitted"),
        ("loss: [{length: 2x, max: 3}]", r"loss\.0\.length: '2x' is no length"),
    ],
)
def test_wrong_thresholds_are_named(tmp_path, text, message):
    (tmp_path / "gate.yaml").write_text(text or "{}")
    with pytest.raises(ValueError, match=rf"gate\.yaml: .*{message}"):
        GateConfig.load(tmp_path / "gate.yaml")
