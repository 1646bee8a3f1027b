"""Tests the page of `heliostat model play` in a real browser: the answer appears as it is written, on a wide screen and a phone.

Debian: chromium, chromium-driver; pip: heliostat[browser-test]. Pictures go to HELIOSTAT_SCREENSHOTS, or pytest's folder.
"""

import pytest
import transformers

from tests.integration.browser import MISSING, loaded, picture, screen, shots
from tests.integration.endpoint import TEMPLATE
from tests.unit.build_document_index import CORPUS, index, write_dataset
from tests.unit.page import KEY, client, opened
from tests.unit.test_filling import PREFIX, SUFFIX, export
from tests.unit.test_infilling import KEYS as ARRANGED
from tests.unit.test_infilling import make, pages, published  # noqa: F401 (a fixture)
from tests.unit.test_play import painter  # noqa: F401 (a fixture)
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

SIZES = [(1280, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def able(pages, tmp_path_factory):  # noqa: F811
    """Returns the URL of a page with a model for fill-in-the-middle and chat, and with an index."""
    folder = tmp_path_factory.mktemp("able")
    export(folder / "coder", published(pages, "of play", make(pages, "of play", keys=ARRANGED)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "coder")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "coder")
    index(write_dataset(folder / "data", CORPUS), folder / "code-index")
    with opened(folder / "coder", folder / "code-index", max_tokens=200) as url:
        yield url


@pytest.fixture
def open_(request, tmp_path):
    """Opens a page on a screen of this width, light or dark. At the end, takes a picture, and checks that no error occurred in
    it."""
    screens = []

    def look(url: str, width: int, scheme: str) -> Screen:
        screens.append(Screen(url, width, scheme))
        return screens[-1]

    yield look
    for number, one in enumerate(screens):
        try:
            picture(one.driver, shots(tmp_path) / f"{request.node.name}-{number}.png")
            assert not [name for name in loaded(one.driver) if not name.startswith(one.url.partition("#")[0])]
        finally:
            one.driver.quit()


class Screen:
    """Provides a browser, and the actions of a person in it."""

    def __init__(self, url: str, width: int, scheme: str) -> None:
        self.driver, self.url = screen(width, scheme), url
        self.driver.get(url)

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def until(self, condition):
        return until(condition, "such page", 60, said=lambda: self.one("body").text)

    def tabs(self) -> list[str]:
        self.until(lambda: self.all("[role=tab]"))
        return [tab.text for tab in self.all("[role=tab]")]

    def fill(self, section: str, **values) -> None:
        for name, value in values.items():
            field = self.one(f"#{section} [name={name}]")
            if field.tag_name == "select" or field.get_attribute("type") == "range":
                script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
                self.driver.execute_script(script, field, value)
            else:
                field.clear()
                field.send_keys(value)

    def go(self, section: str) -> None:
        self.one(f"#{section} .go").click()

    def done(self, section: str) -> None:
        self.until(lambda: self.one(f"#{section} .go").is_enabled())

    def error(self, section: str) -> str:
        return self.until(lambda: self.one(f"#{section} .error").text)


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_a_model_writes_completes_and_chats(able, open_, width, scheme):
    screen = open_(f"{able}/#key={KEY}", width, scheme)
    assert screen.tabs() == ["Write", "Complete", "Chat", "Ask"] and KEY not in screen.driver.current_url
    said = screen.one("#about").text
    assert "Continues a text, completes code, chats, answers from documents" in said and "draw" not in said.lower()
    given = screen.one("#write [name=prompt]")
    assert given.get_attribute("value") == given.get_attribute("placeholder")
    screen.fill("write", prompt="def mean", seed="7", max_tokens="40", temperature="0.9", top_p="1")
    screen.go("write")
    asked = {"model": "coder", "seed": 7, "max_tokens": 40, "temperature": 0.9, "top_p": 1}
    expected = client(able).completions.create(**asked, prompt="def mean").choices[0].text
    screen.done("write")
    assert screen.one("#write .made").get_attribute("textContent") == expected
    assert "seed 7" in screen.one("#write .facts").text and "tokens in" in screen.one("#write .facts").text
    screen.one("#tab-complete").click()
    screen.fill("complete", prefix=PREFIX, suffix=SUFFIX, seed="7", max_tokens="9", temperature="0")
    screen.go("complete")
    screen.until(lambda: screen.one("#complete .facts").text)
    shown = screen.one("#complete .result pre").get_attribute("textContent")
    middle = client(able).completions.create(model="coder", prompt=PREFIX, suffix=SUFFIX, max_tokens=9, temperature=0)
    assert shown == PREFIX + middle.choices[0].text + SUFFIX
    screen.one("#tab-chat").click()
    screen.fill("chat", seed="3", max_tokens="9", system="Be brief.", message="Hello\n")
    screen.until(lambda: screen.all("#chat .assistant .facts") and screen.one("#chat .assistant .facts").text)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    told = client(able).chat.completions.create(
        model="coder", messages=messages, seed=3, max_tokens=9, temperature=0.8, top_p=0.95
    )
    assert screen.one("#chat .assistant .made").get_attribute("textContent") == told.choices[0].message.content
    assert not screen.driver.get_log("browser")  # neither an error, nor something that the page's policy refused


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_an_index_answers_with_its_sources(able, open_, width, scheme):
    screen = open_(f"{able}/#key={KEY}", width, scheme)
    screen.tabs()
    screen.one("#tab-ask").click()
    screen.fill("ask", question="line 7 of a long document", top="3", max_tokens="9")
    screen.go("ask")
    screen.done("ask")
    question = [{"role": "user", "content": "line 7 of a long document"}]
    told = client(able).chat.completions.create(model="code-index", messages=question, max_tokens=9, extra_body={"top": 3})
    assert screen.one("#ask .made").get_attribute("textContent") == told.choices[0].message.content.lstrip()
    assert [place.text for place in screen.all("#ask .source h3")] == [
        f"[{number}] {source['document']}" for number, source in enumerate(told.sources, 1)
    ]
    assert [place.get_attribute("textContent") for place in screen.all("#ask .source .text")] == [
        source["text"].strip() for source in told.sources
    ]
    screen.fill("ask", question="zzzzqqq")
    screen.go("ask")
    assert "no passage of the index" in screen.error("ask")


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_a_model_draws_a_grid_from_seeds(painter, open_, width, scheme):  # noqa: F811
    with opened(painter) as url:
        screen = open_(f"{url}/#key={KEY}", width, scheme)
        assert screen.tabs() == ["Draw"]
        screen.fill("draw", prompt="the digit two", steps="2", count="8", seed="5")
        screen.go("draw")
        screen.done("draw")
        assert [c.text.splitlines()[0].removesuffix(" save") for c in screen.all("#draw figcaption")] == [
            f"seed {n}" for n in range(5, 13)
        ]
        asked = {"steps": 2, "seed": 5, "guidance": float(screen.one("#draw [name=guidance]").get_attribute("value"))}
        drawn = client(url).images.generate(model=painter.name, prompt="the digit two", n=4, extra_body=asked)
        assert [image.get_attribute("src").partition(",")[2] for image in screen.all("#draw img")][:4] == [
            one.b64_json for one in drawn.data
        ]
        assert not screen.driver.get_log("browser")
        screen.fill("draw", width="64")
        screen.go("draw")
        assert "at most 4 times as many pixels" in screen.error("draw")


def test_an_answer_is_seen_while_it_is_written_and_can_be_stopped(able, open_):
    def tokens(prompt: str) -> int:
        asked = {"model": "coder", "temperature": 0, "max_tokens": 200, "prompt": prompt}
        return client(able).completions.create(**asked).usage.completion_tokens

    prompt = next(one for one in ("def", "class", "a", "import", "for x in", "return", "b", "c", "d") if tokens(one) > 150)
    screen = open_(f"{able}/#key={KEY}", 1280, "light")
    screen.tabs()
    screen.fill("write", prompt=prompt, max_tokens="200", temperature="0")
    script = """
        const [made, seen] = [document.querySelector("#write .made"), new Set()];
        window.seen = seen;
        new MutationObserver(() => seen.add(made.textContent.length)).observe(made, {childList: true, characterData: true});
    """
    screen.driver.execute_script(script)
    screen.go("write")
    screen.until(lambda: screen.driver.execute_script("return window.seen.size") > 3)
    screen.one("#write .stop").click()
    screen.done("write")
    assert screen.one("#write .facts").text.startswith("stopped")
    assert not screen.one("#write .error").is_displayed()
    screen.fill("write", max_tokens="9")
    screen.go("write")  # the next is answered
    screen.until(lambda: "9 tokens" in screen.one("#write .facts").text)


def test_without_its_key_the_page_asks_for_it_and_says_what_is_wrong(able, open_):
    screen = open_(f"{able}/", 390, "light")
    screen.until(lambda: screen.one("#door").is_displayed())
    assert not screen.all("[role=tab]") and not screen.one("#door .error").is_displayed()
    screen.one("#door input").send_keys("sk-a-key-of-nobody-here\n")
    assert screen.error("door") == "unknown API key. Use a key from the server's --keys file"
    screen.one("#door input").clear()
    screen.one("#door input").send_keys(f"{KEY}\n")
    assert screen.tabs() and not screen.one("#door").is_displayed()
    screen.driver.refresh()
    assert screen.tabs()  # the tab of the browser keeps the key
