"""The page, in a real browser: it answers as one types, says why, follows the sliders, and fits a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import resources

import pytest
from conftest import free_port
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from raexmc_ray.recipe import Recipe
from raexmc_ray.serve.api import _security
from raexmc_ray.serve.run import serving
from raexmc_ray.serve.schema import ServeSettings

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium"),
]
TEXT = "vim-gtk3: Vi IMproved, an editor"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 740}
# Chromium looks for its maker's servers otherwise, and there is no way out of a test machine.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
TOKEN = "a-token-for-the-page-0123"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def guarded(tiny_run: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an application that wants a token for what is not the page."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(TOKEN)
    settings = ServeSettings(memory=f"{tiny_run.cluster.storage}/memory", tokens_file=str(tokens))
    with serving(settings, port=free_port()) as url:
        yield url


def opened(browser: Browser, url: str, viewport: dict[str, int]) -> tuple[Page, list[str]]:
    """The page after the token was given, and what it complained of or asked of others."""
    page = browser.new_context(viewport=viewport, device_scale_factor=2).new_page()  # type: ignore[arg-type]
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith((url, "data:")) else complaints.append(request.url)
    )
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text) if message.type == "error" and "401" not in message.text else None
        ),
    )
    page.goto(url)
    page.get_by_label("Token", exact=True).fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#about")).to_contain_text("instances")
    return page, complaints


def test_it_answers_says_why_and_follows_the_sliders(guarded: str, browser: Browser) -> None:
    page, complaints = opened(browser, guarded, DESKTOP)
    page.get_by_label("Which labels fit this text?").fill(TEXT)
    rows = page.locator("#answer > li")
    expect(rows).to_have_count(10)
    expect(page.locator("#status")).to_contain_text("10 labels in")
    expect(page.locator("#stages")).to_contain_text("encode")

    first = rows.first
    summary = first.locator("summary")
    summary.focus()
    page.keyboard.press("Enter")  # by the keyboard alone
    expect(first.locator(".votes")).to_be_visible()
    expect(first.locator(".votes")).to_contain_text("cosine")
    page.evaluate("ask()")  # an answer that comes while one reads
    expect(page.locator("#answer:not(.old)")).to_be_visible()
    expect(first.locator("summary")).to_be_focused()
    scores = page.locator(".score").all_text_contents()
    assert scores == sorted(scores, reverse=True)

    # λ = 0: the labels themselves alone vote, so that no bar has a part of the instances' colour.
    page.get_by_label("λ: whom to trust").focus()
    page.keyboard.press("Home")
    expect(page.locator(".score").first).not_to_have_text(scores[0])
    expect(page.locator("#answer:not(.old)")).to_be_visible()
    widths = page.locator(".bar .instance").evaluate_all("parts => parts.map((part) => part.offsetWidth)")
    assert set(widths) == {0}
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.locator(".score").first).to_have_text(scores[0])
    expect(first.locator(".votes")).to_be_visible()  # what was opened stays open

    page.get_by_label("Temperature").focus()
    page.keyboard.press("End")
    expect(page.locator(".score").first).not_to_have_text(scores[0])
    page.locator("#mode").select_option("apart")
    expect(page.get_by_label("Instances retrieved")).to_be_visible()
    expect(page.locator("#problem")).to_be_hidden()
    assert complaints == []


def test_a_token_that_was_not_given_is_asked_for_again(guarded: str, browser: Browser) -> None:
    page = browser.new_context(viewport=DESKTOP).new_page()  # type: ignore[arg-type]
    page.goto(guarded)
    expect(page.get_by_label("Token", exact=True)).to_be_visible()
    page.get_by_label("Token", exact=True).fill("\u201ccopied\u201d from a letter")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Token", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_label("Which labels fit this text?").fill(TEXT)
    page.get_by_label("Token", exact=True).fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#answer > li")).to_have_count(10)


def test_it_fits_a_phone(guarded: str, browser: Browser) -> None:
    page, complaints = opened(browser, guarded, PHONE)
    page.get_by_label("Which labels fit this text?").fill(TEXT)
    expect(page.locator("#answer > li")).to_have_count(10)
    expect(page.get_by_label("Temperature")).to_be_hidden()  # the answer comes first
    page.get_by_text("How the answer is made").click()
    expect(page.get_by_label("Temperature")).to_be_visible()
    page.locator("#answer summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "nothing sticks out"
    sizes = page.locator("button:visible, select:visible, summary").evaluate_all(
        "all => all.map((e) => e.offsetHeight)"
    )
    assert min(sizes) >= 32, "a finger hits it"
    assert complaints == []


def test_a_text_is_text_and_an_error_is_said(guarded: str, browser: Browser) -> None:
    page, complaints = opened(browser, guarded, DESKTOP)
    page.get_by_label("Which labels fit this text?").fill("<img src=x onerror=alert(1)> vim")
    expect(page.locator("#answer > li").first).to_be_visible()
    assert page.locator("main img").count() == 0
    page.route("**/v1/predict", lambda route: route.abort())
    page.get_by_label("Which labels fit this text?").fill("vim")
    expect(page.get_by_role("alert")).to_be_visible()
    assert [c for c in complaints if "ERR_FAILED" not in c] == []
    page.unroute("**/v1/predict")
    page.get_by_label("Which labels fit this text?").fill("vim again")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#answer > li")).to_have_count(10)


def test_it_answers_whatever_the_browser_and_the_limits_are(browser: Browser) -> None:
    """A browser that no longer lets the address say the text, and an application that allows a single neighbour."""
    html = resources.files("raexmc_ray.serve").joinpath("page.html").read_text("utf-8")
    defaults = {"lambda": 0.5, "temperature": 0.05, "neighbours": {"joint": 1}, "k": 3}
    limits = {"neighbours": 1, "k": 1000, "characters": 20_000}
    memory = {"snapshot": "s", "labels": 5, "instances": 5, "shards": 1, "defaults": defaults, "limits": limits}
    label = {"label": 1, "uid": "u", "text": "a label", "score": 0.5, "label_share": 0.4, "evidence": []}
    reply = {
        "snapshot": "s", "answers": [{"labels": [label]}], "missing_shards": [], "milliseconds": {"total": 1.0}
    }  # fmt: skip

    def answer(route: Route) -> None:
        if route.request.url.endswith("/v1/predict"):
            route.fulfill(json=reply)
        elif route.request.url.endswith("/v1/memory"):
            route.fulfill(json=memory)
        else:
            route.fulfill(body=html, content_type="text/html", headers=_security(html))

    page = browser.new_context(viewport=DESKTOP).new_page()  # type: ignore[arg-type]
    page.add_init_script("history.replaceState = () => { throw new DOMException('too often', 'SecurityError') }")
    page.route("**/*", answer)
    page.goto("http://the-page.test/")
    page.get_by_label("Which labels fit this text?").fill(TEXT)
    expect(page.locator("#answer > li")).to_have_count(1)
    with page.expect_request("**/v1/predict") as asked:
        page.locator("#mode").select_option("apart")
    assert asked.value.post_data_json["neighbours"] == {"instances": 1, "labels": 1}
