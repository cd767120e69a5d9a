"""What only a GPU runs: the compiled step in each dtype, its checkpoints, decoding by a graph."""

import pytest
import torch

from nanosynth.inference import generation
from nanosynth.inference.generation import Sampling
from scripted import model_of_chat
from tiny import losses, train_run

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_compiled_run_learns_as_on_the_cpu(tiny_bins, tmp_path, dtype, optimizer):
    wanted = train_run(tiny_bins, tmp_path / "cpu", optimizer=optimizer)
    how = {"device": DEVICE, "dtype": dtype, "compile": True, "optimizer": optimizer}
    found = train_run(tiny_bins, tmp_path / "gpu", **how)
    for split in ("train", "val"):
        assert losses(found, split) == pytest.approx(losses(wanted, split), rel=0.01)


@pytest.mark.parametrize("to", ["cuda", "cpu"])
def test_a_gpus_checkpoint_goes_on(tiny_bins, tmp_path, to):
    wanted = train_run(tiny_bins, tmp_path / "whole", device=DEVICE, dtype="float16")
    first = {"device": DEVICE, "dtype": "float16", "save_interval": 3, "max_steps": 6}
    train_run(tiny_bins, tmp_path / "run", **first)
    for path in (tmp_path / "run").glob("step_000006/*"):
        path.unlink()  # as if it had ended behind step 3
    found = train_run(tiny_bins, tmp_path / "run", **{**first, "device": to})
    assert losses(found) == pytest.approx(losses(wanted), rel=0.01)


def test_a_cuda_graph_gives_the_same_tokens():
    prompts = [[1, 2, 3], [50_000, 7, 9, 11, 13, 2, 40], [5]]
    model = model_of_chat().to(DEVICE)
    plain, by_graph = (
        generation.generate(
            model,
            prompts,
            [0, 1, 2],
            Sampling(max_new_tokens=12, temperature=0.0, cuda_graph=cuda_graph),
        )
        for cuda_graph in (False, True)
    )
    assert by_graph == plain
