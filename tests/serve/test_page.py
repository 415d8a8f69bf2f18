"""The page in headless Chromium: what a person sees, clicks and types."""

import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lightlm.generate.sampling import Sampling
from lightlm.serve.access import Access
from lightlm.serve.loop import DecodeLoop, Limits
from tests.serve.served import PROMPT, Served, served, tiny_loaded, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
expect = playwright.expect

SHADES = """[...document.querySelectorAll(".token")].map(
    (span) => [span.tokens.length, Number(span.style.getPropertyValue("--surprise"))])"""
UNNAMED = """[...document.querySelectorAll("input, textarea, button")].filter(
    (each) => !(each.labels?.length || each.ariaLabel || each.textContent.trim())).map((each) => each.id)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(Limits(rows=4, waiting=4), loaded=tiny_loaded(max_seq_len=4000)) as running:
        yield running


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    yield from opened(browser, server)


def opened(browser: Any, server: Served, **context: Any) -> Iterator[Any]:
    """A page; its script fails nowhere, breaks no security policy, and asks no other server."""
    with browser.new_context(**context) as own:
        page = own.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: problems.append(request.url))
        page.goto(server.url)
        yield page
        expected = (server.url, "data:", "Failed to load resource")  # the last one for an answer 401 or 400
        assert [problem for problem in problems if not problem.startswith(expected)] == []


def fill(page: Any, **settings: object) -> None:
    expect(page.locator("#model")).to_contain_text("tiny")
    page.fill("#prompt", PROMPT)
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))


def test_ctrl_enter_draws_samples_side_by_side_that_equal_the_api(page: Any, server: Served) -> None:
    fill(page, max_tokens=20, n=3, seed=5, temperature=1.2, top_k=50)
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done")
    expect(page.locator("#status")).to_contain_text("tokens/s")
    expected = server.alone([PROMPT], 20, Sampling(temperature=1.2, top_k=50), 5, samples=3)
    cards = page.locator("article")
    assert cards.count() == 3
    for i, text in enumerate(expected):
        assert "".join(cards.nth(i).locator(".token").all_text_contents()) == text
        assert cards.nth(i).locator(".prompt").text_content() == PROMPT
        assert "tokens" in cards.nth(i).locator("header").text_content()
        assert cards.nth(i).locator("header").evaluate("head => head.scrollWidth <= head.clientWidth")
    tops = [cards.nth(i).bounding_box()["y"] for i in range(3)]
    assert max(tops) - min(tops) < 1


def test_a_token_is_shaded_by_its_probability_and_shows_alternatives(page: Any, server: Served) -> None:
    fill(page, max_tokens=8, n=1, seed=5)
    page.click("#generate")
    expect(page.locator("#status")).to_contain_text("Done")
    told = server.complete(max_tokens=8, seed=5, logprobs=5).json()["choices"][0]["logprobs"]
    spans = page.evaluate(SHADES)
    logprobs = iter(told["token_logprobs"])
    for count, surprise in spans:  # one span for several tokens of one character
        assert surprise == pytest.approx(min(1, -sum(itertools.islice(logprobs, count)) / math.log(256)), abs=0.002)
    token = page.locator(".token").first
    token.hover()
    tip = page.locator("#tip")
    expect(tip).to_be_visible()
    assert tip.locator("tr").count() in (5, 6)  # the token itself, if it is not among the five
    chosen = tip.locator("tr.chosen .share").text_content()
    assert float(chosen.strip("<%")) == pytest.approx(100 * math.exp(told["token_logprobs"][0]), abs=0.51)
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    page.uncheck("#shade")
    assert token.evaluate("span => getComputedStyle(span).backgroundColor") == "rgba(0, 0, 0, 0)"


def test_the_keyboard_reaches_everything(page: Any) -> None:
    fill(page, max_tokens=8, n=2, seed=5)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done")
    order = []
    page.focus("#temperature")
    for _ in range(30):
        name = page.evaluate("document.activeElement.id || document.activeElement.className || ''")
        order.append(name)
        page.keyboard.press("Tab")
    wanted = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "seed", "shade", "prompt", "generate"]
    assert [name for name in order if name in wanted][: len(wanted)] == wanted
    assert order.count("token") >= 2  # one stop per sample
    page.focus("article:first-child .token")
    expect(page.locator("#tip")).to_be_visible()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('article .token')[1]")
    assert page.locator("[aria-describedby=tip]").count() == 1
    assert page.evaluate(UNNAMED) == []


@pytest.mark.parametrize("how", ["Escape", "#stop"])
def test_stopping_frees_the_rows_and_keeps_the_text(
    page: Any, server: Served, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DecodeLoop._step
    monkeypatch.setattr(DecodeLoop, "_step", lambda loop: (time.sleep(0.01), step(loop)))  # however slow the browser is
    page.route("**/v1/completions", lambda route: route.continue_(post_data=longer(route.request.post_data)))
    fill(page, n=2)
    page.click("#generate")
    expect(page.locator(".token").nth(5)).to_be_attached()
    expect(page.locator("#generate")).to_be_disabled()
    page.keyboard.press(how) if how == "Escape" else page.click(how)
    expect(page.locator("#status")).to_contain_text("Stopped")
    expect(page.locator("#generate")).to_be_enabled()
    assert page.locator("article").first.locator("header").text_content().count("stopped") == 1
    wait_until(lambda: server.metric("lightlm_rows_used") == 0)
    assert page.locator(".token").count() > 5


def longer(body: str) -> str:
    return json.dumps(json.loads(body) | {"max_tokens": 3900, "logit_bias": {"7": 100}})


def test_text_of_a_model_is_never_html(page: Any) -> None:
    text = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold"
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
    events = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
    fill(page, n=1)
    page.fill("#prompt", "<i>prompt</i>")
    page.click("#generate")
    expect(page.locator("#status")).to_contain_text("Done")
    assert page.locator(".text").text_content() == "<i>prompt</i>" + text
    assert page.locator("#samples img, #samples script, #samples b, #samples i").count() == 0
    assert "owned" not in page.title()


def test_a_sample_is_copied_with_its_whole_prompt(browser: Any, server: Served) -> None:
    for page in opened(browser, server, permissions=["clipboard-read", "clipboard-write"]):
        fill(page, n=1, max_tokens=5)
        prompt = "The cat sat. " * 20
        page.fill("#prompt", prompt)
        page.click("#generate")
        expect(page.locator("#status")).to_contain_text("Done")
        assert page.locator(".prompt").text_content() == f"…{prompt[-160:]}"
        text = prompt + "".join(page.locator(".token").all_text_contents())
        page.click("article button")
        expect(page.locator("article button")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == text
        page.evaluate("navigator.clipboard.writeText = () => Promise.reject()")
        page.click("article button")
        expect(page.locator("article button")).to_have_text("Selected")
        assert page.evaluate("getSelection().anchorNode.textContent") == text


def test_mistakes_are_told_and_the_page_goes_on(page: Any) -> None:
    fill(page, n=8, max_tokens=5)
    page.evaluate("document.querySelector('#n').max = 20")
    page.fill("#n", "20")
    page.click("#generate")
    expect(page.locator("#error")).to_contain_text("this server takes at most 8")
    page.fill("#n", "1")
    page.click("#generate")
    expect(page.locator("#status")).to_contain_text("Done")
    expect(page.locator("#error")).to_be_hidden()


def test_the_page_asks_for_a_key(browser: Any) -> None:
    with served(access=Access("sk-7")) as locked:
        for page in opened(browser, locked):
            expect(page.locator("#access")).to_be_visible()
            page.fill("#key", "sk-wrong")
            page.press("#key", "Enter")
            expect(page.locator("#error")).to_contain_text("wrong API key")
            page.fill("#key", "sk-7")
            page.press("#key", "Enter")
            fill(page, n=1, max_tokens=3)
            page.click("#generate")
            expect(page.locator("#status")).to_contain_text("Done")
            expect(page.locator("#access")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_color_schemes_are_readable_on_a_phone(browser: Any, server: Served, scheme: str) -> None:
    size = {"width": 390, "height": 800}
    for page in opened(browser, server, color_scheme=scheme, viewport=size):
        fill(page, n=2, max_tokens=30, seed=1, temperature=2)
        page.click("#generate")
        expect(page.locator("#status")).to_contain_text("Done")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.locator(".token").nth(3).hover()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]
        for selector in ("body", "article h2", "#model", ".prompt", ".token", "#generate"):
            assert contrast(page, selector) >= 4.5, selector


def contrast(page: Any, selector: str) -> float:
    """The contrast ratio of WCAG 2 between the text of an element and what is behind it."""
    text, *behind = page.locator(selector).first.evaluate(
        """element => {
            const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
            const found = [numbers(getComputedStyle(element).color)];
            for (let e = element; e; e = e.parentElement) found.push(numbers(getComputedStyle(e).backgroundColor));
            return found;
        }"""
    )
    color = [255.0, 255.0, 255.0]
    for layer in reversed(behind):
        alpha = layer[3] if len(layer) > 3 else 1.0
        color = [alpha * new + (1 - alpha) * old for new, old in zip(layer[:3], color, strict=True)]
    first, second = sorted((luminance(text[:3]), luminance(color)), reverse=True)
    return (first + 0.05) / (second + 0.05)


def luminance(color: list[float]) -> float:
    linear = [part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
