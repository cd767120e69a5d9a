import json
import shutil

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager

from nanosynth import UserError, checkpoint, tokenizer
from nanosynth.data import bins
from tiny import REPO, tiny_model, write_bins, write_jsonl
from verdict import answers, instructions, measure, quality, tasks


def chat_document(*turns: str) -> tuple[list[int], list[int]]:
    roles = ("user", "assistant")
    return tokenizer.encode_conversations([[(roles[k % 2], t) for k, t in enumerate(turns)]])[0]


def test_validation_prompts_take_one_turn_of_each_conversation_that_fits(tmp_path):
    documents = [
        chat_document("a", "one", "b", "two"),
        chat_document("a b c d e f g h i j k l m n o p q r s t u v w x y z", "long prompt"),
        chat_document("c", "three", "d", "four"),
        chat_document("e", "long answer " * 20),
    ]
    data_dir = write_bins(tmp_path / "bins", {"train": documents[:1], "val": documents})
    split = bins.Split(data_dir, "val")
    found = answers.validation_prompts(split, 0, block_size=48, max_new_tokens=24)
    texts = {tokenizer.decode(ids) for ids in found.references}
    assert len(found.ids) == 2 and found.left_out == 2
    # Which turn depends on the document's place in the shuffled split.
    for number, (ids, _) in enumerate(split.documents()):
        text = tokenizer.decode(ids)
        if "one" in text or "three" in text:
            assert text.split("assistant\n")[1 + number % 2].split("<|im_end|>")[0] in texts
    assert all(ids[-3:] == tokenizer.prompt_ids([])[-3:] for ids in found.ids)
    one = answers.validation_prompts(split, 1, block_size=48, max_new_tokens=24)
    assert one.ids == found.ids[:1]


def test_the_committed_prompts_fit_and_use_every_check():
    found = answers.checked_prompts(
        REPO / "data/tasks/prompts.jsonl", block_size=80, max_new_tokens=1024
    )
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
    answers.add_parts(model, prompts, [*right, *swapped, empty], batch_size=3)
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


def config_of(**changes) -> measure.TasksConfig:
    settings = {"device": "cpu", "num_prompts": 6, "max_new_tokens": 8, "num_samples": 2}
    settings["top_k"] = 50  # sorting the whole vocabulary takes a CPU seconds
    return measure.TasksConfig(**{**settings, "tasks": "", **changes})


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
    }
    meta = {"val_loss": 1.0, "identity": identity, "settings": {"data_dir": data_dir}}
    (folder / "run").mkdir()
    checkpoint.save(folder / "run", 7, model=model.state_dict(), train_state={}, meta=meta)
    return folder / "run"


def test_the_whole_command_and_its_parts(wide_run, tmp_path, capsys, monkeypatch):
    # lm_eval's own tasks are thousands of files: seconds to list.
    monkeypatch.setattr(tasks, "_manager", lambda: TaskManager(include_defaults=False))
    run = shutil.copytree(wide_run, tmp_path / "run")
    measure.main(config_of(run=str(run)))
    first = json.loads((run / "tasks.json").read_text())
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
    assert reference["n"] == 6 and reference["self_bleu"] is None
    assert [reference["parts"][p] for p in ("ends", "not_empty", "valid_text", "no_loop")] == [
        1
    ] * 4
    assert (
        validation["greedy"]["instructions"] is None
        and prompts["greedy"]["instructions"]["n"] == 100
    )
    assert 0 <= prompts["sampled"]["self_bleu"] < 0.5
    records = [json.loads(line) for line in (run / "task_generations.jsonl").open()]
    assert len(records) == (6 + 12 + 6) + (100 + 132)
    for record in records:
        wanted = all(record[part] for part in quality.PARTS)
        assert record["coherent"] == wanted and record["finish"] in ("stop", "length")
    said = capsys.readouterr().out
    assert "validation reference" in said and "prompts sampled" in said

    measure.main(config_of(run=str(run), generation=False, tasks="questions", limit=4))
    second = json.loads((run / "tasks.json").read_text())
    assert second["generation"] == first["generation"]
    assert second["settings"]["generation"] == first["settings"]["generation"]
    assert second["zero_shot"]["questions"]["n"] == 4
    assert "questions" in capsys.readouterr().out

    with pytest.raises(UserError, match="1 of the tasks asked for could not be run"):
        measure.main(
            config_of(run=str(run), generation=False, tasks="nothing,completion", limit=4), {}
        )
    third = json.loads((run / "tasks.json").read_text())
    assert list(third["zero_shot"]) == ["questions", "completion"]
    assert "no task 'nothing'" in capsys.readouterr().err

    (run / "step_000007").rename(run / "step_000009")
    meta = json.loads((run / "step_000009" / "meta.json").read_text())
    meta.pop("meta_sha256")
    (run / "step_000009" / "meta.json").write_bytes(checkpoint._serialise({**meta, "step": 9}))
    measure.main(config_of(run=str(run), generation=False, tasks="reasoning", limit=4))
    fourth = json.loads((run / "tasks.json").read_text())
    assert fourth["generation"] == {} and list(fourth["zero_shot"]) == ["reasoning"]
    assert "was of step 7 and is replaced" in capsys.readouterr().err


def test_a_planted_copy_is_counted(wide_run, tmp_path):
    rng = np.random.default_rng(0)
    long = rng.integers(0, 50257, 60).tolist()
    document = ([*long, tokenizer.END_OF_TEXT], [0] * 61)
    data_dir = write_bins(tmp_path / "bins", {"train": [document] * 3, "val": [document]})
    train = bins.Split(data_dir, "train")
    sets = {
        "greedy": [answers.Answer(number=0, sample=0, ids=long[:50], ended=True)],
        "sampled": [
            answers.Answer(number=0, sample=0, ids=long[:49], ended=True),
            answers.Answer(number=1, sample=0, ids=[*long[:49], 7], ended=True),
        ],
        "reference": [answers.Answer(number=0, sample=0, ids=[5], ended=True)],
    }
    found = answers._memorised(sets, train)
    assert found["greedy"]["passed"] == found["greedy"]["n"] == 1
    assert found["sampled"]["passed"] == 0 and found["sampled"]["long_enough"] == 1
    assert found["reference"] is None


def test_missing_packages_and_bins_leave_the_rest(wide_run, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(wide_run, tmp_path / "run")
    path = run / "step_000007" / "meta.json"
    meta = json.loads(path.read_text())
    meta.pop("meta_sha256")
    meta["settings"]["data_dir"] = "gone"
    path.write_bytes(checkpoint._serialise(meta))
    prompts = write_jsonl(
        tmp_path / "few.jsonl", [{"prompt": p, "check": {"kind": "one_word"}} for p in ("a", "b")]
    )
    find_spec = measure.importlib.util.find_spec
    absent = ("lm_eval", "sacrebleu")
    monkeypatch.setattr(
        measure.importlib.util, "find_spec", lambda name: name not in absent and find_spec(name)
    )
    measure.main(config_of(run=str(run), tasks="local", prompts=str(prompts)))
    said = capsys.readouterr().err
    for line in (
        "self-BLEU not measured: sacrebleu is missing; pip install -r requirements-eval.txt",
        "zero-shot tasks not measured: lm_eval is missing; pip install -r requirements-eval.txt",
        "validation prompts and memorisation not measured: no prepared data in 'gone'",
    ):
        assert line in said
    result = json.loads((run / "tasks.json").read_text())
    assert list(result["generation"]) == ["prompts"] and result["zero_shot"] == {}
    assert result["generation"]["prompts"]["sampled"]["self_bleu"] is None
    with pytest.raises(UserError, match="no prepared data in 'elsewhere'"):
        measure.main(config_of(run=str(run), data_dir="elsewhere"))


def test_another_vocabulary_and_another_tokenizer_are_refused(wide_run, tmp_path):
    meta = {"identity": {"model": {**vars(tiny_model().config)}}}
    with pytest.raises(UserError, match="has a vocabulary of 64; wanted 50259 or more"):
        measure.load_model(config_of(), wide_run, meta)
    documents = [chat_document("a", "b")]
    data_dir = write_bins(tmp_path / "bins", {"train": documents, "val": documents})
    path = tmp_path / "bins" / "meta.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"tokenizer": {"ranks_sha256": "other"}}))
    with pytest.raises(UserError, match="was made with another tokenizer"):
        measure.open_split(data_dir, "val")


def test_a_torn_tasks_json_is_replaced_aloud(tmp_path):
    path, notices = tmp_path / "tasks.json", []
    assert measure.earlier(path, 7, notices) == {} and not notices
    path.write_text('{"format_version": 1, "st')
    assert measure.earlier(path, 7, notices) == {}
    assert "could not be read" in notices[0]


def test_task_names():
    local = ["questions", "completion"]
    assert measure.task_names("local,piqa", local) == [*local, "piqa"]
    assert measure.task_names(" completion, local ,", local) == ["completion", "questions"]
    assert measure.task_names("", local) == []


def test_published_figures_have_their_sources():
    figures = json.loads((measure.TASKS_DIR / "published.json").read_text())
    for rows in figures.values():
        for row in rows:
            assert set(row) == {"model", "parameters", "metric", "score", "source"}
            assert 0 < row["score"] < 1 and row["parameters"] > 1e8 and len(row["source"]) > 10
    assert list(measure.published(["piqa", "questions"])) == ["piqa"]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"num_samples": 1},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"limit": -1},
        {"generation": False},
    ],
    ids=str,
)
def test_a_senseless_setting_is_refused_by_its_flag(changes):
    with pytest.raises(UserError, match="--"):
        config_of(**changes)
