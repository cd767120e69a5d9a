import io
import os
import subprocess
import sys

import pytest

from nanosynth import settings, terminal
from nanosynth.training.log import Background, Console
from tiny import REPO, losses, read_metrics, train_run


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, näïve 日本 👩‍🚀\tand\n", "plain, näïve 日本 👩‍🚀\tand\n"),
        ("\x1b[2J\x07\r\x00\x9b31m\x7f", r"\x1b[2J\x07\r\x00\x9b31m\x7f"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("out/\udcff", r"out/\udcff"),
    ],
)
def test_harmless(text, shown):
    assert terminal.harmless(text) == shown
    assert terminal.harmless(shown) == shown


def test_one_line():
    assert terminal.one_line("a\nb\r\n\x1b c") == r"a b\r \x1b c"


class Stream(io.TextIOWrapper):
    """A text stream on a file descriptor, in the place of sys.stdout."""

    def __init__(self, descriptor: int, encoding: str = "utf-8"):
        super().__init__(io.FileIO(descriptor, "w", closefd=False), encoding=encoding)


@pytest.fixture(params=["full disk", "gone reader", "sleeping reader"])
def lost(request):
    """A stream that nothing can be written to."""
    if request.param == "full disk":
        yield Stream(os.open("/dev/full", os.O_WRONLY))
        return
    reader, writer = os.pipe()
    if request.param == "gone reader":
        os.close(reader)
    else:
        os.set_blocking(writer, False)
        while True:
            try:
                os.write(writer, bytes(1 << 16))
            except BlockingIOError:
                break
        os.set_blocking(writer, True)
    yield Stream(writer)
    if request.param == "sleeping reader":
        os.close(reader)  # wakes the thread that writes


def test_a_lost_console_neither_ends_nor_delays_a_run(
    lost, tiny_bins, run_dir, tmp_path, monkeypatch
):
    intact = Background.__init__
    monkeypatch.setattr(Background, "__init__", lambda self, work, **_: intact(self, work, 0.2))
    monkeypatch.setattr(sys, "stdout", lost)
    records = train_run(tiny_bins, tmp_path / "run", save_interval=3, eval_interval=3)
    monkeypatch.undo()
    assert losses(records) == losses(read_metrics(run_dir))
    assert (tmp_path / "run" / "latest").read_text() == "step_000006"


def test_a_small_encoding_gets_escapes(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", Stream(writer, "cp1252"))
    console = Console(0, 1)
    console.say("naïve 日本")
    console.close()
    assert os.read(reader, 100) == b"na\xefve \\u65e5\\u672c\n"


SCRIPT = "import sys; from nanosynth import settings, terminal\nwith settings.one_line_errors(): "


@pytest.mark.parametrize(
    ("shell", "body", "code"),
    [
        ("2>&-", "sys.exit(open('/dev/null').fileno() in (0, 1, 2))", 0),
        ("0<&- 1>&- 2>&-", "print('x'); print('y', file=sys.stderr); input", 0),
        ("0<&- 2>&-", "raise SystemExit(bool(sys.stdin.read()))", 0),
        (">/dev/full", "print('x')", 1),
        (">/dev/full", "terminal.say('x')", 0),
        ("2>/dev/full", "raise FileNotFoundError(2, 'planted')", 1),
        ("| true; exit ${PIPESTATUS[0]}", "print('x' * 9**7)", 141),
    ],
    ids=str,
)
def test_streams_that_are_gone_end_nothing(shell, body, code):
    """Nor do they make Python exit with 120."""
    command = f'{sys.executable} -c "$SCRIPT" {shell}'
    environment = {**os.environ, "SCRIPT": SCRIPT + body}
    done = subprocess.run(["bash", "-c", command], cwd=REPO, env=environment, capture_output=True)
    assert done.returncode == code and b"Exception" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (FileNotFoundError(2, "No such file", "a\n\x1b[2J"), "error: [Errno 2] No such file", 1),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
            "error: out",
            1,
        ),
        (MemoryError(), "error: out of memory", 1),
        (settings.UserError("\x1b[31mred\nand a line"), r"error: \x1b[31mred and a line", 1),
        (KeyboardInterrupt(), "", 130),
        (BrokenPipeError(), "", 141),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_line(error, said, code, capfd):
    with pytest.raises(SystemExit) as ended, settings.one_line_errors():
        raise error
    text = capfd.readouterr().err
    assert ended.value.code == code and said in text and text.count("\n") == bool(said)
    assert "\x1b" not in text


def test_what_is_ours_to_mend_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="illegal memory access"), settings.one_line_errors():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
