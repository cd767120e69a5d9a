import math
from dataclasses import asdict

import pytest
import torch
import transformers

from model import GPT
from nanosynth import settings
from tiny import REPO, random_ids, tiny_model
from train import TrainConfig, model_config


def config_file(name: str) -> TrainConfig:
    path = str(REPO / f"config/{name}.py")
    return settings.load(TrainConfig, [path], "train.py", config_file=True)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("500m", 355_919_872),
        ("500m_fast", 355_919_872),
        ("500m_fast_adamw", 355_919_872),
        ("1b", 760_372_224),
        ("1b_fast", 760_372_224),
        ("1b_fast_adamw", 760_372_224),
        ("124m", 124_475_904),
    ],
)
def test_parameter_count(name, count):
    with torch.device("meta"):
        model = GPT(model_config(config_file(name)))
    assert model.n_parameters() == count
    assert f"{count:,}" in (REPO / f"config/{name}.py").read_text()


@pytest.mark.parametrize("name", ["500m", "1b"])
def test_the_fast_configurations_change_the_recipe_alone(name):
    plain, fast, adamw = (
        asdict(config_file(f"{name}{suffix}")) for suffix in ("", "_fast", "_fast_adamw")
    )
    recipe = {"learning_rate", "embedding_learning_rate", "min_learning_rate"}
    recipe |= {"beta1", "beta2", "weight_decay", "out_dir"}
    changed = {key for key in plain if plain[key] != fast[key]}
    assert changed == recipe | {"optimizer", "warmup_steps"}
    changed = {key for key in plain if plain[key] != adamw[key]}
    assert changed == recipe


def test_flops_by_hand():
    model = tiny_model(n_layer=2, n_embd=8, block_size=4, vocab_size=10, bias=False)
    # A block's matrices have 12 C^2 weights and its two LayerNorms C each; ln_f has C.
    body = 2 * (12 * 8 * 8 + 2 * 8) + 8
    attention = 12 * 2 * 8 * 4
    assert model.flops(100, 100) == 100 * (6 * body + attention + 6 * 10 * 8)
    assert model.flops(100, 25) == 100 * (6 * body + attention) + 25 * 6 * 10 * 8


def test_logits_do_not_see_later_tokens():
    model = tiny_model().eval()
    ids = random_ids(2, 12)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 64
    before, after = (model(x).view(2, 12, -1) for x in (ids, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_gradients_to_later_inputs_are_zero():
    model = tiny_model().eval()
    embedded = []
    handle = model.transformer.wte.register_forward_hook(
        lambda module, args, output: (
            embedded.append(output.detach().requires_grad_()) or embedded[0]
        )
    )
    logits = model(random_ids(1, 12)).view(1, 12, -1)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 5].square().sum(), embedded)
    assert torch.equal(gradient[0, 6:], torch.zeros(6, 16))
    assert (gradient[0, :6].abs().sum(dim=1) > 0).all()


def test_initial_loss_is_near_ln_vocab():
    model = tiny_model(vocab_size=512, n_embd=32)
    losses = model(random_ids(8, 16, vocab_size=512), random_ids(128, seed=1, vocab_size=512))
    assert losses.shape == (128,) and losses.dtype == torch.float32
    assert losses.mean().item() == pytest.approx(math.log(512), rel=0.02)


def test_initialisation_is_gpt2s():
    model = tiny_model(n_embd=64, n_head=2, n_layer=8)
    attention = model.transformer.h[3].attn
    assert attention.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert attention.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert attention.c_attn.bias.abs().max() == 0


def test_logits_equal_transformers_gpt2():
    model = tiny_model(n_embd=32, n_head=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=64,
            activation_function="gelu_new",
        )
    ).eval()  # fmt: skip
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = {
        name: tensor.t() if name.endswith(conv1d) else tensor
        for name, tensor in model.state_dict().items()
    }
    assert set(weights) == set(reference.state_dict())
    reference.load_state_dict(weights)
    ids = random_ids(3, 16)
    with torch.no_grad():
        wanted = reference(ids).logits
        found = model(ids).view(3, 16, 64)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_logit_index_scores_only_its_positions():
    model = tiny_model().eval()
    ids, targets = random_ids(2, 8), random_ids(16, seed=1)
    index = torch.tensor([3, 9, 15])
    torch.testing.assert_close(model(ids, targets[index], index), model(ids, targets)[index])


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(dropout=0.1)
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        model(random_ids(2, 16), random_ids(32, seed=1)).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_cached_logits_equal_whole_ones(monkeypatch):
    monkeypatch.setattr("model.KEY_STEP", 4)
    model = tiny_model().eval()
    ids = random_ids(2, 10)
    cache = model.new_cache(2, 10)
    found = []
    for chunk in ids.split([4, 1, 3, 2], dim=1):
        found.append(model(chunk, cache=cache).view(2, chunk.shape[1], -1))
        cache.advance(torch.full((2,), chunk.shape[1]))
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids).view(2, 10, -1))


def test_too_long_an_input_is_refused():
    with pytest.raises(AssertionError, match="17 tokens exceed block_size 16"):
        tiny_model()(random_ids(1, 17))


def test_zero_projections_make_each_block_the_identity():
    model = tiny_model().eval()
    model.zero_projections()
    x = torch.randn(1, 4, 16)
    for block in model.transformer.h:
        assert torch.equal(block(x), x)
    assert model.transformer.h[0].mlp.c_fc.weight.any()
