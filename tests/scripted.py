"""Models of the whole vocabulary: one of lively answers, and one that says what it is told to."""

import torch

from nanosynth import tokenizer
from tiny import tiny_model


def model_of_chat(seed: int = 0, **changes):
    """A model of the whole vocabulary whose next tokens differ much in probability."""
    model = tiny_model(seed, vocab_size=tokenizer.VOCAB_SIZE, block_size=24, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    return model


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
