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
    import importlib.metadata
    import urllib.request

    import xllamacpp  # llama.cpp's server, built

    file = f"{folder}.gguf"
    [converter] = Path(sys.prefix).glob("lib/*/site-packages/*/llama.cpp/convert_hf_to_gguf.py")
    command = [sys.executable, converter, folder, "--outfile", file, "--outtype", "f32"]
    subprocess.run(command, check=True)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.cpuparams.n_threads = file, 1, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def post(path: str, **question) -> dict:
        body = json.dumps(question).encode()
        request = urllib.request.Request(server.listening_address + path, body)
        return json.load(urllib.request.urlopen(request))

    def tokens(turns: list[dict]) -> list[int]:
        text = post("/apply-template", messages=turns)["prompt"]
        return post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def answer(prompt: list[int], n_tokens: int, **more) -> dict:
        greedy = {"n_predict": n_tokens, "temperature": 0, "return_tokens": True}
        return post("/completion", prompt=prompt, **greedy, **more)

    def forced(prompt: list[int], id: int) -> dict:
        return answer(prompt, 1, n_probs=1, logit_bias=[[id, 1e4]])

    scores = []  # of a token that is forced, the probability without force
    for row in asked["rows"]:
        for place in range(1, len(row)):
            [found] = forced(row[:place], row[place])["completion_probabilities"]
            assert found["id"] == row[place]
            scores.append(found["logprob"])
    prompts = [tokens(turns) for turns in asked["questions"]]
    return {
        "version": importlib.metadata.version("xllamacpp"),
        "greedy": [answer(prompt, asked["max_new_tokens"])["tokens"] for prompt in prompts],
        "prompts": [tokens(turns) for turns in asked["conversations"]],
        "perplexity": math.exp(-sum(scores) / len(scores)),
        "stops": [id for id in asked["special"] if forced([198], id)["stop_type"] == "eos"],
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
            disable_tqdm=True,  # the last line of what it says is to be the error
            eos_token="<|im_end|>",
        ),
        train_dataset=datasets.Dataset.from_list(messages),
    )
    rows = list(trainer.train_dataset)
    n_positions = trainer.model.config.n_positions
    trainer.train_dataset = trainer.train_dataset.filter(
        lambda row: len(row["input_ids"]) <= n_positions
    )
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
