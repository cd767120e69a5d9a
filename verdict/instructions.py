"""Instructions whose obedience can be checked exactly: one rule of CHECKS for each prompt.

data/tasks/prompts.jsonl holds lines of {"prompt": ..., "check": {"kind": ..., arguments}}.
"""

import json
import re
from pathlib import Path

from nanosynth import UserError
from nanosynth.data import utf8

_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_NUMBER = re.compile(r"^\s*(\d+)[.):]\s+\S", re.MULTILINE)


def words(text: str) -> list[str]:
    """Runs of letters and digits, with apostrophes and hyphens within.

    >>> words("It's a well-known fact, 2nd to none.")
    ["It's", 'a', 'well-known', 'fact', '2nd', 'to', 'none']
    """
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def lower_words(text: str) -> list[str]:
    return [word.lower() for word in words(text)]


def plain(text: str) -> str:
    """Without the quotation marks and the full stop that may stand around an answer."""
    return text.strip().strip("\"'“”").rstrip(".").strip()


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(text: str) -> int:
    """Stretches that end with . ! or ? before a space or the end, or with the text."""
    return len([part for part in re.split(r"[.!?]+[\"'”)]*(?:\s+|$)", text) if part.strip()])


def items(text: str) -> int:
    """Of a bulleted or numbered list, or of several lines; else parts between commas or 'and'."""
    marked = len(_BULLET.findall(text)) or len(_NUMBER.findall(text))
    if marked:
        return marked
    if len(lines(text)) > 1:
        return len(lines(text))
    tail = plain(text.rsplit(":", 1)[-1])
    return len([part for part in re.split(r",\s*(?:and\s+)?|\s+and\s+", tail) if part.strip()])


def in_order(text: str, words: list[str]) -> bool:
    """Each of the words once, one after the other."""
    return [word for word in lower_words(text) if word in words] == words


def is_json(text: str, keys: list[str]) -> bool:
    body = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        value = json.loads(body)
    except ValueError:
        return False
    return isinstance(value, dict) and set(keys) <= set(value)


def quoted(text: str) -> bool:
    inner = text.strip()
    return len(inner) > 2 and inner[0] in '"“' and inner[-1] in '"”'


CHECKS = {  # of an answer, by kind; the other arguments are those of the check
    "one_word": lambda answer: len(words(answer)) == 1,
    "n_words": lambda answer, n: len(words(answer)) == n,
    "max_words": lambda answer, n: len(words(answer)) <= n,
    "min_words": lambda answer, n: len(words(answer)) >= n,
    "n_items": lambda answer, n: items(answer) == n,
    "numbered": lambda answer, n: _NUMBER.findall(answer) == [str(k + 1) for k in range(n)],
    "bullets": lambda answer, n: len(_BULLET.findall(answer)) == n,
    "n_lines": lambda answer, n: len(lines(answer)) == n,
    "n_sentences": lambda answer, n: sentences(answer) == n,
    "n_paragraphs": lambda answer, n: len(paragraphs(answer)) == n,
    "upper_case": str.isupper,
    "lower_case": str.islower,
    "starts_with": lambda answer, text: answer.strip().startswith(text),
    "ends_with": lambda answer, text: answer.strip().rstrip(".").endswith(text),
    "equals": lambda answer, text: plain(answer) == plain(text),
    "one_of": lambda answer, options: plain(answer).lower() in options,
    "contains": lambda answer, words: set(words) <= set(lower_words(answer)),
    "contains_text": lambda answer, texts: all(part in answer for part in texts),
    "excludes": lambda answer, words: not set(words) & set(lower_words(answer)),
    "excludes_text": lambda answer, texts: not any(part in answer for part in texts),
    "in_order": in_order,
    "quoted": quoted,
    "json": is_json,
}


def obeys(answer: str, check: dict) -> bool:
    """Does an answer do what the prompt asked? One without a letter or digit never does."""
    arguments = {name: value for name, value in check.items() if name != "kind"}
    has_content = any(char.isalnum() for char in answer)
    return has_content and bool(CHECKS[check["kind"]](answer, **arguments))


def read_prompts(path: Path) -> list[dict]:
    """The lines of a prompt file, each with a prompt and a check that can be applied."""
    if not path.is_file():
        raise UserError(f"no prompt file {str(path)!r}; wanted .jsonl with prompt and check")
    rows = []
    for number, line in utf8.lines(path):
        try:
            row = json.loads(line)
            if not isinstance(row["prompt"], str):
                raise TypeError("prompt is not text")
            obeys("a", row["check"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = f"a prompt, and a check of kind {', '.join(CHECKS)} with its arguments"
            raise UserError(f"{path}, line {number}: {error!r}; wanted {wanted}") from None
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no prompt")
    return rows
