import io
import json
import shutil
from pathlib import Path

import pytest

import sample
from nanosynth import UserError, tokenizer
from nanosynth.inference.generation import Sampling
from scripted import model_of_chat, script_of


def config_of(**changes) -> sample.SampleConfig:
    return sample.SampleConfig(
        **({"prompt": "x", "max_new_tokens": 8, "temperature": 0.0} | changes)
    )


def sampling_of(**changes) -> Sampling:
    return Sampling(**({"max_new_tokens": 8, "temperature": 0.0} | changes))


def test_a_cuda_graph_needs_a_gpu():
    with pytest.raises(UserError, match="cuda_graph=True; it needs a GPU, and the device is cpu"):
        sample.main(config_of(cuda_graph=True, device="cpu"))


def test_overlong_prompt_is_cut_aloud(capsys):
    model = model_of_chat()
    assert sample.fit(list(range(100)), model, sampling_of(max_new_tokens=4)) == list(
        range(80, 100)
    )
    said = capsys.readouterr().err
    assert "a prompt of 100 tokens in a context of 24: its first 80 are dropped" in said
    assert sample.fit([1] * 20, model, sampling_of(max_new_tokens=4)) == [1] * 20
    assert sample.fit([1] * 20, model, sampling_of(max_new_tokens=1000)) == [1] * 12
    assert "its first 8 are dropped" in capsys.readouterr().err


def test_encode_prompt():
    assert sample.encode_prompt("Hi", config_of(template=False)) == [17250]
    assert sample.encode_prompt("Hi", config_of()) == tokenizer.prompt_ids([("user", "Hi")])
    wanted = tokenizer.prompt_ids([("system", "S"), ("user", "Hi")])
    assert sample.encode_prompt("Hi", config_of(system="S")) == wanted


def test_streamed_text_waits_for_whole_characters(capsys):
    text = "né👩!"
    ids = tokenizer.encoding().encode_ordinary(text)
    assert len(ids) > 4
    model = model_of_chat()
    script_of(model, 10, *ids, tokenizer.IM_END)
    assert sample.stream_text(model, [1, 1], 0, sampling_of(max_new_tokens=12)) == text
    assert capsys.readouterr().out == f"{text}\n"


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Hi\n\n  \nBye\n")
    found = sample.read_prompts(config_of(prompt="", prompts=str(path)))
    assert found == [(tokenizer.prompt_ids([("user", text)]), None) for text in ("Hi", "Bye")]
    assert len(sample.read_prompts(config_of(prompt="", prompts=str(path), num_prompts=1))) == 1


def test_prompts_of_a_jsonl_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hi", "answer": "Yo"}\n{"prompt": "Bye"}\n')
    found = sample.read_prompts(config_of(prompt="", prompts=str(path)))
    assert [answer for _, answer in found] == ["Yo", None]
    path.write_text('{"prompt": "Hi"}\n{"question": "Bye"}\n')
    with pytest.raises(UserError, match="prompts.jsonl, line 2: wanted"):
        sample.read_prompts(config_of(prompt="", prompts=str(path)))


@pytest.mark.parametrize("row", ['{"prompt": 5}', '{"prompt": null}', "[1]", '"text"', "{"])
def test_a_jsonl_row_without_a_prompt_is_refused(tmp_path, row):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{row}\n")
    with pytest.raises(UserError, match="line 1: wanted"):
        sample.read_prompts(config_of(prompt="", prompts=str(path)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train_mask.bin", b"\0\1", "wanted a .txt or .jsonl file.* or train.bin or val.bin"),
        ("prompts.txt", b"Caf\xe9\n", "is not UTF-8 .byte 3 is 0xe9.; if it is cp1252, .* iconv"),
        ("prompts.txt", "Hi\n".encode("utf-16"), "prompts.txt is UTF-16, not UTF-8"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        sample.read_prompts(config_of(prompt="", prompts=str(tmp_path / name)))


@pytest.mark.parametrize("changes", [{"system": "Be brief."}, {"chat": True, "prompt": ""}])
def test_a_plain_text_has_no_turns(changes):
    with pytest.raises(UserError, match="--template=False; a plain text has no turns"):
        config_of(template=False, **changes)


def test_an_output_folder_that_cannot_be_made_is_said_before_the_work(run_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hi\n")
    changes = {"prompt": "", "prompts": str(tmp_path / "prompts.txt"), "run": str(run_dir)}
    config = config_of(**changes, output_dir=str(tmp_path / "prompts.txt" / "x"), device="cpu")
    with pytest.raises(UserError, match="cannot write in .*; use another --output_dir"):
        sample.main(config)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_at_its_newline_alone(tmp_path, mark, end):
    """Other separators stand within texts, as they are, and a byte order mark in none."""
    for name, form in (("p.txt", "{}"), ("p.jsonl", '{{"prompt": "{}"}}')):
        texts = ["one\u2028two\x85three", "four"]
        texts[0] += "\f\v\rfive" if name == "p.txt" else ""  # which JSON would escape
        lines = [form.format(text) for text in texts]
        (tmp_path / name).write_bytes((mark + end.join([*lines, ""])).encode())
        found = sample.read_prompts(config_of(prompt="", prompts=str(tmp_path / name)))
        assert found == [(tokenizer.prompt_ids([("user", text)]), None) for text in texts]


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_no_prompts_are_refused(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="file that is there|has no prompt"):
        sample.read_prompts(config_of(prompt="", prompts=str(path)))


def test_answers_to_the_validation_split(tiny_bins, run_dir, tmp_path, capfd):
    out_dir = shutil.copytree(run_dir, tmp_path / "run")
    settings = {
        "prompt": "",
        "prompts": f"{tiny_bins}/val.bin",
        "run": str(out_dir),
        "device": "cpu",
    }
    config = config_of(**settings, dtype="float32", num_samples=2, batch_size=3, num_prompts=4)
    sample.main(config)
    records = [json.loads(line) for line in (out_dir / "generations.jsonl").open()]
    assert len(records) == 8 and [record["sample"] for record in records] == [0, 1] * 4
    prompts = [prompt for prompt, _ in sample.read_prompts(config)]
    for record, prompt in zip(records[::2], prompts, strict=True):
        assert record["prompt"] == tokenizer.decode(prompt)
        assert record["prompt"].endswith("<|im_start|>assistant\n")
        assert record["answer"] and "<|im_end|>" not in record["answer"]
        assert record["finish"] in ("stop", "length") and 1 <= record["tokens"] <= 8
        assert record["exact"] == (record["text"] == record["answer"])
    assert records[0]["text"] == records[1]["text"]  # greedy
    said = capfd.readouterr()
    assert said.out.startswith("0 of 8 held-out answers exactly right (0.0%)\n")
    assert f"of 8 answers ended by themselves; the texts: {out_dir}/generations.txt" in said.out
    assert said.out.endswith(f"talk to it: python sample.py --run={out_dir} --chat\n")
    assert "are dropped" in said.err  # a context of 16 tokens is short
    assert records[0]["prompt"] in (out_dir / "generations.txt").read_text()


@pytest.mark.parametrize(
    ("prompts", "is_right", "first"),
    [
        ("data/x/val.bin", [True, False, True], "2 of 3 held-out answers exactly right (66.7%)"),
        ("data/x/train.bin", [True, False, True], "2 of 3 answers exactly right (66.7%)"),
        ("x.jsonl", [True], "1 of 1 answers exactly right (100.0%)"),
        ("x.txt", [None], "1 of 1 answers ended by themselves; the texts: x/generations.txt"),
    ],
)
def test_what_is_said_at_the_end(prompts, is_right, first, capsys):
    records = [
        {"finish": "stop"} | ({} if exact is None else {"exact": exact}) for exact in is_right
    ]
    config = config_of(prompt="", prompts=prompts, run="a run")
    sample.report(records, config, Path("x/generations.txt"))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == first
    assert said[-1] == "talk to it: python sample.py --run='a run' --chat"


def test_exact_needs_the_answer_and_its_end(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hi", "answer": " Hi"}\n')
    answers = []
    for ids in ([15902, tokenizer.IM_END], [15902, 15902, tokenizer.IM_END], [15902] * 12):
        model = model_of_chat()
        n_prompt = len(tokenizer.prompt_ids([("user", "Hi")]))
        script_of(model, *[1] * (n_prompt - 1), *ids, *[1] * (12 - len(ids)))
        config = config_of(prompt="", prompts=str(path))
        prompts = sample.read_prompts(config)
        sampling = sampling_of(max_new_tokens=len(ids))
        answers += sample.answer_all(model, prompts, config, sampling)
    assert [answer["exact"] for answer in answers] == [True, False, False]
    assert [answer["finish"] for answer in answers] == ["stop", "stop", "length"]
    assert [answer["text"] for answer in answers] == [" Hi", " Hi Hi", " Hi" * 12]


def test_conversation_in_the_terminal(monkeypatch, capsys):
    model = model_of_chat()
    said = io.StringIO("Hello\n/new\nAgain, with a longer text\nMore\n\nnever read\n")
    monkeypatch.setattr("sys.stdin", said)
    sample.converse(model, config_of(prompt="", chat=True), sampling_of(max_new_tokens=4))
    assert "the oldest turn is dropped" in capsys.readouterr().out
    assert said.read() == "never read\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"chat": True},
        {"prompts": "x.txt"},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"num_samples": 0},
        {"batch_size": 0},
        {"num_prompts": -1},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_senseless_setting_is_refused_by_its_flag(changes):
    with pytest.raises(UserError, match="--"):
        config_of(**changes)
