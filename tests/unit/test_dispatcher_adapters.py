"""Signatures, secrets, units, limits, versions: what can be told without a server."""

from __future__ import annotations

import base64
import datetime
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_dispatcher.adapters import logs
from rave_dispatcher.adapters.clock import BelievedClock
from rave_dispatcher.adapters.http.api import alert_identity
from rave_dispatcher.adapters.http.limits import CLIENTS, RateLimiter
from rave_dispatcher.adapters.http.versions import ApiVersion, version_of
from rave_dispatcher.adapters.runners import frames, launcher
from rave_dispatcher.adapters.runners.unit import (
    SHOWN,
    Order,
    is_over,
    parse_show,
    systemd_run_argv,
    verdict,
)
from rave_dispatcher.adapters.secrets import SecretFiles
from rave_dispatcher.adapters.signatures import TOKEN_VERIFIED, Signatures, standard_key
from rave_dispatcher.adapters.systemd import Notifier
from rave_dispatcher.adapters.tracing import TimeOrderedIdGenerator, traceparent
from rave_dispatcher.application.errors import (
    MalformedError,
    NotFoundError,
    UnauthenticatedError,
)
from rave_dispatcher.config import Agent, Config, ConfigError, Source, load
from rave_dispatcher.domain.events import Trace
from rave_dispatcher.domain.tasks import Outcome
from tests.dispatcher import github, standard

NOW = 1_700_000_000.0
HOUR_MS = 3_600_000
BODY = b'{"a": 1}'
SOURCES = {s: Source(scheme=s, secret=s) for s in ("gitlab", "github", "standard")}  # type: ignore[arg-type]


def verify(source: str, headers: dict[str, str], *secrets: bytes, body: bytes = BODY) -> Any:
    made = Signatures(SOURCES, lambda _: secrets, lambda: NOW)
    return made.verify(source, {k.lower(): v for k, v in headers.items()}, body)


# --- signatures ------------------------------------------------------------------------------


def test_githubs_documented_example() -> None:
    """The vector of GitHub's own documentation."""
    headers = {
        "X-Hub-Signature-256": "sha256="
        "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
        "X-GitHub-Event": "ping", "X-GitHub-Delivery": "d",
    }  # fmt: skip
    found = verify("github", headers, b"It's a Secret to Everybody", body=b"Hello, World!")
    assert (found.delivery_id, found.event_type) == ("d", "ping")


def test_standard_webhooks_own_example() -> None:
    """The vector of the Standard Webhooks libraries."""
    secret = b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek", "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }  # fmt: skip
    made = Signatures(SOURCES, lambda _: (secret,), lambda: 1614265330.0 + 299)
    assert made.verify("standard", headers, body).delivery_id == headers["webhook-id"]
    late = Signatures(SOURCES, lambda _: (secret,), lambda: 1614265330.0 + 301)
    with pytest.raises(UnauthenticatedError, match="within"):
        late.verify("standard", headers, body)


@given(st.binary(max_size=40), st.binary(min_size=1, max_size=20), st.integers(0, 200))
def test_any_changed_bit_is_refused(body: bytes, secret: bytes, where: int) -> None:
    headers = github(body, "d", secret)
    assert verify("github", headers, secret, body=body)
    if body:
        at = where % len(body)
        changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        with pytest.raises(UnauthenticatedError):
            verify("github", headers, secret, body=changed)
    with pytest.raises(UnauthenticatedError):
        verify("github", headers, secret + b"x", body=body)


def test_each_valid_secret_counts() -> None:
    for secret in (b"new", b"old"):
        assert verify("github", github(BODY, "d", secret), b"new", b"old")
        gitlab = {"X-Gitlab-Token": secret.decode(), "X-Gitlab-Event": "e", "webhook-id": "i"}
        assert verify("gitlab", gitlab, b"new", b"old").signature == TOKEN_VERIFIED
        assert verify("standard", standard(BODY, "i", NOW, secret), b"new", b"old")


@pytest.mark.parametrize("source", ["github", "gitlab", "standard"])
def test_without_a_secret_nothing_is_taken(source: str) -> None:
    with pytest.raises(UnauthenticatedError, match="no secret"):
        verify(source, github(BODY, "d", b""))


@pytest.mark.parametrize(
    ("source", "drop", "error"),
    [
        ("github", "X-Hub-Signature-256", UnauthenticatedError),
        ("github", "X-GitHub-Delivery", MalformedError),
        ("github", "X-GitHub-Event", MalformedError),
        ("gitlab", "X-Gitlab-Token", UnauthenticatedError),
        ("gitlab", "X-Gitlab-Event", MalformedError),
        ("gitlab", "X-Gitlab-Event-UUID", MalformedError),
        ("standard", "webhook-id", UnauthenticatedError),
        ("standard", "webhook-timestamp", UnauthenticatedError),
        ("standard", "webhook-signature", UnauthenticatedError),
    ],
)
def test_each_header_is_needed(source: str, drop: str, error: type[Exception]) -> None:
    headers = {
        "github": github(BODY, "d", b"s"),
        "gitlab": {"X-Gitlab-Token": "s", "X-Gitlab-Event": "e", "X-Gitlab-Event-UUID": "u"},
        "standard": standard(BODY, "i", NOW, b"s"),
    }[source]
    assert verify(source, headers, b"s")
    with pytest.raises(error):
        verify(source, {k: v for k, v in headers.items() if k != drop}, b"s")


@pytest.mark.parametrize("offset", [-301, 301, 10**6, -(10**6)])
def test_a_replay_after_the_tolerance_is_refused(offset: int) -> None:
    with pytest.raises(UnauthenticatedError, match="within"):
        verify("standard", standard(BODY, "i", NOW + offset, b"s"), b"s")


@pytest.mark.parametrize("stamp", ["", "x", "-1", "1.5", "1e9", "٣", "9" * 20])
def test_a_timestamp_is_a_number(stamp: str) -> None:
    headers = standard(BODY, "i", NOW, b"s") | {"webhook-timestamp": stamp}
    with pytest.raises(UnauthenticatedError):
        verify("standard", headers, b"s")


def test_gitlab_that_signs_is_held_to_its_signature() -> None:
    signed = {**standard(BODY, "i", NOW, b"s"), "X-Gitlab-Event": "Push Hook"}
    found = verify("gitlab", signed, b"s")
    # what is not signed names no delivery: who saw one could send it as many
    other = verify("gitlab", {**signed, "Idempotency-Key": "another"}, b"s")
    assert other.delivery_id == found.delivery_id == signed["webhook-id"]
    assert (found.delivery_id, found.event_type) == ("i", "Push Hook")
    # the token cannot stand in for a signature that is wrong
    wrong = {**signed, "webhook-signature": "v1,AAAA", "X-Gitlab-Token": "s"}
    with pytest.raises(UnauthenticatedError):
        verify("gitlab", wrong, b"s")


def test_gitlabs_delivery_ids() -> None:
    base = {"X-Gitlab-Token": "s", "X-Gitlab-Event": "e", "X-Gitlab-Event-UUID": "u"}
    assert verify("gitlab", {**base, "Idempotency-Key": "k"}, b"s").delivery_id == "k"
    empty = {**base, "Idempotency-Key": "", "webhook-id": "w"}
    assert verify("gitlab", empty, b"s").delivery_id == "w"
    first = verify("gitlab", base, b"s").delivery_id
    assert verify("gitlab", base, b"s").delivery_id == first
    assert verify("gitlab", base, b"s", body=b"{}").delivery_id != first


def test_among_several_signatures_one_suffices() -> None:
    good = standard(BODY, "i", NOW, b"s")
    many = {**good, "webhook-signature": f"v1a,xx v1,AAAA {good['webhook-signature']}"}
    assert verify("standard", many, b"s")


def test_keys_of_standard_webhooks() -> None:
    assert standard_key(b"whsec_" + base64.b64encode(b"key")) == b"key"
    assert standard_key(b"whsec_!") == b"whsec_!"
    assert standard_key(b"plain") == b"plain"


@pytest.mark.parametrize("value", ["\xe9", "\x00", "ÿ" * 100])
def test_headers_of_any_bytes(value: str) -> None:
    for source in SOURCES:
        headers = {
            "x-hub-signature-256": value, "x-gitlab-token": value, "webhook-signature": value,
            "webhook-id": value, "webhook-timestamp": "1",
        }  # fmt: skip
        with pytest.raises(UnauthenticatedError):
            verify(source, headers, b"s")


def test_an_unknown_source() -> None:
    with pytest.raises(NotFoundError):
        verify("elsewhere", {}, b"s")


# --- secrets ---------------------------------------------------------------------------------


def put(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.rename(path)


def test_secrets_are_read_again_when_they_change(tmp_path: Path) -> None:
    secrets = SecretFiles(tmp_path)
    assert secrets.accepted("x") == ()
    put(tmp_path / "x", "one\n")
    assert secrets.accepted("x") == (b"one",)
    put(tmp_path / "x.previous-until", f"{int(time.time()) + 2}\n")
    put(tmp_path / "x.previous", "one\n")
    put(tmp_path / "x", "two\n")
    assert secrets.accepted("x") == (b"two", b"one")
    assert secrets.current("x") == b"two"
    time.sleep(2.1)
    assert secrets.accepted("x") == (b"two",), "the previous one counts until its time"
    (tmp_path / "x").unlink()
    assert secrets.accepted("x") == ()


def test_a_new_generation_of_secrets_is_seen(tmp_path: Path) -> None:
    """As the machine does it: /run/secrets is a link to a folder, which is changed."""
    for name, value in (("1", "one"), ("2", "two")):
        (tmp_path / name / "dispatcher").mkdir(parents=True)
        (tmp_path / name / "dispatcher" / "x").write_text(value)
    link = tmp_path / "secrets"
    link.symlink_to("1")
    secrets = SecretFiles(link / "dispatcher")
    assert secrets.accepted("x") == (b"one",)
    new = tmp_path / "new"
    new.symlink_to("2")
    new.rename(link)
    assert secrets.accepted("x") == (b"two",)


def test_a_previous_secret_without_its_time_does_not_count(tmp_path: Path) -> None:
    for name, value in (("x", "a"), ("x.previous", "b"), ("x.previous-until", "soon")):
        (tmp_path / name).write_text(value)
    assert SecretFiles(tmp_path).accepted("x") == (b"a",)


# --- units -----------------------------------------------------------------------------------

ORDER = Order(
    "01a20fd0-8a31-717b-8313-d720ca1794d8", 1, "ai-engineer", f"00-{'a' * 32}-{'b' * 16}-01"
)
AGENT = Agent(command=("claude", "--print"), memory_mb=700, cpu_percent=150, seconds=60)


def argv(agent: Agent = AGENT) -> list[str]:
    return systemd_run_argv(ORDER, agent, "agent", "/home/agent/tasks/x", "/run/p", "/run/o")


def test_a_unit_has_the_limits_of_its_agent() -> None:
    words = argv()
    for wanted in (
        "User=agent", "MemoryMax=700M", "CPUQuota=150%", "RuntimeMaxSec=60", "TasksMax=128",
        "NoNewPrivileges=yes", "ProtectSystem=strict", "KillMode=control-group",
        "IPAddressDeny=any", "StandardInput=file:/run/p",
    ):  # fmt: skip
        assert f"--property={wanted}" in words
    assert words[words.index("--") + 1 :] == ["claude", "--print"]
    assert f"--unit=rave-task-{ORDER.task_id}.service" in words


def test_credentials_are_files_that_systemd_hands_over() -> None:
    words = argv(AGENT.model_copy(update={"credentials": {"router-key": "ccr/api-key"}}))
    assert "--property=LoadCredential=router-key:/run/secrets/ccr/api-key" in words
    assert not any("LoadCredential" in w for w in argv())


def test_a_word_of_the_command_stays_as_it_is() -> None:
    words = argv(AGENT.model_copy(update={"command": ("sh", "-c", "echo ${HOME}")}))
    assert words[-1] == "echo ${HOME}"
    assert "--expand-environment=no" in words[: words.index("--")]


def test_network_only_where_the_profile_says_so() -> None:
    assert not any("IPAddressDeny" in w for w in argv(AGENT.model_copy(update={"network": True})))


def test_nothing_that_the_agent_reads_is_an_argument() -> None:
    assert "TRACEPARENT" in " ".join(argv())
    assert systemd_run_argv(ORDER, AGENT, "agent", "/w", "/p", "/o").count("--") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"task_id": "../../etc"}, {"task_id": "A" * 36}, {"attempt": 0}, {"attempt": 10**6},
        {"traceparent": "00-x"}, {"rule": "x" * 81}, {"rule": 7}, {"task_id": ORDER.task_id + "\n"},
    ],
)  # fmt: skip
def test_an_order_of_another_form_is_refused(change: dict[str, Any]) -> None:
    assert ORDER.fault() is None
    assert Order(**{**vars_of(ORDER), **change}).fault()


def vars_of(order: Order) -> dict[str, Any]:
    return {
        "task_id": order.task_id, "attempt": order.attempt, "agent_type": order.agent_type,
        "traceparent": order.traceparent, "rule": order.rule,
    }  # fmt: skip


def shown(**changes: str) -> dict[str, str]:
    text = (
        "ActiveState=active\nSubState=exited\nResult=success\nExecMainCode=1\nExecMainStatus=0\n"
        "MemoryPeak=10485760\nCPUUsageNSec=500000000\nExecMainStartTimestampMonotonic=1000000\n"
        "ExecMainExitTimestampMonotonic=2000000\n"
    )
    return parse_show(text) | changes


@pytest.mark.parametrize(
    ("changes", "outcome", "words"),
    [
        ({}, Outcome.SUCCEEDED, ""),
        ({"Result": "exit-code", "ExecMainStatus": "3"}, Outcome.ERROR, "exit code 3"),
        (
            {"Result": "signal", "ExecMainCode": "2", "ExecMainStatus": "11"},
            Outcome.ERROR,
            "signal 11",
        ),
        ({"Result": "timeout"}, Outcome.TIMED_OUT, "longer"),
        # by a person, and systemd knows no such unit any more
        ({"ActiveState": "inactive", "SubState": "dead"}, Outcome.ERROR, "its unit was stopped"),
        ({"Result": "oom-kill"}, Outcome.OUT_OF_MEMORY, "memory"),
        ({"Result": "exit-code", "ExecMainStatus": "203"}, Outcome.NOT_STARTED, "could not be run"),
    ],
)
def test_how_a_unit_ended(changes: dict[str, str], outcome: Outcome, words: str) -> None:
    found, detail, usage = verdict(shown(**changes), 7)
    assert found is outcome
    assert words in detail
    assert (usage.duration_ms, usage.memory_usage_mb, usage.cpu_usage_percent) == (1000, 10.0, 50.0)


def test_figures_that_systemd_does_not_know_are_not_guessed() -> None:
    _, _, usage = verdict(
        shown(
            MemoryPeak="[not set]", CPUUsageNSec=str(2**64 - 1), ExecMainExitTimestampMonotonic="0"
        ),
        7,
    )
    assert (usage.duration_ms, usage.memory_usage_mb, usage.cpu_usage_percent) == (7, None, None)
    assert set(shown()) == set(SHOWN)


@pytest.mark.parametrize(
    ("active", "sub", "over"),
    [("active", "running", False), ("active", "exited", True), ("failed", "failed", True),
     ("inactive", "dead", True), ("activating", "start", False), ("deactivating", "stop", False)],
)  # fmt: skip
def test_when_a_unit_is_over(active: str, sub: str, over: bool) -> None:
    assert is_over(shown(ActiveState=active, SubState=sub)) is over


def test_a_sleeping_host_is_believed_and_a_clock_set_ahead_is_not() -> None:
    class Clock:
        wall = steady = 1_700_000_000_000

        def wall_ms(self) -> int:
            return self.wall

        def steady_ms(self) -> int:
            return self.steady

    clock = Clock()
    believed = BelievedClock(clock)
    for _ in range(10):  # it runs for eight hours, and its host sleeps for sixteen
        clock.steady += 8 * HOUR_MS
        clock.wall += 24 * HOUR_MS
        assert believed.now_ms() == clock.wall
    clock.wall += 365 * 24 * HOUR_MS
    at = believed.now_ms()
    assert at == clock.wall - 365 * 24 * HOUR_MS
    assert believed.now_ms() == at, "not a round later either"
    clock.wall -= 2 * 365 * 24 * HOUR_MS
    assert believed.now_ms() == clock.wall, "set back, nothing more is deleted"


# --- the launcher ----------------------------------------------------------------------------


def ordered(data: bytes, config: Config | None = None) -> dict[str, Any]:
    """What the launcher answers to bytes on its socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        launcher.serve(theirs, config or Config())
        ours.settimeout(5)
        head = ours.recv(frames.HEAD_SIZE, socket.MSG_WAITALL)
        kind, size = frames.unpack_head(head)
        assert kind == frames.RESULT
        return dict(json.loads(ours.recv(size, socket.MSG_WAITALL)))


@pytest.mark.parametrize(
    "data",
    [
        b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\n", b"x" * 5000 + b"\n",
        json.dumps({**vars_of(ORDER), "prompt_bytes": -1}).encode() + b"\n",
        json.dumps({**vars_of(ORDER), "prompt_bytes": 10**9}).encode() + b"\n",
        json.dumps({**vars_of(ORDER), "prompt_bytes": 0, "command": ["sh"]}).encode() + b"\n",
        json.dumps({**vars_of(ORDER), "prompt_bytes": 0, "task_id": "../x"}).encode() + b"\n",
        json.dumps({**vars_of(ORDER), "prompt_bytes": 0, "agent_type": "root"}).encode() + b"\n",
        json.dumps({**vars_of(ORDER), "prompt_bytes": 0}).encode() + b"\n",  # none is configured
    ],
)  # fmt: skip
def test_the_launcher_refuses_what_is_no_order(data: bytes) -> None:
    found = ordered(data)
    assert found["outcome"] == "not-started"
    assert found["detail"]


def test_the_launcher_takes_an_order_in_pieces() -> None:
    ours, theirs = socket.socketpair()
    prompt = b"p" * 100_000
    head = json.dumps({**vars_of(ORDER), "prompt_bytes": len(prompt)}).encode() + b"\n"

    def send() -> None:
        for at in range(0, len(head + prompt), 7000):
            ours.sendall((head + prompt)[at : at + 7000])

    sender = threading.Thread(target=send)
    sender.start()
    assert launcher.read_order(theirs) == (ORDER, prompt)
    sender.join()
    ours.close()
    with pytest.raises(launcher.HungUpError):
        launcher.read_order(theirs)


def test_frames() -> None:
    kind, size = frames.unpack_head(frames.pack(frames.OUTPUT, b"abc")[: frames.HEAD_SIZE])
    assert (kind, size) == (frames.OUTPUT, 3)
    for bad in (b"x\0\0\0\1", b"o\xff\0\0\0"):
        with pytest.raises(ValueError, match="not a frame"):
            frames.unpack_head(bad)


# --- HTTP ------------------------------------------------------------------------------------


def test_rates_are_per_client() -> None:
    now = [0.0]
    limiter = RateLimiter(2, 3, lambda: now[0])
    assert [limiter.admit("a") for _ in range(4)] == [None, None, None, 1]
    assert limiter.admit("b") is None
    now[0] = 0.5
    assert [limiter.admit("a") for _ in range(2)] == [None, 1]
    now[0] = -100  # a clock that goes back gives nothing away
    assert limiter.admit("a") == 1
    for i in range(CLIENTS + 10):
        limiter.admit(str(i))
    assert len(limiter._buckets) <= CLIENTS


def test_versions_serve_on_for_six_months() -> None:
    utc = datetime.UTC
    old = ApiVersion(
        1, datetime.datetime(2027, 1, 1, tzinfo=utc), datetime.datetime(2027, 8, 1, tzinfo=utc)
    )
    assert old.headers() == {
        "Deprecation": "@1798761600",
        "Sunset": "Sun, 01 Aug 2027 00:00:00 GMT",
        "Link": '</v2/>; rel="successor-version"',
    }
    assert not old.is_gone(datetime.datetime(2027, 7, 31, tzinfo=utc))
    assert old.is_gone(datetime.datetime(2027, 8, 1, tzinfo=utc))
    assert ApiVersion(2).headers() == {}
    assert version_of("/v1/tasks", (old, ApiVersion(2))) is old
    assert version_of("/metrics") is None
    with pytest.raises(ValueError, match="must serve on"):
        ApiVersion(
            1, datetime.datetime(2027, 1, 1, tzinfo=utc), datetime.datetime(2027, 6, 1, tzinfo=utc)
        )
    with pytest.raises(ValueError, match="needs a sunset"):
        ApiVersion(1, datetime.datetime(2027, 1, 1, tzinfo=utc))


def alert(**changes: Any) -> bytes:
    row = {"fingerprint": "f", "status": "firing", "startsAt": "2026-01-01T00:00:00Z"}
    return json.dumps({"groupKey": "g", "status": "firing", "alerts": [row], **changes}).encode()


def test_an_alert_that_is_repeated_is_the_same_event() -> None:
    first = alert_identity(alert())
    assert first.event_type == "alert.firing"
    assert alert_identity(alert(externalURL="x")).delivery_id == first.delivery_id
    resolved = alert_identity(alert(status="resolved"))
    assert (resolved.event_type, resolved.delivery_id == first.delivery_id) == (
        "alert.resolved",
        False,
    )


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b"[" * 100_000, alert(alerts=7), alert(status="x")]
)
def test_what_is_no_alert(body: bytes) -> None:
    with pytest.raises(MalformedError):
        alert_identity(body)


# --- configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("listen: {port: x}", "listen.port"),
        ("nonsense: 1", "nonsense"),
        ("rules: [{name: r, agent_type: x, prompt: y}]", "agent_type"),
        ("rules: [{name: r, agent_type: ai-engineer, prompt: '{{ $[ }}'}]", "rule 'r'"),
        ("agents: {ai-engineer: {command: []}}", "command"),
        ("a: [", "dispatcher.yaml:1"),
        ("tracing: {otlp_endpoint: 'file:///x'}", "http"),
    ],
)
def test_a_wrong_configuration_names_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "dispatcher.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        load(path)
    assert str(path) in str(e.value)
    assert words in str(e.value)


def test_an_empty_configuration_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    assert load(tmp_path / "c.yaml") == Config()
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.yaml")


# --- logs, traces, systemd -------------------------------------------------------------------


def test_a_log_line_has_the_trace_and_no_exception_text() -> None:
    formatter = logs.JsonFormatter(journal=True)
    token = logs.current_trace.set("t" * 32)
    try:
        raise ValueError("hunter2")
    except ValueError as e:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 0, "failed %s", ("so",), (type(e), e, None)
        )
        record.fields = {"task_id": "1"}
        line = formatter.format(record)
    finally:
        logs.current_trace.reset(token)
    assert line.startswith("<3>{")
    row = json.loads(line[3:])
    assert (row["message"], row["trace_id"], row["task_id"]) == ("failed so", "t" * 32, "1")
    assert "hunter2" not in line
    assert row["exception"].startswith("ValueError")


def test_trace_ids_are_in_the_order_of_time_and_unique() -> None:
    generator = TimeOrderedIdGenerator()
    first = generator.generate_trace_id()
    time.sleep(0.002)
    more = [generator.generate_trace_id() for _ in range(1000)]
    assert len(set(more)) == 1000
    assert all(first < other < 2**128 for other in more)
    assert traceparent(Trace("a" * 32, "b" * 16)) == f"00-{'a' * 32}-{'b' * 16}-01"


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(address)
        s.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "3000000")
        notifier = Notifier()
        notifier.say("READY=1", "STATUS=x")
        assert s.recv(100) == b"READY=1\nSTATUS=x"
        assert notifier.watchdog_seconds == 3.0
    assert "NOTIFY_SOCKET" not in os.environ, "agents do not inherit it"
    Notifier().say("READY=1")  # nobody listens: no error
