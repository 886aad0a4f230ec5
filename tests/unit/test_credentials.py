"""Credentials as openssl, Python's ssl, OpenSSH, paramiko and nginx see them."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import paramiko
import pytest
from cryptography import x509

from ravectl import command, credentials, vault
from ravectl.errors import RavectlError
from ravectl.model import SecretKind
from ravectl.plan import SECRETS
from tests.plans import PLAN

HOSTNAME = PLAN.hostname
OPERATOR = "rave"
CERT, KEY = "ingress/tls-cert", "ingress/tls-key"


@dataclasses.dataclass
class Made:
    """A workspace's and a machine's values as files, for the tools that people have."""

    ca_cert: Path
    ca_key: Path
    operator_key: Path
    operator_public: str
    values: dict[str, str]
    files: dict[str, Path]
    host_key: str


def make(root: Path) -> Made:
    now = vault.now()
    operator = credentials.ensure_operator_key(root / "ssh")
    shared = vault.complete(vault.Vault(), SECRETS, now)
    machine = vault.complete_machine(vault.Vault(), PLAN, shared, now)
    every = dataclasses.replace(PLAN, secrets=SECRETS)  # also what only a larger machine has
    got = vault.delivery(every, shared, machine, [operator.public])
    values = {**shared.values, **machine.values, **got}
    files = {name: root / name.replace("/", ".") for name in values}
    for name, path in files.items():
        path.write_text(values[name])
        path.chmod(0o600)
    host_key = credentials.ssh_public(machine.values["ssh/host-key"])
    return Made(
        files["ca/cert"], files["ca/key"], operator.file, operator.public, values, files, host_key
    )


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verifies(cert: Path, ca: Path, *more: str) -> bool:
    argv = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", ca, *more]
    return command.run([*argv, cert], check=False).returncode == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def made(root: Path) -> Made:
    return make(root)


@pytest.fixture(scope="module")
def keys(made: Made) -> Made:
    return made


# --- what is there ---------------------------------------------------------------------------


def test_there_is_a_value_for_each_secret_that_is_made(made: Made) -> None:
    given = {s.name for s in SECRETS if s.kind is SecretKind.GIVEN}
    assert made.values.keys() == {s.name for s in SECRETS} - given
    assert all(made.values.values())


def test_passwords_are_long_and_each_its_own(made: Made) -> None:
    words = [made.values[s.name].strip() for s in SECRETS if s.kind is SecretKind.PASSWORD]
    assert len(set(words)) == len(words) >= 6
    for word in words:
        assert word.isascii()
        assert word.isalnum()
        assert 62 ** len(word) >= 2**128


def test_machines_share_the_authority_and_nothing_else() -> None:
    now = vault.now()
    shared = vault.complete(vault.Vault(), SECRETS, now)
    one, two = (vault.complete_machine(vault.Vault(), PLAN, shared, now) for _ in range(2))
    assert one.values.keys() == two.values.keys() == {"ssh/host-key", KEY, CERT}
    assert not set(one.values.values()) & set(two.values.values())


def test_a_mode_that_was_opened_is_closed_again(tmp_path: Path) -> None:
    key = credentials.ensure_operator_key(tmp_path)
    key.file.chmod(0o644)
    assert credentials.ensure_operator_key(tmp_path) == key
    assert key.file.stat().st_mode & 0o777 == 0o600


GOOD = {
    kind: credentials.new_value(kind)
    for kind in (
        SecretKind.PASSWORD, SecretKind.SSH_KEY, SecretKind.TLS_KEY, SecretKind.CA_KEY,
    )
} | {SecretKind.GIVEN: "sk-ant-x-y-z"}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_a_value_is_told_from_those_of_other_kinds(kind: SecretKind) -> None:
    assert credentials.fault(kind, GOOD[kind]) is None
    alike = [{SecretKind.TLS_KEY, SecretKind.CA_KEY}, {SecretKind.PASSWORD, SecretKind.GIVEN}]
    for other, value in GOOD.items():
        if other is not kind and {kind, other} not in alike:
            assert credentials.fault(kind, value), (kind, other)
    for value in ("", "x\ny", GOOD[kind][: len(GOOD[kind]) // 3] + "\n", "\0"):
        why = credentials.fault(kind, value)
        assert why
        assert not value.strip() or value not in why


# --- SSH -------------------------------------------------------------------------------------


def public_of(key: Path) -> str:
    return " ".join(command.run(["ssh-keygen", "-y", "-P", "", "-f", key]).stdout.split()[:2])


def test_openssh_reads_the_keys(keys: Made, made: Made) -> None:
    assert public_of(keys.operator_key) == keys.operator_public
    assert public_of(made.files["ssh/host-key"]) == made.host_key
    for path in (keys.operator_key.with_suffix(".pub"), made.files["ssh/authorized-keys"]):
        told = command.run(["ssh-keygen", "-l", "-f", path]).stdout
        assert told.startswith("256 SHA256:")
        assert told.rstrip().endswith("(ED25519)")
        assert path.read_text().startswith(f"{keys.operator_public} ")


def test_paramiko_reads_the_operators_key(keys: Made) -> None:
    key = paramiko.Ed25519Key.from_private_key_file(str(keys.operator_key))
    assert f"{key.get_name()} {key.get_base64()}" == keys.operator_public


# --- TLS -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "name", "holds"),
    [
        ("-verify_hostname", "localhost", True),
        ("-verify_hostname", "kanban.localhost", True),
        ("-verify_hostname", "ccr.localhost", True),
        ("-verify_hostname", "rave-safe.localhost", True),
        ("-verify_hostname", "example.org", False),
        ("-verify_hostname", "localhost.example.org", False),
        ("-verify_ip", "127.0.0.1", True),
        ("-verify_ip", "::1", True),
        ("-verify_ip", "192.0.2.1", False),
    ],
)
def test_openssl_accepts_the_chain_for_our_names_only(
    keys: Made, made: Made, option: str, name: str, holds: bool
) -> None:
    assert verifies(made.files[CERT], keys.ca_cert, option, name) is holds


def test_another_authority_does_not_do(made: Made, tmp_path: Path) -> None:
    other = make(tmp_path)
    assert not verifies(made.files[CERT], other.ca_cert)


def test_a_stolen_authority_can_pose_as_nobody_else(keys: Made, tmp_path: Path) -> None:
    """What openssl, with our authority's key, signs for a bank is refused by everybody."""
    request, cert = tmp_path / "r", tmp_path / "c"
    for name, holds in (("bank.example", False), ("more.localhost", True)):
        command.run([
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-keyout", request, "-out", cert, "-subj", f"/CN={name}", "-days", "2",
            "-CA", keys.ca_cert, "-CAkey", keys.ca_key,
            "-addext", f"subjectAltName=DNS:{name}", "-addext", "basicConstraints=CA:FALSE",
        ])  # fmt: skip
        assert verifies(cert, keys.ca_cert, "-verify_hostname", name) is holds


def test_the_authority_signs_servers_only(keys: Made) -> None:
    extensions = load(keys.ca_cert).extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.value.ca, basic.value.path_length, basic.critical) == (True, 0, True)
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature


def test_how_long_certificates_are_valid(keys: Made, made: Made) -> None:
    now = datetime.datetime.now(datetime.UTC)
    server, ca = load(made.files[CERT]), load(keys.ca_cert)
    assert server.not_valid_before_utc < now - datetime.timedelta(minutes=50)
    total = server.not_valid_after_utc - server.not_valid_before_utc
    assert total == datetime.timedelta(days=397)
    assert ca.not_valid_after_utc - now > datetime.timedelta(days=3640)


@pytest.fixture(scope="module")
def server(made: Made) -> Iterator[int]:
    """Python's own TLS server with the instance's certificate; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.files[CERT], made.files[KEY])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(sock, server_side=True) as tls:
                        tls.sendall(b"hello")
                except OSError:  # a client that refused us
                    sock.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)


@pytest.mark.parametrize(
    "name", ["localhost", "kanban.localhost", "ccr.localhost",
             "rave-safe.localhost", "127.0.0.1", "::1"],
)  # fmt: skip
def test_python_shakes_hands(keys: Made, server: int, name: str) -> None:
    context = ssl.create_default_context(cafile=str(keys.ca_cert))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", server), timeout=20) as sock,
        context.wrap_socket(sock, server_hostname=name) as tls,
    ):
        assert tls.recv(10) == b"hello"


@pytest.mark.parametrize("name", ["example.org", "rave-safe", "a.b.localhost", "127.0.0.2"])
def test_python_refuses_other_names(keys: Made, server: int, name: str) -> None:
    context = ssl.create_default_context(cafile=str(keys.ca_cert))
    with (
        socket.create_connection(("127.0.0.1", server), timeout=20) as sock,
        pytest.raises(ssl.SSLCertVerificationError, match="mismatch"),
    ):
        context.wrap_socket(sock, server_hostname=name)


# --- renewal ---------------------------------------------------------------------------------


def aged(days_left: float) -> tuple[vault.Vault, vault.Vault]:
    """A workspace's vault, and a machine's whose certificate has that many days left."""
    now = vault.now()
    shared = vault.complete(vault.Vault(), SECRETS, now)
    machine = vault.complete_machine(vault.Vault(), PLAN, shared, now)
    ca = x509.load_pem_x509_certificate(shared.values["ca/cert"].encode())
    ca_key = credentials._parse_tls_key(shared.values["ca/key"])
    key = credentials._parse_tls_key(machine.values[KEY])
    then = now + datetime.timedelta(days=days_left) - credentials.SERVER_VALID
    made = credentials._server_certificate(key.public_key(), ca, ca_key, HOSTNAME, then)
    return shared, machine.with_value(CERT, made.decode(), now)


@pytest.mark.parametrize(
    ("days_left", "renewed"), [(-1, True), (29, True), (31, False), (397 + 10, True)]
)
def test_a_certificate_is_renewed_in_time(tmp_path: Path, days_left: int, renewed: bool) -> None:
    shared, old = aged(days_left)
    new = vault.complete_machine(old, PLAN, shared, vault.now())
    changed = {n for n in new.values if new.values[n] != old.values[n]}
    assert changed == ({CERT} if renewed else set())
    cert, ca = tmp_path / "cert", tmp_path / "ca"
    cert.write_text(new.values[CERT])
    ca.write_text(shared.values["ca/cert"])
    assert verifies(cert, ca, "-verify_hostname", "localhost")


def test_another_name_key_or_authority_renews() -> None:
    shared, machine = aged(300)
    moment = vault.now()
    for changed in (
        vault.complete_machine(machine, dataclasses.replace(PLAN, hostname="b"), shared, moment),
        vault.complete_machine(
            machine.with_value(KEY, credentials.new_value(SecretKind.TLS_KEY), moment),
            PLAN, shared, moment,
        ),
        vault.complete_machine(
            machine, PLAN, vault.complete(vault.Vault(), SECRETS, moment), moment
        ),
    ):  # fmt: skip
        assert changed.values[CERT] != machine.values[CERT]


def test_an_ageing_authority_is_renewed_and_old_trust_holds(tmp_path: Path) -> None:
    shared, machine = aged(300)
    key = credentials._parse_tls_key(shared.values["ca/key"])
    long_ago = vault.now() - datetime.timedelta(days=3650 - 400)
    old = shared.with_value(
        "ca/cert", credentials._ca_certificate(key, long_ago).decode(), long_ago
    )
    new = vault.complete(old, SECRETS, vault.now())
    assert new.values["ca/cert"] != old.values["ca/cert"]
    kept = vault.complete_machine(machine, PLAN, new, vault.now())
    cert = tmp_path / "cert"
    cert.write_text(kept.values[CERT])
    for number, held in enumerate((old, new)):
        ca = tmp_path / f"ca{number}"
        ca.write_text(held.values["ca/cert"])
        assert verifies(cert, ca)


# --- damage ----------------------------------------------------------------------------------


def test_a_damaged_operator_key_is_named_with_its_remedy_which_works(tmp_path: Path) -> None:
    key = credentials.ensure_operator_key(tmp_path)
    whole = key.file.read_bytes()
    tls = credentials.new_value(SecretKind.TLS_KEY).encode()
    for content in (b"", whole[: len(whole) // 2], b"\xff\x00" * 40, tls):
        key.file.write_bytes(content)
        with pytest.raises(RavectlError) as caught:
            credentials.ensure_operator_key(tmp_path)
        assert caught.value.message == f"{key.file} is damaged"
        assert caught.value.hint.endswith(f"rm {key.file}")
        assert caught.value.__suppress_context__, "the cause may quote the file"
    key.file.unlink()
    assert credentials.ensure_operator_key(tmp_path).public != key.public


def test_threads_at_once_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(credentials.ensure_operator_key, [tmp_path] * 8))
    assert all(s == seen[0] for s in seen)
    assert public_of(seen[0].file) == seen[0].public


# --- nginx -----------------------------------------------------------------------------------

NGINX = """\
daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {here}/1; proxy_temp_path {here}/2; fastcgi_temp_path {here}/3;
  uwsgi_temp_path {here}/4; scgi_temp_path {here}/5;
  server {{
    listen unix:{here}/s ssl; ssl_protocols TLSv1.3;
    ssl_certificate {cert}; ssl_certificate_key {key};
    location / {{ auth_basic "x"; auth_basic_user_file {htpasswd}; try_files /none =404; }}
  }}
}}
"""


@pytest.fixture(scope="module")
def nginx(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nginx with the instance's key, certificate and passwords; its socket."""
    here = tmp_path_factory.mktemp("n")
    paths = {"cert": CERT, "key": KEY, "htpasswd": "ingress/htpasswd"}
    text = NGINX.format(here=here, **{k: made.files[v] for k, v in paths.items()})
    (here / "conf").write_text(text)
    argv = [command.find_tool("nginx"), "-e", here / "error.log", "-c", here / "conf"]
    process = subprocess.Popen(argv)
    try:
        deadline = time.monotonic() + 30
        while not (here / "s").exists():
            assert process.poll() is None, (here / "error.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield here / "s"
    finally:
        process.terminate()
        process.wait(timeout=10)


def ask(path: Path, ca: Path, login: str | None) -> int:
    """The status that nginx answers."""
    context = ssl.create_default_context(cafile=str(ca))
    sign_in = ""
    if login is not None:
        sign_in = f"Authorization: Basic {base64.b64encode(login.encode()).decode()}\r\n"
    request = f"GET / HTTP/1.1\r\nHost: localhost\r\n{sign_in}Connection: close\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        with context.wrap_socket(sock, server_hostname="localhost") as tls:
            tls.sendall(request.encode())
            return int(tls.recv(100).split()[1])


def test_nginx_lets_in_whom_it_should(nginx: Path, keys: Made, made: Made) -> None:
    password, key = made.values["ingress/password"], made.values["ccr/api-key"]
    assert ask(nginx, keys.ca_cert, f"{OPERATOR}:{password}") == 404, "let in; nothing is there"
    for login in (None, "", ":", f"{OPERATOR}:", f"{OPERATOR}:{password}x", f"x:{password}",
                  f"{OPERATOR}:{password[:-1]}", f"{OPERATOR}:{key}"):  # fmt: skip
        assert ask(nginx, keys.ca_cert, login) == 401, login
