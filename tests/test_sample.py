import io
import json
import shutil

import numpy as np
import pytest
import torch

import sample
from nanosynth import UserError, tokenizer
from nanosynth.inference import generation
from tiny import tiny_model

PROMPTS = [[1, 2, 3], [50_000, 7, 9, 11, 13, 2, 40], [5], [700, 800]]


def model_of_chat(seed: int = 0, **changes):
    """A model of the whole vocabulary whose next tokens differ much in probability."""
    model = tiny_model(seed, vocab_size=tokenizer.VOCAB_SIZE, block_size=24, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    return model


def config_of(**changes) -> sample.SampleConfig:
    return sample.SampleConfig(
        **({"prompt": "x", "max_new_tokens": 8, "temperature": 0.0} | changes)
    )


def generate(model, prompts, numbers=None, **changes) -> list[list[int]]:
    numbers = list(range(len(prompts))) if numbers is None else numbers
    return generation.generate(model, prompts, numbers, sample.sampling(config_of(**changes)))


def script_of(model, *ids: int) -> None:
    """Make the model give ids[p] after the token at position p, whatever was said."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        for axis, id in enumerate(sorted(set(ids))):
            model.transformer.wte.weight[id, axis] = 1.0
        for position, id in enumerate(ids):
            model.transformer.wpe.weight[position] = 100 * model.transformer.wte.weight[id]


def test_greedy_with_cache_equals_greedy_without():
    model = model_of_chat()
    for prompt, found in zip(PROMPTS, generate(model, PROMPTS), strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[-1, : tokenizer.N_IDS].argmax()))
        assert found == ids[len(prompt) :]
        assert len(set(found)) > 2  # not one token again and again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_gives_the_same_tokens():
    model = model_of_chat().cuda()
    assert generate(model, PROMPTS, cuda_graph=True) == generate(model, PROMPTS)


def test_a_cuda_graph_needs_a_gpu():
    with pytest.raises(UserError, match="cuda_graph=True needs a GPU, and the device is cpu"):
        sample.load_model(config_of(cuda_graph=True, device="cpu"))


@pytest.mark.parametrize("temperature", [0.0, 0.2])  # at 1 the model is so flat that rounding tells
def test_a_batch_equals_one_by_one(temperature):
    model = model_of_chat()
    alone = [
        generate(model, [prompt], [number], temperature=temperature)[0]
        for number, prompt in enumerate(PROMPTS)
    ]
    assert generate(model, PROMPTS, temperature=temperature) == alone
    numbers = [2, 0, 3, 1]
    shuffled = generate(model, [PROMPTS[n] for n in numbers], numbers, temperature=temperature)
    assert shuffled == [alone[number] for number in numbers]


def test_seed_and_number_determine_a_sample():
    model = model_of_chat()
    settings = {"temperature": 5.0, "top_p": 1.0}
    first = generate(model, PROMPTS, **settings)
    assert generate(model, PROMPTS, **settings) == first
    assert generate(model, PROMPTS, seed=1, **settings) != first
    assert generate(model, PROMPTS[:1], [9], **settings)[0] != first[0]


def test_top_k_of_one_is_greedy():
    model = model_of_chat()
    assert generate(model, PROMPTS, top_k=1, temperature=2.0) == generate(model, PROMPTS)


def pick(logits: list[float], uniforms: list[float], **changes) -> list[int]:
    """Ids picked from logits of the first ids, all others being out of the question."""
    padded = torch.full((len(uniforms), tokenizer.VOCAB_SIZE), -1e9)
    padded[:, : len(logits)] = torch.tensor(logits)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes
    drawn = torch.tensor(uniforms, dtype=torch.float64)
    return generation.pick(
        padded, drawn, generation.Sampling(max_new_tokens=1, **settings)
    ).tolist()


# Ids 0 to 3 of probability 0.1, 0.4, 0.2, 0.3; from the likeliest down: 1, 3, 2, 0.
LOGITS = np.log([0.1, 0.4, 0.2, 0.3]).tolist()


def test_pick_inverts_the_distribution():
    assert pick(LOGITS, [0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, 0.999]) == [
        1,
        1,
        3,
        3,
        2,
        2,
        0,
        0,
    ]


def test_top_k_keeps_the_likeliest():
    assert pick(LOGITS, [0.0, 0.56, 0.58, 0.999], top_k=2) == [1, 1, 3, 3]
    assert pick(LOGITS, [0.999], top_k=10**9) == [0]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.05, {1}), (0.39, {1}), (0.5, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p, kept):
    assert set(pick(LOGITS, np.linspace(0, 0.999, 30).tolist(), top_p=top_p)) == kept


@pytest.mark.parametrize("changes", [{"top_p": 0.5}, {"top_k": 2}, {}], ids=str)
def test_the_largest_uniform_stays_within_the_kept_ids(changes):
    """In float32 the largest uniforms round to 1."""
    assert set(pick(LOGITS, [1 - 2**-26, 1 - 2**-53], **changes)) <= {0, 1, 2, 3} - (
        {0, 2} if changes else set()
    )


def test_a_flat_row_beside_a_steep_one_changes_nothing():
    """The flat row needs the whole vocabulary sorted; bfloat16 gives the steep one many ties."""
    generator = torch.Generator().manual_seed(0)
    steep = 8 * torch.randn(1, tokenizer.VOCAB_SIZE, generator=generator).bfloat16().float()
    flat = 0.01 * torch.randn(1, tokenizer.VOCAB_SIZE, generator=generator)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 0.95}
    for uniform in torch.linspace(0, 0.999, 50):
        alone = [
            generation.pick(row, uniform[None], generation.Sampling(max_new_tokens=1, **settings))
            for row in (steep, flat)
        ]
        both = generation.pick(
            torch.cat([steep, flat]),
            uniform.expand(2),
            generation.Sampling(max_new_tokens=1, **settings),
        )
        assert both.tolist() == [picked.item() for picked in alone]
        assert (flat > flat[0, both[1]]).sum() < 0.96 * tokenizer.N_IDS


def test_temperature_sharpens():
    assert set(pick(LOGITS, np.linspace(0, 0.99, 30).tolist(), temperature=0.05)) == {1}
    assert pick(LOGITS, [0.999], temperature=0.0) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_ids_are_never_picked(temperature):
    logits = torch.zeros(1, tokenizer.VOCAB_SIZE)
    logits[:, tokenizer.N_IDS :] = 100.0
    logits[:, tokenizer.IM_END] = 50.0
    found = generation.pick(
        logits, torch.tensor([0.5]), temperature=temperature, top_k=0, top_p=1.0
    )
    assert found.tolist() == [tokenizer.IM_END]


@pytest.mark.parametrize("stop", tokenizer.STOP_IDS)
def test_generation_stops_at_a_stop_id(stop):
    model = model_of_chat()
    script_of(model, 10, 10, 11, 12, 13, stop, 14, 14, 14, 14, 14, 14, 14)
    # Rows of unlike lengths reach the stop after unlike numbers of steps.
    found = generate(model, [[1, 1, 1], [1, 1, 1, 1, 1], [1] * 6, [1] * 7], max_new_tokens=5)
    assert found == [[11, 12, 13, stop], [13, stop], [stop], [14] * 5]


def test_overlong_prompt_is_cut_aloud(capsys):
    model = model_of_chat()
    assert sample.fit(list(range(100)), model, config_of(max_new_tokens=4)) == list(range(80, 100))
    said = capsys.readouterr().err
    assert "a prompt of 100 tokens in a context of 24: its first 80 are dropped" in said
    assert sample.fit([1] * 20, model, config_of(max_new_tokens=4)) == [1] * 20
    assert sample.fit([1] * 20, model, config_of(max_new_tokens=1000)) == [1] * 12
    assert "its first 8 are dropped" in capsys.readouterr().err


def test_answers_are_half_the_context_at_most():
    found = generate(model_of_chat(), [[1]], max_new_tokens=1000)[0]
    assert len(found) == 12


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
    assert sample.stream_text(model, [1, 1], 0, config_of(max_new_tokens=12)) == text
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


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_no_prompts_are_refused(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="no file|has no prompt"):
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
    assert "8 answers" in said.out and "exactly right: 0 of 8 (0.0%)" in said.out
    assert "are dropped" in said.err  # a context of 16 tokens is short
    assert records[0]["prompt"] in (out_dir / "generations.txt").read_text()


def test_exact_needs_the_answer_and_its_end(tiny_bins, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hi", "answer": " Hi"}\n')
    answers = []
    for ids in ([15902, tokenizer.IM_END], [15902, 15902, tokenizer.IM_END], [15902] * 12):
        model = model_of_chat()
        n_prompt = len(tokenizer.prompt_ids([("user", "Hi")]))
        script_of(model, *[1] * (n_prompt - 1), *ids, *[1] * (12 - len(ids)))
        config = config_of(prompt="", prompts=str(path), max_new_tokens=len(ids))
        answers.append(sample.answer_all(model, config)[0])
    assert [answer["exact"] for answer in answers] == [True, False, False]
    assert [answer["finish"] for answer in answers] == ["stop", "stop", "length"]
    assert [answer["text"] for answer in answers] == [" Hi", " Hi Hi", " Hi" * 12]


def test_conversation_in_the_terminal(monkeypatch, capsys):
    model = model_of_chat()
    said = io.StringIO("Hello\n/new\nAgain, with a longer text\nMore\n\nnever read\n")
    monkeypatch.setattr("sys.stdin", said)
    sample.converse(model, config_of(prompt="", chat=True, max_new_tokens=4))
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
