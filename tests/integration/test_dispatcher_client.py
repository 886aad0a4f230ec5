"""ravectl's client of the dispatcher: the real dispatcher behind a real nginx with TLS."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ravectl import credentials, feed, reconnect
from ravectl import dispatcher as client
from ravectl.cli import app, dispatch
from ravectl.errors import RavectlError, UsageError
from ravectl.model import SecretKind
from ravectl.verify import web
from tests import dispatcher

NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_protocols TLSv1.3;
    ssl_certificate {folder}/cert; ssl_certificate_key {folder}/key;
    location /api/ {{ proxy_pass http://127.0.0.1:{upstream}/; }}
  }}
}}
"""


@dataclass
class Ingress:
    port: int
    ca_cert: Path
    dispatcher: dispatcher.Dispatcher

    def api(self, token: str = dispatcher.TOKEN) -> client.Api:
        return client.Api(self.port, self.ca_cert, token)


@pytest.fixture(scope="module")
def ingress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingress]:
    folder = tmp_path_factory.mktemp("ingress")
    folder.chmod(0o755)
    ca_key = credentials.new_value(SecretKind.CA_KEY)
    ca_cert = credentials.ca_certificate(ca_key)
    key = credentials.new_value(SecretKind.TLS_KEY)
    (folder / "ca").write_text(ca_cert)
    (folder / "key").write_text(key)
    (folder / "cert").write_text(credentials.server_certificate(key, ca_cert, ca_key, "rave-x"))
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    assert nginx is not None
    agents = {
        "backend-architect": {"command": ["cat"]}, "ai-engineer": {"command": ["sleep", "60"]},
    }  # fmt: skip
    tasks = {"lease_seconds": 1, "concurrency": 2, "max_attempts": 1}
    with dispatcher.running(folder / "d", agents=agents, tasks=tasks) as d:
        port = dispatcher.free_port()
        config = folder / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, port=port, upstream=d.port))
        process = subprocess.Popen([nginx, "-c", config, "-p", folder])
        try:
            end = time.monotonic() + 10
            while not (folder / "nginx.pid").exists():
                assert time.monotonic() < end
                time.sleep(0.02)
            yield Ingress(port, folder / "ca", d)
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture
def run(ingress: Ingress, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """The command line, with the machine's address put in place of an instance's."""
    monkeypatch.setattr(dispatch, "_api", lambda name, workspace: ingress.api())
    return CliRunner()


def test_a_task_from_the_command_line(run: CliRunner) -> None:
    done = run.invoke(app, ["task", "submit", "say this", "--wait", "20"])
    assert done.exit_code == 0, done.output
    task_id = done.stdout.strip()
    assert run.invoke(app, ["task", "logs", task_id]).stdout == "say this"
    shown = json.loads(run.invoke(app, ["task", "show", task_id]).stdout)
    assert (shown["status"], shown["outcome"]) == ("completed", "succeeded")
    listed = run.invoke(app, ["task", "list", "--status", "completed"])
    assert task_id in listed.stdout
    stdin = run.invoke(app, ["task", "submit", "-", "--json", "--project", "p"], input="from stdin")
    assert json.loads(stdin.stdout)["project"] == "p"


def test_cancel_and_replay_from_the_command_line(run: CliRunner) -> None:
    task_id = run.invoke(app, ["task", "submit", "x", "-a", "ai-engineer"]).stdout.strip()
    end = time.monotonic() + 15
    while json.loads(run.invoke(app, ["task", "show", task_id]).stdout)["status"] != "running":
        assert time.monotonic() < end
    assert run.invoke(app, ["task", "cancel", task_id]).stdout == "stopping\n"
    while json.loads(run.invoke(app, ["task", "show", task_id]).stdout)["status"] != "failed":
        assert time.monotonic() < end
    assert run.invoke(app, ["task", "replay", task_id]).stdout == "pending\n"
    run.invoke(app, ["task", "cancel", task_id])


def test_events_from_the_command_line(run: CliRunner, ingress: Ingress) -> None:
    made = [ingress.dispatcher.hook(b'{"n": "\\u001b[31m"}').json()["event_uuid"] for _ in range(3)]
    listed = run.invoke(app, ["event", "list", "--source", "github", "--limit", "2"]).stdout
    assert [line.split()[0] for line in listed.splitlines()] == made[:0:-1]
    rows = json.loads(run.invoke(app, ["event", "list", "--type", "push", "--json"]).stdout)
    assert {r["event_uuid"] for r in rows} >= set(made)
    shown = json.loads(run.invoke(app, ["event", "show", made[0]]).stdout)
    assert shown["payload"] == {"n": "\x1b[31m"}
    assert run.invoke(app, ["event", "replay", made[0]]).stdout.strip() == made[0]


def test_lists_go_over_pages(ingress: Ingress, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [ingress.dispatcher.hook().json()["event_uuid"] for _ in range(7)]
    monkeypatch.setattr(client, "PAGE", 3)
    with ingress.api() as api:
        rows = list(api.items("/events", {}, 7))
    assert [r["event_uuid"] for r in rows] == made[::-1]


def test_a_refusal_names_cause_and_remedy(ingress: Ingress) -> None:
    with ingress.api("wrong") as api, pytest.raises(RavectlError, match="not authenticated") as e:
        api.get("/tasks")
    assert "wrong" not in f"{e.value.message}{e.value.details}"
    assert e.value.details.startswith("trace ")
    with ingress.api() as api:
        with pytest.raises(UsageError, match="there is no task none"):
            api.get("/tasks/none")
        with pytest.raises(UsageError, match="priority: Input should be"):
            api.post("/tasks", {"agent_type": "ai-engineer", "prompt": "x", "priority": 99})


def test_what_is_no_dispatcher(ingress: Ingress, tmp_path: Path) -> None:
    other_key = credentials.new_value(SecretKind.CA_KEY)
    (tmp_path / "other").write_text(credentials.ca_certificate(other_key))
    wrong = pytest.raises(RavectlError, match="does not answer: certificate")
    with client.Api(ingress.port, tmp_path / "other", "t") as api, wrong:
        api.get("/tasks")
    nobody = pytest.raises(RavectlError, match="does not answer")
    with client.Api(dispatcher.free_port(), ingress.ca_cert, "t") as api, nobody:
        api.post("/tasks", {})


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"title": 1}', b"[" * 100_000])
def test_an_answer_that_is_no_problem(body: bytes) -> None:
    assert "status 502" in client.refusal(web.Answer(502, {}, body, 0.0)).message
    # by nginx: the dispatcher's own 404 says what there is not
    none = client.refusal(web.Answer(404, {}, body, 0.0))
    assert none.message == "this machine has no dispatcher"
    assert none.hint


def test_words_that_do_not_exist(run: CliRunner) -> None:
    for words in (["task", "submit", "x", "-a", "nobody"], ["task", "list", "--status", "x"]):
        done = run.invoke(app, words)
        assert isinstance(done.exception, UsageError)


def test_events_are_followed_over_a_lost_connection(ingress: Ingress) -> None:
    def hook(number: int) -> str:
        body = json.dumps({"follow": number}).encode()
        return str(ingress.dispatcher.hook(body).json()["event_uuid"])

    made = [hook(n) for n in range(3)]
    shown: list[str] = []
    told: list[reconnect.Lost] = []
    connections = 0

    class Done(Exception):
        """What a person does by Ctrl-C."""

    def connect() -> client.Api:
        nonlocal connections
        connections += 1
        if connections == 2:
            raise client.UnreachableError("it restarts")
        return ingress.api("wrong" if connections == 3 else dispatcher.TOKEN)

    def put(row: dict[str, Any]) -> None:
        shown.append(row["event_uuid"])
        assert row["trace_id"]
        if len(shown) == 2:
            made.append(hook(3))
        if len(shown) == 3:
            # more than a page while nobody looks, and the connection is gone
            made.extend(hook(n) for n in range(4, 4 + feed.PAGE + 5))
            raise client.UnreachableError("it broke")
        if len(shown) == len(made) - 1:
            raise Done

    with pytest.raises(Done):
        feed.follow(connect, {"source": "github"}, 2, put, told.append)
    assert shown == made[1:]
    assert [w.attempts for w in told] == [0, 1, 2]


def test_events_by_the_name_that_one_expects(run: CliRunner, ingress: Ingress) -> None:
    ingress.dispatcher.hook(b'{"by": "habit"}')
    by_habit = run.invoke(app, ["events", "--limit", "1", "--json"])
    assert by_habit.exit_code == 0, by_habit.output
    assert by_habit.stdout == run.invoke(app, ["event", "list", "--limit", "1", "--json"]).stdout
