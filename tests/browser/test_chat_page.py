"""The chat page in a real browser, over a scripted engine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import serving
from tests.waiting import wait_for

pytestmark = pytest.mark.browser

TOK = Tokenizer.bytes_only()
ATTACK = '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>'


def answer(text: str) -> list[int]:
    marks = {"[": ["<|python_start|>"], "=": ["<|python_end|>", "<|output_start|>"]}
    marks["]"] = ["<|output_end|>"]
    tokens: list[int] = []
    for char in text:
        tokens += [TOK.special(m) for m in marks[char]] if char in marks else TOK.encode(char)
    return tokens


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient(answer("Hello there."), delay=0.002)


@pytest.fixture
def url(engine: ScriptedClient) -> Iterator[str]:
    with serving(build_app(engine, TOK, "tiny-d2", 2048)) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.goto(url)
    expect(page.get_by_label("model")).to_have_text("tiny-d2")
    yield page
    context.close()
    assert all(u.startswith((url, "data:")) for u in urls), "the page asked another host"
    # A refused request is reported by the browser itself; all else is a fault of the page.
    assert [p for p in problems if "Failed to load resource" not in p] == []


def say(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def wait_until_idle(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_conversation_goes_on(page: Page, engine: ScriptedClient) -> None:
    say(page, "hi")
    wait_until_idle(page)
    expect(page.locator(".assistant .text")).to_have_text("Hello there.")
    page.get_by_label("Your message").fill("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    wait_until_idle(page)
    assert "line one\nline two" in TOK.decode(engine.requests[1].prompt)
    assert "Hello there." in TOK.decode(engine.requests[1].prompt)
    expect(page.locator(".user")).to_have_count(2)
    page.reload()  # the conversation is kept
    expect(page.locator(".user")).to_have_count(2)
    page.get_by_role("button", name="Regenerate").click()
    wait_for(lambda: len(engine.requests) == 3)
    wait_until_idle(page)
    assert list(engine.requests[2].prompt) == list(engine.requests[1].prompt)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_text_is_never_html(page: Page, engine: ScriptedClient) -> None:
    engine.tokens = [t for c in ATTACK for t in TOK.encode(c)]
    say(page, ATTACK)
    wait_until_idle(page)
    expect(page.locator(".assistant .text")).to_have_text(ATTACK)
    expect(page.locator(".user p")).to_have_text(ATTACK)
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("by_key", [True, False])
def test_stop_frees_the_slot(page: Page, engine: ScriptedClient, by_key: bool) -> None:
    engine.tokens, engine.delay, engine.finish = answer("word " * 300), 0.02, None
    say(page, "go on")
    expect(page.locator(".assistant .text")).to_contain_text("word word")  # it streams
    if by_key:
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    wait_until_idle(page)
    expect(page.locator(".foot")).to_contain_text("stopped")
    wait_for(lambda: len(engine.aborts) == 1)
    expect(page.locator(".assistant .text")).to_contain_text("word")  # what came is kept


def test_settings_are_sent(page: Page, engine: ScriptedClient) -> None:
    page.get_by_role("button", name="Settings").click()
    for label, value in [
        ("Temperature", "0.3"),
        ("Top-k", "9"),
        ("Top-p", "0.8"),
        ("Max tokens", "5"),
        ("Seed", "42"),
        ("System prompt", "Be brief."),
    ]:
        page.get_by_label(label).fill(value)
    say(page, "hi")
    wait_until_idle(page)
    params = engine.requests[0].params
    assert (params.temperature, params.top_k, params.top_p) == (0.3, 9, 0.8)
    assert (params.max_tokens, params.seed) == (5, 42)
    assert "Be brief." in TOK.decode(engine.requests[0].prompt)
    expect(page.locator(".foot")).to_contain_text("cut at the token limit")
    page.reload()
    expect(page.locator("#temperature")).to_have_value("0.3")


def test_errors_are_shown_and_retried(page: Page, engine: ScriptedClient) -> None:
    engine.break_after = 3
    say(page, "hi")
    expect(page.get_by_role("alert")).to_contain_text("the engine was lost")
    engine.break_after = None
    page.get_by_role("button", name="Retry").click()
    wait_until_idle(page)
    expect(page.locator(".assistant .text")).to_have_text("Hello there.")
    say(page, "x" * 3000)
    expect(page.get_by_role("alert")).to_contain_text("maximum context length is 2048 tokens")


def test_page_asks_for_a_key(browser: Browser, engine: ScriptedClient) -> None:
    with serving(build_app(engine, TOK, "tiny-d2", 2048, keys=["secret"])) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("secret")
        say(page, "hi")
        expect(page.locator(".assistant .text")).to_have_text("Hello there.")
        page.close()
        assert httpx.get(f"{url}/v1/models").status_code == 401


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(browser: Browser, url: str, engine: ScriptedClient, scheme: str) -> None:
    engine.tokens = answer("a" * 200 + " wide")
    context = browser.new_context(
        viewport={"width": 360, "height": 640},
        has_touch=True,
        is_mobile=True,
        color_scheme=scheme,  # type: ignore[arg-type]
    )
    page = context.new_page()
    page.goto(url)
    page.get_by_label("Your message").fill("hi")
    page.get_by_role("button", name="Send").tap()
    wait_until_idle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.get_by_label("Your message").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 640
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", colour)[:3])) > 384
    assert light == (scheme == "light")
    context.close()


def test_calculator_and_picture(page: Page, engine: ScriptedClient) -> None:
    engine.tokens = answer("That is [47+38-9=76]76. You had 47, got 38 more, and gave 9 away.")
    say(page, "I have 47 marbles, find 38 and give 9 away. How many are left?")
    wait_until_idle(page)
    expect(page.locator(".calculator")).to_have_text("calculator47+38-9 = 76")
    expect(page.locator(".assistant .text").last).to_contain_text("76. You had 47")
    engine.tokens = answer(
        "A small language model, trained from raw text on this machine: first to continue text, "
        "then to talk. I am often wrong, but sums I do with a calculator."
    )
    say(page, "Who are you?")
    wait_until_idle(page)
    if picture := os.environ.get("CHAT_PICTURE"):  # the README's is made by this test
        page.set_viewport_size({"width": 880, "height": 560})
        page.get_by_label("Your message").blur()
        page.screenshot(path=picture)


def test_full_context_drops_oldest_turns(browser: Browser, engine: ScriptedClient) -> None:
    with serving(build_app(engine, TOK, "tiny-d2", 200)) as url:
        page = browser.new_page()
        page.goto(url)
        for i in range(8):
            say(page, f"question {i} is a little longer")
            wait_for(lambda n=i + 1: len(engine.requests) == n)
            wait_until_idle(page)
        divider = page.get_by_role("note")
        expect(divider).to_contain_text("no longer fit")
        expect(page.locator(".user")).to_have_count(8)
        text = TOK.decode(engine.requests[-1].prompt)
        assert "question 7" in text
        assert "question 6" in text
        assert "question 0" not in text
        page.reload()
        expect(divider).to_contain_text("no longer fit")
        page.get_by_role("button", name="New chat").click()
        expect(divider).to_have_count(0)
        page.close()


def test_suggestions_are_asked_with_a_click(browser: Browser, engine: ScriptedClient) -> None:
    texts = ["Who are you?", f"What is {ATTACK}?"]
    with serving(build_app(engine, TOK, "tiny-d2", 2048, suggestions=texts)) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#suggestions button")).to_have_text(texts)
        page.get_by_role("button", name=texts[0]).click()
        expect(page.locator(".turn.user")).to_have_text(texts[0])
        expect(page.locator(".turn.assistant")).to_contain_text("Hello there.")
        expect(page.locator("#suggestions")).to_have_count(0)
        assert page.evaluate("window.hacked") is None
        page.close()


def test_an_input_method_keeps_its_enter(page: Page, engine: ScriptedClient) -> None:
    """Chromium says isComposing; Safari says 229, the code of a key that an input method has."""
    page.get_by_label("Your message").fill("nihon")
    for fields in ("isComposing: true", "keyCode: 229"):
        keydown = f"new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true, {fields}}})"
        page.evaluate(f"document.getElementById('input').dispatchEvent({keydown})")
    expect(page.get_by_label("Your message")).to_have_value("nihon")
    assert not engine.requests


def test_an_answer_is_copied_without_a_clipboard_object(page: Page) -> None:
    """Browsers have none for a page over plain HTTP from another host."""
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.evaluate(
        "addEventListener('copy', () => { window.copied = document.activeElement.value; })"
    )
    say(page, "hi")
    wait_until_idle(page)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("window.copied") == "Hello there."
