import copy
import functools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nanosynth.training import muon, optim
from nanosynth.training.distributed import World
from tiny import ALONE, CPU, random_ids, tiny_model


def test_muon_equals_torch_muon_on_the_blocks_and_adamw_on_the_rest():
    """Over three steps; torch's takes q, k and v as matrices of their own."""
    model, twin = tiny_model(), tiny_model()
    both = optim.build_optimizer("muon", model, weight_decay=0.1, betas=(0.9, 0.95), world=ALONE)
    optim.set_learning_rate(both, 0.02)
    parts, whole, rest = [], {}, []
    for name, parameter in twin.named_parameters():
        if ".h." in name and parameter.dim() == 2:
            n_parts = 3 if "c_attn" in name else 1
            whole[parameter] = [torch.nn.Parameter(p) for p in parameter.data.chunk(n_parts)]
            parts += whole[parameter]
        else:
            rest.append({"params": [parameter], "weight_decay": 0.1 * (parameter.dim() > 1)})
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [
        torch.optim.Muon(parts, **settings),
        torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.95)),
    ]
    for number in range(3):
        for one in (model, twin):
            one.zero_grad()
            batch = random_ids(4, 16, seed=number), random_ids(64, seed=9)
            one(*batch).sum().backward()
        for parameter, split in whole.items():
            for part, gradient in zip(split, parameter.grad.chunk(len(split)), strict=True):
                part.grad = gradient
        both.step()
        for optimizer in optimizers:
            optimizer.step()
    for parameter, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        if parameter.dim() == 2:  # the key's bias has no gradient but noise, which AdamW enlarges
            torch.testing.assert_close(parameter, wanted, rtol=0.02, atol=1e-4)
    moved = next(iter(whole)) - tiny_model().transformer.h[0].attn.c_attn.weight
    assert moved.abs().mean() > 50 * 1e-4  # the tolerance is far below what three steps do


def test_orthogonalise_brings_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 8), (2, 8, 32), (2, 32, 8)):
        found = muon.orthogonalise(torch.randn(shape, generator=generator))
        values = torch.linalg.svdvals(found.float())
        assert found.shape == shape and values.min() > 0.5 and values.max() < 1.3
    assert not muon.orthogonalise(torch.zeros(1, 4, 4)).any()


def test_the_state_is_restored_and_the_learning_rate_reaches_both_parts():
    models = tiny_model(), tiny_model(seed=1)
    build = {"weight_decay": 0.1, "betas": (0.9, 0.95), "world": ALONE}
    first, second = (optim.build_optimizer("muon", model, **build) for model in models)
    for optimizer, model in ((first, models[0]), (second, models[1])):
        optim.set_learning_rate(optimizer, 0.02)
        model(random_ids(4, 16), random_ids(64, seed=9)).sum().backward()
        optimizer.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    models[1].load_state_dict(models[0].state_dict())
    for optimizer, model in ((first, models[0]), (second, models[1])):
        optim.set_learning_rate(optimizer, 0.01)
        optimizer.zero_grad()
        model(random_ids(4, 16, seed=5), random_ids(64, seed=6)).sum().backward()
        optimizer.step()
        assert {group["lr"] for group in optimizer.adamw.param_groups} == {0.01}
    for found, wanted in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(found, wanted)


def on_ranks(size: int, action: Callable[[World], object]) -> list:
    """What `action(world)` returns on each rank, a rank a thread."""
    barrier, parts = threading.Barrier(size), [torch.empty(0)] * size

    class Rank(World):
        def gather(self, tensor: torch.Tensor) -> torch.Tensor:
            parts[self.rank] = tensor
            barrier.wait()
            joined = torch.cat(parts)
            barrier.wait()
            return joined

    worlds = [Rank(rank=rank, size=size, device=CPU) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(action, worlds))


MODEL = tiny_model(n_layer=3)


def two_steps(world: World, state: dict | None = None):
    """A model after two steps, and its optimizer; `state` is taken on before them."""
    model = copy.deepcopy(MODEL)
    optimizer = optim.build_optimizer(
        "muon", model, weight_decay=0.1, betas=(0.9, 0.95), world=world
    )
    if state:
        optimizer.load_state_dict(copy.deepcopy(state))
    for number in range(2):
        optim.set_learning_rate(optimizer, 0.02 / (1 + number))
        noise = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=noise)
        optimizer.step()
    return model, optimizer, optimizer.state_dict()


@pytest.mark.parametrize("size", [2, 4])  # of 3 matrices: 2 and 1; 1, 1, 1 and none
def test_a_rank_has_the_momenta_of_its_share_and_all_take_the_same_steps(size):
    _, _, state = two_steps(ALONE)
    wanted, _, last_state = two_steps(ALONE, state)
    found = on_ranks(size, lambda world: two_steps(world, state))
    for model, optimizer, _ in found:
        assert all(len(g["momentum"]) == math.ceil(3 / size) for g in optimizer.matrix_groups)
        for one, other in zip(model.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len(last_state["momenta"]) == 4
    for one, other in zip(found[0][2]["momenta"], last_state["momenta"], strict=True):
        assert torch.equal(one, other)


def test_compiled_it_has_a_graph_for_each_shape_at_any_learning_rate(monkeypatch):
    counter = CompileCounter()
    compiled = functools.partial(torch.compile, backend=counter)
    monkeypatch.setattr(muon.torch, "compile", compiled)
    torch._dynamo.reset()
    model = tiny_model()
    build = {"weight_decay": 0.1, "betas": (0.9, 0.95), "world": ALONE}
    optimizer = optim.build_optimizer("muon", model, **build, is_compiled=True)
    for number in range(3):
        optim.set_learning_rate(optimizer, 0.02 / (1 + number))
        model(random_ids(4, 16, seed=number), random_ids(64, seed=9)).sum().backward()
        optimizer.step()
    assert counter.frame_count == 4
    torch._dynamo.reset()
