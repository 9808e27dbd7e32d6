"""The lm-eval model and its tables: right numbers, nothing cut in silence, stock tasks on local files."""

import gzip
import json
import logging
import math
import os
from pathlib import Path

import lm_eval
import pytest
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from data.corpus.tokenizer import TextTokenizer
from data.shards import ShardWriter, write_manifest
from eval import documents
from eval.lm import S2LM, evaluate, main, stock_tasks, table
from eval.local_tasks import write_local_tasks
from eval.task_manager import quiet_about
from tests.eval.small_checkpoint import make_checkpoint, prose


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def dense(request, tmp_path_factory):
    """A checkpoint that Hugging Face's Llama can also run."""
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "hf", "dense", adds_bos=request.param)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("run") / "stage" / "hf")


@pytest.fixture(scope="module")
def lm(sparse):
    return S2LM(sparse, device="cpu")


def hugging_face(folder, **options):
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, **options)


def requests(*arguments):
    return [Instance("loglikelihood", {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [(prose(i % 9 + 1, i), " " + prose(1, 100 + i)) for i in range(24)] + [
    ("", "the river"),
    ("trailing ", "space"),
]


def test_loglikelihoods_equal_those_of_the_hugging_face_model(dense):
    ours = S2LM(dense, device="cpu", batch_tokens=600).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    theirs = hugging_face(dense).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4, rel=1e-6)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_loglikelihoods_equal_those_of_the_hugging_face_model_over_several_windows(dense):
    texts = requests(*[(prose(n, n),) for n in (1, 10, 25, 60)])
    ours = S2LM(dense, device="cpu").loglikelihood_rolling(texts, disable_tqdm=True)
    # With a tokenizer that adds BOS, the Hugging Face model would put two in front and score the second.
    theirs = hugging_face(dense, add_bos_token=False).loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-6)


def test_generated_texts_equal_those_of_the_hugging_face_model(dense):
    options = {"until": ["\n", "the"], "max_gen_toks": 24}
    prompts = requests(*[(prose(n % 3 + 1, n), dict(options)) for n in range(6)])
    theirs = hugging_face(dense)
    theirs.tokenizer.pad_token_id = theirs.tokenizer.eos_token_id
    assert S2LM(dense, device="cpu").generate_until(prompts, disable_tqdm=True) == theirs.generate_until(
        prompts, disable_tqdm=True
    )


def test_batches_change_nothing_for_sparse_layers(sparse):
    pairs = requests(*PAIRS[:12])
    alone = S2LM(sparse, device="cpu", batch_size=1).loglikelihood(pairs, disable_tqdm=True)
    together = S2LM(sparse, device="cpu", batch_tokens=4096).loglikelihood(pairs, disable_tqdm=True)
    assert [v for v, _ in alone] == pytest.approx([v for v, _ in together], abs=1e-4)
    prompts = requests(*[(prose(n % 3 + 1, n), {"until": [], "max_gen_toks": 8}) for n in range(6)])
    one = S2LM(sparse, device="cpu", batch_size=1).generate_until(prompts, disable_tqdm=True)
    assert one == S2LM(sparse, device="cpu", batch_size=6).generate_until(prompts, disable_tqdm=True)


def test_greedy_flag_tells_the_models_own_continuation(lm):
    prompt = prose(3, 1)
    (said,) = lm.generate_until(requests((prompt, {"until": [], "max_gen_toks": 1})), disable_tqdm=True)
    tokens = lm.checkpoint.generate([lm.tok_encode(prompt)], 1)[0]
    scored = lm._loglikelihood_tokens([(None, lm.tok_encode(prompt), tokens)], disable_tqdm=True)
    assert scored[0][1] and lm.checkpoint.tokenizer.decode(tokens) == said
    other = [(tokens[0] + 1) % 512]
    assert not lm._loglikelihood_tokens([(None, lm.tok_encode(prompt), other)], disable_tqdm=True)[0][1]
    half = [*tokens, (lm.checkpoint.generate([lm.tok_encode(prompt)], 2)[0][1] + 1) % 512]
    assert not lm._loglikelihood_tokens([(None, lm.tok_encode(prompt), half)], disable_tqdm=True)[0][1]


def test_bos_is_as_set_and_never_doubled(dense):
    as_tokenizer = S2LM(dense, device="cpu")
    adds = as_tokenizer.encoder.add_bos_token
    assert adds == (
        "bos" in as_tokenizer.encoder.bos_setting() and as_tokenizer.encoder.bos_setting().startswith("yes")
    )
    for wanted in (True, False):
        lm = S2LM(as_tokenizer.checkpoint, add_bos_token=wanted)
        assert (lm.tok_encode("the river")[0] == 0) is wanted
        assert lm.tok_encode("<|bos|>the river").count(0) == wanted  # in a text it is text, as in training


def test_long_inputs_are_cut_on_the_left_with_a_warning_that_names_max_length(sparse, caplog):
    lm = S2LM(sparse, device="cpu", max_length=64)
    long, short = (prose(30, 1), " the river"), (prose(1, 2), " the river")
    with caplog.at_level(logging.WARNING):
        results = lm.loglikelihood(requests(long, short, long), disable_tqdm=True)
    assert "max_length=64" in caplog.text
    assert lm.overflow_note() == "2 request(s) cut on the left to max_length=64"
    kept = lm.tok_encode(long[0])
    answer = lm.tok_encode(" the river", add_special_tokens=False)
    expected = lm._loglikelihood_tokens([(None, kept[-(65 - len(answer)) :], answer)], disable_tqdm=True)
    assert results[0][0] == pytest.approx(expected[0][0], abs=1e-4)
    lm.generate_until(requests((prose(30, 1), {"until": [], "max_gen_toks": 8})), disable_tqdm=True)
    assert lm.overflow_note() == "2 request(s), 1 prompt(s) cut on the left to max_length=64"


def test_long_inputs_stop_the_run_when_asked_to(sparse):
    lm = S2LM(sparse, device="cpu", max_length=64, on_overflow="error")
    with pytest.raises(ValueError, match=r"a request of \d+ tokens is too long for max_length=64"):
        lm.loglikelihood(requests((prose(30, 1), " the river")), disable_tqdm=True)


def test_impossible_settings_are_refused(sparse, lm):
    with pytest.raises(ValueError, match=r"max_length=512: the checkpoint .* reads 2 to 256 tokens"):
        S2LM(sparse, device="cpu", max_length=512)
    with pytest.raises(ValueError, match="on_overflow='ignore'"):
        S2LM(lm.checkpoint, on_overflow="ignore")
    with pytest.raises(ValueError, match="leaves no room for a prompt in max_length=256"):
        lm.generate_until(requests(("the", {"until": []})), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"max_seq_lengths \[4096\]: longer than max_length=256"):
        evaluate(lm, ["s2_passkey"], metadata={"max_seq_lengths": [128, 4096]})
    with pytest.raises(ValueError, match="s2_passkey: samples=True; expected a whole number"):
        evaluate(lm, ["s2_passkey"], metadata={"samples": True})
    for lengths in (4096, ["4096"]):
        with pytest.raises(ValueError, match=r"max_seq_lengths .*4096.*: expected a list of lengths in tokens"):
            evaluate(lm, ["s2_passkey"], metadata={"max_seq_lengths": lengths})
    with pytest.raises(ValueError, match=r"--tasks helaswag: no task, group or tag of this .*did you mean hellaswag"):
        evaluate(lm, ["helaswag"])
    with pytest.raises(ValueError, match=r"--data-dir .*: s2_passkey do not read it"):
        evaluate(lm, ["s2_passkey"], data_dir=sparse)
    with pytest.raises(ValueError, match="--metadata sample: s2_passkey take only heldout, samples, seed, num_lengths"):
        evaluate(lm, ["s2_passkey"], metadata={"sample": 3})
    with pytest.raises(ValueError, match="s2_passkey: samples=0; expected a whole number"):
        evaluate(lm, ["s2_passkey"], metadata={"samples": 0})
    for limit in (0, -1, 2.5):
        with pytest.raises(ValueError, match=rf"--limit {limit}: expected a number of documents, at least 1, or a"):
            evaluate(lm, ["s2_passkey"], limit=limit)
    for name, value in (("batch_tokens", 0), ("batch_size", "all"), ("dtype", "fp32")):
        with pytest.raises(ValueError, match=f"{name}='?{value}'?(: expected| must be a whole)"):
            S2LM(lm.checkpoint, **{name: value})
    with pytest.raises(ValueError, match="--device tpu9: no such device here"):
        S2LM(sparse, device="tpu9")


@pytest.fixture(scope="module")
def local_data(tmp_path_factory):
    """A few rows of made-up data in the columns of the stock tasks."""
    folder = tmp_path_factory.mktemp("data")

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    pair = [{"goal": prose(1, i), "sol1": prose(1, i + 50), "sol2": prose(1, i + 80), "label": i % 2} for i in range(6)]
    write(folder / "piqa" / "validation.jsonl.gz", pair)
    write(folder / "wikitext" / "test.jsonl", [{"page": prose(30, i)} for i in range(2)])
    question = {"question": "Which?", "choices": ["one", "two", "three", "four"], "answer": 1}
    subjects = sorted(
        path.stem.removeprefix("mmlu_")
        for path in (Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml")
    )
    for split, n in (("dev", 5), ("test", 2)):
        rows = [
            {**question, "subject": subject, "question": f"{subject} {i}?"} for subject in subjects for i in range(n)
        ]
        write(folder / "mmlu" / f"{split}.jsonl.gz", rows)
    return folder


def scores(model, names, data, tmp_path, limit=None):
    write_local_tasks(stock_tasks(), names, data, tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)["results"]


def assert_same_scores(ours, theirs):
    assert ours.keys() == theirs.keys()
    for task in ours:
        for key, value in ours[task].items():
            expected = theirs[task][key]
            assert value == (pytest.approx(expected, rel=1e-5) if isinstance(value, float) else expected), (
                task,
                key,
            )


def test_tables_equal_those_of_the_hugging_face_model_on_local_files(tmp_path, tmp_path_factory, local_data):
    dense = make_checkpoint(tmp_path_factory.mktemp("table") / "hf", "dense", adds_bos=False)
    names = ["piqa", "wikitext"]
    ours = scores(S2LM(dense, device="cpu"), names, local_data, tmp_path)
    assert_same_scores(ours, scores(hugging_face(dense), names, local_data, tmp_path))


@pytest.mark.skipif(
    "S2_SHARED_DATA" not in os.environ, reason="S2_SHARED_DATA names no folder with the real task files"
)
def test_tables_equal_those_of_the_hugging_face_model_on_the_real_tasks(tmp_path, tmp_path_factory):
    dense = make_checkpoint(tmp_path_factory.mktemp("real") / "hf", "dense", adds_bos=False)
    data = Path(os.environ["S2_SHARED_DATA"]) / "eval"
    names = ["piqa", "hellaswag", "winogrande", "boolq", "arc_easy", "arc_challenge", "lambada_openai"]
    ours = scores(S2LM(dense, device="cpu"), names, data, tmp_path, limit=4)
    assert_same_scores(ours, scores(hugging_face(dense), names, data, tmp_path, limit=4))


def test_local_results_carry_stock_names_prompts_and_versions(lm, local_data):
    results = evaluate(lm, ["piqa"], data_dir=local_data, log_samples=True)
    config = results["configs"]["piqa"]
    assert config["dataset_path"] == "json" and config["doc_to_text"] == "Question: {{goal}}\nAnswer:"
    assert len(results["samples"]["piqa"]) == 6 and results["versions"]["piqa"] == 1.0


def test_a_template_is_compiled_once_and_not_for_each_document(lm, local_data, monkeypatch):
    compiled = []
    compile_template = utils.env.compile
    monkeypatch.setattr(utils.env, "compile", lambda text: compiled.append(text) or compile_template(text))
    results = evaluate(lm, ["piqa"], data_dir=local_data)
    assert compiled and len(compiled) == len(set(compiled))
    assert "from_string" not in vars(utils.env)  # lm-eval is as it was
    assert results["config"]["bootstrap_iters"] == 10_000


def test_two_models_have_the_same_documents_where_they_were_asked_the_same(lm, local_data, tmp_path):
    """Whichever the weights; other data has other ones."""
    shuffled = tmp_path / "piqa"
    shuffled.mkdir()
    with gzip.open(local_data / "piqa" / "validation.jsonl.gz", "rt") as stream:
        (shuffled / "validation.jsonl").write_text("".join(reversed(stream.readlines())))
    other = make_checkpoint(tmp_path / "hf", "dense")

    def asked(model, data_dir=local_data):
        found = evaluate(model, ["piqa"], data_dir=data_dir, limit=4)
        numbers = documents.of(found, "piqa", "acc_norm,none")
        assert len(numbers) == 4 and set(numbers.values()) <= {0.0, 1.0}
        assert math.fsum(numbers.values()) / 4 == found["results"]["piqa"]["acc_norm,none"]
        return numbers.keys()

    ours = asked(lm)
    assert ours == asked(S2LM(other, device="cpu"))
    assert not ours & asked(lm, data_dir=tmp_path)


def test_a_group_reads_its_subjects_from_one_file(lm, local_data, tmp_path):
    results = evaluate(lm, ["mmlu_humanities"], data_dir=local_data, limit=1, num_fewshot=0, log_samples=True)
    assert len(results["samples"]) == 13
    for task, samples in results["samples"].items():
        assert samples[0]["doc"]["question"] == f"{task.removeprefix('mmlu_')} 0?"
    assert len(documents.of(results, "mmlu_humanities", "acc,none")) == 13
    assert "mmlu_humanities" in results["groups"] and "|Groups" in table(results).replace("|  Groups", "|Groups")


def test_few_shot_examples_from_another_split_are_remarked(lm, local_data):
    results = evaluate(lm, ["piqa"], data_dir=local_data, limit=2, num_fewshot=1)
    assert "piqa: no local train split, so few-shot examples come from another one" in table(results)


@pytest.mark.parametrize("task", ["arc_easy", "piqa"])  # evaluated on a test and on a validation split
def test_no_prompt_shows_the_documents_own_answer(lm, local_data, tmp_path, task):
    rows = [
        {
            "id": str(i),
            "question": f"What is number {i}?",
            "choices": {"text": [f"stone {i}", "other"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for i in range(4)
    ]
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, shots = (tmp_path, 3) if task == "arc_easy" else (local_data, 5)
    results = evaluate(lm, [task], data_dir=data, num_fewshot=shots, log_samples=True)
    for sample in results["samples"][task]:
        prompt = (
            sample["arguments"]["gen_args_0"]["arg_0"]
            if isinstance(sample["arguments"], dict)
            else sample["arguments"][0][0]
        )
        assert prompt.count("Answer:") == shots + 1
        assert prompt.count(sample["doc"]["question" if task == "arc_easy" else "goal"]) == 1
    with pytest.raises(ValueError, match=rf"--num-fewshot {shots + 1}: task {task} has only {shots} documents"):
        evaluate(lm, [task], data_dir=data, num_fewshot=shots + 1)


def test_missing_local_data_is_named(lm, local_data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder for task 'hellaswag'.*it has: mmlu, piqa, wikitext"):
        evaluate(lm, ["hellaswag"], data_dir=local_data)
    with pytest.raises(FileNotFoundError, match=r"--data-dir .*nowhere: no such folder"):
        evaluate(lm, ["piqa"], data_dir=tmp_path / "nowhere")
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "validation.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match=r"'arc_easy' is evaluated on its test split; expected .*arc_easy/test"):
        evaluate(lm, ["arc_easy"], data_dir=tmp_path)
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "test.jsonl").write_text('{"subject": "other"}\n')
    with pytest.raises(ValueError, match="has no row whose 'subject' is 'astronomy'"):
        evaluate(lm, ["mmlu_astronomy"], data_dir=tmp_path)
    for content, words in (
        ("", "test.jsonl is empty"),
        ('{"id": 1}\n{"id": \n', r"test.jsonl, line 2: "),
        ('{"id": 1}\n', r"rows are not as arc_easy need them \((KeyError|Undef|DatasetGen)[\s\S]*columns of the hub"),
    ):
        (tmp_path / "arc_easy" / "test.jsonl").write_text(content)
        with pytest.raises(ValueError, match=words):
            evaluate(lm, ["arc_easy"], data_dir=tmp_path)


def test_warnings_of_other_tasks_stay(caplog):
    of_tasks = logging.getLogger("lm_eval.api.task")
    with quiet_about(["s2_passkey"]):
        for task in ("s2_passkey", "ruler_vt"):
            of_tasks.warning(f"{task}: Custom kwargs can be passed to `--metadata`")
        of_tasks.warning("s2_passkey: something else")
    of_tasks.warning("s2_passkey: Custom kwargs can be passed to all")
    said = [record.getMessage() for record in caplog.records]
    assert [words.partition(":")[0] for words in said] == ["ruler_vt", "s2_passkey", "s2_passkey"]


def test_a_hub_out_of_reach_names_the_way_without_it(lm, monkeypatch):
    def load(self, names):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr(TaskManager, "load", load)
    with pytest.raises(ConnectionError, match=r"on the Hub; --data-dir FOLDER \(make: EVAL_DATA=FOLDER\) reads local"):
        evaluate(lm, ["hellaswag"])


def test_damaged_local_data_is_named(lm, tmp_path):
    packed = gzip.compress(b"".join(b'{"id": %d}\n' % (i * 7919 % 1000) for i in range(2000)))
    (tmp_path / "arc_easy").mkdir()
    for damaged in (packed[:-20], packed[:10] + b"\xff" * 50 + packed[60:], packed[:-8] + b"12345678"):
        (tmp_path / "arc_easy" / "test.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"test\.jsonl\.gz, line \d+: "):
            evaluate(lm, ["arc_easy"], data_dir=tmp_path)


@pytest.fixture(scope="module")
def heldout(sparse):
    """Held-out shards where a recipe keeps them, beside the run of `sparse`."""
    tokenizer = TextTokenizer(sparse / "tokenizer.json")
    folder = sparse.parent.parent / "data" / "heldout"
    texts = [prose(20, seed) for seed in range(3)] + ["[1, 2, 3]", "42"]
    ids = [f"prose/{i}" for i in range(len(texts))]
    with ShardWriter(folder, "shard", "prose", tokenizer.dtype, tokenizer.vocab_size, 1 << 20) as writer:
        writer.add(tokenizer.encode_documents(texts), [len(text.encode()) for text in texts], ids, [""] * len(texts))
    file = os.path.relpath(tokenizer.file, folder)
    write_manifest(
        folder,
        tokenizer.dtype,
        writer.shards,
        {"prose": writer.counts},
        tokenizer={**tokenizer.describe(), "file": file},
    )
    return texts


def test_without_tasks_the_command_line_runs_our_own_and_prints_the_table(
    sparse, lm, heldout, tmp_path, capsys, caplog
):
    main(["--ckpt", str(sparse), "--output", str(tmp_path), "--device", "cpu"])
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("lm_eval")]
    assert not [said for said in warned if "Custom kwargs" in said or "same number of documents" in said]
    printed, log = capsys.readouterr()
    assert "\r" not in log  # no bars, lm-eval's own included
    files = [Path(line) for line in printed.splitlines()[-2:]]
    assert [file.suffix for file in files] == [".json", ".md"] and files[0].parent == tmp_path
    assert files[0].name.startswith("lm-s2_heldout+s2_passkey-")
    written = files[1].read_text()
    assert written in printed
    for expected in (
        "attention: L2V4-inter, block size 16",
        "max_length: 256 (model: 256); cut inputs: none",
        "BOS: yes (<|bos|>)",
        "n-shot: task default; limit: none",
        "|  Tasks   |Version|Filter|n-shot|",
        "|s2_heldout|",
        "|acc_256 ",
    ):
        assert expected in written
    results = json.loads(files[0].read_text())
    assert "samples" not in results  # texts are not kept, numbers are
    for task, metric in [("s2_heldout", "word_perplexity,none"), ("s2_passkey", "acc_256,none")]:
        numbers = documents.of(results, task, metric)
        assert len(numbers) == (len(heldout) if task == "s2_heldout" else 20)
        assert math.fsum(numbers.values()) / len(numbers) == pytest.approx(results["results"][task][metric], rel=1e-4)
    total = sum(lm.loglikelihood_rolling(requests(*[(text,) for text in heldout]), disable_tqdm=True))
    num_bytes = sum(len(text.encode()) for text in heldout)
    bits = results["results"]["s2_heldout"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / num_bytes / 0.6931471805599453, rel=1e-6)


def test_passkey_prompts_fit_their_length_and_repeat(sparse):
    from eval.tasks.passkey import load

    rows = load(str(sparse), 1024, samples=4, num_lengths=2)["test"]
    assert [row["length"] for row in rows] == [512] * 4 + [1024] * 4
    lm = S2LM(sparse, device="cpu")
    for row in rows:
        size = len(lm.tok_encode(row["prompt"] + row["answer"]))
        assert row["length"] - 40 <= size <= row["length"]
        assert row["prompt"].count(row["answer"].strip()) == 2
        place = row["prompt"].index(" The pass key is") / len(row["prompt"])
        assert place == pytest.approx(row["depth"], abs=0.1)
    assert rows[:] == load(str(sparse), 1024, samples=4, num_lengths=2)["test"][:]
    with pytest.raises(ValueError, match="s2_passkey: max_length=128"):
        load(str(sparse), 128)


def test_missing_heldout_is_named(tmp_path):
    folder = make_checkpoint(tmp_path / "a" / "b" / "hf")
    with pytest.raises(FileNotFoundError, match=r"no held-out shards near it.* --heldout FILE \(make: HELDOUT=FILE\)$"):
        evaluate(S2LM(folder, device="cpu"), ["s2_heldout"])
    with pytest.raises(FileNotFoundError, match=r"--heldout nothing\.jsonl: no such file"):
        main(["--ckpt", str(folder), "--output", str(tmp_path), "--heldout", "nothing.jsonl"])
