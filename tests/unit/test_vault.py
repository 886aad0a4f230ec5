"""A workspace's encrypted files: made once, completed, never overwritten, and told when damaged."""

from __future__ import annotations

import dataclasses
import datetime
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ravectl import (
    audit,
    credentials,
    delivery,
    files,
    journal,
    model,
    profile,
    rotate,
    sops,
    vault,
)
from ravectl.errors import HostError, RavectlError, UsageError
from ravectl.instance import Instance, new_record
from ravectl.model import EngineName, SecretKind, SecretScope
from ravectl.plan import SECRETS, make_plan
from ravectl.sops import Identity
from ravectl.vault import Places, Vault
from ravectl.workspace import Workspace
from tests.plans import PLAN


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity(tmp_path / "keys" / "keys.txt")


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    root = tmp_path / "space"
    root.mkdir()
    return Workspace(root)


@pytest.fixture
def made(space: Workspace, identity: Identity) -> Places:
    vault.init(space, SECRETS, identity)
    return Places(space)


def below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_an_authority_that_git_brought_signs_the_machines_anew(
    made: Places, identity: Identity
) -> None:
    """A teammate rotated ca/key: he has no vault of our machines."""
    folder = made.workspace.instance_dir("one")
    record = new_record(PLAN, EngineName.DEBIAN)
    shared = vault.read(made.shared, identity)
    vault.ensure_machine(made.workspace, folder, PLAN, shared, identity)
    Instance(folder, "one").save(record)
    moment = vault.now()
    theirs = shared.with_value("ca/key", credentials.new_value(SecretKind.CA_KEY), moment)
    theirs = vault.renew_authority(theirs.without("ca/cert"), moment)
    vault.write(made.shared, theirs, made.recipients())
    assert rotate.deliver(made.workspace, identity).names == ("ingress/tls-cert",)
    own = vault.read(made.machine(folder), identity).values
    authority = theirs.values["ca/cert"]
    assert made.ca_cert.read_text() == authority
    assert credentials.serves(
        own["ingress/tls-cert"], own["ingress/tls-key"], authority, PLAN.hostname
    )
    assert rotate.deliver(made.workspace, identity).files == ()


def test_two_that_make_the_secrets_at_once_have_the_same(
    space: Workspace, identity: Identity
) -> None:
    """As when two machines of a new workspace are started."""
    both = threading.Barrier(2)

    def ensure(_: int) -> Vault:
        both.wait(timeout=20)
        return vault.ensure(space, SECRETS, identity)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(ensure, range(2))
    assert one == two == vault.read(Places(space).shared, identity)


# --- init ----------------------------------------------------------------------------------------


def test_init_makes_everything_that_is_declared(made: Places, identity: Identity) -> None:
    shared = vault.read(made.shared, identity)
    wanted = {s.name for s in SECRETS
              if s.scope is SecretScope.WORKSPACE and s.kind is not SecretKind.GIVEN}  # fmt: skip
    assert shared.values.keys() == wanted == shared.changed.keys()
    text = made.shared.read_text()
    for name, value in shared.values.items():
        assert credentials.fault(next(s.kind for s in SECRETS if s.name == name), value) is None
        assert value not in text
    assert made.ca_cert.read_text() == shared.values["ca/cert"]
    assert identity.file is not None
    assert identity.file.stat().st_mode & 0o777 == 0o600
    assert made.recipients() == identity.recipients()


def test_what_is_private_is_not_for_git(made: Places, identity: Identity) -> None:
    root = made.workspace.root
    git = ["git", "-C", root]
    subprocess.run([*git, "init", "-q"], check=True)
    credentials.ensure_operator_key(made.workspace.ssh_dir)
    subprocess.run([*git, "add", "--all"], check=True)
    listed = subprocess.run([*git, "ls-files"], check=True, capture_output=True, text=True).stdout
    assert listed.split() == [".sops.yaml", "secrets.yaml"]


def test_a_key_that_is_there_is_used(space: Workspace, identity: Identity) -> None:
    assert identity.file is not None
    sops.make_identity(identity.file)
    before = identity.file.read_text()
    done = vault.init(space, SECRETS, identity)
    assert not done.made_identity
    assert identity.file.read_text() == before


def test_a_team_and_a_machine_of_ci_can_open_it(
    space: Workspace, identity: Identity, tmp_path: Path
) -> None:
    mate, ci = Identity(tmp_path / "mate.txt"), Identity(tmp_path / "ci.txt")
    others = [sops.make_identity(i.file)[0] for i in (mate, ci) if i.file]
    vault.init(space, SECRETS, identity, others)
    places = Places(space)
    opened = [vault.read(places.shared, i) for i in (identity, mate, ci)]
    assert opened[0] == opened[1] == opened[2]
    assert set(others) < set(places.recipients())
    assert ci.file is not None
    inline = Identity(None, ci.file.read_text())
    assert vault.read(places.shared, inline) == opened[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [("secrets.yaml", "init overwrites nothing"), (".sops.yaml", "is no configuration of sops")],
)
def test_nothing_is_overwritten(space: Workspace, identity: Identity, name: str, said: str) -> None:
    (space.root / name).write_text("mine")
    with pytest.raises(UsageError, match=said):
        vault.init(space, SECRETS, identity)
    assert below(space.root.parent) == {f"space/{name}": b"mine"}


def test_what_init_could_not_end_it_ends_the_next_time(
    space: Workspace, identity: Identity
) -> None:
    """Also beside rules of the person's own."""
    (space.root / ".sops.yaml").write_text("creation_rules:\n- {path_regex: o, age: age1other}\n")
    vault.init(space, SECRETS, identity)
    (space.root / "secrets.yaml").unlink()
    with pytest.raises(RavectlError, match="there is no") as caught:
        vault.ensure(space, SECRETS, identity)
    assert f"git -C {space.root} checkout -- secrets.yaml" in caught.value.hint
    assert "ravectl init" in caught.value.hint
    vault.init(space, SECRETS, identity)
    assert "age1other" in (space.root / ".sops.yaml").read_text()
    assert vault.ensure(space, SECRETS, identity).values


def test_the_remedy_for_a_machines_own_file_spares_the_shared_one(
    space: Workspace, identity: Identity
) -> None:
    vault.init(space, SECRETS, identity)
    path = space.instance_dir("default") / "secrets.yaml"
    path.parent.mkdir(parents=True)
    for text in (None, "garbage", "secrets: 5\n"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(RavectlError) as caught:
            vault.read(path, identity)
        assert f"rm -f {path}" in caught.value.hint
        assert "checkout" not in caught.value.hint


@pytest.mark.parametrize("name", ["secrets.yaml", ".sops.yaml"])
def test_secrets_are_not_changed_through_a_link(
    space: Workspace, identity: Identity, name: str
) -> None:
    vault.init(space, SECRETS, identity)
    real = space.root / "real"
    (space.root / name).rename(real)
    (space.root / name).symlink_to(real)
    assert vault.ensure(space, SECRETS, identity).values, "but read"
    before = real.read_bytes()
    with pytest.raises(RavectlError, match="is a link"):
        rotate.set_values(space, identity, {"agents/anthropic-api-key": "x" * 40}, "set")
    assert real.read_bytes() == before
    assert (space.root / name).is_symlink()


@pytest.mark.parametrize("name", ["secrets.yaml", ".sops.yaml"])
def test_init_puts_nothing_in_the_place_of_a_link(
    space: Workspace, identity: Identity, name: str
) -> None:
    (space.root / name).symlink_to("gone")
    with pytest.raises(RavectlError):
        vault.init(space, SECRETS, identity)
    assert (space.root / name).is_symlink()


def test_a_state_folder_that_came_from_elsewhere_is_refused(
    space: Workspace, identity: Identity
) -> None:
    """A checkout makes folders that others may enter; what is in it decides nothing."""
    victim = space.root.parent / "victim"
    victim.write_text("mine")
    (space.state / "rotation").mkdir(parents=True, mode=0o755)
    (space.state / "rotation" / "payload").write_text("theirs")
    for action in (
        lambda: vault.ensure(space, SECRETS, identity),
        lambda: rotate.recover(space, identity),
        lambda: vault.init(space, SECRETS, identity),
    ):
        with pytest.raises(HostError, match="is not private to you") as caught:
            action()
        assert caught.value.hint
    assert victim.read_text() == "mine"


def test_a_bad_recipient_leaves_nothing_behind(space: Workspace, identity: Identity) -> None:
    with pytest.raises(UsageError, match="is no recipient"):
        vault.init(space, SECRETS, identity, ["age1nonsense"])
    assert below(space.root.parent) == {}


def test_a_read_only_workspace_is_told(tmp_path: Path) -> None:
    """As root only a file system that is read-only refuses: so one is mounted, in a namespace."""
    code = """
import sys
from pathlib import Path
from ravectl import console, vault
from ravectl.errors import RavectlError
from ravectl.plan import SECRETS
from ravectl.sops import Identity
from ravectl.workspace import Workspace
try:
    vault.init(Workspace(Path(sys.argv[1])), SECRETS, Identity(Path(sys.argv[2])))
except RavectlError as e:
    console.error(e)
    sys.exit(e.exit_code)
"""
    (tmp_path / "ro").mkdir()
    key = tmp_path / "keys.txt"
    sops.make_identity(key)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc",
         'mount -t tmpfs -o ro tmpfs "$1"; shift; exec "$@"', "sh", tmp_path / "ro",
         os.sys.executable, "-c", code, tmp_path / "ro", key],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == HostError.exit_code, done.stderr
    assert "read-only file system" in done.stderr
    assert "fix:" in done.stderr


# --- ensure --------------------------------------------------------------------------------------


def test_a_second_look_changes_nothing(made: Places, identity: Identity) -> None:
    before = below(made.workspace.root)
    vault.ensure(made.workspace, SECRETS, identity)
    after = below(made.workspace.root)
    assert {k: v for k, v in after.items() if not k.endswith(".lock")} == {
        k: v for k, v in before.items() if not k.endswith(".lock")
    }


def test_what_a_newer_ravectl_declares_is_added(made: Places, identity: Identity) -> None:
    old = vault.read(made.shared, identity)
    vault.write(made.shared, old.without("dispatcher/api-token"), made.recipients())
    new = vault.ensure(made.workspace, SECRETS, identity)
    assert new.values.keys() == old.values.keys()
    assert {n for n in old.values if old.values[n] != new.values[n]} == {"dispatcher/api-token"}


def test_a_machine_has_its_own_and_keeps_it(made: Places, identity: Identity) -> None:
    shared = vault.read(made.shared, identity)
    folders = [made.workspace.instance_dir(n) for n in ("one", "two")]
    one, two = (vault.ensure_machine(made.workspace, f, PLAN, shared, identity) for f in folders)
    assert not set(one.values.values()) & set(two.values.values())
    again = vault.ensure_machine(made.workspace, folders[0], PLAN, shared, identity)
    assert again == one


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p.shared.unlink(), "there is no"),
        (lambda p: p.shared.write_text(""), "cannot be opened"),
        (lambda p: p.shared.write_bytes(b"\xff\xfe"), "not text"),
        (lambda p: p.rules.write_text("creation_rules: []\n"), "names no recipients"),
        (lambda p: p.rules.write_text("{"), "names no recipients"),
    ],
)
def test_damage_is_told(
    made: Places, identity: Identity, spoil: Callable[[Places], object], said: str
) -> None:
    def look() -> None:
        vault.read(made.shared, identity)
        made.recipients()

    spoil(made)
    with pytest.raises(RavectlError, match=said) as caught:
        look()
    assert caught.value.hint


def test_rules_of_others_stay(made: Places) -> None:
    made.rules.write_text(
        "creation_rules:\n- path_regex: other\n  age: age1other\nstores: {x: 1}\n"
    )
    made.rules.write_text(vault.rules_with(made, ["age1a", "age1b"]))
    text = made.rules.read_text()
    assert made.recipients() == ("age1a", "age1b")
    assert "age1other" in text
    assert "stores" in text


# --- the journal ---------------------------------------------------------------------------------


def journal_of(space: Workspace, phase: str) -> journal.Journal:
    files.make_private_dir(journal.folder(space.state))
    (journal.folder(space.state) / "new").write_text("new")
    (space.root / "secrets.yaml").write_text("old")
    written = journal.Journal(
        version=1, id="x", action="rotate", who="me", started=1.0, phase=phase, names=("a",),
        files={".rave/rotation/new": "secrets.yaml"}, serials={"one": 5}, changed={"one": ("a",)},
    )  # fmt: skip
    return journal.write(space.state, written)


def test_files_take_their_places_only_when_committed(space: Workspace) -> None:
    prepared = journal_of(space, journal.PREPARED)
    assert journal.read(space.state) == prepared
    journal.settle(space.root, space.state)
    assert (space.root / "secrets.yaml").read_text() == "old"
    journal.commit(space.state, prepared)
    for _ in range(2):  # a second time, after a crash in the middle of the first
        journal.settle(space.root, space.state)
        assert (space.root / "secrets.yaml").read_text() == "new"
    journal.close(space.state)
    assert journal.read(space.state) is None
    assert not journal.folder(space.state).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 9}'])
def test_a_damaged_journal_is_told(space: Workspace, text: str) -> None:
    journal_of(space, journal.PREPARED)
    (journal.folder(space.state) / journal.FILE).write_text(text)
    with pytest.raises(RavectlError, match="is damaged") as caught:
        journal.read(space.state)
    assert "ravectl down; ravectl up" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "target"),
    [(".rave/rotation/new", "../victim"), (".rave/rotation/new", "/etc/passwd"),
     (".rave/rotation/new", ".rave/instances/../../x/secrets.yaml"),
     (".rave/rotation/../ssh/id_ed25519", "secrets.yaml"), ("secrets.yaml", ".sops.yaml"),
     (".rave/rotation/new", ".git/config")],
)  # fmt: skip
def test_a_journal_moves_nothing_but_what_is_ours(
    space: Workspace, source: str, target: str
) -> None:
    written = journal_of(space, journal.COMMITTED)
    journal.write(space.state, dataclasses.replace(written, files={source: target}))
    with pytest.raises(RavectlError, match="is damaged"):
        journal.settle(space.root, space.state)


def test_a_machine_that_was_thrown_away_holds_nothing_up(space: Workspace) -> None:
    written = journal_of(space, journal.COMMITTED)
    more = {**written.files, ".rave/rotation/gone.yaml": ".rave/instances/gone/secrets.yaml"}
    (journal.folder(space.state) / "gone.yaml").write_text("x")
    journal.write(space.state, dataclasses.replace(written, files=more))
    journal.settle(space.root, space.state)
    assert (space.root / "secrets.yaml").read_text() == "new"


def test_the_audit_log_survives_a_line_cut_short(space: Workspace) -> None:
    space.prepare()
    journal.log(space.state, {"action": "one"})
    path = space.state / journal.AUDIT
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("ab") as f:
        f.write(b'5\n{"names": null}\n\xff\n{"action": "tw')
    assert journal.history(space.state) == [{"action": "one"}]
    journal.log(space.state, {"action": "three"})
    journal.log(space.state, {"action": "four"})
    assert [r["action"] for r in journal.history(space.state)] == ["one", "three", "four"]


# --- check ---------------------------------------------------------------------------------------


def findings(made: Places, identity: Identity) -> list[str]:
    return [f.text for f in audit.check(made.workspace, SECRETS, identity)]


def test_a_fresh_workspace_is_in_order(made: Places, identity: Identity) -> None:
    assert findings(made, identity) == []


def test_a_receiver_that_no_alert_can_reach_is_told(made: Places, identity: Identity) -> None:
    told = [
        model.AlertReceiver(model.ReceiverKind.WEBHOOK),
        model.AlertReceiver(model.ReceiverKind.SLACK, channel="#ops"),
        model.AlertReceiver(model.ReceiverKind.EMAIL, to="a@b.org", username="a"),
        model.AlertReceiver(model.ReceiverKind.EMAIL, to="a@b.org"),
    ]
    plan = dataclasses.replace(PLAN, alert_receivers=tuple(told))
    shared = vault.read(made.shared, identity)
    names = ["alerts/webhook-url", "alerts/slack-url", "alerts/smtp-password"]
    assert vault.unreachable(plan, shared) == [
        (f"no alert reaches {kind}: {name} is missing", f"ravectl secrets set {name}")
        for kind, name in zip(("webhook", "slack", "email"), names, strict=True)
    ]
    held = dataclasses.replace(shared, values={**shared.values, **dict.fromkeys(names, "x")})
    assert vault.unreachable(plan, held) == []


def changed(made: Places, identity: Identity, change: Callable[[Vault], Vault]) -> None:
    vault.write(made.shared, change(vault.read(made.shared, identity)), made.recipients())


def test_each_disorder_is_found(made: Places, identity: Identity, tmp_path: Path) -> None:
    old = vault.now() - datetime.timedelta(days=91)
    weak = "hunter2hunter2"
    changed(
        made, identity,
        lambda v: v.without("dispatcher/api-token")
        .with_value("ccr/api-key", weak, vault.now())
        .with_value("ingress/password", v.values["ingress/password"], old)
        .with_value("no/such", "x", vault.now()),
    )  # fmt: skip
    other, _ = sops.make_identity(tmp_path / "other.txt")
    made.rules.write_text(vault.rules_with(made, [*identity.recipients(), other]))
    assert identity.file is not None
    identity.file.chmod(0o644)
    seen = "\n".join(findings(made, identity))
    for text in (
        "dispatcher/api-token is missing", "ccr/api-key is not 22 or more",
        "ingress/password is 91 days old", "no/such is not declared", f"not for {other}",
        "can be read by others (mode 644)",
    ):  # fmt: skip
        assert text in seen
    assert weak not in seen
    assert len(seen.splitlines()) == 6


def test_git_is_searched_for_what_was_once_in_it(made: Places, identity: Identity) -> None:
    root = made.workspace.root
    shared = vault.read(made.shared, identity)

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x@x", *words],
            check=True, capture_output=True,
        )  # fmt: skip

    git("init", "-q")
    (root / "notes.txt").write_text(f"the key is {shared.values['ccr/api-key']} it is\n")
    (root / "ca.pem").write_text(shared.values["ca/key"])
    (root / "id").write_text(credentials.new_value(SecretKind.SSH_KEY))
    git("add", "--all")
    git("commit", "-q", "-m", "oops")
    git("rm", "-q", "notes.txt", "ca.pem", "id")
    git("commit", "-q", "-m", "gone, they think")
    seen = "\n".join(findings(made, identity))
    assert "git holds ccr/api-key in plain text (notes.txt, commit " in seen
    assert "git holds ca/key in plain text (ca.pem, commit " in seen
    assert "git holds a private key in plain text (id, commit " in seen
    assert shared.values["ccr/api-key"] not in seen
    assert len(seen.splitlines()) == 3


def test_grafana_gets_the_password_of_the_ingress_and_starts_anew_with_another() -> None:
    plan = make_plan(**profile.load("full-pipe", None).plan_arguments())
    moment = vault.now()
    shared = vault.complete(Vault(), SECRETS, moment)
    for engine in EngineName:
        machine = vault.complete_machine(Vault(), plan.on(engine), shared, moment)
        given = vault.delivery(plan.on(engine), shared, machine, ["ssh-ed25519 AAAA"])
        # a machine without Grafana gets nothing of it
        assert any(name.startswith("grafana/") for name in given) == (engine is EngineName.NIX)
    password = shared.values["ingress/password"] + "\n"
    nix = plan.on(EngineName.NIX)
    machine = vault.complete_machine(Vault(), nix, shared, moment)
    given = vault.delivery(nix, shared, machine, ["ssh-ed25519 AAAA"])
    assert given["grafana/admin-password"] == password
    assert given["grafana/secret-key"] == shared.values["grafana/secret-key"] + "\n"
    changed = ["ingress/htpasswd", "grafana/admin-password"]
    assert delivery.commands(nix, EngineName.NIX, changed) == [
        ["systemctl", "restart", "grafana.service"]
    ]
    for name in changed:
        with pytest.raises(UsageError, match="is made of ingress/password"):
            rotate.choose(SECRETS, {}, {}, rotate.Asked(names=(name,)), moment)
