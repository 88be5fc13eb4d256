"""MLflow's pages in a real browser, as a stranger opens them: by the lines that the commands end with.

The pictures go to the folder that MSER_PICTURES names, to be looked at.
"""

import os
from pathlib import Path

import pytest

from mser_dist.runs.page import page, pages, sweep_page
from mser_dist.runs.record import HEADLINE
from tests.lab.browser import Browser
from tests.lab.made_up_sweep import BEST, make
from tests.unit.made_up_runs import write_clips

pytestmark = pytest.mark.lab
RUNS = 6  # of the sweep


@pytest.fixture(scope="module")
def swept(server: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that is in the server."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", server[0])
        return make(folder / "runs", write_clips(folder / "set"), folder / "set")


def address(line: str | None) -> str:
    """That in a line of `runs.page`."""
    assert line is not None
    return line.split()[-1]


def look(browser: Browser, name: str) -> None:
    """Keep a picture of what is seen, if somebody wants it."""
    if folder := os.environ.get("MSER_PICTURES"):
        browser.picture(Path(folder) / f"{name}.png")


def choose(browser: Browser, opener: str, option: str) -> None:
    """Choose an option of a list, which the element `opener` opens."""
    browser.click(opener)
    browser.click(f"[...document.querySelectorAll('[role=option]')].find(e => e.innerText.trim() == '{option}')")


def drawn(browser: Browser, selector: str, at_least: int) -> int:
    """How many elements are drawn, once there are so many."""
    count = f"document.querySelectorAll('{selector}').length"
    browser.wait(f"{count} >= {at_least}")
    return int(browser.ask(count))


@pytest.mark.timeout(600)
def test_the_charts_of_a_sweep_begin_with_the_unseen_languages(browser: Browser, swept: Path) -> None:
    browser.goto(address(sweep_page(swept / "sweep", 1)))
    assert drawn(browser, ".barlayer .trace .point", RUNS) >= RUNS
    look(browser, "charts")
    text = browser.text()
    assert f"{RUNS} matching runs" in text, "the trainings, without evaluations and the sweep itself"
    assert text.index(BEST) < text.index("lr=0.001_seed=0") < text.index("lr=0.0001_seed=0"), "the best first"
    assert text.index("\ntest\n") < text.index("\ntrain\n") and "test/ua_unseen" in text
    assert "System metrics" in text and "Traces" in text and "Prompts" not in text, "no pages for chat applications"


def test_the_table_of_runs_is_sorted_by_it(browser: Browser, swept: Path) -> None:
    url = address(sweep_page(swept / "sweep", 1)).replace("compareRunsMode=CHART&", "")
    browser.goto(url)
    browser.wait(f"document.body.innerText.includes('{BEST}')")
    look(browser, "runs")
    assert f"Sort: {HEADLINE}" in browser.text()


def test_runs_are_compared_by_parameters_that_differ(browser: Browser, swept: Path) -> None:
    trained = [swept / f"lr={lr}_seed={seed}" for lr in ("0.001", "0.0003", "0.0001") for seed in (0, 1)]
    browser.goto(address(pages(trained)))
    metrics = "document.querySelectorAll('[role=combobox]')[1]"
    browser.wait(f"!!{metrics}")
    assert browser.ask("document.querySelectorAll('[role=combobox]')[0].getAttribute('aria-description')") == (
        "seed, train.lr"
    ), "those that were swept, and no others"
    browser.ask(
        f"{metrics}.closest('.du-bois-light-select-selector')"
        ".dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))"
    )
    browser.wait(  # of a long list only what is seen is there
        f"(() => {{ const one = [...document.querySelectorAll('.du-bois-light-select-item-option')]"
        f".find(e => e.innerText.trim() == '{HEADLINE}'); if (one) {{ one.click(); return true }}"
        " const list = [...document.querySelectorAll('.rc-virtual-list-holder')].pop();"
        " list.scrollTop = (list.scrollTop + 100) % list.scrollHeight; return false })()",
        60,
    )
    titles = "[...document.querySelectorAll('.parcoords .axis-title')].map(e => e.textContent)"
    browser.wait(f"{titles}.includes('{HEADLINE}')")
    look(browser, "parallel")
    assert {"seed", "train.lr", HEADLINE} <= set(browser.ask(titles))
    lines = browser.ask(
        "[...document.querySelectorAll('.js-plotly-plot')].flatMap(e => e.data)"
        ".filter(t => t.type == 'parcoords').map(t => Math.min(...t.dimensions.map(d => d.values.length)))"
    )
    assert lines == [RUNS], "every run has all of them"

    browser.click("[...document.querySelectorAll('[role=tab]')].find(e => e.innerText.trim() == 'Box Plot')")
    choose(browser, "document.getElementById('x-axis-selector')", "train.lr")
    choose(browser, "document.getElementById('y-axis-selector')", HEADLINE)
    assert drawn(browser, ".boxlayer .trace path.box", 3) == 3, "a box for each learning rate"
    look(browser, "box")


def test_a_run_tells_what_it_is(browser: Browser, swept: Path) -> None:
    browser.goto(address(page(swept / f"{BEST}-eval")))
    browser.wait("document.body.innerText.includes('About this run')")
    look(browser, "run")
    text = browser.text()
    for told in ("el of made-up", "Finished", HEADLINE, "made up", "macroF1"):  # data set, metric, title and table
        assert told in text, told
    browser.goto(address(page(swept / "sweep")))
    browser.wait("document.body.innerText.includes('About this run')")
    look(browser, "sweep")
    text = browser.text()
    for told in ("6 runs, 6 ended", "unseen UA", "mser.best_trial", BEST, "best/ua_unseen"):
        assert told in text, told
