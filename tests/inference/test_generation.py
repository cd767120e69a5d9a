import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanosynth import tokenizer
from nanosynth.inference import generation
from nanosynth.inference.generation import Sampling
from scripted import model_of_chat, script_of
from tiny import tiny_model

PROMPTS = [[1, 2, 3], [50_000, 7, 9, 11, 13, 2, 40], [5], [700, 800]]


def sampling_of(**changes) -> Sampling:
    return Sampling(**({"max_new_tokens": 8, "temperature": 0.0, "top_p": 0.95} | changes))


def generate(model, prompts, numbers=None, **changes) -> list[list[int]]:
    numbers = list(range(len(prompts))) if numbers is None else numbers
    return generation.generate(model, prompts, numbers, sampling_of(**changes))


def test_greedy_with_cache_equals_greedy_without():
    model = model_of_chat()
    for prompt, found in zip(PROMPTS, generate(model, PROMPTS), strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[-1, : tokenizer.N_IDS].argmax()))
        assert found == ids[len(prompt) :]
        assert len(set(found)) > 2  # not one token again and again


def test_a_decoding_step_meets_few_shapes(monkeypatch):
    """What is set up once for a shape (an attention's plan, a CUDA graph) is so for 128 tokens."""
    attend, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def counted(q, k, v, attn_mask):
        shapes.append((q.shape, k.shape, attn_mask.shape))
        return attend(q, k, v, attn_mask=attn_mask)

    model = tiny_model(vocab_size=tokenizer.VOCAB_SIZE, block_size=640, n_layer=1).eval()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    prompts = [list(range(20)), list(range(7))]
    texts = generate(model, prompts, max_new_tokens=300)
    assert [len(text) for text in texts] == [300, 300] and len(shapes) == 300
    assert len(set(shapes[1:])) == 3 == -(-320 // 128)  # the first is the prompts'


class Recorder(TorchDispatchMode):
    """A CUDA graph on a CPU: recording has no effect, a replay fills the recorded tensors anew."""

    def __enter__(self):
        self.calls, self.changed = [], []
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.changed):
            tensor.copy_(before)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable:
            self.changed.append((args[0], args[0].clone()))
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    def replay(self):
        for function, args, kwargs, found in self.calls:
            again = function(*args, **kwargs)
            if isinstance(found, torch.Tensor) and not function._schema.is_mutable:
                found.copy_(again)  # nothing new where it is a view


def test_recorded_steps_give_the_same_tokens(monkeypatch):
    """Several numbers of keys, on any machine, with a recorder for torch's graph."""
    monkeypatch.setattr("model.KEY_STEP", 4)
    model = model_of_chat()
    wanted = generate(model, PROMPTS, max_new_tokens=12)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda recorder: recorder)
    assert generate(model, PROMPTS, max_new_tokens=12, cuda_graph=True) == wanted


@pytest.mark.parametrize("temperature", [0.0, 0.2])  # at 1 the model is so flat that rounding tells
def test_a_batch_equals_one_by_one(temperature):
    model = model_of_chat()
    alone = [
        generate(model, [prompt], [number], temperature=temperature)[0]
        for number, prompt in enumerate(PROMPTS)
    ]
    assert generate(model, PROMPTS, temperature=temperature) == alone
    numbers = [2, 0, 3, 1]
    shuffled = generate(model, [PROMPTS[n] for n in numbers], numbers, temperature=temperature)
    assert shuffled == [alone[number] for number in numbers]


def test_seed_and_number_determine_a_sample():
    model = model_of_chat()
    settings = {"temperature": 5.0, "top_p": 1.0}
    first = generate(model, PROMPTS, **settings)
    assert generate(model, PROMPTS, **settings) == first
    assert generate(model, PROMPTS, seed=1, **settings) != first
    assert generate(model, PROMPTS[:1], [9], **settings)[0] != first[0]


def test_top_k_of_one_is_greedy():
    model = model_of_chat()
    assert generate(model, PROMPTS, top_k=1, temperature=2.0) == generate(model, PROMPTS)


def pick(logits: list[float], uniforms: list[float], **changes) -> list[int]:
    """Ids picked from logits of the first ids, all others being out of the question."""
    padded = torch.full((len(uniforms), tokenizer.VOCAB_SIZE), -1e9)
    padded[:, : len(logits)] = torch.tensor(logits)
    drawn = torch.tensor(uniforms, dtype=torch.float64)
    how = sampling_of(**({"temperature": 1.0, "top_p": 1.0} | changes))
    return generation.pick(padded, drawn, how).tolist()


# Ids 0 to 3 of probability 0.1, 0.4, 0.2, 0.3; from the likeliest down: 1, 3, 2, 0.
LOGITS = np.log([0.1, 0.4, 0.2, 0.3]).tolist()


def test_pick_inverts_the_distribution():
    uniforms = [0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, 0.999]
    assert pick(LOGITS, uniforms) == [1, 1, 3, 3, 2, 2, 0, 0]


def test_top_k_keeps_the_likeliest():
    assert pick(LOGITS, [0.0, 0.56, 0.58, 0.999], top_k=2) == [1, 1, 3, 3]
    assert pick(LOGITS, [0.999], top_k=10**9) == [0]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.05, {1}), (0.39, {1}), (0.5, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p, kept):
    assert set(pick(LOGITS, np.linspace(0, 0.999, 30).tolist(), top_p=top_p)) == kept


@pytest.mark.parametrize("changes", [{"top_p": 0.5}, {"top_k": 2}, {}], ids=str)
def test_the_largest_uniform_stays_within_the_kept_ids(changes):
    """In float32 the largest uniforms round to 1."""
    kept = {1, 3} if changes else {0, 1, 2, 3}
    assert set(pick(LOGITS, [1 - 2**-26, 1 - 2**-53], **changes)) <= kept


def test_a_flat_row_beside_a_steep_one_changes_nothing():
    """The flat row needs the whole vocabulary sorted; bfloat16 gives the steep one many ties."""
    generator = torch.Generator().manual_seed(0)
    steep = 8 * torch.randn(1, tokenizer.VOCAB_SIZE, generator=generator).bfloat16().float()
    flat = 0.01 * torch.randn(1, tokenizer.VOCAB_SIZE, generator=generator)
    how = sampling_of(temperature=1.0)
    for uniform in torch.linspace(0, 0.999, 50):
        alone = [generation.pick(row, uniform[None], how) for row in (steep, flat)]
        both = generation.pick(torch.cat([steep, flat]), uniform.expand(2), how)
        assert both.tolist() == [picked.item() for picked in alone]
        assert (flat > flat[0, both[1]]).sum() < 0.96 * tokenizer.N_IDS


def test_temperature_sharpens():
    assert set(pick(LOGITS, np.linspace(0, 0.99, 30).tolist(), temperature=0.05)) == {1}
    assert pick(LOGITS, [0.999], temperature=0.0) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_ids_are_never_picked(temperature):
    logits = torch.zeros(1, tokenizer.VOCAB_SIZE)
    logits[:, tokenizer.N_IDS :] = 100.0
    logits[:, tokenizer.IM_END] = 50.0
    found = generation.pick(logits, torch.tensor([0.5]), sampling_of(temperature=temperature))
    assert found.tolist() == [tokenizer.IM_END]


@pytest.mark.parametrize("stop", tokenizer.STOP_IDS)
def test_generation_stops_at_a_stop_id(stop):
    model = model_of_chat()
    script_of(model, 10, 10, 11, 12, 13, stop, 14, 14, 14, 14, 14, 14, 14)
    # Rows of unlike lengths reach the stop after unlike numbers of steps.
    found = generate(model, [[1, 1, 1], [1, 1, 1, 1, 1], [1] * 6, [1] * 7], max_new_tokens=5)
    assert found == [[11, 12, 13, stop], [13, stop], [stop], [14] * 5]


def test_answers_are_half_the_context_at_most():
    found = generate(model_of_chat(), [[1]], max_new_tokens=1000)[0]
    assert len(found) == 12


def test_all_answers_come_in_the_order_of_the_prompts():
    model = model_of_chat()
    how = sampling_of(temperature=0.2)
    wanted = [(ids, False) for ids in generate(model, PROMPTS, temperature=0.2)]
    assert generation.answer_all(model, PROMPTS, how, batch_size=3) == wanted
    assert generation.answer_all(model, PROMPTS, how, batch_size=1) == wanted


def test_an_answer_is_without_its_stop_id():
    model = model_of_chat()
    script_of(model, 10, 11, tokenizer.IM_END, 12, 12, 12)
    found = generation.answer_all(model, [[1], [1] * 4], sampling_of(max_new_tokens=3), 2)
    assert found == [([10, 11], True), ([12, 12, 12], False)]
