import pytest
import torch

from nanosynth.training import optim
from tiny import ALONE, CPU, random_ids, tiny_model

SCHEDULE = {
    "max_steps": 110,
    "warmup_steps": 10,
    "learning_rate": 1.0,
    "min_learning_rate": 0.1,
}


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (0, 0.1),  # never zero
        (8, 0.9),
        (9, 1.0),  # the last warmup step takes the peak
        (59, 0.55),  # half way down the cosine
        (34, 0.1 + 0.9 * (1 + 2**-0.5) / 2),  # a quarter of it
        (109, 0.1),  # the last update
    ],
)
def test_lr_at_its_corners(step, wanted):
    assert optim.lr_at(step, **SCHEDULE) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("step", "wanted"), [(9, 1.0), (34, 0.775), (59, 0.55), (109, 0.1)])
def test_linear_decay_at_its_corners(step, wanted):
    assert optim.lr_at(step, decay="linear", **SCHEDULE) == pytest.approx(wanted, rel=1e-12)


def test_lr_rises_then_falls():
    rates = [optim.lr_at(step, **SCHEDULE) for step in range(110)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert max(rates) == 1.0 and min(rates) >= 0.1 - 1e-12


def test_lr_without_warmup_starts_high():
    assert optim.lr_at(0, **{**SCHEDULE, "warmup_steps": 0}) == pytest.approx(1.0, rel=1e-3)


def test_each_parameter_is_in_exactly_one_group():
    model = tiny_model()
    groups = optim.parameter_groups(model, weight_decay=0.01, embedding_share=4.0)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    assert [group["weight_decay"] for group in groups] == [0.01, 0.01, 0.0]
    assert [group["lr_share"] for group in groups] == [4.0, 1.0, 1.0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings, matrices, vectors = ([names[id(p)] for p in group["params"]] for group in groups)
    assert embeddings == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(name.endswith(".weight") and ".ln_" not in name for name in matrices)
    assert all(name.endswith(".bias") or ".ln_" in name for name in vectors)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_embeddings_learn_at_a_rate_of_their_own(name):
    """AdamW's first step is the learning rate, whatever the gradient's size."""
    model, before = tiny_model(), tiny_model()
    settings = {"weight_decay": 0.0, "betas": (0.9, 0.95), "world": ALONE}
    optimizer = optim.build_optimizer(name, model, **settings, embedding_share=4.0)
    optim.set_learning_rate(optimizer, 0.01)
    model(random_ids(4, 16), random_ids(64, seed=9)).sum().backward()
    optimizer.step()
    moved = {
        key: (after - old).abs().max().item()
        for (key, after), old in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    for key in ("wte", "wpe"):
        assert moved[f"transformer.{key}.weight"] == pytest.approx(0.04, rel=1e-3)
    assert moved["transformer.ln_f.weight"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_brings_moments_and_the_settings_bring_groups(name):
    """Older checkpoints have embeddings and matrices in one group."""
    settings = {"betas": (0.9, 0.95), "world": ALONE}
    models = tiny_model(), tiny_model(seed=1)
    first = optim.build_optimizer(name, models[0], weight_decay=0.1, **settings)
    models[0](random_ids(4, 16), random_ids(64, seed=9)).sum().backward()
    first.step()
    state = first.state_dict()
    adamw = state if name == "adamw" else state["adamw"]
    embeddings, matrices, vectors = adamw["param_groups"]
    embeddings["params"] += matrices["params"]
    adamw["param_groups"] = [embeddings, vectors]
    for group in adamw["param_groups"]:
        del group["lr_share"]
    second = optim.build_optimizer(
        name, models[1], weight_decay=0.3, **settings, embedding_share=4.0
    )
    second.load_state_dict(state)
    optim.set_learning_rate(second, 0.01)
    assert {(group["lr"], group["weight_decay"]) for group in second.param_groups} == {
        (0.04, 0.3),
        (0.01, 0.3),
        (0.01, 0.0),
    }
    found, wanted = second.state_dict(), first.state_dict()
    if name == "muon":
        found, wanted = found["adamw"], wanted["adamw"]
    assert len(found["state"]) > 10
    for number, moments in wanted["state"].items():
        for key, tensor in moments.items():
            assert torch.equal(found["state"][number][key], tensor)


def test_optimizer_takes_its_settings():
    optimizer = optim.build_optimizer(
        "adamw", tiny_model(), weight_decay=0.03, betas=(0.8, 0.9), world=ALONE
    )
    optim.set_learning_rate(optimizer, 0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.03, 0.03, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(("max_norm", "wanted"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_clip_gradients(max_norm, wanted):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, value in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([value])
    assert optim.clip_gradients(parameters, max_norm).item() == pytest.approx(5.0)
    norm = torch.cat([parameter.grad for parameter in parameters]).norm()
    assert norm.item() == pytest.approx(wanted, rel=1e-5)


def full_guard(sigmas: float = 8.0) -> optim.SpikeGuard:
    """A guard that has seen 64 losses of 3 and 64 of 5: mean 4, standard deviation about 1."""
    guard = optim.SpikeGuard(sigmas, CPU)
    for number in range(guard.WINDOW):
        guard.note(torch.tensor(3.0 + 2 * (number % 2)), torch.tensor(True))
    return guard


@pytest.mark.parametrize(
    ("loss", "accepted"),
    [
        (4.0, True),
        (0.1, True),
        (11.9, True),
        (12.2, False),
        (float("nan"), False),
        (float("inf"), False),
    ],
)
def test_spike_guard(loss, accepted):
    assert full_guard().accepts(torch.tensor(loss)).item() is accepted


def test_spike_guard_accepts_all_finite_losses_until_its_window_is_full():
    guard = optim.SpikeGuard(8.0, CPU)
    for _ in range(guard.WINDOW - 1):
        guard.note(torch.tensor(1.0), torch.tensor(True))
    assert guard.accepts(torch.tensor(1000.0)) and not guard.accepts(torch.tensor(float("nan")))
    guard.note(torch.tensor(1.0), torch.tensor(True))
    assert not guard.accepts(torch.tensor(1000.0))


def test_spike_guard_turned_off_still_refuses_nan():
    guard = full_guard(sigmas=0.0)
    assert guard.accepts(torch.tensor(1e9)) and not guard.accepts(torch.tensor(float("nan")))


def test_spike_guard_does_not_learn_from_what_it_refused():
    guard, other = full_guard(), full_guard()
    guard.note(torch.tensor(1000.0), torch.tensor(False))
    guard.note(torch.tensor(float("nan")), torch.tensor(False))
    found, wanted = guard.state_dict(), other.state_dict()
    assert torch.equal(found["losses"], wanted["losses"])
    assert found["n_accepted"] == wanted["n_accepted"] == 128


def test_spike_guard_counts_skipped_steps_in_a_row():
    guard = full_guard()
    counts = []
    for accepted in (False, False, True, False):
        guard.note(torch.tensor(4.0), torch.tensor(accepted))
        counts.append(int(guard.n_skipped))
    assert counts == [1, 2, 0, 1]


def test_spike_guard_is_restored():
    guard = optim.SpikeGuard(8.0, CPU)
    guard.load_state_dict(full_guard().state_dict())
    assert not guard.accepts(torch.tensor(12.2)) and guard.accepts(torch.tensor(11.9))
