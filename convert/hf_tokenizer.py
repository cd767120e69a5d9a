"""Our tokenizer and chat template in Hugging Face's files, and the check of another's tokenizer."""

import functools
import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from convert import runs
from nanosynth import UserError, tokenizer

END_OF_TEXT, IM_START, IM_END = (
    tokenizer.decode([id]) for id in (tokenizer.END_OF_TEXT, tokenizer.IM_START, tokenizer.IM_END)
)
MARKS = {tokenizer.IM_START: IM_START, tokenizer.IM_END: IM_END}
# Other normalizers and pre-tokenizers than GPT-2's give other ids of one of them.
SAMPLES = (" It's  the\n\n\tcafe\u0301 of 1,234 naïve日本語 words: 'x' \n", "no space before it")
# Equal to tokenizer.prompt_ids where a prompt is asked for, else to tokenizer.encode_conversations.
# What stands between the marks of a generation has mask 1, for trainers that learn answers alone.
# A content may be a list of parts; a part that is no text is refused, not left out, and a text of
# None is ''.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% set content = message['content'] or '' %}"
    "{% if content is not string %}"
    "{% for part in content if part['type'] != 'text' %}"
    "{{ raise_exception('wanted text, found a part of type ' + part['type']) }}"
    "{% endfor %}"
    "{% set content = content | map(attribute='text') | select | join %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ content + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% else %}{{ '<|endoftext|>' }}{% endif %}"
)


@functools.cache
def gpt2_bpe() -> Tokenizer:
    """Text to the ids of tiktoken; the three special tokens, too, are read out of the text."""
    ids = {tokenizer.token_text(id): id for id in range(tokenizer.END_OF_TEXT)}
    letters = bytes_to_unicode()  # GPT-2's files spell each byte as a letter
    spelt = {token: "".join(letters[byte] for byte in token) for token in ids}
    vocabulary = {spelt[token]: id for token, id in ids.items()}
    merges = [(spelt[left], spelt[right]) for left, right in _merges(ids)]
    bpe = Tokenizer(models.BPE(vocabulary | {END_OF_TEXT: tokenizer.END_OF_TEXT}, merges))
    # A role's line is encoded apart from the text behind it, as encode_conversations does:
    # newlines that open the text must not merge with the role's own.
    opening = Regex(rf"\A(?:{'|'.join(tokenizer.ROLES)})\n")
    bpe.pre_tokenizer = Sequence([Split(opening, "isolated"), ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([END_OF_TEXT, IM_START, IM_END])
    return bpe


def _merges(ids: dict[bytes, int]) -> list[list[bytes]]:
    """GPT-2's 50,000 merges in order, of which the rank table has the results only.

    A token's merge is what its bytes come down to when only the merges before it are made.
    (transformers' TikTokenConverter lists every split into two tokens, 108,299 of them.)
    """
    merges = []
    for token, rank in ids.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            ranks = [ids.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            place = ranks.index(min(ranks))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        merges += [parts] if len(parts) == 2 else []
    return merges


def save(folder: Path, block_size: int) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template."""
    PreTrainedTokenizerFast(
        tokenizer_object=gpt2_bpe(),
        bos_token=END_OF_TEXT,
        eos_token=IM_END,  # a turn's end ends an answer
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=block_size,
        padding_side="left",  # a batch of prompts goes on at its right end
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    # As text, not as pairs, which the tokenizers of transformers before 4.45 cannot read.
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    for_others = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # known to transformers 4, too
        "additional_special_tokens": [IM_START, IM_END],
        "add_bos_token": False,  # llama.cpp's converter reads it
        # transformers 4 would add token_type_ids, for which its GPT-2 adds an embedding.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    path.write_text(
        json.dumps(json.loads(path.read_bytes()) | for_others, indent=2) + "\n", encoding="utf-8"
    )


def check(folder: Path, n_rows: int) -> tuple[str, dict[int, int]]:
    """Which file shows that a folder's tokenizer is GPT-2's, or '', and the id there of each chat
    mark that it has. Other tokens are refused, but for those that stand in no text: pad and unk.
    """
    ours, theirs = gpt2_bpe(), None
    described = read_json(folder / "tokenizer_config.json", {})
    special = described | read_json(folder / "special_tokens_map.json", {})
    if (path := folder / "tokenizer.json").is_file():
        with runs.reading(path):
            theirs = Tokenizer.from_file(str(path))
        theirs.no_padding()
        theirs.no_truncation()
        found, merges = theirs.get_vocab(), _merges_of(theirs)
    elif (path := folder / "vocab.json").is_file():
        found = read_json(path) | read_json(folder / "added_tokens.json", {})
        merges = _read_merges(folder / "merges.txt")
    else:
        _check_absent(folder, described, n_rows)
        return "", runs.same_rows(n_rows)
    with runs.reading(folder, "has a tokenizer that is not as transformers writes it"):
        added = described.get("added_tokens_decoder", {})
        found |= {_text_of(token): int(id) for id, token in added.items()}
        chat_rows = {
            id: found.pop(text) for id, text in MARKS.items() if found.get(text, n_rows) < n_rows
        }
        for role in ("pad_token", "unk_token"):
            if found.get(text := _text_of(special.get(role)), 0) >= runs.N_BPE:
                del found[text]
    wanted = {token: id for token, id in ours.get_vocab().items() if id < tokenizer.END_OF_TEXT}
    absent = wanted.keys() - found.keys()
    wanted[END_OF_TEXT] = tokenizer.END_OF_TEXT
    if wrong := [token for token in found if found[token] != wanted.get(token)] or sorted(absent):
        first = f"{wrong[0]!r} is id {found.get(wrong[0])}, wanted {wanted.get(wrong[0])}"
        raise UserError(f"{path} is not GPT-2's tokenizer in {len(wrong):,} tokens: {first}")
    if (theirs or merges) and merges != _merges_of(ours):
        raise UserError(f"{path} has other merges than GPT-2's; wanted GPT-2's tokenizer")
    with runs.reading(path):  # it may lack the token of what it does not know
        of = functools.partial((theirs or ours).encode, add_special_tokens=False)
        is_same = all(of(text).ids == ours.encode(text).ids for text in SAMPLES)
    if not is_same or described.get("add_prefix_space"):
        raise UserError(f"{path} takes texts apart otherwise than GPT-2's tokenizer; wanted that")
    return path.name, chat_rows


def _read_merges(path: Path) -> list[list[str]]:
    """Without the file none are known; the ids of the tokens, which are checked, tell them too."""
    with runs.reading(path):
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [line.split(" ") for line in lines if line and not line.startswith("#version")]


def _check_absent(folder: Path, described: dict, n_rows: int) -> None:
    """Refuse a folder without our tokenizer's files that may have had another."""
    kind = described.get("tokenizer_class") or "GPT2Tokenizer"
    others = [*folder.glob("*.model"), *folder.glob("merges.txt"), *folder.glob("vocab.txt")]
    if others or not str(kind).startswith("GPT2"):
        found = others[0].name if others else f"a tokenizer_config.json of {kind}"
        raise UserError(f"{folder} has {found}; wanted GPT-2's tokenizer.json or vocab.json")
    if n_rows not in (runs.N_BPE, tokenizer.N_IDS, tokenizer.VOCAB_SIZE):
        said = f"{folder} has {n_rows:,} tokens and no tokenizer, so the last are unknown"
        raise UserError(f"{said}; wanted {runs.N_BPE:,} tokens, or tokenizer.json beside them")


def _text_of(token: str | dict | None) -> str | None:
    """A special token's text, which files have bare or in an object."""
    return token.get("content") if isinstance(token, dict) else token


def _merges_of(bpe: Tokenizer) -> list | None:
    return json.loads(bpe.to_str())["model"].get("merges")


def read_json(path: Path, default: dict | None = None) -> dict:
    """The object of a JSON file that a user brings; the default where there is none."""
    if default is not None and not path.is_file():
        return default
    with runs.reading(path):
        return {**json.loads(path.read_bytes())}
