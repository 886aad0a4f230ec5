"""What a rotation is to change: decided without a file or a machine."""

from __future__ import annotations

import base64
import datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from ravectl import credentials, delivery, rotate, vault
from ravectl.errors import UsageError
from ravectl.model import EngineName, SecretKind, SecretScope
from ravectl.plan import SECRETS
from ravectl.rotate import Secrets
from ravectl.verify import secrecy
from tests.plans import PLAN

NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
PLANS = {"one": PLAN, "two": PLAN}
ROUTINE = {
    "ingress/tls-key", "ingress/tls-cert", "ingress/password", "ccr/api-key",
    "postgres/exporter-password", "dispatcher/api-token", "dispatcher/alerts-token",
    "dispatcher/gitlab-token",
    "dispatcher/github-secret", "dispatcher/standard-secret",
}  # fmt: skip


@pytest.fixture(scope="module")
def before() -> Secrets:
    then = NOW - datetime.timedelta(days=100)
    shared = vault.complete(vault.Vault(), SECRETS, then)
    machines = {n: vault.complete_machine(vault.Vault(), PLAN, shared, then) for n in PLANS}
    return Secrets(shared, machines, ("age1x",), credentials.new_value(SecretKind.SSH_KEY))


UNTIL = {"dispatcher/gitlab-token": "2026-11-24T11:00:00Z"}  # over


def chosen(*names: str, **options: object) -> set[str]:
    dates = {"ccr/api-key": "2026-08-01T00:00:00Z", "ingress/password": "2026-11-23T00:00:00Z"}
    asked = rotate.Asked(names, **options)  # type: ignore[arg-type]
    return set(rotate.choose(SECRETS, dates, UNTIL, asked, NOW))


def test_without_names_all_that_is_routine() -> None:
    assert chosen() == ROUTINE
    assert chosen(everything=True) == ROUTINE


def test_what_all_leaves_out_is_named() -> None:
    made = {s.name for s in SECRETS if s.kind is not SecretKind.GIVEN}
    assert rotate.left_out(made) == (("ca/key", "grafana/secret-key"), ())
    given = ("agents/anthropic-api-key", "alerts/slack-url")
    assert rotate.left_out({*given, "ccr/api-key"}) == ((), given)


def test_names_ssh_and_age() -> None:
    assert chosen("ccr/api-key") == {"ccr/api-key"}
    assert chosen(ssh=True) == {"ssh/host-key", "ssh/operator-key"}
    assert chosen(ssh=True, everything=True) == ROUTINE | {"ssh/host-key", "ssh/operator-key"}
    ninety = datetime.timedelta(days=90)
    assert chosen(older_than=ninety) == {"ccr/api-key"}
    assert chosen("ingress/password", older_than=ninety) == set()


@pytest.mark.parametrize(
    ("name", "said"),
    [("nothing", "there is no secret 'nothing'"), ("agents/anthropic-api-key", "given by you"),
     ("ingress/htpasswd", "made of ingress/password"),
     ("ssh/authorized-keys", "made of the operator's key")],
)  # fmt: skip
def test_what_cannot_be_rotated_is_told(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        chosen(name)
    assert caught.value.hint


@pytest.mark.parametrize("name", sorted(ROUTINE | {"ssh/host-key", "ssh/operator-key", "ca/key"}))
def test_each_name_changes_itself_and_what_is_made_of_it(before: Secrets, name: str) -> None:
    after = rotate.rotated(before, [name], SECRETS, PLANS, NOW)
    along = {"ca/key": {"ca/cert", "ingress/tls-cert"}, "ingress/tls-key": {"ingress/tls-cert"}}
    assert set(rotate.differences(before, after)) == {name} | along.get(name, set())
    for s in SECRETS:
        if s.name == name and s.scope is SecretScope.INSTANCE:
            values = [m.values[name] for m in after.machines.values()]
            assert len(set(values)) == len(PLANS), "each machine its own"
    for held in (after.shared, *after.machines.values()):
        for n, value in held.values.items():
            s = next(s for s in SECRETS if s.name == n)
            assert credentials.fault(s.kind, value) is None, n
    for machine in after.machines.values():
        assert credentials.serves(
            machine.values["ingress/tls-cert"], machine.values["ingress/tls-key"],
            after.shared.values["ca/cert"], PLAN.hostname,
        )  # fmt: skip


def test_only_what_was_changed_is_dated_anew(before: Secrets) -> None:
    after = rotate.rotated(before, ["ccr/api-key"], SECRETS, PLANS, NOW)
    changed = {n for n, d in after.shared.changed.items() if d != before.shared.changed[n]}
    assert changed == {"ccr/api-key"}
    assert after.shared.changed["ccr/api-key"] == "2026-11-24T12:00:00Z"


def test_webhook_secrets_overlap_and_the_overlap_ends(before: Secrets) -> None:
    name = "dispatcher/gitlab-token"
    after = rotate.rotated(before, [name], SECRETS, PLANS, NOW)
    assert after.shared.previous == {name: before.shared.values[name]}
    assert after.shared.until == {name: "2026-11-25T12:00:00Z"}
    got = vault.delivery(PLAN, after.shared, after.machines["one"], ["ssh-ed25519 A"])
    assert got[f"{name}.previous"] == before.shared.values[name] + "\n"
    assert int(got[f"{name}.previous-until"]) == int(NOW.timestamp()) + 24 * 3600
    later = rotate.rotated(
        after, ["ccr/api-key"], SECRETS, PLANS, NOW + datetime.timedelta(hours=25)
    )
    assert not later.shared.previous
    assert not later.shared.until
    for s in SECRETS:
        assert bool(s.grace_hours) == s.name.endswith(
            ("gitlab-token", "github-secret", "standard-secret")
        ), s.name


def test_what_a_sender_may_still_use_is_not_rotated_again() -> None:
    name = "dispatcher/gitlab-token"

    def choose(*names: str, **options: bool) -> tuple[str, ...]:
        asked = rotate.Asked(names, **options)  # type: ignore[arg-type]
        return rotate.choose(SECRETS, {}, {name: "2026-11-24T13:00:00Z"}, asked, NOW)

    assert set(choose()) == ROUTINE - {name}
    assert set(choose(grace=False)) == ROUTINE
    assert choose(name, grace=False) == (name,)
    with pytest.raises(UsageError, match="accepted until 2026-11-24T13:00:00Z") as caught:
        choose(name)
    assert "--no-grace" in caught.value.hint


def test_without_grace_the_former_one_is_refused_at_once(before: Secrets) -> None:
    name = "dispatcher/gitlab-token"
    once = rotate.rotated(before, [name], SECRETS, PLANS, NOW)
    twice = rotate.rotated(once, [name], SECRETS, PLANS, NOW, grace=False)
    assert not twice.shared.previous
    assert not twice.shared.until
    assert twice.shared.values[name] != once.shared.values[name]


def test_nothing_shows_a_value(before: Secrets) -> None:
    after = rotate.rotated(before, sorted(ROUTINE), SECRETS, PLANS, NOW)
    key = credentials.OperatorKey(Path("/k"), "ssh-ed25519 A")
    values = delivery.values_of(PLAN, after.shared, after.machines["one"], key)
    shown = repr(before) + repr(after) + repr(values) + str(after.shared)
    for held in (before.shared, after.shared, *after.machines.values()):
        for name, value in held.values.items():
            assert value not in shown, name
            assert value[:20] not in shown or "-----" in value[:20], name


@pytest.mark.parametrize("kind", [SecretKind.SSH_KEY, SecretKind.TLS_KEY, SecretKind.PASSWORD])
def test_what_is_looked_for_is_of_this_value_alone(kind: SecretKind) -> None:
    values = [credentials.new_value(kind) for _ in range(20)]
    for value in values:
        assert [v for v in values if secrecy.core(value) in v] == [value]


def test_what_is_looked_for_of_a_key_is_not_public() -> None:
    private = credentials.new_value(SecretKind.SSH_KEY)
    seed = serialization.load_ssh_private_key(private.encode(), None).private_bytes_raw()  # type: ignore[union-attr]
    # base64 of any alignment: 32 bytes are 40 characters that depend on nothing else
    whole = "".join(private.splitlines()[1:-1])
    at = base64.b64decode(whole).index(seed) * 4 // 3
    assert whole[at + 2 : at + 40] in secrecy.core(private)


# --- what readers are told -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "commands"),
    [
        (["ingress/htpasswd"], []),
        (["ccr/api-key"], ["systemctl reload nginx.service"]),
        (["ingress/tls-key", "ingress/tls-cert", "ccr/api-key"],
         ["systemctl reload nginx.service"]),
        (["dispatcher/gitlab-token", "dispatcher/gitlab-token.previous",
          "dispatcher/gitlab-token.previous-until"], []),
        (["ssh/host-key", "ccr/api-key", "postgres/exporter-scram", "agents/anthropic-api-key"],
         ["-u postgres /usr/lib/rave/roles", "systemctl restart claude-code-router.service",
          "systemctl reload nginx.service", "systemctl reload ssh.service"]),
    ],
)  # fmt: skip
def test_readers_are_told_in_order_and_once(names: list[str], commands: list[str]) -> None:
    seen = [" ".join(c) for c in delivery.commands(PLAN, EngineName.DEBIAN, names)]
    assert seen == commands


def test_every_reader_of_a_delivered_secret_is_a_service() -> None:
    for s in PLAN.delivered():
        if s.activation.value in ("reload", "restart"):
            assert PLAN.readers(s.name), s.name
