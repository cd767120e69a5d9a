import io
import json
import re
from pathlib import Path

import pytest

from nanosynth import UserError
from nanosynth.data import json_array

PATH = Path("rows.json")
ARRAY = [
    {"a": [1, -2.5e3, 'x\u00e9\U0001f642 \\ " ]', None, True], "b": {}},
    12345,
    "text",
    [],
    -1.5,
    [[{}]],
    False,
]


@pytest.mark.parametrize("indent", [None, 2, 40])
@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_an_array_is_read_whatever_the_blocks(monkeypatch, indent, is_ascii, block):
    monkeypatch.setattr(json_array, "BLOCK_BYTES", block)
    text = json.dumps(ARRAY, indent=indent, ensure_ascii=is_ascii)
    assert list(json_array.items(io.BytesIO(text.encode()), PATH)) == ARRAY


@pytest.mark.parametrize(
    ("content", "message", "offset"),
    [
        (b"[1, 2", "it ends too early", 5),
        (b"[1, 2,", "Expecting value", 6),
        (b"[1, 2,]", "Expecting value", 6),
        (b"[1 2]", "wanted ',' or ']'", 3),
        (b"[1] [", "text after the array's end", 4),
        (b"[1]\x00", "text after the array's end", 3),
        (b'["caf\xc3\xa9", {"a": tru}]', "Expecting value", 16),
        (b'["caf\xc3\xa9", {"a": "x]', "Unterminated string starting at", 16),
        (b"[" + b"[" * 100_000 + b"]" * 100_000 + b"]", "it is nested too deeply", 1),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 16])
def test_broken_arrays_say_where(monkeypatch, content, message, offset, block):
    if block == 1 and len(content) > 1000:
        pytest.skip("no window of one byte for a long item")
    monkeypatch.setattr(json_array, "BLOCK_BYTES", block)
    with pytest.raises(UserError, match=f"near byte {offset} of its text: {re.escape(message)}"):
        list(json_array.items(io.BytesIO(content), PATH))
