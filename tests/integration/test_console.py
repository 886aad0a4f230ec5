"""The console in a browser: real dispatcher, Prometheus, node exporter, nginx (with the rendered
configuration) and Chromium."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Response, expect, sync_playwright

from rave_dispatcher.adapters.console import parts
from rave_dispatcher.adapters.store.sqlite import EventStore
from rave_dispatcher.config import Console
from tests import console, dispatcher
from tests.console import PASSWORD, USER, Site

CHROMIUM = "/usr/bin/chromium-headless-shell"
BUDGET = 200_000  # bytes that a first visit may load
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
CSP = {
    "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'",
    "img-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
}  # fmt: skip
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 360, "height": 740}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="asks as other users")
expect.set_options(timeout=60_000)  # a host that has other tests to run may need some of it


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with console.running(tmp_path_factory.mktemp("site")) as made:
        post(made, "Fix the login form")
        post(made, HOSTILE, project="<b>team</b>")
        made.dispatcher.hook(b'{"repository": {"full_name": "team/infra"}}')
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # it is root here, and shows nothing but what this test serves
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def post(site: Site, title: str, project: str = "team/shop") -> None:
    body = json.dumps({"title": title, "repository": {"full_name": project}}).encode()
    headers = dispatcher.github(body, event="issues")
    assert site.dispatcher.request("POST", "/webhooks/github", body, headers).status == 202


# --- without a browser --------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("console", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(15)
        self.sock.connect(str(self.path))


def ask(site: Site, path: str, method: str = "GET", **headers: str) -> dispatcher.Answer:
    """A request as nginx makes it, past nginx."""
    connection = UnixConnection(site.socket)
    with contextlib.closing(connection):
        connection.request(
            method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        response = connection.getresponse()
        found = {k.lower(): v for k, v in response.getheaders()}
        return dispatcher.Answer(response.status, found, response.read())


def through_nginx(
    site: Site, path: str, method: str = "GET", password: str | None = PASSWORD
) -> dispatcher.Answer:
    context = ssl.create_default_context(cafile=str(site.folder / "cert"))
    context.check_hostname = False
    connection = http.client.HTTPSConnection("localhost", site.ports["nginx"], context=context)
    headers = {}
    if password is not None:
        headers["Authorization"] = (
            "Basic " + base64.b64encode(f"{USER}:{password}".encode()).decode()
        )
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        found = {k.lower(): v for k, v in response.getheaders()}
        return dispatcher.Answer(response.status, found, response.read())


PATHS = ("/", "/console/status", "/console/console.js", f"/console/traces/{'a' * 32}")


@pytest.mark.parametrize("path", PATHS)
def test_the_port_that_agents_reach_does_not_have_it(site: Site, path: str) -> None:
    for headers in ({}, dispatcher.AUTH, {"Authorization": "Basic cmF2ZTp4"}):
        assert site.dispatcher.get(path, headers).status == 404


def test_other_users_cannot_open_its_socket(site: Site) -> None:
    script = f"import socket; socket.socket(socket.AF_UNIX).connect({str(site.socket)!r})"
    # where it is, others may look: only the socket itself is in their way
    for folder in (site.folder, *site.folder.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    for user, refused in (("root", False), ("nobody", True)):
        done = subprocess.run(
            ["/usr/bin/python3", "-c", script], user=user, capture_output=True, text=True,
            check=False, cwd="/",
        )  # fmt: skip
        assert ("PermissionError" in done.stderr) is refused, done.stderr
        assert (done.returncode != 0) is refused


@pytest.mark.parametrize("path", [*PATHS, "/console/down/index.html", "/console/nothing"])
def test_nothing_of_it_is_seen_without_signing_in(site: Site, path: str) -> None:
    for password in (None, "wrong"):
        found = through_nginx(site, path, password=password)
        assert found.status == 401
        assert b"unit" not in found.body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_reads(site: Site, method: str) -> None:
    for path in PATHS:
        assert through_nginx(site, path, method).status == 405


def test_what_is_not_there_is_told(site: Site) -> None:
    for path in ("/console/", "/console/../x", "/console/traces/x", "/console/index.html",
                 f"/console/traces/{'0' * 32}", "/console/status/x", "/console/%00"):  # fmt: skip
        assert ask(site, path).status == 404, path
    assert ask(site, "/console/status?period=7d").status == 400
    assert ask(site, "/console/status?query=up").status == 400


@pytest.mark.parametrize("path", ["/", "/console/status", "/console/style.css"])
def test_headers(site: Site, path: str) -> None:
    found = through_nginx(site, path)
    assert found.status == 200
    policies = found.headers["content-security-policy"].split(", ")
    assert [dict(p.split(" ") for p in policy.split("; ")) for policy in policies] == [CSP]
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in found.headers
    assert "no-" in found.headers["cache-control"]
    assert "unsafe" in through_nginx(site, "/ccr/x").headers["content-security-policy"]


def test_no_secret_is_in_what_it_says(site: Site) -> None:
    texts = [ask(site, path).body for path in ("/", "/console/status", "/console/console.js")]
    for secret in (dispatcher.TOKEN.encode(), dispatcher.GITHUB, dispatcher.GITLAB):
        assert not any(secret in text for text in texts)


def status(site: Site, period: str = "1h") -> Any:
    return ask(site, f"/console/status?period={period}").json()


def until(get: Callable[[], Any], holds: Callable[[Any], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not holds(found := get()):
        assert time.monotonic() < end, found
        time.sleep(0.3)
    return found


def test_units_and_alerts_are_prometheus(site: Site) -> None:
    def holds(found: Any) -> bool:
        rows = found["prometheus"]["alerts"]["rows"]
        return bool(rows) and rows[0]["state"] == "firing"

    found = until(lambda: status(site), holds)["prometheus"]
    assert found["units"]["error"] is found["alerts"]["error"] is None
    states = {u["unit"]: u["state"] for u in found["units"]["rows"]}
    assert states == {
        s.unit["debian"]: "not running" if s.unit["debian"] == console.STOPPED else "active"
        for s in console.PLAN.services
    }
    first, second = found["alerts"]["rows"]
    assert (first["name"], first["severity"]) == ("ServiceDown", "critical")
    assert (second["name"], second["state"]) == ("DiskFilling", "pending")


@pytest.mark.parametrize("period", ["15m", "1h", "6h", "24h"])
def test_every_chart_has_its_data_and_gaps_where_there_is_none(site: Site, period: str) -> None:
    found = status(site, period)["charts"]
    charts = {c["key"]: c for c in found["charts"]}
    assert {c["error"] for c in charts.values()} == {None}
    names = {key: [s["name"] for s in c["series"]] for key, c in charts.items()}
    assert names == {
        "cpu": ["used"], "memory": ["used"], "disk": ["used"], "requests": ["2xx", "4xx", "5xx"],
        "latency": ["p99", "median"], "queue": ["waiting", "running", "events"],
        "outcomes": ["succeeded", "failed", "cancelled"],
    }  # fmt: skip
    memory = charts["memory"]["series"][0]["values"]
    ago = round(750 / found["step"])  # seconds: within the history, before this run
    assert memory[-1 - ago] == console.HISTORY_MEMORY
    if period in ("6h", "24h"):  # the history begins an hour and a half ago
        assert memory[0] is None
        assert charts["requests"]["series"][0]["values"][0] is None


def test_the_same_again_is_not_sent_again(site: Site) -> None:
    def twice() -> tuple[int, int]:
        first = ask(site, "/console/status?period=24h")
        return first.status, ask(
            site, "/console/status?period=24h", If_None_Match=first.headers["etag"]
        ).status

    until(twice, lambda found: found == (200, 304))
    page = ask(site, "/")
    assert ask(site, "/", If_None_Match=f'W/{page.headers["etag"]}, "x"').status == 304
    assert ask(site, "/", If_None_Match='"x"').status == 200
    head = ask(site, "/", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) == len(page.body)


def test_memory_stays_flat_however_often_it_is_asked(site: Site) -> None:
    assert site.dispatcher.process is not None
    about = Path(f"/proc/{site.dispatcher.process.pid}/status")

    def resident() -> float:
        return int(re.findall(r"VmRSS:\s+(\d+) kB", about.read_text())[0]) / 1024

    connection = UnixConnection(site.socket)
    with contextlib.closing(connection):

        def many(count: int) -> None:
            for i in range(count):
                connection.request("GET", f"/console/status?period={('1h', '6h', '24h')[i % 3]}")
                response = connection.getresponse()
                assert response.status == 200
                response.read()

        many(300)
        before = resident()
        many(2000)
        assert resident() - before < 3  # MB


def test_memory_stays_flat_however_often_it_is_made(site: Site, tmp_path: Path) -> None:
    """The same for what is made anew, at most every second: as often as in some minutes."""

    async def work() -> int:
        store = await EventStore.open(tmp_path / "events.db", 0)
        config = Console.model_validate(
            {**site.dispatcher.config["console"], "prometheus": site.prometheus}
        )
        made = parts.Parts(config, store, list)
        charts = made._charts_of("1h")

        async def many(count: int) -> int:
            for _ in range(count):
                for make in (made._make_feed, made._make_state, charts):
                    assert len(await make()) > 30
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = await many(20)
            return await many(80) - before
        finally:
            tracemalloc.stop()
            await store.close()

    assert asyncio.run(work()) < 50_000  # bytes; one answer alone is more


# --- in a browser -------------------------------------------------------------------------------


@dataclass
class View:
    """A page, and everything that went wrong on it."""

    page: Page
    troubles: list[str] = field(default_factory=list)
    loaded: dict[str, int] = field(default_factory=dict)

    def console(self, message: ConsoleMessage) -> None:
        self.troubles.append(f"{message.type}: {message.text}")

    def response(self, response: Response) -> None:
        # a 304 and a page that went away have no body
        with contextlib.suppress(Exception):
            self.loaded.setdefault(response.url, len(response.body()))

    def row(self, table: str, text: str) -> Any:
        return self.page.locator(f"#{table} tr", has_text=text)


@contextlib.contextmanager
def view(
    browser: Browser, site: Site, *, path: str = "/", wait: bool = True, clean: bool = True,
    **context: Any,
) -> Iterator[View]:  # fmt: skip
    """The console in a fresh browser profile; with `clean`, nothing may be complained about."""
    credentials = {"username": USER, "password": PASSWORD}
    made = browser.new_context(
        ignore_https_errors=True, http_credentials=credentials,
        **{"viewport": WIDE, **context},
    )  # fmt: skip
    try:
        found = View(made.new_page())
        found.page.on("console", found.console)
        found.page.on("pageerror", lambda e: found.troubles.append(str(e)))
        found.page.on("response", found.response)
        found.page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.blockedURI))"
        )
        found.page.goto(site.url + path)
        if wait:
            expect(found.page.locator("#tasks tr").first).to_be_visible()
            expect(found.page.locator("#chart-cpu canvas")).to_be_visible()
        yield found
        if clean:
            assert found.troubles == []
    finally:
        made.close()


def test_it_shows_what_there_is_and_complains_of_nothing(browser: Browser, site: Site) -> None:
    with view(browser, site) as v:
        expect(v.page.get_by_role("heading", level=1)).to_contain_text("rave-safe")
        expect(v.page.locator("#verdict")).to_contain_text("1 unit down")
        expect(v.page.locator("#verdict")).to_contain_text("1 alert firing")
        assert v.page.title() == "(!) rave-safe console"
        assert v.page.locator("#units li").count() == len(console.PLAN.services)
        expect(v.page.locator("#units li", has_text=console.STOPPED)).to_contain_text("not running")
        assert v.page.locator("figure canvas").count() == 7
        expect(v.page.locator("#freshness")).to_contain_text("Live")
        for name in ("Vibe Kanban", "Claude Code Router", "Health"):
            expect(v.page.get_by_role("navigation").get_by_role("link", name=name)).to_be_visible()
        v.page.wait_for_timeout(1500)
        inked = v.page.evaluate(
            """[...document.querySelectorAll('figure canvas')].map((c) =>
            c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((x) => x))"""
        )
        assert inked == [True] * 7
        files = {u: n for u, n in v.loaded.items() if "/console/status" not in u}
        assert len(files) == 9
        assert sum(v.loaded.values()) < BUDGET, v.loaded


INK = """() => { const c = document.querySelector('#chart-memory canvas');
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;
  for (let i = 0; i < d.length; i += 4) n += d[i + 3] > 200 && d[i + 2] - d[i] > 150;
  return n; }"""


@pytest.mark.parametrize("places", [(), (60,), (10, 60)])
def test_a_value_without_neighbours_is_seen(
    browser: Browser, site: Site, places: tuple[int, ...]
) -> None:
    """As on a machine that just started: a line needs two points."""
    document = status(site)
    values = document["charts"]["charts"][1]["series"][0]["values"]
    values[:] = [50.0 if i in places else None for i in range(len(values))]
    with view(browser, site, wait=False, clean=False) as v:
        v.page.route("**/console/status*", lambda route: route.fulfill(json=document))
        v.page.reload()
        expect(v.page.locator("#chart-memory canvas")).to_be_visible()
        v.page.wait_for_timeout(500)
        blue = v.page.evaluate(INK)
        assert (blue > 3 * len(places)) if places else blue == 0


def test_what_senders_and_rules_wrote_is_text(browser: Browser, site: Site) -> None:
    with view(browser, site) as v:
        row = v.row("tasks", "onerror")
        expect(row).to_contain_text(HOSTILE)
        expect(row).to_contain_text("<b>team</b>")
        expect(v.row("events", "<b>team</b>")).to_be_visible()
        expect(v.page.locator("#alerts")).to_contain_text("<img src=x onerror=alert(1)>")
        assert "owned" not in v.page.title()
        assert v.page.locator("main img, main script, main b").count() == 0


def test_inline_code_would_not_run(browser: Browser, site: Site) -> None:
    """The policy works: what gets into the page as HTML all the same does nothing."""
    with view(browser, site, clean=False) as v:
        v.page.evaluate(
            """() => { const d = document.createElement('div'); document.body.append(d);
            d.innerHTML = '<img src=x onerror="document.title=1" style="color:red">';
            const s = document.createElement('script'); s.textContent = 'document.title=1';
            document.body.append(s); }"""
        )
        v.page.wait_for_timeout(300)
        assert v.page.title() != "1"
        assert any("CSP" in t for t in v.troubles)


def test_a_trace_opens_and_closes_by_keyboard(browser: Browser, site: Site) -> None:
    with view(browser, site) as v:
        link = v.row("tasks", "Fix the login form").get_by_role("link", name="Trace of task")
        link.focus()
        v.page.keyboard.press("Enter")
        dialog = v.page.get_by_role("dialog", name="Trace")
        expect(dialog).to_be_visible()
        spans = dialog.locator("tbody tr")
        expect(spans).to_have_count(3)
        names = [spans.nth(i).locator(".span-name").inner_text() for i in range(3)]
        assert names == ["POST /webhooks/{source}", "event", "task"]
        ends = [spans.nth(i).locator(".bar-of").bounding_box() for i in range(3)]
        lefts = [box["x"] for box in ends if box]
        assert lefts == sorted(lefts)
        assert len(set(lefts)) == 3
        for _ in range(3):  # focus stays inside
            v.page.keyboard.press("Tab")
            assert v.page.evaluate("document.activeElement.closest('dialog') !== null")
        v.page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        expect(link).to_be_focused()
        expect(v.page).to_have_url(re.compile("^[^#]*$"))
        expect(v.row("tasks", "Fix the login form")).to_contain_text("ravectl task logs ")


def test_an_address_opens_a_trace_and_says_when_there_is_none(browser: Browser, site: Site) -> None:
    trace = status(site)["dispatcher"]["events"][0]["trace_id"]
    with view(browser, site, path=f"/#trace={trace}") as v:
        expect(v.page.locator("#spans tr").first).to_be_visible()
        v.page.get_by_role("button", name="Close").click()
        expect(v.page.get_by_role("dialog")).to_be_hidden()
    with view(browser, site, path=f"/#trace={'0' * 32}", clean=False) as v:
        expect(v.page.locator("#trace-note")).to_contain_text("no span is kept")


def test_what_comes_in_shows_without_a_reload_and_focus_stays(browser: Browser, site: Site) -> None:
    with view(browser, site) as v:
        link = v.row("tasks", "Fix the login form").get_by_role("link", name="Trace of task")
        link.focus()
        post(site, "It came while the page was open")
        expect(v.row("tasks", "It came while the page was open")).to_be_visible()
        expect(link).to_be_focused()


def test_charts_are_read_by_keyboard_and_as_tables(browser: Browser, site: Site) -> None:
    with view(browser, site) as v:
        figure = v.page.locator("#chart-memory")
        plot = figure.get_by_role("img")
        expect(plot).to_have_attribute("aria-label", re.compile(r"^Memory, last 1h: used now \d"))
        plot.focus()
        for key in ("Home", "ArrowRight", "PageDown", "ArrowLeft"):
            v.page.keyboard.press(key)
        expect(figure.locator("[aria-live]")).to_have_text(
            re.compile(rf"^\d\d:\d\d: used {console.HISTORY_MEMORY:g} %$")
        )
        figure.locator("summary").focus()
        v.page.keyboard.press("Enter")
        table = figure.get_by_role("table")
        expect(table.locator("tbody tr")).to_have_count(121)
        expect(table.get_by_role("cell", name="41 %").first).to_be_visible()
        v.page.get_by_role("radio", name="1h").focus()
        v.page.keyboard.press("ArrowRight")
        expect(plot).to_have_attribute("aria-label", re.compile("last 6h"))
        expect(v.page.get_by_role("radio", name="6h")).to_be_checked()
        expect(table.get_by_role("cell", name="\N{EN DASH}").first).to_be_attached()


def test_the_tab_order_begins_with_a_way_past_the_head(browser: Browser, site: Site) -> None:
    with view(browser, site) as v:
        v.page.keyboard.press("Tab")
        expect(v.page.get_by_role("link", name="Skip to the content")).to_be_focused()
        v.page.keyboard.press("Enter")
        expect(v.page.locator("main")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_axe_finds_nothing(browser: Browser, site: Site, scheme: str, size: Any) -> None:
    """Names, roles, order of headings, contrast of AA: on the page, on a table, in the dialog."""
    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    with view(browser, site, color_scheme=scheme, viewport=size) as v:
        assert v.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        v.page.locator("#chart-latency summary").click()
        results = [Axe().run(v.page, options=options)]
        v.row("tasks", "Fix the login form").get_by_role("link", name="Trace of task").click()
        expect(v.page.locator("#spans tr").first).to_be_visible()
        v.page.locator("#spans summary").first.click()
        results.append(Axe().run(v.page, options=options))
        for found in results:
            assert found.violations_count == 0, found.generate_report()
            assert len(found.response["passes"]) > 15


def requests(v: View) -> list[str]:
    seen: list[str] = []
    v.page.on("request", lambda r: seen.append(r.url) if "/console/status" in r.url else None)
    return seen


def test_a_page_that_nobody_looks_at_asks_nothing(browser: Browser, site: Site) -> None:
    with view(browser, site) as v:
        seen = requests(v)
        v.page.evaluate(
            """() => { Object.defineProperty(document, 'hidden', {get: () => window.away});
            window.away = true; document.dispatchEvent(new Event('visibilitychange')); }"""
        )
        v.page.wait_for_timeout(6500)
        assert seen == []
        v.page.evaluate(
            "() => { away = false; document.dispatchEvent(new Event('visibilitychange')) }"
        )
        v.page.wait_for_timeout(500)
        assert len(seen) == 1
        pause = v.page.get_by_role("button", name="Pause")
        pause.click()
        expect(pause).to_have_attribute("aria-pressed", "true")
        expect(v.page.locator("#freshness")).to_contain_text("Paused")
        v.page.wait_for_timeout(6500)
        assert len(seen) == 1
        pause.click()
        expect(v.page.locator("#freshness")).to_contain_text("Live")


def test_without_prometheus_its_panels_say_so_and_the_others_go_on(
    browser: Browser, site: Site
) -> None:
    site.stop("prometheus")
    try:
        until(lambda: status(site), lambda s: s["prometheus"]["units"]["error"])
        until(lambda: status(site), lambda s: s["charts"]["charts"][0]["error"], 40)
        with view(browser, site, wait=False) as v:
            for place in ("#units-note", "#alerts-note", "#chart-cpu .empty", "#verdict"):
                expect(v.page.locator(place)).to_contain_text("Prometheus cannot be reached")
            states = v.page.locator("#units .badge").all_inner_texts()
            assert set(states) == {"no data"}
            expect(v.row("tasks", "Fix the login form")).to_be_visible()
            assert v.page.title().startswith("(?)")
    finally:
        site.start_prometheus()
    until(lambda: status(site), lambda s: s["prometheus"]["units"]["error"] is None)
    until(lambda: status(site), lambda s: s["charts"]["charts"][0]["error"] is None, 40)


def test_without_the_dispatcher_the_page_says_so_and_comes_back(
    browser: Browser, site: Site
) -> None:
    with view(browser, site, clean=False) as v:
        site.dispatcher.stop()
        trouble = v.page.get_by_role("alert")
        expect(trouble).to_contain_text("The dispatcher is down or just starting")
        expect(trouble).to_contain_text("Next try in 10 s")
        expect(v.page.locator("#freshness")).to_contain_text("Not live")
        expect(v.row("tasks", "Fix the login form")).to_be_visible()
        # who opens it now gets nginx's own page, also strict and also behind the password
        with view(browser, site, wait=False, clean=False) as down:
            expect(down.page.get_by_role("heading")).to_contain_text("is not there")
            expect(down.page.get_by_role("link", name="Vibe Kanban")).to_be_visible()
            font = down.page.evaluate("getComputedStyle(document.documentElement).fontFamily")
            assert "system-ui" in font  # its style sheet came
            assert through_nginx(site, "/").status == 502
            assert through_nginx(site, "/", password=None).status == 401
            assert "'none'" in through_nginx(site, "/").headers["content-security-policy"]
            site.dispatcher.start()
            expect(down.page.locator("#tasks tr").first).to_be_visible()
        expect(trouble).to_be_hidden()
        expect(v.page.locator("#freshness")).to_contain_text("Live")


def test_an_empty_machine_is_no_broken_one(browser: Browser, tmp_path: Path) -> None:
    with console.running(tmp_path, history=False) as empty:
        empty.stop("node")
        until(
            lambda: status(empty),
            lambda s: (
                {("ssh", "no data"), ("dispatcher", "active")}
                < {(u["name"], u["state"]) for u in s["prometheus"]["units"]["rows"]}
            ),
        )
        with view(browser, empty, wait=False) as v:
            expect(v.page.locator("#tasks-note")).to_contain_text("No task yet")
            expect(v.page.locator("#events-note")).to_contain_text("No webhook came yet")
            expect(v.page.locator("#chart-disk .empty")).to_have_text("No data for this period")
            expect(v.page.locator("#units li").first).to_contain_text("no data")
            # it answers its scrapes, so that it runs is known all the same
            dispatcher_row = v.page.locator("#units li", has_text="rave-dispatcher.service")
            expect(dispatcher_row.locator(".badge")).to_have_text("active")


def test_nothing_was_logged_as_a_defect(site: Site) -> None:
    rows = [json.loads(line) for line in site.dispatcher.log.splitlines() if line.startswith("{")]
    assert [r for r in rows if r["level"] == "error"] == []
    assert "Traceback" not in site.dispatcher.log
