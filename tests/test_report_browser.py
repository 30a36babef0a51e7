"""The report in a browser: no errors, reachable for everybody, the table sorts and filters."""

import os
import shutil

import pytest
from made_run import GATE, write_run, write_run_between_machines

from crosslm.html_report.collect import RunView
from crosslm.html_report.page import render
from crosslm.runs.rundir import RunDir

try:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright
except ImportError:
    if os.environ.get("REQUIRE_BROWSER"):
        raise
    pytest.skip("the browser tests need the extra 'browser': make test-report", allow_module_level=True)

REQUIRED = bool(os.environ.get("REQUIRE_BROWSER"))  # by make test-report
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None and not REQUIRED, reason="there is no Chromium on this machine")
SIZES = {"desktop": (1280, 900), "phone": (375, 800)}
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of one run, of one between machines, and of both, as addresses."""
    folder = tmp_path_factory.mktemp("reports")
    written = write_run(folder / "a", extra=GATE), write_run_between_machines(folder / "b")
    views = [RunView.read(RunDir.open(run)) for run in written]
    shown = {"one": views[:1], "machines": views[1:], "two": views}
    for name, of in shown.items():
        (folder / f"{name}.html").write_text(render(of))
    return {name: (folder / f"{name}.html").as_uri() for name in shown}


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.fail("there is no Chromium on the PATH: install chromium or google-chrome, then make test-report again")
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, address, **options):
    """A page, and a list that gathers what its console says and what it asks of a network."""
    page = browser.new_context(**options).new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: request.url == address or said.append(request.url))
    page.goto(address)
    return page, said


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [
        ("one", "desktop", "light"),
        ("one", "desktop", "dark"),
        ("one", "phone", "light"),
        ("machines", "desktop", "dark"),
        ("machines", "phone", "light"),
        ("two", "desktop", "light"),
        ("two", "phone", "dark"),
    ],
)
def test_it_opens_without_an_error_and_axe_finds_nothing(browser, pages, name, size, scheme):
    width, height = SIZES[size]
    page, said = opened(browser, pages[name], viewport={"width": width, "height": height}, color_scheme=scheme)
    found = Axe().run(page, options={"runOnly": RULES}).response
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]] == []
    assert {"color-contrast", "document-title"} <= {one["id"] for one in found["passes"]}
    assert said == []
    assert page.title() != "taken"
    assert page.locator("caption:text-is('What the gate found of each upload on texts of known label')").count() > 0
    assert (page.locator("caption:has-text('Who uploaded when')").count() > 0) == (name != "one")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()


def visible(page, column):
    return page.eval_on_selector_all(
        "#texts tbody tr:not([hidden])", f"rows => rows.map(row => row.cells[{column}].textContent)"
    )


def test_the_texts_sort_and_filter(browser, pages):
    page, said = opened(browser, pages["one"])
    page.click("#texts th button:text-is('reward')")
    rewards = [float(text.replace("−", "-")) for text in visible(page, 3)]
    assert rewards == sorted(rewards, reverse=True)
    assert page.get_attribute("#texts th:has(button:text-is('reward'))", "aria-sort") == "descending"
    page.click("#texts th button:text-is('reward')")
    assert [float(text.replace("−", "-")) for text in visible(page, 3)] == sorted(rewards)
    page.fill("[name=words]", "LIFT")
    assert visible(page, 0) == ["the lift is stuck"] * 2
    assert page.text_content("#found") == "2 of 12 texts"
    page.fill("[name=words]", "")
    page.select_option("[name=kept]", "yes")
    page.select_option("[name=arrival]", "2 south")
    assert set(visible(page, 7)) == {"yes"}
    assert set(visible(page, 1)) == {"2 south"}
    page.select_option("[name=label]", "urgent")
    assert visible(page, 2) == ["urgent"]
    assert said == []
    page.context.close()


def test_it_is_all_there_without_javascript_and_on_paper(browser, pages):
    page, _ = opened(browser, pages["one"], java_script_enabled=False)
    assert page.locator("#texts tbody tr").count() == 12
    assert page.locator("#texts tbody tr").first.is_visible()
    assert not page.locator("#filters").is_visible()
    assert page.locator("figure svg").first.is_visible()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.locator("#texts tbody tr").first.is_visible()
    page.context.close()
