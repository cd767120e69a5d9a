"""What one client makes of an exported folder; runs in that client's own environment.

Usage: python clients.py CLIENT FOLDER QUESTIONS.json ANSWERS.json
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path


def transformers(folder: str, asked: dict) -> dict:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    chat = {"add_generation_prompt": True, "tokenize": False}
    texts = [tokenizer.apply_chat_template(turns, **chat) for turns in asked["questions"]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")  # on the left, as the folder says
    found = model.generate(**batch, max_new_tokens=asked["max_new_tokens"], do_sample=False)
    stops = model.generation_config.eos_token_id
    return {
        "version": transformers.__version__,
        "greedy": [cut(ids, stops) for ids in found[:, batch["input_ids"].shape[1] :].tolist()],
        "prompts": prompt_ids(tokenizer, asked),
        "perplexity": perplexity(model, asked),
        "stops": stops,
    }


def perplexity(model, asked: dict) -> float:
    import torch

    nats = []
    for row in torch.tensor(asked["rows"]):
        with torch.no_grad():
            logits = model(row[None]).logits[0, :-1].double().log_softmax(-1)
        nats.append(-logits.gather(1, row[1:, None]).mean().item())
    return math.exp(sum(nats) / len(nats))


def prompt_ids(tokenizer, asked: dict) -> list[list[int]]:
    chat = {"add_generation_prompt": True, "tokenize": False}
    texts = [tokenizer.apply_chat_template(turns, **chat) for turns in asked["conversations"]]
    return [tokenizer(text)["input_ids"] for text in texts]


def cut(ids: list[int], stops: list[int]) -> list[int]:
    """Up to the first stop, which a padded batch goes on behind."""
    ends = [place + 1 for place, id in enumerate(ids) if id in stops]
    return ids[: ends[0]] if ends else ids


def ctranslate2(folder: str, asked: dict) -> dict:
    import ctranslate2
    import transformers
    from ctranslate2.converters import TransformersConverter

    converted = f"{folder}-ctranslate2"
    shutil.rmtree(converted, ignore_errors=True)
    TransformersConverter(folder).convert(converted)
    generator = ctranslate2.Generator(converted)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stops = json.loads(Path(folder, "generation_config.json").read_text())["eos_token_id"]
    prompts = prompt_ids(tokenizer, {"conversations": asked["questions"]})
    results = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids) for ids in prompts],
        max_length=asked["max_new_tokens"],
        sampling_topk=1,
        include_prompt_in_result=False,
        end_token=tokenizer.convert_ids_to_tokens(stops),
        return_end_token=True,
    )
    rows = [tokenizer.convert_ids_to_tokens(row) for row in asked["rows"]]
    scores = [score for result in generator.score_batch(rows) for score in result.log_probs]
    return {
        "version": ctranslate2.__version__,
        "greedy": [result.sequences_ids[0] for result in results],
        "prompts": prompt_ids(tokenizer, asked),
        "perplexity": math.exp(-sum(scores) / len(scores)),
        "stops": "given by the caller",
    }


def llama_cpp(folder: str, asked: dict) -> dict:
    import llama_cpp_py_sync  # llama.cpp's library, built
    import numpy as np

    file = f"{folder}.gguf"
    [converter] = Path(sys.prefix).glob("lib/*/site-packages/*/llama.cpp/convert_hf_to_gguf.py")
    command = [sys.executable, converter, folder, "--outfile", file, "--outtype", "f32"]
    subprocess.run(command, check=True)
    llama = llama_cpp_py_sync.Llama(file, n_ctx=0, n_threads=1, type_k="f32", type_v="f32")
    library, context = llama._lib, llama._ctx  # what is public gives texts alone
    stops = [id for id in range(llama.n_vocab) if library.llama_vocab_is_eog(llama._vocab, id)]

    def tokens(turns: list[dict]) -> list[int]:
        text, _ = llama._format_chat_prompt(turns)  # llama.cpp's own reading of the template
        return llama.tokenize(text, add_special=False, parse_special=True)

    def logits(ids: list[int], n_past: int = 0) -> np.ndarray:
        """(len(ids), vocabulary), of tokens behind the n_past that the cache has."""
        if not n_past:
            library.llama_memory_clear(library.llama_get_memory(context), True)
        batch = library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, id in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = id, n_past + place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        assert library.llama_decode(context, batch) == 0
        library.llama_batch_free(batch)
        rows = [library.llama_get_logits_ith(context, place) for place in range(len(ids))]
        return np.array([llama._ffi.unpack(row, llama.n_vocab) for row in rows])

    def answer(turns: list[dict]) -> list[int]:
        prompt, found = tokens(turns), []
        last = logits(prompt)[-1]
        while True:
            found.append(int(last.argmax()))
            if found[-1] in stops or len(found) == asked["max_new_tokens"]:
                return found
            last = logits(found[-1:], len(prompt) + len(found) - 1)[-1]

    nats = []
    for row in asked["rows"]:
        found = logits(row[:-1])
        top = found.max(-1, keepdims=True)
        totals = top[:, 0] + np.log(np.exp(found - top).sum(-1))
        nats.append((totals - found[np.arange(len(found)), row[1:]]).mean())
    return {
        "version": llama_cpp_py_sync.__llama_cpp_tag__,
        "greedy": [answer(turns) for turns in asked["questions"]],
        "prompts": [tokens(turns) for turns in asked["conversations"]],
        "perplexity": math.exp(sum(nats) / len(nats)),
        "stops": stops,
    }


def trl(folder: str, asked: dict) -> dict:
    import datasets
    import trl

    messages = [{"messages": turns} for turns in asked["answered"]]
    trainer = trl.SFTTrainer(
        folder,
        args=trl.SFTConfig(
            output_dir=f"{folder}-trl",
            assistant_only_loss=True,
            max_length=None,
            max_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            report_to=[],
            eos_token="<|im_end|>",
        ),
        train_dataset=datasets.Dataset.from_list(messages),
    )
    rows = list(trainer.train_dataset)
    trainer.train()
    trainer.save_model()
    return {
        "version": trl.__version__,
        "answered": [row["input_ids"] for row in rows],
        "masks": [[int(label != -100) for label in row["labels"]] for row in rows],
        "perplexity": perplexity(trainer.model.eval(), asked),
        "folder": f"{folder}-trl",
    }


def vllm(folder: str, asked: dict) -> dict:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    import vllm

    model = vllm.LLM(folder, dtype="float32", enforce_eager=True)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=asked["max_new_tokens"])
    found = model.chat(asked["questions"], greedy, use_tqdm=False)
    one = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
    prompts = model.chat(asked["conversations"], one, use_tqdm=False)
    rows = [{"prompt_token_ids": row} for row in asked["rows"]]
    scored = model.generate(rows, one, use_tqdm=False)
    nats = [
        -place[id].logprob
        for result in scored
        for id, place in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
    ]
    config = json.loads(Path(folder, "generation_config.json").read_text())
    return {
        "version": vllm.__version__,
        "greedy": [list(result.outputs[0].token_ids) for result in found],
        "prompts": [list(result.prompt_token_ids) for result in prompts],
        "perplexity": math.exp(sum(nats) / len(nats)),
        "stops": config["eos_token_id"],
    }


if __name__ == "__main__":
    client, folder, questions, answers = sys.argv[1:]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    here = str(Path(__file__).parent)  # it must not stand before the libraries
    sys.path = [path for path in sys.path if path != here]
    found = globals()[client](folder, json.loads(Path(questions).read_text()))
    Path(answers).write_text(json.dumps(found))
