"""Checkpoints as nanoGPT saves them, as runs."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers

import eval_ppl
import sample
from convert import hf, nanogpt
from convert.nanogpt import NanoGPTConfig
from convert.runs import HEAD, WTE
from model import GPT, GPTConfig
from nanosynth import UserError, checkpoint, tokenizer
from nanosynth.inference.generation import Sampling, generate
from tiny import load_run, random_ids, train_run
from verdict import __main__ as verdict
from verdict.__main__ import VerdictConfig

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}


def write_checkpoint(path: Path, prefix: str = "", **changes) -> GPT:
    """A random model's ckpt.pt, with all that nanoGPT puts there; what it holds."""
    shape = {**SHAPE, "vocab_size": 50304, "dropout": 0.0, "bias": False, **changes}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape, activation="gelu")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 2
    tensors = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    tensors[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "model": tensors,
        "optimizer": optimizer.state_dict(),
        "model_args": shape,
        "iter_num": 700,
        "best_val_loss": torch.tensor(3.25),
        "config": {"dataset": "openwebtext", "compile": True, "learning_rate": 6e-4},
    }
    torch.save(content, path)
    return model


def forward(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits (tokens, vocabulary) of ids (tokens,), by nanoGPT's architecture."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = tensors.get(f"{name}.bias")
        return x @ tensors[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        bias = tensors.get(f"{name}.bias")
        return x * tensors[f"{name}.weight"] + (0 if bias is None else bias)

    n_tokens = len(ids)
    x = tensors[WTE][ids] + tensors["transformer.wpe.weight"][:n_tokens]
    later = torch.ones(n_tokens, n_tokens).triu(1).bool()
    for layer in range(SHAPE["n_layer"]):
        at = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, -1)
        q, k, v = (part.view(n_tokens, SHAPE["n_head"], -1).transpose(0, 1) for part in qkv)
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(mixed, f"{at}.attn.c_proj")
        hidden = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        hidden = hidden * (1 + (hidden / 2**0.5).erf()) / 2  # the exact GELU
        x = x + linear(hidden, f"{at}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ tensors[WTE].T


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_greedy_tokens_are_those_of_the_architecture(tmp_path, bias):
    tensors = write_checkpoint(tmp_path / "ckpt.pt", bias=bias).state_dict()
    model = load_run(convert(tmp_path / "ckpt.pt", tmp_path / "run"))
    ids = random_ids(1, 8, vocab_size=50257)[0]
    greedy = Sampling(max_new_tokens=8, temperature=0.0)
    [answer] = generate(model, [ids.tolist()], [0], greedy)
    model.double()  # float32 sums differ by their order alone, by more than a wrong constant might
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    for id in answer:
        wanted = forward(tensors, ids)[:, : tokenizer.N_IDS]
        found = model(ids[None])[:, : tokenizer.N_IDS]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
        assert wanted[-1].argmax() == id
        ids = torch.cat([ids, torch.tensor([id])])
    assert len(answer) == 8 or answer[-1] in tokenizer.STOP_IDS


def convert(source: Path, to: Path) -> Path:
    nanogpt.main(NanoGPTConfig(source=str(source), to=str(to)))
    return to


@torch.no_grad()
@pytest.mark.parametrize(
    ("prefix", "vocab_size", "bias"),
    [("", 50257, True), ("_orig_mod.", 50304, True), ("", 50304, False)],
)
def test_logits_are_those_of_the_checkpoint(tmp_path, prefix, vocab_size, bias):
    theirs = write_checkpoint(tmp_path / "ckpt.pt", prefix, vocab_size=vocab_size, bias=bias)
    run_dir = convert(tmp_path / "ckpt.pt", tmp_path / "run")
    model = load_run(run_dir)
    wanted = asdict(theirs.config) | {"vocab_size": tokenizer.VOCAB_SIZE}
    assert asdict(model.config) == wanted and wanted["activation"] == "gelu"
    ids = random_ids(2, 16, vocab_size=50257)
    logits = theirs(ids)
    torch.testing.assert_close(model(ids)[:, :vocab_size], logits, rtol=0, atol=1e-5)
    for layer in theirs.transformer.h:
        layer.mlp.approximate = "tanh"
    assert (theirs(ids) - logits).abs().max() > 1e-4  # GPT-2's own would not do


@torch.no_grad()
def test_transformers_computes_the_same_of_it(tmp_path):
    theirs = write_checkpoint(tmp_path / "ckpt.pt", bias=True)
    run_dir = convert(tmp_path / "ckpt.pt", tmp_path / "run")
    hf.main(hf.HFConfig(run=str(run_dir), to=str(tmp_path / "hf")))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = random_ids(2, 16, vocab_size=50257)
    found, wanted = model(ids).logits.flatten(0, 1), theirs(ids)[:, : tokenizer.N_IDS]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_it_is_a_run_for_every_script(tiny_bins, tmp_path, capfd):
    write_checkpoint(tmp_path / "ckpt.pt")
    run_dir = convert(tmp_path / "ckpt.pt", tmp_path / "run")
    assert "after 700 steps of nanoGPT" in capfd.readouterr().out
    score = {"run": str(run_dir), "dtype": "float32", "device": "cpu"}
    sample.main(sample.SampleConfig(prompt="Hi", max_new_tokens=2, **score))
    eval_ppl.main(eval_ppl.EvalConfig(data_dir=tiny_bins, **score))
    assert verdict.main(VerdictConfig(run=(str(run_dir),), only="report")) is None
    start = {"init_from": str(run_dir), "bias": False, "activation": "gelu"}
    train_run(tiny_bins, tmp_path / "more", learning_rate=0.0, min_learning_rate=0.0, **start)
    weights = [load_run(tmp_path / name).state_dict() for name in ("run", "more")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    with pytest.raises(UserError, match="its settings are --bias=False --activation=gelu"):
        train_run(tiny_bins, tmp_path / "other", init_from=str(run_dir))


def test_a_checkpoint_of_other_code_says_no_steps(tmp_path, capsys):
    write_checkpoint(path := tmp_path / "ckpt.pt")
    content = torch.load(path)
    torch.save(content | {"iter_num": torch.tensor(7)}, path)
    convert(path, tmp_path / "run")
    assert capsys.readouterr().out.startswith(f"{path}, 811,344 parameters\n")


def test_a_ckpt_elsewhere_is_answered_with_the_command(tiny_bins, tmp_path):
    path = tmp_path / "ckpt.pt"
    write_checkpoint(path)
    wanted = f"python -m convert.nanogpt --source={path} --to="
    for run in (str(path), str(tmp_path)):
        with pytest.raises(UserError, match=wanted):
            checkpoint.find(run)
        with pytest.raises(UserError, match=wanted):
            sample.main(sample.SampleConfig(prompt="Hi", run=run))
        with pytest.raises(UserError, match=wanted):
            train_run(tiny_bins, tmp_path / "run", init_from=run)
        with pytest.raises(UserError, match=wanted):
            verdict.main(VerdictConfig(run=(run,)))
    with pytest.raises(UserError, match=wanted):
        hf.main(hf.HFConfig(source=str(tmp_path), to=str(tmp_path / "x")))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_checkpoint_of_gpt2_is_refused(tmp_path):
    def refused() -> str:
        with pytest.raises(UserError) as error:
            convert(path, tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
        return str(error.value)

    path = tmp_path / "ckpt.pt"
    assert "is not read as a ckpt.pt of nanoGPT: FileNotFoundError" in refused()
    path.write_bytes(b"x" * 100)
    assert "is not read as a ckpt.pt of nanoGPT" in refused()
    torch.save([Path("x")], path)
    assert "Weights only load failed" in refused()
    torch.save({"weights": 1}, path)
    assert "it has weights (int); wanted model and model_args" in refused()
    write_checkpoint(path, vocab_size=65)
    assert "has vocab_size=65; wanted 50257 or 50304" in refused()
    write_checkpoint(path)
    content = torch.load(path)

    def changed(**tensors) -> dict:
        return content | {"model": content["model"] | tensors}

    torch.save(changed(**{WTE: torch.full((50304, 16), torch.nan)}), path)
    assert f"has {WTE}, but 804,864 of its 804,864 numbers are NaN" in refused()
    torch.save(changed(**{HEAD: torch.zeros(50304, 16)}), path)
    assert f"has {HEAD} apart from {WTE}" in refused()
    torch.save(changed(more=torch.zeros(1)), path)
    assert 'not the tensors of its model_args: Unexpected key(s) in state_dict: "more"' in refused()
    wrong = [("n_layer", "2"), ("n_head", 3), ("n_head", 0), ("dropout", 1.0)]
    for name, value in [*wrong, ("vocab_size", 50304.0)]:
        torch.save(content | {"model_args": content["model_args"] | {name: value}}, path)
        assert f"{name}={value!r}" in (said := refused()) and "wanted sizes of 1 or more" in said
    torch.save(content | {"model_args": content["model_args"] | {"n_layer": 10**9}}, path)
    assert "its model_args: 16 tensors are not of 1,000,000,000 layers" in refused()
    torch.save(content | {"model": [1]}, path)
    assert "it has model (list), " in (said := refused()) and "model_args, a dict each" in said
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for tensor in (torch.eye(4).to_sparse(), nested, torch.ones(2, device="meta")):
        torch.save(changed(**{WTE: tensor}), path)
        assert f"has {WTE}, a Tensor; wanted a tensor, dense and with" in refused()
    torch.save(changed(**{WTE: "x"}), path)
    assert f"has {WTE}, a str; wanted a tensor" in refused()
    arguments = {key: value for key, value in content["model_args"].items() if key != "bias"}
    torch.save(content | {"model_args": arguments}, path)
    assert "its model_args lack bias" in refused()
    write_checkpoint(path)
    with pytest.raises(UserError, match="--to=.* is not written: "):
        convert(path, path / "below")
