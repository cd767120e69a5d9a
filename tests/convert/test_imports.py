"""The forms in which a GPT-2 of transformers comes: brought exactly, or refused by name."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from convert import hf, hf_tokenizer, runs
from convert.hf import INDEX, PICKLE, PICKLE_INDEX, WEIGHTS
from convert.runs import HEAD, WTE
from nanosynth import UserError, tokenizer
from tiny import load_run, random_ids

C_FC = "transformer.h.0.mlp.c_fc.weight"
MARKS = ["<|im_start|>", "<|im_end|>"]


@functools.cache
def gpt2(n_rows: int = runs.N_BPE, **changes) -> transformers.GPT2LMHeadModel:
    """A random GPT-2; made once, so what a variant changes must be a copy."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": n_rows}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 3
    return model


@functools.cache
def openai_tokenizer() -> str:
    content = json.loads(hf_tokenizer.gpt2_bpe().to_str())
    content["added_tokens"] = content["added_tokens"][:1]  # <|endoftext|>
    return json.dumps(content)


def save_tokenizer(folder: Path, *added: str, **special: str) -> None:
    """GPT-2's own tokenizer with `added` tokens after it, and special ones by role."""
    tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(openai_tokenizer()), eos_token="<|endoftext|>"
    )
    tokens.add_special_tokens(special)
    tokens.add_tokens(list(added))
    tokens.save_pretrained(folder)


def save_slow_tokenizer(folder: Path, change: Callable[[list], list] = list) -> None:
    """As transformers 4 saved GPT2Tokenizer, after a pad token was added."""
    model = json.loads(openai_tokenizer())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in change(model["merges"])]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "added_tokens.json").write_text('{"[PAD]": 50257}')
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "[PAD]"}}')


def save_changed_tokenizer(folder: Path, **changes) -> None:
    save_tokenizer(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_in_config(folder: Path, names: dict[str, str]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({names.get(key, key): value for key, value in content.items()}))


def only_what_is_no_default(folder: Path) -> None:
    """As the oldest files are, which don't even say their kind."""
    kept = {"n_layer", "n_head", "n_embd", "n_positions", "vocab_size"}
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: content[k] for k in kept}))


def with_tensors(
    folder: Path, change: Callable[[dict], dict] = dict, name: str = WEIGHTS, **more
) -> None:
    """Write the weights anew: changed, with `more`, under another name."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(change(tensors) | more, folder / name)


def cast(dtype: torch.dtype) -> Callable[[dict], dict]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def bare(tensors: dict) -> dict:
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    return masks | {name.removeprefix("transformer."): t for name, t in tensors.items()}


def in_shards(folder: Path, names: list[str], index: str, twice: bool = False) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = [dict(list(tensors.items())[:9]), dict(list(tensors.items())[8 if twice else 9 :])]
    for name, part in zip(names, parts, strict=True):
        save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
        save(part, folder / name)
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / index).write_text(json.dumps({"weight_map": places}))


PARTS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
BIN_PARTS = ["pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"]
# A form of a folder, and where the two chat marks' rows are in it.
EXACT = {
    "as saved": (gpt2, lambda folder: None),
    "bare, with masks": (gpt2, lambda f: with_tensors(f, bare)),
    "head stored": (gpt2, lambda f: with_tensors(f, lambda t: t | {HEAD: t[WTE].clone()})),
    "head stored alone": (
        gpt2,
        lambda f: with_tensors(f, lambda t: {HEAD if name == WTE else name: t[name] for name in t}),
    ),
    "shards": (gpt2, lambda f: in_shards(f, PARTS, INDEX)),
    "pickle": (gpt2, lambda f: with_tensors(f, name=PICKLE)),
    "pickled shards": (gpt2, lambda f: in_shards(f, BIN_PARTS, PICKLE_INDEX)),
    "variant": (gpt2, lambda f: with_tensors(f, name="model.v2.safetensors")),
    "float64": (gpt2, lambda f: with_tensors(f, cast(torch.float64))),
    "hidden_size": (
        gpt2,
        lambda f: rename_in_config(f, {v: k for k, v in gpt2().config.attribute_map.items()}),
    ),
    "n_ctx": (gpt2, lambda f: rename_in_config(f, {"n_positions": "n_ctx"})),
    "defaults": (gpt2, only_what_is_no_default),
    "exact GELU": (lambda: gpt2(activation_function="gelu"), lambda folder: None),
    "GELU's other name": (
        gpt2,
        lambda f: change_config(f, activation_function="gelu_pytorch_tanh"),
    ),
    "dropouts": (lambda: gpt2(attn_pdrop=0.0), lambda folder: None),
    "GPT-2's tokenizer": (gpt2, save_tokenizer),
    "pad": (lambda: gpt2(50258), lambda f: save_tokenizer(f, pad_token="[PAD]")),
    "pad, slow": (lambda: gpt2(50258), save_slow_tokenizer),
    "pad, slow, no merges": (
        lambda: gpt2(50258),
        lambda f: save_slow_tokenizer(f, lambda merges: []),
    ),
    "saved while it padded": (
        gpt2,
        lambda f: save_changed_tokenizer(
            f,
            padding={
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 50256,
                "pad_type_id": 0,
                "pad_token": "<|endoftext|>",
            },
            truncation={
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            },
        ),
    ),
    "not quantised": (gpt2, lambda f: change_config(f, quantization_config=None)),
    "padded": (lambda: gpt2(50304), save_tokenizer),
    "padded further": (lambda: gpt2(50432), lambda f: save_tokenizer(f, pad_token="[PAD]")),
    "ours": (lambda: gpt2(50259), lambda f: save_tokenizer(f, *MARKS)),
    "ours, no tokenizer": (lambda: gpt2(50259), lambda folder: None),
    "pad, then ours": (
        lambda: gpt2(50304),
        lambda f: save_tokenizer(f, *MARKS, pad_token="[PAD]"),
    ),
}
CHAT_ROWS = {"ours": (50257, 50258), "ours, no tokenizer": (50257, 50258)}
CHAT_ROWS["pad, then ours"] = (50258, 50259)


def bring(folder: Path, to: Path) -> Path:
    hf.main(hf.HFConfig(source=str(folder), to=str(to)))
    return to


@torch.no_grad()
@pytest.mark.parametrize("form", EXACT)
def test_this_form_is_brought_exactly(form, tmp_path, capsys):
    make, change = EXACT[form]
    theirs = make()
    theirs.save_pretrained(tmp_path / "hf")
    change(tmp_path / "hf")
    model = load_run(bring(tmp_path / "hf", tmp_path / "run"))
    ids = random_ids(2, 16, vocab_size=runs.N_BPE)
    found, wanted = model(ids), theirs(ids).logits.flatten(0, 1)
    n_rows = wanted.shape[1]
    ends = CHAT_ROWS.get(form, ())
    torch.testing.assert_close(found[:, : runs.N_BPE], wanted[:, : runs.N_BPE], rtol=0, atol=1e-5)
    mean = wanted[:, : runs.N_BPE].mean(1, keepdim=True).expand(-1, 2)
    marks = wanted[:, ends] if ends else mean
    torch.testing.assert_close(found[:, runs.N_BPE : tokenizer.N_IDS], marks, rtol=0, atol=1e-4)
    # Rows of no token of ours are padding, so that they take what they took there.
    others = [row for row in range(runs.N_BPE, n_rows) if row not in ends][:45]
    padding = found[:, tokenizer.N_IDS :][:, : len(others)]
    torch.testing.assert_close(padding, wanted[:, others], rtol=0, atol=1e-5)
    said = capsys.readouterr().out
    assert ("its dropouts {'resid_pdrop': 0.1" in said) == (form == "dropouts")


def test_half_precision_is_brought_exactly(tmp_path):
    gpt2().save_pretrained(tmp_path / "hf")
    with_tensors(tmp_path / "hf", cast(torch.bfloat16))
    model = load_run(bring(tmp_path / "hf", tmp_path / "run"))
    wanted = gpt2().transformer.wte.weight.bfloat16().float()
    assert torch.equal(model.transformer.wte.weight[: runs.N_BPE], wanted)


def with_nan(tensors: dict) -> dict:
    return tensors | {"transformer.ln_f.bias": torch.tensor([float("inf")] * 16)}


REFUSED = {
    "another model": (lambda f: change_config(f, model_type="llama"), "model_type='llama'"),
    "another activation": (
        lambda f: change_config(f, activation_function="relu"),
        "activation_function='relu'; our GPT-2 has 'gelu_new' or",
    ),
    "an untied head": (lambda f: change_config(f, tie_word_embeddings=False), "tie_word_embedd"),
    "quantised": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq"}),
        "config.json is of a quantised model; bring the one that it was made from",
    ),
    "quantised by a file": (
        lambda f: (f / "quantize_config.json").write_text("{}"),
        "quantize_config.json is of a quantised model",
    ),
    "quantised by another file": (
        lambda f: (f / "hf_quant_config.json").write_text("{}"),
        "hf_quant_config.json is of a quantised model",
    ),
    "an adapter's weights": (
        lambda f: shutil.copy(f / WEIGHTS, f / "adapter_model.safetensors"),
        "adapter_model.safetensors is an adapter",
    ),
    "a whole training state": (
        lambda f: with_tensors(f, lambda t: {"state_dict": t, "epoch": 3}, PICKLE),
        "has transformer.state_dict, a dict; wanted a tensor",
    ),
    "other merges": (
        lambda f: save_slow_tokenizer(f, lambda merges: merges[::-1]),
        "other merges than GPT-2's",
    ),
    "merges that are no text": (
        lambda f: [save_slow_tokenizer(f), (f / "merges.txt").write_bytes(b"\xff")],
        "merges.txt cannot be read: UnicodeDecodeError: 'utf-8' codec",
    ),
    "merges alone": (
        lambda f: [save_slow_tokenizer(f), (f / "vocab.json").unlink()],
        "has merges.txt; wanted GPT-2's tokenizer.json or vocab.json",
    ),
    "SentencePiece": (
        lambda f: (f / "tokenizer.model").write_bytes(b"x"),
        "has tokenizer.model; wanted GPT-2's",
    ),
    "a tokenizer without its files": (
        lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}'),
        "has a tokenizer_config.json of LlamaTokenizer; wanted GPT-2's",
    ),
    "lower case": (
        lambda f: save_changed_tokenizer(f, normalizer={"type": "Lowercase"}),
        "tokenizer.json takes texts apart otherwise",
    ),
    "words alone": (
        lambda f: save_changed_tokenizer(f, pre_tokenizer={"type": "Whitespace"}),
        "tokenizer.json takes texts apart otherwise",
    ),
    "a space before each text": (
        lambda f: save_changed_tokenizer(
            f, pre_tokenizer=json.loads(ByteLevel(add_prefix_space=True).__getstate__())
        ),
        "tokenizer.json takes texts apart otherwise",
    ),
    "a space before each text, slow": (
        lambda f: [save_slow_tokenizer(f),
                   (f / "tokenizer_config.json").write_text('{"add_prefix_space": true}')],
        "vocab.json takes texts apart otherwise",
    ),
    "added tokens in a list": (
        lambda f: [save_tokenizer(f),
                   (f / "tokenizer_config.json").write_text('{"added_tokens_decoder": []}')],
        "hf has a tokenizer that is not as transformers writes it",
    ),
    "a pad token of two": (
        lambda f: [save_tokenizer(f),
                   (f / "tokenizer_config.json").write_text('{"pad_token": ["a", "b"]}')],
        "hf has a tokenizer that is not as transformers writes it",
    ),
    "a pad token of two, in the map": (
        lambda f: [save_slow_tokenizer(f),
                   (f / "special_tokens_map.json").write_text('{"pad_token": ["a", "b"]}')],
        "hf has a tokenizer that is not as transformers writes it",
    ),
    "sparse": (
        lambda f: with_tensors(f, lambda t: t | {C_FC: t[C_FC].to_sparse()}, PICKLE),
        "c_fc.weight, a Tensor; wanted a tensor, dense",
    ),
    "int8": (lambda f: with_tensors(f, cast(torch.int8)), "in torch.int8; wanted one of"),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "adapter_config.json is an adapter; merge it into its model first",
    ),
    "a classifier": (
        lambda f: with_tensors(f, **{"score.weight": torch.ones(2, 16)}),
        'Unexpected key.*"score.weight"',
    ),
    "not finite": (
        lambda f: with_tensors(f, with_nan),
        "transformer.ln_f.bias, but 16 of its 16 numbers are NaN or infinite",
    ),
    "a tensor twice": (
        lambda f: in_shards(f, PARTS, INDEX, twice=True),
        "model-2-of-2.safetensors has .*, and another file of the folder has it too",
    ),
    "only a .h5": (
        lambda f: (f / WEIGHTS).rename(f / "tf_model.h5"),
        "no weights in .* which has config.json, .*tf_model.h5; wanted model.safetensors or",
    ),
    "two variants": (
        lambda f: [shutil.move(f / WEIGHTS, f / "a.safetensors"),
                   shutil.copy(f / "a.safetensors", f / "b.safetensors")],
        "no weights in .* which has a.safetensors, b.safetensors; wanted",
    ),
    "tokens of its own": (
        lambda f: save_tokenizer(f, "<|user|>", pad_token="[PAD]"),
        "not GPT-2's tokenizer in 1 tokens: '<.user.>' is id 50258, wanted None",
    ),
    "tokens nobody names": (
        lambda f: [gpt2(50258).save_pretrained(f)],
        "has 50,258 tokens and no tokenizer, so the last are unknown",
    ),
    "too many tokens": (
        lambda f: change_config(f, vocab_size=51200), "vocab_size=51200; wanted 50257 to 50432"
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_this_form_is_refused_by_name(form, tmp_path):
    change, wanted = REFUSED[form]
    gpt2().save_pretrained(tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(UserError, match=wanted) as error:
        bring(tmp_path / "hf", tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    gpt2().save_pretrained(tmp_path / "hf")
    run_dir = bring(tmp_path / "hf", tmp_path / "run")
    path = run_dir / "step_000000"
    meta = hf.checkpoint.read_meta(path)
    tensors = hf.checkpoint.read_model(path, meta)
    tensors["transformer.wpe.weight"][3, 4] = float("nan")
    shutil.rmtree(path)
    meta = {key: meta[key] for key in ("val_loss", "identity", "settings")}
    hf.checkpoint.save(run_dir, 0, model=tensors, train_state={}, meta=meta)
    with pytest.raises(UserError, match="numbers that are not finite, in transformer.wpe.weight"):
        hf.main(hf.HFConfig(run=str(run_dir), to=str(tmp_path / "out")))
