"""Generate text from a run: one prompt, a conversation in the terminal, or a file of prompts.

Usage:
    python sample.py --run=out/demo --prompt="What is 7 + 5?"
    python sample.py --run=out/demo --chat
    python sample.py --run=out/demo --prompts=prompts.txt --num_samples=4
    python sample.py --run=out/demo --prompts=data/demo/val.bin --temperature=0
"""

import codecs
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanosynth import UserError, settings, tokenizer
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class SampleConfig(settings.Settings):
    """Generate text from a trained run."""

    run: str = setting(
        "out/demo", "a run's folder, or one of its step folders", group="the model", path=True
    )
    step: str = setting("best", "which checkpoint: best, latest or a step's number")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = setting(
        "auto", "of the weights; auto: float16 on CUDA, bfloat16 on a CPU that has it"
    )
    cuda_graph: bool = setting(
        False, "launch a token's kernels as one on a GPU, which otherwise waits for each"
    )
    prompt: str = setting("", "one prompt; its answer goes to the terminal", group="the prompts")
    system: str = setting("", "a system turn before the prompt")
    template: bool = setting(True, "the prompt is a user's turn; False: plain text to continue")
    chat: bool = setting(False, "a conversation in the terminal")
    prompts: str = setting(
        "", "file: .txt (one a line), .jsonl (prompt, answer) or a split's .bin", path=True
    )
    num_prompts: int = setting(0, "take the first so many of the file; 0: all", at_least=0)
    num_samples: int = setting(1, "answers to each prompt", at_least=1)
    batch_size: int = setting(64, "sequences generated together", at_least=1)
    output_dir: str = setting(
        "", "where generations.jsonl and .txt go; empty: the run's folder", path=True
    )
    max_new_tokens: int = setting(
        256, "longest answer; half the context at most", group="the sampling", at_least=1
    )
    temperature: float = setting(0.8, "0: always the likeliest token", at_least=0)
    top_k: int = setting(0, "keep the k likeliest tokens; 0: all", at_least=0)
    top_p: float = setting(
        0.95, "keep the likeliest tokens up to this much probability", above=0, at_most=1
    )
    seed: int = setting(42, "of the sampling; an answer depends on no other one", at_least=0)

    def check(self) -> None:
        if self.chat + bool(self.prompt) + bool(self.prompts) != 1:
            raise UserError("wanted one of --prompt=TEXT, --prompts=FILE and --chat")


if __name__ == "__main__":
    arguments = settings.from_argv(SampleConfig)  # before torch takes its time

from tqdm import tqdm

from model import GPT
from nanosynth.data import bins
from nanosynth.device import choose_device, choose_dtype
from nanosynth.files import write_atomically
from nanosynth.inference import generation
from nanosynth.inference.generation import Sampling
from nanosynth.inference.load import load


def load_model(config: SampleConfig) -> GPT:
    device = choose_device(config.device)
    if config.cuda_graph and device.type != "cuda":
        raise UserError(f"--cuda_graph=True needs a GPU, and the device is {device}")
    dtype = choose_dtype(config.dtype, device)
    return load(config.run, config.step, device=device, dtype=dtype).model


def sampling(config: SampleConfig) -> Sampling:
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        cuda_graph=config.cuda_graph,
    )


def fit(ids: list[int], model: GPT, config: SampleConfig) -> list[int]:
    """The last tokens of a prompt, as many as leave room for the answer; says what it drops."""
    room = sampling(config).room(model.config.block_size)
    if len(ids) > room:
        found = f"a prompt of {len(ids)} tokens in a context of {model.config.block_size}"
        print(f"{found}: its first {len(ids) - room} are dropped", file=sys.stderr)
    return ids[-room:]


def encode_prompt(text: str, config: SampleConfig) -> list[int]:
    if not config.template:
        return tokenizer.encoding().encode_ordinary(text)
    system = [("system", config.system)] if config.system else []
    return tokenizer.prompt_ids([*system, ("user", text)])


def stream_text(model: GPT, prompt: list[int], number: int, config: SampleConfig) -> str:
    """Print the answer as it comes, whole characters at a time; the answer's text."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    for (id,) in generation.stream(model, [prompt], [number], sampling(config)):
        piece = decoder.decode(b"" if id in tokenizer.STOP_IDS else tokenizer.token_text(id))
        print(piece, end="", flush=True)
        text += piece
    print(decoder.decode(b"", final=True))
    return text


def converse(model: GPT, config: SampleConfig) -> None:
    """A conversation in the terminal; the oldest turns leave when the context is full."""
    print("an empty line ends the conversation, /new starts another")
    system = [("system", config.system)] if config.system else []
    room = sampling(config).room(model.config.block_size)
    turns: list[tokenizer.Turn] = []
    number = 0
    while text := _read_line("you> "):
        if text == "/new":
            turns = []
            continue
        turns.append(("user", text))
        while len(turns) > 2 and len(tokenizer.prompt_ids([*system, *turns])) > room:
            print("(the context is full: the oldest turn is dropped)")
            turns = turns[2:]
        prompt = fit(tokenizer.prompt_ids([*system, *turns]), model, config)
        turns.append(("assistant", stream_text(model, prompt, number, config)))
        number += 1


def _read_line(sign: str) -> str:
    try:
        return input(sign).strip()
    except EOFError:
        return ""


def read_prompts(config: SampleConfig) -> list[tuple[list[int], str | None]]:
    """(prompt ids, reference answer or None) of each line of a file, or each answer of a split."""
    path = Path(config.prompts)
    if not path.is_file():
        raise UserError(f"no file {config.prompts!r}; wanted .txt, .jsonl or a split's .bin")
    pairs: list[tuple[list[int], str | None]] = []
    if path.suffix == ".bin":
        for ids, mask in bins.Split(str(path.parent), path.stem).documents():
            for prompt, answer in bins.prompts_and_answers(ids, mask):
                pairs.append((prompt, tokenizer.decode(answer).removesuffix("<|im_end|>")))
    else:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if line.strip():
                text, answer = _read_prompt(line, path, number)
                pairs.append((encode_prompt(text, config), answer))
    if not pairs:
        raise UserError(f"{path} has no prompt")
    return pairs[: config.num_prompts or None]


def _read_prompt(line: str, path: Path, number: int) -> tuple[str, str | None]:
    if path.suffix != ".jsonl":
        return line, None
    try:
        row = json.loads(line)
        prompt, answer = row["prompt"], row.get("answer")
        if not isinstance(prompt, str) or not isinstance(answer, str | None):
            raise TypeError
        return prompt, answer
    except (ValueError, KeyError, TypeError, AttributeError):
        wanted = '{"prompt": "...", "answer": "..."}, the answer as you like'
        raise UserError(f"{path}, line {number}: wanted {wanted}") from None


def answer_all(model: GPT, config: SampleConfig) -> list[dict]:
    """A record for each sample of each prompt, in the file's order."""
    records = []
    for prompt, answer in read_prompts(config):
        for sample in range(config.num_samples):
            record = {"prompt": tokenizer.decode(prompt), "sample": sample, "answer": answer}
            records.append((fit(prompt, model, config), record))
    by_length = sorted(range(len(records)), key=lambda number: len(records[number][0]))
    for start in tqdm(range(0, len(records), config.batch_size), unit="batch", disable=None):
        numbers = by_length[start : start + config.batch_size]
        prompts = [records[number][0] for number in numbers]
        continuations = generation.generate(model, prompts, numbers, sampling(config))
        for number, ids in zip(numbers, continuations, strict=True):
            ended = ids[-1] in tokenizer.STOP_IDS
            record = records[number][1]
            record["text"] = tokenizer.decode(ids[:-1] if ended else ids)
            record["finish"] = "stop" if ended else "length"
            record["tokens"] = len(ids)
            if record["answer"] is not None:
                record["exact"] = ended and record["text"] == record["answer"]
    return [record for _, record in records]


def write_generations(records: list[dict], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / "generations.jsonl",
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
    )
    pages = []
    for record in records:
        page = (
            f"{record['prompt']}{record['text']}\n[{record['finish']}, {record['tokens']} tokens]"
        )
        if "exact" in record:
            wanted = "exactly right" if record["exact"] else f"wanted: {record['answer']}"
            page += f" {wanted}"
        pages.append(page)
    write_atomically(folder / "generations.txt", "\n\n----\n\n".join(pages) + "\n")


def main(config: SampleConfig) -> None:
    model = load_model(config)
    if config.chat:
        converse(model, config)
    elif config.prompt:
        prompt = fit(encode_prompt(config.prompt, config), model, config)
        for sample in range(config.num_samples):
            stream_text(model, prompt, sample, config)
    else:
        records = answer_all(model, config)
        run_dir = Path(config.run)
        folder = Path(config.output_dir or (run_dir.parent if "step_" in run_dir.name else run_dir))
        write_generations(records, folder)
        ended = sum(record["finish"] == "stop" for record in records)
        print(f"{len(records)} answers, {ended} ended by themselves: {folder / 'generations.txt'}")
        scored = [record["exact"] for record in records if "exact" in record]
        if scored:
            share = sum(scored) / len(scored)
            print(f"exactly right: {sum(scored)} of {len(scored)} ({share:.1%})")


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
