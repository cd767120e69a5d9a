"""What makes inference faster: on a CPU weights laid out once and freed memory kept, on a GPU no
attention that is set up anew for each length.
"""

import torch
from torch import Tensor, nn

from nanosynth.device import keep_freed_memory


class PackedLinear(nn.Module):
    """A Linear for inference on a CPU, its weight laid out once as oneDNN reads it fastest.

    A plain Linear is laid out anew at each call; inductor packs by the same two operators.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def speed_up_inference(model: nn.Module, dtype: torch.dtype) -> None:
    """On a CPU, replace the model's Linears by packed ones that multiply in `dtype`, if oneDNN is
    there, and keep freed memory (what each gains: benchmarks/RESULTS.md). In the whole process, no
    attention by cuDNN, which builds a plan, in tenths of a second, for each shape that it meets:
    training has one shape, but texts are of any length.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if next(model.parameters()).device.type != "cpu":
        return
    keep_freed_memory()
    has_kernels = {
        torch.float32: torch.backends.mkldnn.is_available(),
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    if not has_kernels.get(dtype, False):
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, dtype))
