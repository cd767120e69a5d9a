"""Instructions whose obedience can be checked exactly: one rule of CHECKS for each prompt.

data/tasks/prompts.jsonl holds lines of {"prompt": ..., "check": {"kind": ..., arguments}}.
"""

import json
import re
from pathlib import Path

from nanosynth import UserError

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


def in_order(text: str, wanted: list[str]) -> bool:
    """Each wanted word once, one after the other."""
    found = [word for word in lower_words(text) if word in wanted]
    return found == wanted


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


CHECKS = {
    "one_word": lambda text: len(words(text)) == 1,
    "n_words": lambda text, n: len(words(text)) == n,
    "max_words": lambda text, n: len(words(text)) <= n,
    "min_words": lambda text, n: len(words(text)) >= n,
    "n_items": lambda text, n: items(text) == n,
    "numbered": lambda text, n: _NUMBER.findall(text) == [str(k + 1) for k in range(n)],
    "bullets": lambda text, n: len(_BULLET.findall(text)) == n,
    "n_lines": lambda text, n: len(lines(text)) == n,
    "n_sentences": lambda text, n: sentences(text) == n,
    "n_paragraphs": lambda text, n: len([p for p in re.split(r"\n\s*\n", text) if p.strip()]) == n,
    "upper_case": lambda text: text.isupper(),
    "lower_case": lambda text: text.islower(),
    "starts_with": lambda text, text_wanted: text.strip().startswith(text_wanted),
    "ends_with": lambda text, text_wanted: text.strip().rstrip(".").endswith(text_wanted),
    "equals": lambda text, text_wanted: plain(text) == plain(text_wanted),
    "one_of": lambda text, options: plain(text).lower() in options,
    "contains": lambda text, words: set(words) <= set(lower_words(text)),
    "contains_text": lambda text, texts: all(part in text for part in texts),
    "excludes": lambda text, words: not set(words) & set(lower_words(text)),
    "excludes_text": lambda text, texts: not any(part in text for part in texts),
    "in_order": lambda text, words: in_order(text, words),
    "quoted": quoted,
    "json": is_json,
}


def obeys(text: str, check: dict) -> bool:
    """Does `text` do what the prompt asked? An answer without a letter or digit never does."""
    arguments = {("text_wanted" if k == "text" else k): v for k, v in check.items() if k != "kind"}
    has_content = any(char.isalnum() for char in text)
    return has_content and bool(CHECKS[check["kind"]](text, **arguments))


def read_prompts(path: Path) -> list[dict]:
    """The lines of a prompt file, each with a prompt and a check that can be applied."""
    if not path.is_file():
        raise UserError(f"no prompt file {str(path)!r}; wanted .jsonl with prompt and check")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
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
