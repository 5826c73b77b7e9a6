"""The page in a real browser: searches, comparisons, the keyboard, a phone. Needs the extra `browser` and a Chromium."""

import shutil
import threading

import pytest
import uvicorn

import moeret
from moeret.config import ServeConfig
from moeret.serving.app import make_app

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def urls(index_folder):
    """The addresses of a service without a key, and of one with the key `s3cret`."""
    retriever, running = moeret.Retriever.load(index_folder), []
    for key in (None, "s3cret"):
        app = make_app(retriever, ServeConfig(reload_every=0), key=key)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            thread.join(0.01)
        running.append((server, thread))
    yield [f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/" for server, _ in running]
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, urls):
    """A fresh page, which must ask no other host and put no error on its console."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, wrong = context.new_page(), []
    page.on("request", lambda request: request.url.startswith((*urls, "data:")) or wrong.append(request.url))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.wrong = wrong
    yield page
    context.close()


def search(page, query):
    page.get_by_label("Search for").fill(query)
    page.get_by_role("button", name="Search").click()
    page.get_by_text("hits from").wait_for()


def test_a_search_shows_hits_words_router_and_times(page, urls, index_folder):
    page.goto(urls[0])
    search(page, "find the metal nick10")
    expected = [hit.id for hit in moeret.Retriever.load(index_folder).search("find the metal nick10")]
    assert page.locator(".hits li").evaluate_all("items => items.map((own) => own.dataset.id)") == expected
    assert {word.lower() for word in page.locator("mark").all_inner_texts()} == {"metal"}
    assert "metal" in page.locator(".router .chosen .name").all_inner_texts()
    assert page.locator(".times .bars li").count() == 4
    assert page.url.endswith("?q=find+the+metal+nick10")
    page.reload()
    page.get_by_text("hits from").wait_for()
    assert page.get_by_label("Search for").input_value() == "find the metal nick10"
    assert not page.get_by_label("key", exact=True).is_visible()
    assert page.wrong == []


def test_other_experts_are_compared_side_by_side(page, urls):
    page.goto(urls[0])
    search(page, "gold and silver")
    for other in ("base", "fruit"):
        page.get_by_label("compare with").select_option(other)
        page.locator(f'.column[data-route="{other}"] article').first.wait_for()
        boxes = [own.bounding_box() for own in page.locator(".column").all()]
        assert len(boxes) == 2 and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert set(page.locator('.column[data-route="fruit"] .badge').all_inner_texts()) == {"fruit"}
    assert page.wrong == []


def test_the_keyboard_is_enough(page, urls):
    page.goto(urls[0])
    page.keyboard.type("gold and silver")
    page.keyboard.press("Enter")
    page.get_by_text("hits from").wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    focused = "document.querySelectorAll('article')[1] === document.activeElement"
    assert page.evaluate(focused)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("/")
    page.keyboard.type("kiwi")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?q=kiwi")


def test_what_is_wrong_is_said(page, urls):
    page.goto(urls[0])
    page.get_by_label("filter").fill("{year")
    page.get_by_label("Search for").fill("gold")
    page.keyboard.press("Enter")
    page.get_by_text("The filter must be JSON").wait_for()
    page.get_by_label("filter").fill('{"year": {"above": 3}}')
    page.get_by_role("button", name="Search").click()
    page.locator("#status.wrong", has_text="above").wait_for()
    page.get_by_label("filter").fill('{"year": 3}')
    page.get_by_role("button", name="Search").click()
    page.get_by_text("Nothing found.").wait_for()


def test_text_is_text_and_never_markup(page, urls):
    page.goto(urls[0])
    search(page, "<img src=x onerror=alert(1)> gold")
    assert page.locator("img").count() == 0
    assert page.wrong == []


def test_a_key_is_asked_for_and_kept_for_the_session(page, urls):
    page.goto(urls[1])
    page.get_by_label("key", exact=True).fill("s3cret")
    page.get_by_label("Search for").fill("gold")
    page.keyboard.press("Enter")
    page.get_by_text("hits from").wait_for()
    assert page.get_by_label("compare with").locator("option").count() > 2
    page.reload()
    page.get_by_text("hits from").wait_for()


def test_it_fits_a_phone(browser, urls):
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(f"{urls[0]}?q=gold+and+silver&with=base")
    page.get_by_text("hits from").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    first, second = (own.bounding_box() for own in page.locator(".column").all())
    assert second["y"] > first["y"] + first["height"] - 1
    context.close()


def test_the_openapi_page_works_without_another_host(page, urls):
    page.goto(f"{urls[0]}docs")
    page.get_by_text("/v1/embeddings").first.wait_for()
    assert page.wrong == []
