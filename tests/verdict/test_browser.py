"""report.html in Chromium: it renders, filters, searches, and neither complains nor fetches."""

import shutil

import pytest
from test_report import config_of, perplexity_of, sample_of, tasks_of, train_records, write_run

from verdict import report, runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</pre><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """report.html of two runs in a phone's window; its complaints are kept in `said`."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium here; make browser installs one")
    folder = tmp_path_factory.mktemp("browser")
    samples = [sample_of(n, f"answer {n}") for n in range(3)]
    samples += [sample_of(3, "LOOPS", no_loop=False, ends=False), sample_of(4, HOSTILE, ends=False)]
    samples[1]["mode"] = "greedy"
    loaded = []
    for seed in (42, 43):
        tasks = tasks_of(0.9)
        tasks["zero_shot"]["quiz"] |= {"chance": 0.25}
        tasks["published"] = {"quiz": [{"model": "m", "score": 0.4, "source": HOSTILE}]}
        path = folder / f"seed{seed}"
        config, scored = config_of(path, seed), perplexity_of(9.0)
        write_run(path, config=config, records=train_records(140), eval_ppl=scored, tasks=tasks)
        loaded.append(runs.read(str(path)))
        loaded[-1].samples, loaded[-1].samples_file = samples, "task_generations.jsonl"
    report.write(loaded, folder, 5)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 390, "height": 800})
        opened.said = []
        opened.on("console", lambda message: opened.said.append(message.text))
        opened.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.on("request", lambda request: opened.said.append(request.url))
        opened.goto(f"file://{folder}/report.html")
        yield opened
        browser.close()


def texts(page) -> list[str]:
    """Of the answers that are shown; the first run's, both having the same."""
    shown = page.locator("article:visible pre:not(.prompt)").all_text_contents()
    assert page.locator("#count").inner_text() == f"{len(shown)} of 10 answers."
    return shown[: len(shown) // 2]


def test_it_renders_whole_without_complaint(page):
    assert page.said == [page.url]  # no other request, no error
    assert page.title() == "Was pure synthetic data enough?" and len(texts(page)) == 5
    assert page.locator(".pictures svg").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # fits a phone
    assert page.locator("article script, article img").count() == 0
    assert HOSTILE in texts(page)


@pytest.mark.parametrize(
    ("chosen", "searched", "wanted"),
    [
        ({"mode": "greedy"}, "", ["answer 1"]),
        ({"finding": "coherent"}, "", ["answer 0", "answer 1", "answer 2"]),
        ({"finding": "failed: no loop"}, "", ["LOOPS"]),
        ({"finding": "failed: ends"}, "loops", ["LOOPS"]),
        ({"finding": "failed: ends", "mode": "greedy"}, "", []),
        ({}, "Answer 2", ["answer 2"]),
    ],
    ids=str,
)
def test_answers_are_filtered_and_searched(page, chosen, searched, wanted):
    for name in ("mode", "finding"):
        page.locator(f"select[name={name}]").select_option(chosen.get(name, ""))
    page.locator("input[name=search]").fill(searched)
    assert texts(page) == wanted


def test_one_run_alone(page):
    page.locator("#filters").evaluate("form => form.reset()")
    page.locator("select[name=run]").select_option(index=2)
    assert len(page.locator("article:visible").all()) == 5


def test_both_themes(page):
    """Ink, page and the pictures' lines change together."""
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        of = "element => [getComputedStyle(element).color, getComputedStyle(element).stroke]"
        label = page.locator(".pictures text").first.evaluate("t => getComputedStyle(t).fill")
        colours.append((page.locator("body").evaluate(of)[0], label))
    (ink, label), (dark_ink, dark_label) = colours
    assert ink == label != dark_ink == dark_label
