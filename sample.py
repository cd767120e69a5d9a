"""Generate text from a run: one prompt, a conversation in the terminal, or a file of prompts.

Usage:
    python sample.py --run=out/demo --prompt="What is 7 + 5?"
    python sample.py --run=out/demo --chat
    python sample.py --run=out/demo --prompts=prompts.txt --num_samples=4
    python sample.py --run=out/demo --prompts=data/demo/val.bin --temperature=0
"""

import codecs
import itertools
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanosynth import UserError, settings, terminal, tokenizer
from nanosynth.settings import setting


@dataclass(frozen=True, kw_only=True)
class SampleConfig(settings.Settings):
    """Text from a trained run: the answer to a prompt, a conversation, or a file of answers."""

    run: str = setting(
        "out/demo", "a run's folder, or one of its step folders", group="The model", path=True
    )
    step: str = setting("best", "which checkpoint: best, latest or a step's number")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: settings.DTYPE = setting(
        "auto", "of the weights; auto: float16 on CUDA, bfloat16 on a CPU that has it"
    )
    cuda_graph: bool = setting(
        False, "a GPU launches a token's kernels as one, without a wait for each"
    )

    prompt: str = setting(
        "", "one prompt; its answer goes to the terminal", group="What is asked: one of three"
    )
    chat: bool = setting(False, "a conversation in the terminal")
    prompts: str = setting(
        "", "file: .txt (one a line), .jsonl (prompt, answer) or a split's .bin", path=True
    )

    template: bool = setting(
        True, "a prompt is a user's turn; False: plain text to continue", group="How it is asked"
    )
    system: str = setting("", "a system turn before the prompt")
    num_samples: int = setting(1, "answers to each prompt", at_least=1, at_most=100_000)

    num_prompts: int = setting(
        0, "take the first so many; 0: all", group="A file of prompts", at_least=0
    )
    batch_size: int = setting(64, "sequences generated together", at_least=1)
    output_dir: str = setting("", "for generations.jsonl and .txt; empty: the run's", path=True)

    max_new_tokens: int = setting(
        256, "longest answer; half the context at most", group="The sampling", at_least=1
    )
    temperature: float = setting(0.8, "0: always the likeliest token", at_least=0)
    top_k: int = setting(0, "keep the k likeliest tokens; 0: all", at_least=0)
    top_p: float = setting(
        0.95, "keep the likeliest up to this much probability", above=0, at_most=1
    )
    seed: int = setting(42, "of the sampling; an answer depends on no other one", **settings.SEED)

    def check(self) -> None:
        if self.chat + bool(self.prompt) + bool(self.prompts) != 1:
            raise UserError("wanted one of --prompt=TEXT, --prompts=FILE and --chat")
        if not self.template and (self.chat or self.system):
            self.refuse("template", "a plain text has no turns, so no --chat and no --system")


if __name__ == "__main__":
    arguments = settings.from_argv(SampleConfig)  # before torch takes its time

from model import GPT
from nanosynth.data import bins, utf8
from nanosynth.device import choose_device, choose_dtype
from nanosynth.files import printed_if_lost, writable, write_atomically
from nanosynth.inference import generation
from nanosynth.inference.generation import Sampling
from nanosynth.inference.load import load

Prompt = tuple[list[int], str | None]  # ids, and the reference answer where there is one


def read_prompts(config: SampleConfig) -> list[Prompt]:
    """The prompts of a file: one a line, or each answer of a split with all that stands before."""
    path = Path(config.prompts)
    if not path.is_file() or (path.suffix == ".bin" and path.stem not in bins.SPLITS):
        wanted = "a .txt or .jsonl file that is there, or train.bin or val.bin of prepared data"
        config.refuse("prompts", f"wanted {wanted}")
    prompts = list(itertools.islice(_prompts(path, config), config.num_prompts or None))
    if not prompts:
        raise UserError(f"{path} has no prompt")
    return prompts


def _prompts(path: Path, config: SampleConfig) -> Iterator[Prompt]:
    if path.suffix == ".bin":
        for ids, mask in bins.Split(str(path.parent), path.stem).documents():
            for prompt, answer in bins.prompts_and_answers(ids, mask):
                yield prompt, tokenizer.decode(answer).removesuffix("<|im_end|>")
        return
    for number, line in utf8.lines(path):
        is_row = path.suffix.lower() == ".jsonl"
        text, answer = _read_row(line, f"{path}, line {number}") if is_row else (line, None)
        yield encode_prompt(text, config), answer


def _read_row(line: str, place: str) -> tuple[str, str | None]:
    try:
        row = json.loads(line)
        prompt, answer = row["prompt"], row.get("answer")
        if not isinstance(prompt, str) or not isinstance(answer, str | None):
            raise TypeError
        return prompt, answer
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        wanted = '{"prompt": "...", "answer": "..."}, the answer as you like'
        raise UserError(f"{place}: wanted {wanted}") from None


def encode_prompt(text: str, config: SampleConfig) -> list[int]:
    if not config.template:
        return tokenizer.encoding().encode_ordinary(text)
    return tokenizer.prompt_ids([*system_turn(config), ("user", text)])


def system_turn(config: SampleConfig) -> list[tokenizer.Turn]:
    return [("system", config.system)] if config.system else []


def fit(ids: list[int], model: GPT, sampling: Sampling) -> list[int]:
    """The last tokens of a prompt, as many as leave room for the answer; says what it drops."""
    room = sampling.room(model.config.block_size)
    if len(ids) > room:
        found = f"a prompt of {len(ids)} tokens in a context of {model.config.block_size}"
        print(f"{found}: its first {len(ids) - room} are dropped", file=sys.stderr)
    return ids[-room:]


def stream_text(model: GPT, prompt: list[int], number: int, sampling: Sampling) -> str:
    """Print the answer as it comes, and return it.

    A token may end within a character's bytes: the decoder holds them back until the rest is there.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    for (id,) in generation.stream(model, [prompt], [number], sampling):
        piece = decoder.decode(b"" if id in tokenizer.STOP_IDS else tokenizer.token_text(id))
        print(terminal.harmless(piece), end="", flush=True)
        text += piece
    print(decoder.decode(b"", final=True))
    return text


def converse(model: GPT, config: SampleConfig, sampling: Sampling) -> None:
    """A conversation in the terminal; the oldest turns leave when the context is full."""
    print("an empty line ends the conversation, /new starts another")
    system, room = system_turn(config), sampling.room(model.config.block_size)
    turns: list[tokenizer.Turn] = []
    number = 0  # of the answer: each draws anew, also to a question asked twice
    while text := _ask("you> "):
        if text == "/new":
            turns = []
            continue
        turns.append(("user", text))
        while len(turns) > 2 and len(tokenizer.prompt_ids([*system, *turns])) > room:
            print("(the context is full: the oldest turn is dropped)")
            turns = turns[2:]  # a question goes with its answer
        prompt = fit(tokenizer.prompt_ids([*system, *turns]), model, sampling)
        turns.append(("assistant", stream_text(model, prompt, number, sampling)))
        number += 1


def _ask(sign: str) -> str:
    """A line of the terminal; empty at its end, and at Ctrl-C."""
    try:
        return input(sign).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def answer_all(
    model: GPT, prompts: list[Prompt], config: SampleConfig, sampling: Sampling
) -> list[dict]:
    """A record for each sample of each prompt, in the file's order."""
    records, fitted = [], []
    for ids, answer in prompts:
        fitted += [fit(ids, model, sampling)] * config.num_samples
        for sample in range(config.num_samples):
            records.append({"prompt": tokenizer.decode(ids), "sample": sample, "answer": answer})
    answers = generation.answer_all(model, fitted, sampling, config.batch_size)
    for record, (ids, ended) in zip(records, answers, strict=True):
        record["text"] = tokenizer.decode(ids)
        record["finish"] = "stop" if ended else "length"
        record["tokens"] = len(ids) + ended
        if record["answer"] is not None:  # one that was cut off is not right, whatever it says
            record["exact"] = ended and record["text"] == record["answer"]
    return records


def write_generations(records: list[dict], folder: Path) -> Path:
    """generations.jsonl for programs, generations.txt for people; the path of the latter."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(folder / "generations.jsonl", "".join(lines))
    pages = []
    for record in records:
        remark = f"[{record['finish']}, {record['tokens']} tokens]"
        if "exact" in record:
            remark += " exactly right" if record["exact"] else f" wanted: {record['answer']}"
        pages.append(f"{record['prompt']}{record['text']}\n{remark}")
    write_atomically(folder / "generations.txt", "\n\n----\n\n".join(pages) + "\n")
    return folder / "generations.txt"


def report(records: list[dict], config: SampleConfig, texts: Path) -> None:
    """How many answers are right, where the texts lie, and what one may do next."""
    is_right = [record["exact"] for record in records if "exact" in record]
    if is_right:
        answers = "held-out answers" if Path(config.prompts).name == "val.bin" else "answers"
        share = sum(is_right) / len(is_right)
        print(f"{sum(is_right):,} of {len(is_right):,} {answers} exactly right ({share:.1%})")
    n_ended = sum(record["finish"] == "stop" for record in records)
    print(f"{n_ended:,} of {len(records):,} answers ended by themselves; the texts: {texts}")
    print(f"talk to it: python sample.py --run={shlex.quote(config.run)} --chat")


def main(config: SampleConfig) -> None:
    prompts = read_prompts(config) if config.prompts else []  # a bad file is said at once
    device = choose_device(config.device)
    if config.cuda_graph and device.type != "cuda":
        config.refuse("cuda_graph", f"it needs a GPU, and the device is {device}")
    dtype = choose_dtype(config.dtype, device)
    model, path, _ = load(config.run, config.step, device=device, dtype=dtype)
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        cuda_graph=config.cuda_graph,
    )
    if config.chat:
        converse(model, config, sampling)
    elif config.prompt:
        prompt = fit(encode_prompt(config.prompt, config), model, sampling)
        for sample in range(config.num_samples):
            stream_text(model, prompt, sample, sampling)
    else:
        folder = writable(Path(config.output_dir or path.parent), "use another --output_dir")
        records = answer_all(model, prompts, config, sampling)
        with printed_if_lost(records):
            texts = write_generations(records, folder)
        report(records, config, texts)


if __name__ == "__main__":
    with settings.one_line_errors():
        main(arguments)
