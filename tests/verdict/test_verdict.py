"""The whole program on a run: what it measures, what it leaves out, and the answers' figures."""

import importlib.util
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from nanosynth import UserError, checkpoint, tokenizer
from nanosynth.data import bins
from nanosynth.inference.generation import Sampling
from tiny import command, encoded, tiny_model, write_bins, write_jsonl
from verdict import TASKS_DIR, answers, curves, instructions, quality, runs
from verdict import __main__ as verdict
from verdict.__main__ import VerdictConfig

SAMPLING = Sampling(max_new_tokens=24, temperature=1.0)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Reports without their curves, which take a second and have tests of their own."""
    monkeypatch.setattr(curves, "as_svg", lambda *_: [])
    monkeypatch.setattr(curves, "draw", lambda *_: None)


def chat_document(*turns: str) -> tuple[list[int], list[int]]:
    roles = ("user", "assistant")
    return encoded([(roles[k % 2], t) for k, t in enumerate(turns)])[0]


def test_validation_prompts_take_one_turn_of_each_conversation_that_fits(tmp_path):
    documents = [
        chat_document("a", "one", "b", "two"),
        chat_document("a b c d e f g h i j k l m n o p q r s t u v w x y z", "long prompt"),
        chat_document("c", "three", "d", "four"),
        chat_document("e", "long answer " * 20),
    ]
    data_dir = write_bins(tmp_path / "bins", {"train": documents[:1], "val": documents})
    split = bins.Split(data_dir, "val")
    found = answers.validation_prompts(split, 0, block_size=48, sampling=SAMPLING)
    texts = {tokenizer.decode(ids) for ids in found.references}
    assert len(found.ids) == 2 and found.left_out == 2
    # Which turn depends on the document's place in the shuffled split.
    for number, (ids, _) in enumerate(split.documents()):
        text = tokenizer.decode(ids)
        if "one" in text or "three" in text:
            assert text.split("assistant\n")[1 + number % 2].split("<|im_end|>")[0] in texts
    assert all(ids[-3:] == tokenizer.prompt_ids([])[-3:] for ids in found.ids)
    one = answers.validation_prompts(split, 1, block_size=48, sampling=SAMPLING)
    assert one.ids == found.ids[:1]


def test_the_committed_prompts_fit_and_use_every_check():
    sampling = Sampling(max_new_tokens=1024, temperature=1.0)
    found = answers.checked_prompts(TASKS_DIR / "prompts.jsonl", block_size=80, sampling=sampling)
    assert len(found.ids) == 100 and found.left_out == 0
    assert len({tuple(ids) for ids in found.ids}) == 100
    assert {check["kind"] for check in found.checks} == set(instructions.CHECKS)


def test_about_the_prompt_is_told_from_a_model_that_copies():
    """A model whose next token is the first prompt token likes an answer after its own prompt."""
    prompts = answers.Prompts(name="x", ids=[[1, 5], [2, 5], [3, 5], [4, 5]])
    right = [answers.Answer(number=n, sample=0, ids=[n + 1], ended=True) for n in range(4)]
    swapped = [
        answers.Answer(number=n, sample=0, ids=[(n + 2) % 4 + 1], ended=True) for n in range(4)
    ]
    empty = answers.Answer(number=0, sample=0, ids=[], ended=True)
    model = Echo()
    answers.add_findings(model, prompts, [*right, *swapped, empty], 3, None)
    assert [a.parts["about_prompt"] for a in right] == [True] * 4
    assert [a.parts["about_prompt"] for a in swapped] == [False] * 4
    assert not empty.parts["about_prompt"] and not empty.coherent


class Echo(torch.nn.Module):
    """Logits of 9 for the first token of the row, 0 for the others."""

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(1, 8)
        self.config = tiny_model(vocab_size=8).config

    def forward(self, ids, targets=None, logit_index=None, cache=None):
        rows = logit_index // ids.shape[1]
        return 9.0 * torch.nn.functional.one_hot(ids[rows, 0], 8)


def test_a_common_length_leaves_out_who_says_nothing():
    assert answers.common([100, 40, 70]) == 40
    assert answers.common([100, 9, 70]) == 70
    assert answers.common([0, 0]) == 0


def config_of(run: object = "x", **changes: object) -> VerdictConfig:
    settings = {"device": "cpu", "num_prompts": 6, "max_new_tokens": 8, "num_samples": 2}
    settings["top_k"] = 50  # sorting the whole vocabulary takes a CPU seconds
    return VerdictConfig(**{**settings, "run": (str(run),), "tasks": "", **changes})


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory):
    """An untrained model whose context holds the conversations, saved as a run's checkpoint."""
    folder = tmp_path_factory.mktemp("wide")
    documents = [chat_document(f"Say {k}", f"It is {k}.") for k in range(40)]
    data_dir = write_bins(folder / "bins", {"train": documents, "val": documents[:12]})
    model = tiny_model(vocab_size=tokenizer.VOCAB_SIZE, block_size=64, n_layer=1)
    identity = {
        "model": vars(model.config),
        "data_sha256": bins.Split(data_dir, "train").sha256,
        "loss_on": "all",
    }
    meta = {"val_loss": 1.0, "identity": identity, "settings": {"data_dir": data_dir}}
    (folder / "run").mkdir()
    checkpoint.save(folder / "run", 7, model=model.state_dict(), train_state={}, meta=meta)
    return folder / "run"


def read_tasks(run) -> dict:
    return json.loads((run / "tasks.json").read_text())


def rewrite_meta(folder, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta.pop("meta_sha256")
    (folder / "meta.json").write_bytes(checkpoint._serialise({**meta, **changes}))


def test_what_is_missing_is_measured_once(wide_run, tmp_path, capsys):
    run = shutil.copytree(wide_run, tmp_path / "run")
    verdict.main(config_of(run))
    said = capsys.readouterr().out
    for part in ("the perplexity", "answers"):
        assert f"{run}, step 7: measuring {part}" in said
    assert "zero-shot" not in said and f"written: {run / 'report.html'}" in said
    assert f"{run}: no: perplexity " in said and "needs a second seed" in said
    first = read_tasks(run)
    assert first["format_version"] == 1 and first["step"] == 7 and first["rule"] == quality.RULE
    assert first["zero_shot"] == first["published"] == {}
    validation, prompts = first["generation"]["validation"], first["generation"]["prompts"]
    assert list(validation) == ["greedy", "sampled", "reference"]
    assert list(prompts) == ["greedy", "sampled"] and prompts["greedy"]["n"] == 100
    for metrics in [*validation.values(), *prompts.values()]:
        assert set(metrics["parts"]) == set(quality.PARTS)
        assert set(metrics["distinct"]) == {"1", "2", "3"} and metrics["compression_ratio"] > 0
        assert set(metrics["coherent"]) == {"passed", "n", "share", "interval"}
        assert metrics["memorised"] is None  # no answer has 50 tokens
        low, high = metrics["coherent"]["interval"]
        assert low <= metrics["coherent"]["share"] <= high
    reference = validation["reference"]
    assert reference["about_prompt_fixed_judge"]["share"] == 1  # "It is 5." to "Say 5"
    assert reference["judges_disagree"]["n"] == 6
    assert reference["n"] == 6 and reference["self_bleu"] is None
    assert {reference["parts"][p] for p in quality.PARTS[:4]} == {1}
    assert validation["greedy"]["instructions"] is None
    assert prompts["greedy"]["instructions"]["n"] == 100
    assert 0 <= prompts["sampled"]["self_bleu"] < 0.5
    records = [json.loads(line) for line in (run / "task_generations.jsonl").open()]
    assert len(records) == (6 + 12 + 6) + (100 + 132)
    for record in records:
        wanted = all(record[part] for part in quality.PARTS)
        assert record["coherent"] == wanted and record["finish"] in ("stop", "length")

    verdict.main(config_of(run))
    assert f"{run}, step 7: is measured;" in capsys.readouterr().out and read_tasks(run) == first


def test_each_part_is_measured_anew_by_name(wide_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(answers, "measure", lambda *_, **__: ({"sampled": {}}, []))
    run = shutil.copytree(wide_run, tmp_path / "run")
    verdict.main(config_of(run, only="perplexity"))
    assert capsys.readouterr().out.count("measuring") == 1
    (run / "eval_ppl.json").write_text("{}")
    verdict.main(config_of(run, only="report"))
    assert "measuring" not in capsys.readouterr().out
    verdict.main(config_of(run, only="tasks"))
    assert "measuring answers" in capsys.readouterr().out
    assert (run / "eval_ppl.json").read_text() == "{}"
    verdict.main(config_of(run))
    assert capsys.readouterr().out.count("measuring") == 2  # neither file is of its form


def test_a_measurement_is_not_replaced_by_one_of_fewer(wide_run, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "measure", lambda *_, **__: ({}, []))
    stub([], monkeypatch)
    run = shutil.copytree(wide_run, tmp_path / "run")
    for before, fewer in (
        ({}, {"num_prompts": 5}),
        ({}, {"limit": 3}),
        ({"limit": 0}, {"limit": 5}),
    ):
        before = {"tasks": "questions", "only": "tasks", "limit": 4, **before}
        verdict.main(config_of(run, **before))
        measured = read_tasks(run)
        with pytest.raises(UserError, match=r"--\w+=\d; tasks.json in .* is of --\w+=\d; use that"):
            verdict.main(config_of(run, **(before | fewer)))
        assert read_tasks(run) == measured


def test_a_set_that_does_not_fit_is_said_and_not_tried_again(wide_run, tmp_path, capsys):
    run = shutil.copytree(wide_run, tmp_path / "run")
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "check": {"kind": "one_word"}}])
    verdict.main(config_of(run, prompts=str(one), num_prompts=2))
    assert f"{run}: prompts not measured: 1 prompts fit, wanted 2" in capsys.readouterr().err
    assert read_tasks(run)["generation"]["prompts"] == {}
    verdict.main(config_of(run))
    assert "is measured;" in capsys.readouterr().out


def stub(measured: list[list[str]], monkeypatch) -> None:
    """Zero-shot tasks without lm_eval's model: what was asked for, each with a score."""

    def measure(lm, names, *, limit, chat_format):
        measured.append(names)
        scored = {"metric": "acc", "score": 0.5, "stderr": None, "chance": 0.25, "n": 4}
        scored["scores"] = [1.0, 0.0, 1.0, 0.0]
        known = {n: scored | {"metrics": {}, "asked_as": n} for n in names if n != "nothing"}
        return known, [f"no task {name!r}" for name in names if name == "nothing"]

    module = types.SimpleNamespace(measure=measure, as_lm=lambda *_: None)
    monkeypatch.setitem(sys.modules, "verdict.tasks", module)


def test_zero_shot_tasks_add_up_until_the_step_changes(wide_run, tmp_path, capsys, monkeypatch):
    run, measured = shutil.copytree(wide_run, tmp_path / "run"), []
    stub(measured, monkeypatch)
    for names in ("questions", "local", "local,nothing"):
        verdict.main(config_of(run, generation=False, tasks=names, limit=4))
    assert measured == [["questions"], ["completion", "reasoning"], ["nothing"]]
    assert f"{run}: no task 'nothing'" in capsys.readouterr().err
    scored = read_tasks(run)["zero_shot"]
    assert list(scored) == ["questions", "completion", "reasoning"]
    assert scored["questions"]["limit"] == 4 and scored["questions"]["chat_format"] is False
    verdict.main(config_of(run, generation=False, tasks="questions", only="tasks"))
    assert measured[-1] == ["questions"]

    (run / "step_000007").rename(run / "step_000009")
    rewrite_meta(run / "step_000009", step=9)
    capsys.readouterr()
    verdict.main(config_of(run, generation=False, tasks="reasoning", limit=4))
    assert "step 9: measuring the perplexity" in capsys.readouterr().out
    assert list(read_tasks(run)["zero_shot"]) == ["reasoning"] and read_tasks(run)["step"] == 9


def test_other_data_is_scored_anew(wide_run, tmp_path, capsys):
    run = shutil.copytree(wide_run, tmp_path / "run")
    config = {"generation": False}
    verdict.main(config_of(run, **config))
    documents = [chat_document("Another", "split.")] * 9
    other = write_bins(tmp_path / "other", {"train": documents, "val": documents})
    for _ in range(2):
        verdict.main(config_of(run, **config, data_dir=other))
    assert capsys.readouterr().out.count("measuring the perplexity") == 2
    assert json.loads((run / "eval_ppl.json").read_text())["data"] == f"{other}/val.bin"


@pytest.mark.parametrize("content", ['{"format_version": 1, "st', '{"generation": 5}'])
def test_a_torn_tasks_json_is_measured_anew(wide_run, tmp_path, capsys, monkeypatch, content):
    run, measured = shutil.copytree(wide_run, tmp_path / "run"), []
    stub(measured, monkeypatch)
    (run / "tasks.json").write_text(content)
    verdict.main(config_of(run, generation=False, tasks="questions"))
    assert measured == [["questions"]] and list(read_tasks(run)["zero_shot"]) == ["questions"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "tasks.json is left out: " in said[0]
    assert said[0].endswith("; measured anew")


def test_a_run_under_way_without_checkpoint_gets_its_report(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"max_steps": 100}))
    verdict.main(config_of(run))
    said = capsys.readouterr()
    assert f"{run}: nothing is measured: no checkpoint in" in said.err
    assert len(said.err.splitlines()) == 1 and "training is not finished" in said.out
    assert "is not measured" in (run / "report.md").read_text()


def test_a_part_that_was_asked_for_by_name_fails_loudly(wide_run, tmp_path):
    run = shutil.copytree(wide_run, tmp_path / "run")
    for folder in run.glob("step_*"):
        shutil.rmtree(folder)
    (run / "config.json").write_text('{"parameters": 5}')
    with pytest.raises(UserError, match="no checkpoint in"):
        verdict.main(config_of(run, only="perplexity"))


def test_a_planted_copy_is_counted(wide_run, tmp_path):
    rng = np.random.default_rng(0)
    long = rng.integers(0, 50257, 60).tolist()
    document = ([*long, tokenizer.END_OF_TEXT], [0] * 61)
    data_dir = write_bins(tmp_path / "bins", {"train": [document] * 3, "val": [document]})
    train = bins.Split(data_dir, "train")
    prompts = answers.Prompts(name="x", ids=[[1], [2]])
    found = [
        answers.Answer(number=n, sample=0, ids=ids, ended=True)
        for n, ids in enumerate((long[:50], long[:49], [*long[:49], 7], [5]))
    ]
    for answer in found:
        answer.number %= 2
    answers.add_findings(
        tiny_model(vocab_size=tokenizer.VOCAB_SIZE, block_size=64), prompts, found, 4, train
    )
    assert [answer.copied for answer in found] == [True, False, False, False]
    assert answers._memorised(found[:1])["share"] == 1
    counted = answers._memorised(found[1:3])
    assert counted["passed"] == 0 and counted["long_enough"] == 1
    assert answers._memorised(found[3:]) is None


def test_missing_packages_and_bins_leave_the_rest(wide_run, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(wide_run, tmp_path / "run")
    rewrite_meta(run / "step_000007", settings={"data_dir": "gone"})
    prompts = write_jsonl(
        tmp_path / "few.jsonl", [{"prompt": p, "check": {"kind": "one_word"}} for p in ("a", "b")]
    )
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name != "sacrebleu" and find_spec(name)
    )
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "verdict.tasks", raising=False)
    config = {"tasks": "local", "prompts": str(prompts)}
    verdict.main(config_of(run, **config))
    lines = capsys.readouterr().err.splitlines()
    for line in (
        "the perplexity not measured: no prepared data in 'gone'",
        "self-BLEU not measured: sacrebleu is missing; pip install -r requirements-eval.txt",
        "zero-shot tasks not measured: lm_eval is missing; pip install -r requirements-eval.txt",
        "validation prompts and memorisation not measured: no prepared data in 'gone'",
    ):
        assert any(said.startswith(f"{run}: {line}") for said in lines), lines
    result = read_tasks(run)
    assert list(result["generation"]) == ["prompts"] and result["zero_shot"] == {}
    assert result["generation"]["prompts"]["sampled"]["self_bleu"] is None
    verdict.main(config_of(run, **config))
    assert "measuring answers" not in capsys.readouterr().out  # they would be the same


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data_dir": "elsewhere"}, "no prepared data in 'elsewhere'"),
        ({"prompts": "missing.jsonl"}, "no prompt file 'missing.jsonl'"),
        ({"device": "abacus"}, "--device=abacus"),
        ({"step": "17"}, "no step '17'"),
    ],
)
def test_what_no_run_can_mend_is_refused_before_the_work(wide_run, capsys, changes, why):
    with pytest.raises(UserError, match=why):
        verdict.main(config_of(wide_run, **changes))
    assert capsys.readouterr().out == ""


def test_bins_of_another_tokenizer_are_refused(tmp_path):
    documents = [chat_document("a", "b")]
    data_dir = write_bins(tmp_path / "bins", {"train": documents, "val": documents})
    path = tmp_path / "bins" / "meta.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"tokenizer": {"ranks_sha256": "other"}}))
    meta = {"step": 7, "settings": {"data_dir": data_dir}}
    with pytest.raises(UserError, match="was made with another tokenizer"):
        verdict.Measurement(runs.Run(path="x"), meta, config_of()).open_data()


def test_task_names():
    local = ["questions", "completion", "reasoning"]
    assert verdict.task_names("local,piqa") == [*local, "piqa"]
    assert verdict.task_names(" completion, local ,") == ["completion", "questions", "reasoning"]
    assert verdict.task_names("") == []


def test_published_figures_have_their_sources():
    figures = json.loads((TASKS_DIR / "published.json").read_text())
    for rows in figures.values():
        for row in rows:
            assert set(row) == {"model", "parameters", "metric", "score", "source"}
            assert 0 < row["score"] < 1 and row["parameters"] > 1e8 and len(row["source"]) > 10
    assert "piqa" in figures and "questions" not in figures


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"num_samples": 1},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"limit": -1},
        {"only": "tasks", "generation": False},
    ],
    ids=str,
)
def test_a_senseless_setting_is_refused_by_its_flag(changes):
    with pytest.raises(UserError, match="--"):
        config_of(**changes)


def test_a_typo_is_said_before_torch_is_imported():
    done = command("-X", "importtime", "-m", "verdict", "--num_promts=1")
    assert done.returncode == 1 and "did you mean 'num_prompts'?" in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "nanosynth.settings" in imported and "torch" not in imported
    said = command("-m", "verdict", "--help").stdout
    assert "usage: python -m verdict" in said and "\nZero-shot tasks\n" in said
