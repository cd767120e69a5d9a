import copy

import pytest
import torch

from nanosynth.device import autocast
from nanosynth.inference.speed import PackedLinear, speed_up_inference
from tiny import CPU, random_ids, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_model_gives_the_same_losses(dtype):
    model = tiny_model(bias=dtype == torch.float32).eval()
    packed = copy.deepcopy(model)
    speed_up_inference(packed, dtype)
    assert isinstance(packed.lm_head, PackedLinear)
    assert isinstance(packed.transformer.h[1].mlp.c_proj, PackedLinear)
    batch = random_ids(3, 16), random_ids(48, seed=1)
    with torch.inference_mode(), autocast(CPU, dtype):
        torch.testing.assert_close(packed(*batch), model(*batch), rtol=1e-5, atol=1e-5)


def test_a_packed_model_with_a_cache():
    model = tiny_model().to(torch.bfloat16).eval()
    packed = copy.deepcopy(model)
    speed_up_inference(packed, torch.bfloat16)
    ids = random_ids(2, 7)
    with torch.inference_mode():
        found, wanted = (m(ids, cache=m.new_cache(2, 8)) for m in (packed, model))
    torch.testing.assert_close(found, wanted)


def test_no_attention_that_plans_for_each_length():
    """cuDNN's has a plan for each shape: 0.1 to 0.4 s for each new token."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    speed_up_inference(tiny_model(), torch.float16)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_dtype_without_kernels_is_left_as_it_is():
    model = tiny_model()
    speed_up_inference(model, torch.float16)
    assert isinstance(model.lm_head, torch.nn.Linear)
