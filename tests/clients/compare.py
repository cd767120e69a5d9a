"""A run through the clients that people use: what they answer beside what we do.

Usage: python tests/clients/compare.py --run=out/demo --venvs=.venv-clients
Writes benchmarks/CLIENTS.md. Environments that are not there yet are made first.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path.insert(0, str(REPO))

import torch

from convert import hf
from nanosynth import tokenizer
from nanosynth.data import bins
from nanosynth.inference import generation
from nanosynth.inference.load import load
from nanosynth.table import table

CLIENTS = {  # name in the table: (its environment, its function in clients.py)
    "transformers 5": ("", "transformers"),
    "transformers 4": ("transformers4", "transformers"),
    "transformers, oldest": ("transformers4.44", "transformers"),
    "CTranslate2": ("transformers4", "ctranslate2"),
    "llama.cpp, f32": ("transformers4", "llama_cpp"),
    "TRL": ("transformers4", "trl"),
    "vLLM, CPU": ("vllm", "vllm"),
}
TEXTS = (
    *("What is 7 + 5?", " a leading space", "a trailing newline\n", "tabs\t\tand  spaces"),
    *("zażółć 日本語 👩‍👩‍👧‍👦", "don't we'LL I'd", "user", "\nfoo", "\n\nfoo"),
)
N_ROWS, N_QUESTIONS, MAX_NEW_TOKENS = 20, 8, 12
TEXT = """# What other programs make of a run

Written by `make clients` (`python tests/clients/compare.py`); nothing in it is typed by
hand. {run}, a GPT of {n_layer} layers and {n_embd} channels,
exported by `python -m convert.hf`, went through each client in its own environment
(`tests/clients/requirements*.txt`), in float32. {when}

- greedy answers: to {questions} held-out questions, from the messages to the last token, of up to
  {tokens} tokens;
- prompt ids: of {texts} conversations of odd texts, two of which open with newlines;
- perplexity: over all tokens of {rows} rows of validation text, those that training left out too;
  beside it ours, of the same weights;
- stop ids: those at which the client ends an answer by itself; ours are {stops};
- ids and masks: of {texts} conversations with answers, for a loss on the answers alone. TRL
  then takes a step with them; its perplexity is of what that made, brought back for ours.

{table}

{summary}

{remarks}
"""
KNOWN = """llama.cpp does not split a role's line from the text behind it, so a message that opens
with two newlines gets other ids there than in training. CTranslate2's caller names the tokens that
end an answer."""


def questions(model, run_meta: dict) -> dict:
    """What every client is asked, with our own answers: 'ours' of each."""
    split = bins.Split(run_meta["settings"]["data_dir"], "val")
    block_size = model.config.block_size
    n_tokens = block_size - 1  # vLLM wants a place for an answer
    rows = [split.ids(n * n_tokens, n_tokens).tolist() for n in range(N_ROWS)]
    asked = []
    for ids, mask in split.documents():
        pairs = bins.prompts_and_answers(ids, mask)
        turns = read_turns(tokenizer.decode(pairs[0][0])) if pairs else []
        if turns and len(tokenizer.prompt_ids(turns)) + MAX_NEW_TOKENS <= block_size:
            asked.append(turns)
        if len(asked) == N_QUESTIONS:
            break
    conversations = [[("system", text), ("user", text)] for text in TEXTS]
    answered = [[*turns, ("assistant", turns[1][1])] for turns in conversations]
    greedy = generation.Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
    prompts = [tokenizer.prompt_ids(turns) for turns in asked]
    encoded = tokenizer.encode_conversations(answered)
    return {
        "questions": [messages(turns) for turns in asked],
        "conversations": [messages(turns) for turns in conversations],
        "answered": [messages(turns) for turns in answered],
        "rows": rows,
        "special": list(range(tokenizer.END_OF_TEXT, tokenizer.N_IDS)),
        "max_new_tokens": MAX_NEW_TOKENS,
        "ours": {
            "greedy": generation.generate(model, prompts, list(range(len(prompts))), greedy),
            "prompts": [tokenizer.prompt_ids(turns) for turns in conversations],
            "answered": [ids.tolist() for ids, _ in encoded],
            "masks": [mask.tolist() for _, mask in encoded],
            "perplexity": perplexity(model, rows),
            "stops": sorted(tokenizer.STOP_IDS),
        },
    }


def read_turns(text: str) -> list[tokenizer.Turn]:
    """The turns of a prompt that our template wrote, but for the opened answer."""
    parts = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>")[1:-1]]
    return [(role, content) for role, _, content in (part.partition("\n") for part in parts)]


def messages(turns: list[tokenizer.Turn]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


@torch.no_grad()
def perplexity(model, rows: list[list[int]]) -> float:
    nats = []
    for row in torch.tensor(rows):
        logits = model(row[None])[:-1].double().log_softmax(-1)
        nats.append(-logits.gather(1, row[1:, None]).mean().item())
    return math.exp(sum(nats) / len(nats))


def python_of(venv: str, venvs: Path) -> Path:
    """The Python of a client's environment, made anew where its requirements are others."""
    if not venv:
        return Path(sys.executable)
    wanted, installed = HERE / f"requirements-{venv}.txt", venvs / venv / "requirements.txt"
    python = venvs / venv / "bin/python"
    if not installed.exists() or installed.read_bytes() != wanted.read_bytes():
        print(f"installing {wanted.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", venvs / venv], check=True)
        pip = [python, "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", "--no-compile", "-r", wanted], check=True, stderr=-1)
        # Those of the registry are for CUDA, and break what imports them beside a CPU's torch.
        for_cuda = ("torchvision", "torchaudio", "torchcodec")
        subprocess.run([*pip, "uninstall", "--yes", *for_cuda], check=True, stderr=-1)
        shutil.copy(wanted, installed)
    return python


def ask(name: str, venvs: Path, work: Path) -> dict:
    """A client's answers, or {'failed': why}."""
    venv, client = CLIENTS[name]
    answers = work / f"{name}.json"
    script = [HERE / "clients.py", client, work / "hf", work / "questions.json", answers]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        command = [python_of(venv, venvs), *script]
        subprocess.run(command, check=True, cwd=work, env=environment, capture_output=True)
    except subprocess.CalledProcessError as error:
        return {"failed": error.stderr.decode().strip().splitlines()[-1]}
    return json.loads(answers.read_text())


def ours_of(folder: str, work: Path, rows: list[list[int]]) -> float:
    """Our perplexity of a client's folder, brought back as a run."""
    hf.main(hf.HFConfig(source=folder, to=str(work / "back")))
    model, _, _ = load(str(work / "back"), device=torch.device("cpu"), dtype=torch.float32)
    return perplexity(model, rows)


def row(name: str, found: dict, ours: dict) -> list[str]:
    if "failed" in found:
        return [name, f"FAILED: {found['failed'][:80]}", *["-"] * 6]

    def equal(*keys: str) -> str:
        if keys[0] not in found:
            return "-"
        pairs = zip(*(found[key] for key in keys), strict=True)
        wanted = zip(*(ours[key] for key in keys), strict=True)
        same = [pair == want for pair, want in zip(pairs, wanted, strict=True)]
        return f"{sum(same)} of {len(same)}"

    stops = found.get("stops", "-")
    return [
        name,
        found["version"],
        equal("greedy"),
        equal("prompts"),
        f"{found['perplexity']:.6f}",
        f"{found.get('ours', ours['perplexity']):.6f}",
        stops if isinstance(stops, str) else ", ".join(map(str, sorted(stops))),
        equal("answered", "masks"),
    ]


def summary(rows: list[list[str]]) -> str:
    """What the table's rows, but for its head, come to."""

    def total(column: int) -> str:
        counts = [row[column].split(" of ") for row in rows if " of " in row[column]]
        equal, asked = (sum(int(count[place]) for count in counts) for place in (0, 1))
        return f"{equal} of {asked}"

    failed = [row[0] for row in rows if row[1].startswith("FAILED")]
    factors = [float(row[4]) / float(row[5]) for row in rows if row[0] not in failed]
    apart = max((abs(factor - 1) for factor in factors), default=0)
    return (
        f"In all, {total(2)} greedy answers, {total(3)} prompts, and {total(7)} ids and masks\n"
        f"are ours; the perplexities are within {apart:.1e} of ours, relatively. "
        f"{'No client' if not failed else ', '.join(failed)} failed."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="out/demo")
    parser.add_argument("--venvs", default=".venv-clients", type=Path)
    parser.add_argument("--work", default="out/clients", type=Path, help="its hf/ is made anew")
    arguments = parser.parse_args()
    work, venvs = arguments.work.resolve(), arguments.venvs.resolve()
    model, path, meta = load(arguments.run, device=torch.device("cpu"), dtype=torch.float32)
    for folder in ("hf", "back"):
        shutil.rmtree(work / folder, ignore_errors=True)
    hf.main(hf.HFConfig(run=arguments.run, to=str(work / "hf")))
    asked = questions(model, meta)
    (work / "questions.json").write_text(json.dumps(asked))
    rows = [["client", "version", "greedy answers", "prompt ids", "perplexity", "ours", "stop ids",
             "ids and masks"]]  # fmt: skip
    failed = False
    for name in CLIENTS:
        found = ask(name, venvs, work)
        if "folder" in found:
            found["ours"] = ours_of(found["folder"], work, asked["rows"])
        failed |= "failed" in found
        rows.append(row(name, found, asked["ours"]))
        print(rows[-1], flush=True)
    text = TEXT.format(
        run=path,
        n_layer=model.config.n_layer,
        n_embd=model.config.n_embd,
        when=f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}.",
        questions=len(asked["questions"]),
        texts=len(TEXTS),
        tokens=MAX_NEW_TOKENS,
        rows=len(asked["rows"]),
        stops=", ".join(map(str, asked["ours"]["stops"])),
        table=table(rows, left=(0, 1, 6), markdown=True),
        summary=summary(rows[1:]),
        remarks=KNOWN,
    )
    (REPO / "benchmarks/CLIENTS.md").write_text(text)
    sys.exit(failed)


if __name__ == "__main__":
    main()
