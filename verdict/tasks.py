"""A model behind EleutherAI's lm-evaluation-harness, and the three tasks that need no network.

Imports lm_eval and datasets (requirements-eval.txt), so scripts import it only where they use it.
"""

import functools
import json
import logging
from pathlib import Path

import datasets
import lm_eval.evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn

from nanosynth import UserError, tokenizer
from nanosynth.inference import generation, likelihood

# (name, what stands before the choices). The choice follows a space, as the harness has it.
LOCAL_TASKS = {
    "questions": "Question: {{question}}\nAnswer:",
    "completion": "{{context}}",
    "reasoning": "Question: {{question}}\nAnswer:",
}
BOOTSTRAP_ITERATIONS = 1000  # for the metrics whose standard error has no formula
DECODE_INTERVAL = 16  # steps between looks for a stop string


class HarnessLM(TemplateLM):
    """Our model as lm_eval knows models; `chat_format` puts each context into a user's turn."""

    def __init__(self, model: nn.Module, batch_size: int, chat_format: bool = False):
        super().__init__()
        self.model, self.batch_size, self.chat_format = model, batch_size, chat_format

    @property
    def eot_token_id(self) -> int:
        return tokenizer.END_OF_TEXT

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list:
        return tokenizer.encoding().encode_ordinary(string)

    def _context_ids(self, context: str) -> list[int]:
        if self.chat_format:
            return tokenizer.prompt_ids([("user", context)])
        return self.tok_encode(context) or [self.prefix_token_id]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.chat_format:
            return self._context_ids(context), self.tok_encode(continuation.lstrip())
        return super()._encode_pair(context, continuation)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list:
        return super().loglikelihood(requests, disable_tqdm)  # of encoding; scoring has its own bar

    def _loglikelihood_tokens(self, requests: list, **kwargs) -> list[tuple[float, bool]]:
        """A continuation that exceeds the context is scored piece by piece."""
        size = self.model.config.block_size
        pairs, owners = [], []
        for owner, (_, context, continuation) in enumerate(requests):
            for start in range(0, len(continuation), size):
                before = context + continuation[:start]
                pairs.append((before, continuation[start : start + size]))
                owners.append(owner)
        return self._score(pairs, owners, len(requests))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.config.block_size,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        return [value for value, _ in self._score(pairs, owners, len(requests))]

    def _score(self, pairs: list, owners: list[int], n: int) -> list[tuple[float, bool]]:
        """Sums over the pairs of each of `n` owners."""
        found = [(0.0, True)] * n
        scores = likelihood.score(self.model, pairs, self.batch_size)
        for owner, (value, greedy) in zip(owners, scores, strict=True):
            found[owner] = (found[owner][0] + value, found[owner][1] and greedy)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, a stop id, max_gen_toks or half the context."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                contexts = [requests[number].args[0] for number in batch]
                found = self._continue(contexts, batch, requests[batch[0]].args[1])
                for number, text in zip(batch, found, strict=True):
                    texts[number] = text
        return texts

    def _continue(self, contexts: list[str], numbers: list[int], arguments: dict) -> list[str]:
        until = arguments.get("until") or []
        until = [until] if isinstance(until, str) else until
        sampled = arguments.get("do_sample", False)
        max_new_tokens = int(arguments.get("max_gen_toks", 256))
        sampling = generation.Sampling(
            seed=0,
            max_new_tokens=max_new_tokens,
            temperature=float(arguments.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(arguments.get("top_k", 0)),
            top_p=float(arguments.get("top_p", 1.0)),
        )
        room = sampling.room(self.model.config.block_size)
        steps = generation.stream(
            self.model,
            [self._context_ids(context)[-room:] for context in contexts],
            numbers,
            sampling,
        )
        rows: list[list[int]] = [[] for _ in contexts]
        ended = [False] * len(contexts)
        for step, ids in enumerate(steps, start=1):
            for row, id in enumerate(ids):
                ended[row] = ended[row] or id is None or id in tokenizer.STOP_IDS
                if not ended[row]:
                    rows[row].append(id)
            if step % DECODE_INTERVAL == 0:
                texts = [tokenizer.decode(ids) for ids in rows]
                if all(
                    end or any(stop in text for stop in until)
                    for end, text in zip(ended, texts, strict=True)
                ):
                    break
        return [_before(tokenizer.decode(ids), until) for ids in rows]


def _before(text: str, stops: list[str]) -> str:
    """`text` up to the first of the stop strings."""
    for stop in stops:
        text = text.split(stop, 1)[0] if stop else text
    return text


def _read(path: str, **_: object) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in open(path)])}


def local_task(name: str, folder: Path) -> dict:
    """The harness's configuration of one of LOCAL_TASKS; its data is read from `folder`."""
    metrics = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ]
    return {
        "task": name,
        "custom_dataset": functools.partial(_read, str((folder / f"{name}.jsonl").resolve())),
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": LOCAL_TASKS[name],
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics,
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


@functools.cache
def _manager() -> TaskManager:
    """lm_eval's own tasks; reading their list takes seconds."""
    return TaskManager()


def load(name: str, folder: Path) -> dict:
    """A task of ours, or one of the harness by name, whose data then comes from the hub."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if name in LOCAL_TASKS:
        return TaskManager(include_defaults=False).load([local_task(name, folder)])
    manager = _manager()
    if name not in manager.all_tasks:
        raise UserError(f"no task {name!r}; wanted {', '.join(LOCAL_TASKS)} or one of lm_eval's")
    try:
        return manager.load([name])
    except Exception as error:  # whatever stands between us and the hub
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(
            f"task {name!r} cannot be loaded; its data comes from the Hugging Face hub, so look at "
            f"the network or its cache ({reason})"
        ) from error


def measure(lm: HarnessLM, loaded: dict, limit: int) -> dict[str, dict]:
    """For each task: metric, score, stderr, chance, n, and all its `metrics`.

    The score is acc_norm (likelihood a byte) where the task has it, else acc, else its first.
    """
    found = lm_eval.evaluator.evaluate(
        lm, loaded, limit=limit or None, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=True
    )
    figures = {}
    for task, results in found["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in results.items()
            if "," in key and isinstance(value, int | float)
        }
        names = [name for name in metrics if "_stderr" not in name]
        if not names:
            continue
        metric = next((name for name in ("acc_norm", "acc") if name in names), names[0])
        samples = found["samples"].get(task, [])
        figures[task] = {
            "metric": metric,
            "score": float(metrics[metric]),
            "stderr": metrics.get(f"{metric}_stderr"),
            "chance": _chance(loaded, task, samples) if metric.startswith("acc") else None,
            "n": len(samples),
            "metrics": metrics,
        }
    return figures


def _chance(loaded: dict, task: str, samples: list[dict]) -> float | None:
    """The mean of 1 / choices over the documents; None for a task without choices."""
    config = getattr(loaded["tasks"].get(task), "config", None)
    if config is None or config.output_type != "multiple_choice" or not samples:
        return None
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)
