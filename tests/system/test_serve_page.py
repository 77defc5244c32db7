"""The page in a real browser: it streams, shades, is used by keyboard, and survives the death of the rank that served it."""

import contextlib
import re
import shutil
import signal
import urllib.parse

import httpx
import pytest
from helpers.model_folders import make, make_kind
from helpers.server import SURVIVES, Server
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with its chromedriver")
QUIET = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for name in (*QUIET, f"user-data-dir={tmp_path}/profile"):
        options.add_argument(f"--{name}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.set_page_load_timeout(30)
    yield browser
    browser.quit()


class Page:
    """The page as a person sees it."""

    def __init__(self, browser, server):
        self.browser = browser
        browser.get(f"{server.url}/")
        self.until(lambda: "2 ranks" in self["pulse"].text, "two ranks")

    def __getitem__(self, name):
        return self.browser.find_element(By.ID, name)

    def until(self, condition, what, limit=30):
        WebDriverWait(self.browser, limit, 0.05).until(lambda _: condition(), f"no {what}")

    def fill(self, **values):
        for name, value in values.items():
            self[name].clear()
            self[name].send_keys(str(value))

    def tokens(self):
        return self.browser.execute_script(
            "return [...document.querySelectorAll('.token')].map(one => [one.textContent, one.className])"
        )

    def is_busy(self):
        return self["text"].get_attribute("aria-busy") == "true"


def test_the_page_streams_a_text_and_shades_it(world, browser):
    with Server(world / "run", "--max-tokens", 10**5, ranks=2) as server:
        page = Page(browser, server)
        assert page["model"].text == "run"
        page.fill(prompt="To be", max_tokens=40, seed=5)
        page["prompt"].send_keys(Keys.CONTROL, Keys.ENTER)
        page.until(lambda: len(page.tokens()) == 40 and not page.is_busy(), "forty tokens")
        answer = server.complete(max_tokens=40, seed=5, temperature=0.8, top_p=0.95).json()
        assert "".join(text for text, _ in page.tokens()) == answer["choices"][0]["text"]
        assert len({shade for _, shade in page.tokens()}) > 1
        assert re.match(r"rank [01], 40 tokens, \d+ a second", page["state"].text)
        page["text"].send_keys(Keys.ARROW_RIGHT)
        rows = page["detail"].find_elements(By.TAG_NAME, "tr")
        assert 5 <= len(rows) <= 6
        assert len(page["detail"].find_elements(By.CLASS_NAME, "chosen")) == 1
        assert len(page["ranks"].find_elements(By.TAG_NAME, "tr")) == 2
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

        page.fill(max_tokens=90_000)
        page["run"].click()
        page.until(lambda: len(page.tokens()) > 20, "a beginning")
        page["prompt"].send_keys(Keys.ESCAPE)
        page.until(lambda: not page.is_busy(), "a stop")
        assert "stopped" in page["state"].text
        server.until(lambda: not any(rank["active"] for rank in server.health()["ranks"]), "an end of the stream", 10)

        page.fill(prompt="\u20ac", max_tokens=5)  # which the vocabulary lacks
        page["run"].click()
        page.until(lambda: "not in the vocabulary" in page["notes"].text, "reason")


def test_whoever_looks_at_several_models_chooses_one(tmp_path, browser):
    for name, hidden in (("small", 18), ("large", 30)):
        make(tmp_path / name, hidden=hidden)
    make_kind(tmp_path / "classes", {"kind": "classifier"})
    with Server([tmp_path / "small", tmp_path / "classes", tmp_path / "large"], ranks=2) as server:
        page = Page(browser, server)
        assert page["model"].text == "small, classes, large"
        assert page["which"].is_displayed()
        for name in ("large", "small"):
            Select(page["asked"]).select_by_visible_text(name)
            page.fill(prompt="bcd", max_tokens=30, seed=5)
            page["run"].click()
            page.until(lambda: len(page.tokens()) == 30 and not page.is_busy(), "thirty tokens")
            answer = server.complete("bcd", model=name, max_tokens=30, seed=5, temperature=0.8, top_p=0.95).json()
            assert "".join(text for text, _ in page.tokens()) == answer["choices"][0]["text"]
        assert [one.text for one in Select(page["asked"]).options] == ["small", "large"]
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_fits_a_phone_in_light_and_dark_and_asks_nobody_else(world, browser):
    with Server(world / "run", ranks=2) as server:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        page, run = Page(browser, server), browser.execute_script
        assert run("return document.documentElement.scrollWidth") <= 390
        asked = run("return performance.getEntriesByType('resource').map(one => one.name)")
        assert {urllib.parse.urlsplit(one).netloc for one in asked} == {urllib.parse.urlsplit(server.url).netloc}
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            ink, paper = (run(f"return getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
            is_light = lambda colour: sum(map(int, re.findall(r"\d+", colour)[:3])) > 384
            assert (is_light(ink), is_light(paper)) == (scheme == "dark", scheme == "light")
        labels = {label.get_attribute("for") for label in browser.find_elements(By.TAG_NAME, "label")}
        assert {one.get_attribute("id") for one in browser.find_elements(By.CSS_SELECTOR, "input, textarea, select")} == labels
        assert page["prompt"] == browser.switch_to.active_element
        policy = httpx.get(f"{server.url}/").headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


@pytest.mark.skipif(not SURVIVES, reason="all ranks die with one under MPICH")
def test_the_page_survives_the_death_of_the_rank_that_served_it(world, browser):
    with Server(world / "run", "--max-tokens", 10**6, ranks=2) as server:
        page, pids = Page(browser, server), server.alive()
        page.fill(prompt="To be", max_tokens=90_000)
        page["run"].click()
        page.until(lambda: len(page.tokens()) > 20, "a beginning")
        rank = int(re.match(r"rank (\d)", page["state"].text)[1])
        server.signal(signal.SIGKILL, [pids[rank]])
        page.until(lambda: f"Rank {1 - rank} goes on from there." in page["notes"].text, "other rank")
        assert f"Rank {rank} was lost after" in page["notes"].text
        count = len(page.tokens())
        page.until(lambda: len(page.tokens()) > count + 20, "more tokens")
        with contextlib.suppress(Exception):
            page["prompt"].send_keys(Keys.ESCAPE)
        page.until(lambda: "1 rank," in page["pulse"].text, "one rank")
