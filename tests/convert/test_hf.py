"""Both ways against transformers, and what vLLM and llama.cpp's converter ask of a folder."""

import hashlib
import importlib.util
import json
import math
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import jinja2
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from huggingface_hub import ModelCard

import eval_ppl
import sample
from convert import hf, hf_tokenizer, runs
from convert.hf import INDEX, PICKLE, WEIGHTS, WTE, HFConfig
from model import GPT, GPTConfig
from nanosynth import UserError, checkpoint, files
from nanosynth import tokenizer as chat
from nanosynth.data import bins
from nanosynth.inference import generation
from tiny import command, encoded, load_run, random_ids, tiny_model, train_run
from verdict import __main__ as verdict
from verdict.__main__ import VerdictConfig

UNKNOWN = dict.fromkeys(("seed", "rows_per_step", "loss_on", "optimizer", "data_sha256"))
NASTY = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "\n\nfoo",
    " \n foo",
    "\t\n  x\n\n\n   y  ",
    "\r\n\r\nx\r\n",
    "don't we'LL I'd they've 'tis it''s",
    "3.14159 1,000,000 ٣ ½ ² 12345678901234567890",
    "héllo wörld e\u0301 ñ Ðø ß",
    "日本語の文章、한국어 ไทย العربية עברית",
    "👩‍👩‍👧‍👦 👍🏽🏳️‍🌈✅",
    "\u00a0\u3000\u200b\u2028\x85x\x1c",
    "a\x00b\ufeffc\ufffd\U0010ffff\u202etxet",
    "def f(x):\n    return  {'a': [1, 2]}\n\n\n\n# ------====",
    "user",
    "user\nassistant\n",
    "\nuser\n\n\n",
    "<|im_start and |> <| im_end |>",
    "x" * 300,
]


@pytest.fixture(scope="module", autouse=True)
def no_network():
    def connect(*arguments):
        raise AssertionError(f"a connection to {arguments[1:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield


def save_run(model: GPT, run_dir: Path) -> Path:
    run_dir.mkdir(parents=True)
    meta = {"identity": {"model": asdict(model.config), **UNKNOWN}, "settings": {"data_dir": ""}}
    meta["val_loss"] = 1.0
    checkpoint.save(run_dir, 6, model=model.state_dict(), train_state={}, meta=meta)
    return run_dir


def random_model(**changes) -> GPT:
    """A model of the whole vocabulary, every tensor of it random: biases and gains too. Rows of no
    token are unlikely, as training makes them.
    """
    model = tiny_model(vocab_size=chat.VOCAB_SIZE, **changes).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 3
        if changes.get("bias", True):
            direction = model.transformer.ln_f.bias
            direction += 1.0
            model.transformer.wte.weight[chat.N_IDS :] -= 20 * direction / direction.square().sum()
    return model


def convert(**flags) -> Path:
    hf.main(HFConfig(**{name: str(flags[name]) for name in flags}))
    return Path(flags["to"])


def copies_of(model: GPT, hf_model) -> tuple[GPT, transformers.GPT2LMHeadModel]:
    ours = GPT(model.config).eval()
    ours.load_state_dict(model.state_dict())
    theirs = transformers.GPT2LMHeadModel(hf_model.config).eval()
    theirs.load_state_dict(hf_model.state_dict())
    theirs.generation_config = hf_model.generation_config
    return ours, theirs


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A random model, its run, the exported folder, and what transformers makes of that."""
    folder = tmp_path_factory.mktemp("export")
    model = random_model()
    run_dir = save_run(model, folder / "run")
    to = convert(run=run_dir, to=folder / "hf")
    return SimpleNamespace(
        model=model,
        run_dir=run_dir,
        folder=to,
        hf_model=transformers.AutoModelForCausalLM.from_pretrained(to).eval(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(to),
    )


@torch.no_grad()
def test_logits_are_ours(exported):
    ids = random_ids(3, 16, vocab_size=chat.N_IDS)
    found, ours = exported.hf_model(ids).logits.flatten(0, 1), exported.model(ids)
    assert found.dtype == torch.float32 and found.shape == (48, chat.N_IDS)
    assert ours.abs().max() > 1
    torch.testing.assert_close(found, ours[:, : chat.N_IDS], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_exact_gelu_is_exported_and_comes_back(tmp_path):
    model = random_model(activation="gelu")
    to = convert(run=save_run(model, tmp_path / "run"), to=tmp_path / "hf")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    assert hf_model.config.activation_function == "gelu"
    ids = random_ids(2, 16, vocab_size=chat.N_IDS)
    found, ours = hf_model(ids).logits.flatten(0, 1), model(ids)[:, : chat.N_IDS]
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
    for layer in model.transformer.h:
        layer.mlp.approximate = "tanh"  # is seen at all
    assert (model(ids)[:, : chat.N_IDS] - ours).abs().max() > 1e-4
    assert load_run(convert(source=to, to=tmp_path / "back")).config.activation == "gelu"


@torch.no_grad()
def test_a_model_without_biases_gets_zeros(tmp_path):
    model = random_model(bias=False)
    to = convert(run=save_run(model, tmp_path / "run"), to=tmp_path / "hf")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    ids = random_ids(2, 16, vocab_size=chat.N_IDS)
    found = hf_model(ids).logits.flatten(0, 1)
    torch.testing.assert_close(found, model(ids)[:, : chat.N_IDS], rtol=0, atol=1e-5)


@pytest.mark.parametrize("favourite", [None, chat.IM_END, chat.END_OF_TEXT])
def test_generate_gives_our_greedy_tokens(exported, favourite):
    """With a token that stops and is likelier than all others, too."""
    ours, theirs = copies_of(exported.model, exported.hf_model)
    prompts = [[1, 2, 3], [50_000, 7, 9, 11, 13, 2, 40], [5]]
    if favourite:
        with torch.no_grad():
            for model in (ours, theirs):
                model.transformer.wte.weight[:, 0] = 0
                model.transformer.wte.weight[favourite, 0] = 1
                model.transformer.ln_f.bias[0] = 100
    greedy = generation.Sampling(max_new_tokens=8, temperature=0.0)
    wanted = generation.generate(ours, prompts, [0, 1, 2], greedy)
    batch = exported.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    found = theirs.generate(**batch, max_new_tokens=8, do_sample=False)
    for ids, row in zip(wanted, found[:, 7:].tolist(), strict=True):
        assert row[: len(ids)] == ids and max(ids) < chat.N_IDS
        assert all(id == chat.END_OF_TEXT for id in row[len(ids) :])  # padding
    lengths = {len(ids) for ids in wanted}
    assert lengths == {1} if favourite in chat.STOP_IDS else 8 in lengths


def test_tokenizer_gives_the_ids_of_tiktoken(exported):
    generator = np.random.default_rng(0)
    letters = list(" \n\t\r'.,-=_|<>#0129½٣aZéß日한👩\u200d🏽\u0301\u00a0\x00") + [
        "'s",
        " the",
        "'ve",
    ]
    texts = NASTY + ["".join(generator.choice(letters, n)) for n in range(200)]
    for text in texts:
        ids = chat.encoding().encode_ordinary(text)
        assert exported.tokenizer(text)["input_ids"] == ids, repr(text)
        assert exported.tokenizer.decode(ids) == text


def test_special_tokens(exported):
    tokenizer = exported.tokenizer
    for id in (chat.END_OF_TEXT, chat.IM_START, chat.IM_END):
        assert tokenizer(f"Hi{tokenizer.decode([id])}")["input_ids"] == [17250, id]
    assert tokenizer.eos_token_id == chat.IM_END
    assert tokenizer.bos_token_id == tokenizer.pad_token_id == chat.END_OF_TEXT
    assert len(tokenizer) == chat.N_IDS and tokenizer.model_max_length == 16
    ids = [chat.IM_START, 17250, chat.IM_END, chat.END_OF_TEXT]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi"


@pytest.mark.parametrize("text", NASTY)
def test_chat_template_gives_our_ids(exported, text):
    apply = exported.tokenizer.apply_chat_template
    conversation = [("system", text), ("user", text), ("assistant", text), ("user", f" {text}\n")]
    for turns in (conversation, conversation[1:2]):
        messages = [{"role": role, "content": content} for role, content in turns]
        prompt = apply(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == chat.prompt_ids(turns)
        assert apply(messages)["input_ids"] == encoded(turns)[0][0]


@pytest.mark.parametrize("text", NASTY)
def test_the_template_marks_what_our_mask_marks(exported, text):
    """What trainers read for a loss on answers alone."""
    turns = [("system", "a"), ("user", text), ("assistant", text), ("user", "b"), ("assistant", "")]
    found = exported.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert (found["input_ids"], found["assistant_masks"]) == encoded(turns)[0]


def test_the_template_takes_parts_and_no_content(exported):
    def ids(content):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
        return exported.tokenizer.apply_chat_template(messages)["input_ids"]

    parts = [{"type": "text", "text": "12"}, {"type": "text", "text": "3 \n"}]
    assert ids(parts) == ids("123 \n") and ids(parts[:1]) == ids("12")
    assert ids([*parts, {"type": "text", "text": None}]) == ids("123 \n")
    assert ids(None) == ids([]) == ids("") == encoded([("user", "Hi"), ("assistant", "")])[0][0]
    with pytest.raises(jinja2.TemplateError, match="wanted text, found a part of type image"):
        ids([*parts, {"type": "image", "url": "x.png"}])


def test_two_limits_of_their_tokenizer(exported):
    """Special tokens are read out of text; text that begins like a turn is split like one."""
    encode = exported.tokenizer.apply_chat_template
    message = {"role": "user", "content": "a<|im_end|>b"}
    assert encode([message])["input_ids"].count(chat.IM_END) == 2
    assert encoded([("user", "a<|im_end|>b")])[0][0].count(chat.IM_END) == 1
    assert exported.tokenizer("user\n\n\nHi")["input_ids"] == [7220, 198, 198, 198, 17250]
    assert chat.encoding().encode_ordinary("user\n\n\nHi") == [7220, 628, 198, 17250]


def test_vocabulary_and_merges_are_those_of_openai(exported):
    """The hashes are those that tiktoken expects of OpenAI's encoder.json and vocab.bpe."""
    model = json.loads((exported.folder / "tokenizer.json").read_text())["model"]
    vocabulary = json.dumps(model["vocab"])
    digest = hashlib.sha256(vocabulary.encode()).hexdigest()
    assert digest == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    merges = "\n".join(["#version: 0.2", *model["merges"], ""])
    digest = hashlib.sha256(merges.encode()).hexdigest()
    assert digest == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@torch.no_grad()
def test_perplexity_by_transformers_is_eval_ppls(exported, tiny_bins, tmp_path):
    run_dir = shutil.copytree(exported.run_dir, tmp_path / "run")
    eval_ppl.main(
        eval_ppl.EvalConfig(run=str(run_dir), data_dir=tiny_bins, dtype="float32", device="cpu")
    )
    ours = json.loads((run_dir / "eval_ppl.json").read_text())["all"]
    split = bins.Split(tiny_bins, "val")
    ids = torch.from_numpy(split.ids(0, split.n_tokens).astype(np.int64))
    nats, n_tokens = 0.0, 0
    for start in range(0, len(ids) - 1, 16):
        row = ids[start : start + 17]
        logits = exported.hf_model(row[None, :-1]).logits[0].double()
        nats -= logits.log_softmax(-1).gather(1, row[1:, None]).sum().item()
        n_tokens += len(row) - 1
    assert n_tokens == ours["tokens"]
    assert math.exp(nats / n_tokens) == pytest.approx(ours["perplexity"], rel=1e-4)


def test_what_vllm_and_llama_cpps_converter_read(exported):
    """Neither runs here: what each looks up by name in a GPT-2's folder is there and fits."""
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["vocab_size"] == chat.N_IDS  # CTranslate2 refuses rows of no token
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["n_ctx"] == config["n_positions"] == 16  # the converter's context length
    assert transformers.AutoConfig.from_pretrained(exported.folder).to_dict()["n_ctx"] == 16
    sizes = [config[name] for name in ("n_layer", "n_head", "n_embd", "layer_norm_epsilon")]
    assert sizes == [2, 2, 16, 1e-5] and config["activation_function"] == "gelu_new"
    with safetensors.safe_open(exported.folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    # Both skip a tied head, look up each name behind `transformer.`, and expect every bias.
    wanted = {name: list(value.shape) for name, value in exported.hf_model.state_dict().items()}
    del wanted["lm_head.weight"]
    assert shapes == wanted
    assert shapes["transformer.wte.weight"] == [chat.N_IDS, 16]
    # The converter's vocabulary: ids without a gap, none past the rows; merges as pairs.
    content = json.loads((exported.folder / "tokenizer.json").read_text())
    model, added = content["model"], content["added_tokens"]
    ids = [*model["vocab"].values(), *(token["id"] for token in added)]
    assert sorted(set(ids)) == list(range(chat.N_IDS))
    assert all(token["special"] and not token["normalized"] for token in added)
    assert (model["type"], content["decoder"]["type"]) == ("BPE", "ByteLevel")
    assert not model["byte_fallback"] and not model["ignore_merges"]
    # As "a b": transformers before 4.45 reads no pairs.
    assert all(len(merge.split(" ")) == 2 for merge in model["merges"])
    # It finds special ids by their text among the added tokens, the first found counts.
    described = json.loads((exported.folder / "tokenizer_config.json").read_text())
    by_text = {token["content"]: token["id"] for token in added}
    for kind in ("bos", "eos", "pad"):
        assert by_text[described[f"{kind}_token"]] == config[f"{kind}_token_id"]
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows it
    assert described["add_bos_token"] is False and "<|im_start|>" in described["chat_template"]
    # transformers 4 gives token_type_ids unless told, and its GPT-2 adds an embedding for them.
    assert described["model_input_names"] == ["input_ids", "attention_mask"]
    # vLLM ends an answer at these ids, and samples like this; top_k 0 is none, their default 50.
    generation_config = json.loads((exported.folder / "generation_config.json").read_text())
    assert generation_config["eos_token_id"] == list(chat.STOP_IDS)
    sampled = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
    assert sampled.items() <= generation_config.items()
    assert "suppress_tokens" not in generation_config


def test_the_card_says_what_the_runs_folder_knows(tiny_bins, tmp_path):
    train_run(tiny_bins, run_dir := tmp_path / "run")
    licence = tmp_path / "terms.txt"
    licence.write_text("Do as you like.")
    card = (convert(run=run_dir, to=tmp_path / "bare") / "README.md").read_text()
    assert "license:" not in card and "Not judged yet: `python -m verdict --run=" in card
    assert '- source: "conversations.jsonl"' in card and "- rows_kept: 200" in card
    assert "- learning_rate: 0.01" in card and "- step: 6" in card
    verdict.main(VerdictConfig(run=(str(run_dir),), only="report"))
    flags = {"license": "mit", "license_file": licence}
    to = convert(run=run_dir, to=tmp_path / "judged", **flags)
    card = (to / "README.md").read_text()
    assert card.startswith("---\n") and "\nlicense: mit\n---\n" in card
    assert "| stability" in card and "NOT MEASURED" in card
    assert (to / "LICENSE").read_text() == licence.read_text()
    report = json.loads((run_dir / "report.json").read_text())
    report["criteria"][0]["verdict"] = report["how"]["x"] = "\x1b[31mred\n\n# yes"
    (run_dir / "report.json").write_text(json.dumps(report))
    card = (convert(run=run_dir, to=tmp_path / "edited") / "README.md").read_text()
    assert "\x1b" not in card and "\n# yes" not in card
    (run_dir / "report.json").write_text("[]")
    with pytest.raises(UserError, match="report.json is no report"):
        convert(run=run_dir, to=tmp_path / "torn")
    with pytest.raises(UserError, match="--license_file=.*x.txt cannot be read"):
        convert(run=run_dir, to=tmp_path / "torn", license_file=tmp_path / "x.txt")
    with pytest.raises(UserError, match="--license=mit; it goes with --run"):
        HFConfig(source="a", to="b", license="mit")


@pytest.mark.parametrize(
    "licence",
    ["mit", 'other: "x"', "yes", "1.0", "null", " # x", "a\n---\nb", "{name}", "zażółć", "x\udcff"],
)
def test_the_cards_front_matter_holds_any_licence_as_it_is_given(licence, tmp_path):
    run_dir = save_run(random_model(), tmp_path / "a\n---\n{run}")
    card = ModelCard.load(convert(run=run_dir, to=tmp_path / "hf", license=licence) / "README.md")
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert card.data.to_dict() == front | {"license": licence}
    assert card.text.startswith("\n# a --- {run}\n")


def gpt2(rows: int = 50257, **changes) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 of transformers whose logits lie about 20 below zero, as GPT-2's do."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": rows}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 3
        direction = model.transformer.ln_f.bias
        direction += 2.0
        model.transformer.wte.weight -= 20 * direction / direction.square().sum()
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A GPT-2 as transformers saves it, without a tokenizer, and the run made of it."""
    folder = tmp_path_factory.mktemp("source")
    model = gpt2()
    model.save_pretrained(folder / "gpt2")
    run_dir = convert(source=folder / "gpt2", to=folder / "run")
    return SimpleNamespace(model=model, folder=folder / "gpt2", run_dir=run_dir)


def model_bytes(run_dir: Path) -> bytes:
    return (checkpoint.find(str(run_dir)) / checkpoint.MODEL).read_bytes()


@torch.no_grad()
def test_a_gpt2_brought_here_computes_the_same(source):
    model = load_run(source.run_dir)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": True}
    assert model.config == GPTConfig(**shape, vocab_size=chat.VOCAB_SIZE, dropout=0.1)
    ids = random_ids(3, 16, vocab_size=50257)
    ours, theirs = model(ids), source.model(ids).logits.flatten(0, 1)
    assert theirs.mean() < -10
    torch.testing.assert_close(ours[:, :50257], theirs, rtol=0, atol=1e-5)
    # 47 new rows beside 50,257 take less than their share, however the others are spread.
    mass = ours.double().softmax(-1)[:, 50257:].sum(-1)
    assert mass.max() <= 47 / 50304
    model.transformer.wte.weight[50257:] = 0  # what zero rows would do
    assert model(ids).double().softmax(-1)[:, 50257:].sum(-1).min() > 0.5


def test_mean_rows_take_less_than_their_share_of_any_distribution():
    embedding = torch.randn(runs.N_BPE, 8, generator=torch.Generator().manual_seed(0))
    more = runs.lay_out(embedding, {})
    assert torch.equal(more[: runs.N_BPE], embedding) and more.shape == (chat.VOCAB_SIZE, 8)
    for scale in (0.0, 1.0, 30.0):
        state = scale * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
        mass = (state @ more.t()).double().softmax(-1)[:, runs.N_BPE :].sum(-1)
        assert mass.max() <= 47 / chat.VOCAB_SIZE + 1e-6
    assert mass.mean() < 1e-6  # of peaked distributions, next to nothing


CONFIG = {
    "model_type": "gpt2",
    **{"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 50257},
}


def write_source(folder: Path, tensors: dict, **changes) -> Path:
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def tensors_of(source) -> dict:
    return safetensors.torch.load_file(source.folder / WEIGHTS)


def test_every_layout_of_the_same_weights_makes_the_same_run(source, tmp_path):
    tensors = tensors_of(source)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    bare["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    write_source(tmp_path / "bare", bare)
    head = {**tensors, "lm_head.weight": tensors[WTE].clone()}
    write_source(tmp_path / "head", head)
    source.model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    pickled = write_source(tmp_path / "pickled", tensors)
    torch.save(tensors, pickled / PICKLE)
    (pickled / WEIGHTS).unlink()
    for name in ("bare", "head", "shards", "pickled"):
        run_dir = convert(source=tmp_path / name, to=tmp_path / f"{name}-run")
        assert model_bytes(run_dir) == model_bytes(source.run_dir), name


def test_half_precision_weights_are_kept_exactly(source, tmp_path):
    halves = {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()}
    run_dir = convert(source=write_source(tmp_path / "hf", halves), to=tmp_path / "run")
    found = checkpoint.read_model(path := run_dir / "step_000000", checkpoint.read_meta(path))
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(found[name], halves[name].t().float())


def test_round_trips_are_exact(exported, source, tmp_path):
    """But for the embedding's padding, rows of no token, which are not exported."""
    back = convert(source=exported.folder, to=tmp_path / "back")
    ours, theirs = exported.model.state_dict(), load_run(back).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        n_rows = chat.N_IDS if name in (WTE, runs.HEAD) else None
        assert torch.equal(tensor[:n_rows], theirs[name][:n_rows]), name
    mean = ours[WTE][: runs.N_BPE].double().mean(0).float()
    assert torch.equal(theirs[WTE][chat.N_IDS :], mean.expand(45, -1))
    again = convert(run=back, to=tmp_path / "again")
    names = sorted(path.name for path in exported.folder.iterdir())
    assert len({path.stat().st_mode for path in exported.folder.iterdir()}) == 1
    assert names == sorted(path.name for path in again.iterdir())
    for name in set(names) - {"README.md"}:  # says where it comes from
        assert (again / name).read_bytes() == (exported.folder / name).read_bytes(), name
    there = convert(run=source.run_dir, to=tmp_path / "there")
    found, wanted = safetensors.torch.load_file(there / WEIGHTS), tensors_of(source)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name][: len(tensor)], tensor), name
    assert model_bytes(convert(source=there, to=tmp_path / "once")) == model_bytes(source.run_dir)


def test_a_gpt2_brought_here_is_a_run_for_every_script(source, tiny_bins, tmp_path):
    run_dir = shutil.copytree(source.run_dir, tmp_path / "run")
    assert (run_dir / "latest").read_text() == "step_000000"
    facts = json.loads((run_dir / "config.json").read_text())
    assert facts["parameters"] == load_run(run_dir).n_parameters()
    score = {"run": str(run_dir), "dtype": "float32", "device": "cpu"}
    eval_ppl.main(eval_ppl.EvalConfig(data_dir=tiny_bins, **score))
    with pytest.raises(UserError, match="not trained on bins of ours; name some with --data_dir"):
        eval_ppl.main(eval_ppl.EvalConfig(**score))
    sample.main(sample.SampleConfig(prompt="Hi", max_new_tokens=2, **score))

    # A learning rate of 0 leaves the weights that training starts from.
    still = {"init_from": str(run_dir), "learning_rate": 0.0, "min_learning_rate": 0.0}
    train_run(tiny_bins, tmp_path / "trained", **still)
    assert model_bytes(tmp_path / "trained") == model_bytes(run_dir)
    with pytest.raises(UserError, match="another shape; its settings are --block_size=16$"):
        train_run(tiny_bins, tmp_path / "longer", **{**still, "block_size": 8})
    identity = checkpoint.read_meta(run_dir / "step_000000")["identity"] | {"seed": 42}
    with pytest.raises(UserError, match="made with seed=None, this run has 42.*--init_from"):
        checkpoint.find_start(run_dir, "auto", identity)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model_type": "llama"}, "config.json has model_type='llama'; wanted 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function='relu'; our GPT-2 has 'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06; our GPT-2 has 1e-05"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"n_inner": 32}, "n_inner=32; our GPT-2 has None or 64"),
        ({"n_head": 3}, "n_head=3, n_embd=16.*; wanted .* n_embd divisible by n_head"),
        ({"n_layer": None}, "'n_layer' expected int, got NoneType"),
        ({"n_layer": True}, "'n_layer' expected int, got bool"),
        ({"n_layer": 0}, "n_layer=0, .*; wanted sizes of 1 or more"),
        ({"n_positions": 0}, "/config.json has .* n_positions=0, .*; wanted sizes of 1 or more"),
        ({"n_embd": 10**400}, "n_embd=10.*; wanted sizes of 1 or more"),
        ({"n_layer": 10**9}, r"config.json \(.*\): 29 tensors are not of 1,000,000,000 layers"),
        ({"n_embd": "16"}, r"'n_embd' expected int, got str \(value: '16'\)"),
        ({"resid_pdrop": 1.0}, "resid_pdrop=1.0, .*; wanted .* below 1"),
        ({"vocab_size": 32000}, "vocab_size=32000; wanted 50257 to 50432"),
        ({"n_layer": 3}, r"config.json \(.*\): Missing key.*transformer.h.2.ln_1.weight"),
        ({"n_layer": 1}, r"config.json \(.*\): Unexpected key.*transformer.h.1.ln_1.weight"),
        ({"n_positions": 32}, r"mismatch for transformer.wpe.weight: .*\[16, 16\].*\[32, 16\]"),
        ({"vocab_size": 50304}, r"mismatch for .*wte.weight: .*\[50257, 16\].*\[50304, 16\]"),
    ],
)
def test_a_model_that_is_not_gpt2_is_refused(source, tmp_path, changes, wanted):
    folder = write_source(tmp_path / "hf", tensors_of(source), **changes)
    with pytest.raises(UserError, match=wanted):
        convert(source=folder, to=tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]  # nothing half done


def test_tensors_that_are_not_gpt2s_are_refused(source, tmp_path):
    tensors = tensors_of(source)
    name = "transformer.h.0.mlp.c_fc.weight"
    changed = {
        "(c_* matrices as out, in): size mismatch": {name: tensors[name].t().contiguous()},
        "with shape torch.Size([1, 16, 64])": {name: tensors[name][None].clone()},
        "c_fc.weight in torch.int8; wanted one of torch.float32": {
            name: tensors[name].to(torch.int8)
        },
        "c_fc.weight, but 1 of its 1,024 numbers are NaN or infinite": {
            name: torch.where(torch.arange(64) + torch.arange(16)[:, None] == 0, math.nan, 1.0)
        },
        "in float32": {name: tensors[name].double() * 1e300},
        "lm_head.weight apart from transformer.wte": {"lm_head.weight": tensors[WTE] + 1},
        'Unexpected key(s) in state_dict: "h.0.lora_A"': {"h.0.lora_A": torch.ones(2)},
        'Unexpected key(s) in state_dict: "wte.weight"': {"wte.weight": tensors[WTE].clone()},
        'state_dict: "transformer.h.7.attn.c_attn.bias"': {
            "transformer.h.7.attn.c_attn.bias": torch.ones(48)
        },
    }
    for number, (wanted, change) in enumerate(changed.items()):
        folder = write_source(tmp_path / f"hf-{number}", tensors | change)
        with pytest.raises(UserError) as error:
            convert(source=folder, to=tmp_path / "run")
        assert wanted in str(error.value) and "\n" not in str(error.value)


class Payload:
    """Would make a file when unpickled without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_unreadable_weights_are_refused_with_one_line(source, tmp_path):
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            convert(source=folder, to=tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
        return str(error.value)

    folder = write_source(tmp_path / "hf", {})
    weights = folder / WEIGHTS
    weights.write_bytes((source.folder / WEIGHTS).read_bytes()[:5000])
    assert "model.safetensors cannot be read: " in refused(folder)
    weights.unlink()
    assert "no weights in" in refused(folder)
    torch.save({"wte.weight": Payload(tmp_path / "touched")}, folder / PICKLE)
    assert "pytorch_model.bin cannot be read: UnpicklingError: Weights only load failed" in refused(
        folder
    )
    assert not (tmp_path / "touched").exists()
    torch.save([1, 2], folder / PICKLE)
    assert "pytorch_model.bin cannot be read: " in refused(folder)
    torch.save({"wte.weight": "words", 7: torch.ones(2)}, folder / PICKLE)
    assert "has transformer.wte.weight, a str; wanted a tensor" in refused(folder)
    (folder / PICKLE).write_bytes(b"")
    assert "pytorch_model.bin cannot be read" in refused(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": "../x.safetensors"}}))
    assert "names no files of its folder" in refused(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": "x.safetensors"}}))
    assert "x.safetensors cannot be read: FileNotFoundError" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json cannot be read: FileNotFoundError: [Errno 2] No such file" in refused(
        folder
    )
    assert "missing/config.json cannot be read" in refused(Path("missing"))


def test_the_source_tokenizer_is_checked(exported, tmp_path):
    def check(name: str, content: dict) -> str:
        path = tmp_path / name
        path.write_text(json.dumps(content))
        try:
            return hf_tokenizer.check(tmp_path, chat.N_IDS)[0]
        finally:
            path.unlink()

    marks = {chat.IM_START: chat.IM_START, chat.IM_END: chat.IM_END}
    assert hf_tokenizer.check(tmp_path, runs.N_BPE) == ("", {})
    assert hf_tokenizer.check(tmp_path, chat.N_IDS) == ("", marks)
    assert hf_tokenizer.check(exported.folder, chat.N_IDS) == ("tokenizer.json", marks)
    ours = json.loads((exported.folder / "tokenizer.json").read_text())
    model, vocabulary = ours["model"], ours["model"]["vocab"]
    assert check("vocab.json", vocabulary) == "vocab.json"
    with pytest.raises(UserError, match="in 2 tokens: .* is id [78], wanted"):
        check("vocab.json", vocabulary | {"world": 8, "Hello": 7})
    with pytest.raises(UserError, match="in 50,255 tokens: .* is id None, wanted"):
        check("vocab.json", {"!": 0, "<|endoftext|>": chat.END_OF_TEXT})
    spelt = model["merges"]
    pairs = [merge.split(" ") for merge in spelt]  # as newer files have them
    assert check("tokenizer.json", ours | {"model": model | {"merges": pairs}}) == "tokenizer.json"
    with pytest.raises(UserError, match="other merges than GPT-2's"):
        check("tokenizer.json", ours | {"model": model | {"merges": spelt[::-1]}})
    with pytest.raises(UserError, match="'<pad>' is id 50257, wanted None"):
        added = [ours["added_tokens"][0], ours["added_tokens"][1] | {"content": "<pad>"}]
        check("tokenizer.json", ours | {"added_tokens": added})
    with pytest.raises(UserError, match="'a' is id 0, wanted 64"):
        unigram = {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}
        check("tokenizer.json", ours | {"model": unigram, "added_tokens": []})
    others = [token for token in vocabulary if token != "<|endoftext|>"]  # is added beside them
    same_ids = {"type": "Unigram", "unk_id": None, "vocab": [[token, 0.0] for token in others]}
    word_level = {"type": "WordLevel", "unk_token": "[UNK]", "vocab": vocabulary}
    for without in (same_ids, word_level):
        with pytest.raises(UserError, match="other merges than GPT-2's"):
            check("tokenizer.json", ours | {"model": without})
    with pytest.raises(UserError, match="tokenizer.json cannot be read: .*UNK"):
        words = {"model": model | {"unk_token": "[UNK]"}, "pre_tokenizer": {"type": "Whitespace"}}
        check("tokenizer.json", ours | words)
    with pytest.raises(UserError, match="tokenizer.json cannot be read: "):
        check("tokenizer.json", {"model": 5})


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"to": "x"}, "wanted one of --run=RUN"),
        ({"run": "a", "source": "b", "to": "x"}, "wanted one of --run=RUN"),
        ({"run": "a"}, "wanted --to=FOLDER"),
        ({"source": "a", "step": "latest", "to": "x"}, "--step=latest; it goes with --run"),
    ],
)
def test_flags_that_do_not_go_together(flags, wanted):
    with pytest.raises(UserError, match=wanted):
        HFConfig(**flags)


def test_the_new_folder_must_be_new(exported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name in ("full", "link", "full/kept.txt"):
        with pytest.raises(UserError, match="is there and is no empty folder"):
            convert(run=exported.run_dir, to=tmp_path / name)
    assert (tmp_path / "full" / "kept.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is not written: "):
        convert(run=exported.run_dir, to=tmp_path / "full" / "kept.txt" / "below")


def test_a_file_is_named_whole():
    with pytest.raises(UserError, match="no. 1/config.json"), runs.reading("a folder"):
        raise FileNotFoundError(2, "No such file", "no. 1/config.json")


def test_an_export_builds_no_second_model(exported, tmp_path, monkeypatch):
    def normal_(tensor: torch.Tensor, *arguments, **options) -> torch.Tensor:
        assert tensor.is_meta
        return tensor

    monkeypatch.setattr(torch.nn.init, "normal_", normal_)
    to = convert(run=exported.run_dir, to=tmp_path / "hf")
    assert (to / WEIGHTS).read_bytes() == (exported.folder / WEIGHTS).read_bytes()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "empty") as folder:
        (folder / "half").write_text("x")
        assert not any((tmp_path / "empty").iterdir())
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / ".tmp-empty").mkdir()  # a user's
    (tmp_path / ".tmp-empty" / "kept").write_text("x")
    with files.new_folder(tmp_path / "empty") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["whole"]
    assert {path.name for path in tmp_path.iterdir()} == {"empty", ".tmp-empty"}
    assert (tmp_path / ".tmp-empty" / "kept").read_text() == "x"


def test_a_run_of_another_vocabulary_is_refused(tmp_path):
    run_dir = save_run(tiny_model(), tmp_path / "run")
    with pytest.raises(UserError, match="a vocabulary of 64; the tokenizer has 50259 tokens"):
        convert(run=run_dir, to=tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_transformers_is_an_optional_requirement(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="transformers is missing; pip install -r requirements-ev"):
        HFConfig(run="out/demo", to="out/demo-hf")


def test_the_command_line_is_checked_before_the_libraries_are_imported():
    done = command("-X", "importtime", "-m", "convert.hf", "--sourc=x")
    *imports, said = done.stderr.splitlines()
    assert done.returncode == 1
    assert said.startswith("convert.hf: error: unknown setting 'sourc'") and "'source'" in said
    imported = {line.split("|")[-1].strip() for line in imports}
    assert "nanosynth.settings" in imported and not {"torch", "transformers"} & imported


def test_from_the_command_line(exported, tmp_path):
    to = tmp_path / "hf"
    done = command("-m", "convert.hf", "--run", exported.run_dir, "--to", to)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == f"written to {to}"
    assert len(list(to.iterdir())) == len(list(exported.folder.iterdir()))
