"""Credentials as openssl, Python's ssl, OpenSSH, paramiko and nginx see them."""

from __future__ import annotations

import base64
import datetime
import multiprocessing
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
from cryptography import x509

from ravectl import command, credentials, plan
from ravectl.credentials import InstanceCredentials, WorkspaceKeys
from ravectl.errors import RavectlError

HOSTNAME = "rave-safe"
OPERATOR = "rave"
CERT, KEY = "ingress/tls-cert", "ingress/tls-key"


def make(
    root: Path, name: str = "main", **change: str
) -> tuple[WorkspaceKeys, InstanceCredentials]:
    keys = credentials.ensure_workspace_keys(root / "ca", root / "ssh")
    who = {"hostname": HOSTNAME, "operator": OPERATOR} | change
    return keys, credentials.ensure_instance(root / name, keys, **who)


def contents(root: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verifies(cert: Path, ca: Path, *more: str) -> bool:
    argv = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", ca, *more]
    return command.run([*argv, cert], check=False).returncode == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def keys(root: Path) -> WorkspaceKeys:
    return make(root)[0]


@pytest.fixture(scope="module")
def made(root: Path) -> InstanceCredentials:
    return make(root)[1]


# --- what is there ---------------------------------------------------------------------------


def test_there_is_a_file_for_each_secret_of_the_plan(made: InstanceCredentials) -> None:
    assert set(made.files) == {s.name for s in plan.SECRETS}
    assert all(p.stat().st_size > 0 for p in made.files.values())


def test_everything_is_private(root: Path, made: InstanceCredentials) -> None:
    assert made
    below = list(root.rglob("*"))
    assert {p.stat().st_mode & 0o777 for p in below if p.is_file()} == {0o600}
    assert {p.stat().st_mode & 0o777 for p in below if p.is_dir()} == {0o700}


def test_passwords_are_long_and_each_its_own(made: InstanceCredentials) -> None:
    password, key = made.ingress_password(), made.router_key()
    assert password != key
    for secret in (password, key):
        assert secret.isascii()
        assert secret.isalnum()
        assert 62 ** len(secret) >= 2**128
    assert made.router_key_file == made.files["ccr/api-key"]
    assert made.ingress_user == OPERATOR


def test_what_is_shown_holds_no_secret(keys: WorkspaceKeys, made: InstanceCredentials) -> None:
    shown = f"{keys!r} {made!r} {made} {vars(made)}"
    for path in (keys.operator_key, keys.ca_key, *made.files.values(), made.ingress_password_file):
        lines = [line for line in path.read_text().splitlines() if "-----" not in line]
        assert not any(line in shown for line in lines), path


def test_a_second_call_changes_nothing(root: Path, made: InstanceCredentials) -> None:
    before = contents(root)
    assert make(root)[1] == made
    assert contents(root) == before


def test_instances_share_the_authority_and_nothing_else(tmp_path: Path) -> None:
    keys, one = make(tmp_path, "one")
    same, two = make(tmp_path, "two")
    assert keys == same
    assert one.host_key != two.host_key
    for name in set(one.files) - {"ssh/authorized-keys"}:
        assert one.files[name].read_bytes() != two.files[name].read_bytes(), name
    assert verifies(two.files[CERT], keys.ca_cert)


def test_a_mode_that_was_opened_is_closed_again(tmp_path: Path) -> None:
    keys, made = make(tmp_path)
    for path in (keys.operator_key, keys.ca_key, made.files[KEY], made.ingress_password_file):
        path.chmod(0o644)
    make(tmp_path)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()} == {0o600}


# --- SSH -------------------------------------------------------------------------------------


def public_of(key: Path) -> str:
    return " ".join(command.run(["ssh-keygen", "-y", "-P", "", "-f", key]).stdout.split()[:2])


def test_openssh_reads_the_keys(keys: WorkspaceKeys, made: InstanceCredentials) -> None:
    assert public_of(keys.operator_key) == keys.operator_public
    assert public_of(made.files["ssh/host-key"]) == made.host_key
    for path in (keys.operator_key.with_suffix(".pub"), made.files["ssh/authorized-keys"]):
        told = command.run(["ssh-keygen", "-l", "-f", path]).stdout
        assert told.startswith("256 SHA256:")
        assert told.rstrip().endswith("(ED25519)")
        assert path.read_text().startswith(f"{keys.operator_public} ")


def test_paramiko_reads_the_operators_key(keys: WorkspaceKeys) -> None:
    key = paramiko.Ed25519Key.from_private_key_file(str(keys.operator_key))
    assert f"{key.get_name()} {key.get_base64()}" == keys.operator_public


def test_another_operator_gets_in_and_signs_in(tmp_path: Path) -> None:
    _, before = make(tmp_path)
    old = before.files["ingress/htpasswd"].read_text()
    _, after = make(tmp_path, operator="ada")
    new = after.files["ingress/htpasswd"].read_text()
    assert old.startswith("rave:")
    assert new.startswith("ada:")
    assert after.ingress_user == "ada"
    assert after.ingress_password() == before.ingress_password()


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
    keys: WorkspaceKeys, made: InstanceCredentials, option: str, name: str, holds: bool
) -> None:
    assert verifies(made.files[CERT], keys.ca_cert, option, name) is holds


def test_another_authority_does_not_do(made: InstanceCredentials, tmp_path: Path) -> None:
    other = credentials.ensure_workspace_keys(tmp_path / "ca", tmp_path / "ssh")
    assert not verifies(made.files[CERT], other.ca_cert)


def test_a_stolen_authority_can_pose_as_nobody_else(keys: WorkspaceKeys, tmp_path: Path) -> None:
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


def test_the_authority_signs_servers_only(keys: WorkspaceKeys) -> None:
    extensions = load(keys.ca_cert).extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.value.ca, basic.value.path_length, basic.critical) == (True, 0, True)
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature


def test_how_long_certificates_are_valid(keys: WorkspaceKeys, made: InstanceCredentials) -> None:
    now = datetime.datetime.now(datetime.UTC)
    server, ca = load(made.files[CERT]), load(keys.ca_cert)
    assert server.not_valid_before_utc < now - datetime.timedelta(minutes=50)
    total = server.not_valid_after_utc - server.not_valid_before_utc
    assert total == datetime.timedelta(days=397)
    assert ca.not_valid_after_utc - now > datetime.timedelta(days=3640)


@pytest.fixture(scope="module")
def server(made: InstanceCredentials) -> Iterator[int]:
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
def test_python_shakes_hands(keys: WorkspaceKeys, server: int, name: str) -> None:
    context = ssl.create_default_context(cafile=str(keys.ca_cert))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", server), timeout=20) as sock,
        context.wrap_socket(sock, server_hostname=name) as tls,
    ):
        assert tls.recv(10) == b"hello"


@pytest.mark.parametrize("name", ["example.org", "rave-safe", "a.b.localhost", "127.0.0.2"])
def test_python_refuses_other_names(keys: WorkspaceKeys, server: int, name: str) -> None:
    context = ssl.create_default_context(cafile=str(keys.ca_cert))
    with (
        socket.create_connection(("127.0.0.1", server), timeout=20) as sock,
        pytest.raises(ssl.SSLCertVerificationError, match="mismatch"),
    ):
        context.wrap_socket(sock, server_hostname=name)


# --- renewal ---------------------------------------------------------------------------------


def age(keys: WorkspaceKeys, made: InstanceCredentials, days_left: float) -> None:
    """Replace the instance's certificate by one with that many days left."""
    ca_key = credentials._parse_tls_key(keys.ca_key.read_bytes())
    key = credentials._parse_tls_key(made.files[KEY].read_bytes())
    left = datetime.timedelta(days=days_left)
    now = datetime.datetime.now(datetime.UTC) + left - credentials.SERVER_VALID
    made.files[CERT].write_bytes(
        credentials._server_certificate(key.public_key(), load(keys.ca_cert), ca_key, HOSTNAME, now)
    )


@pytest.mark.parametrize(("days_left", "renewed"), [(-1, True), (29, True), (31, False)])
def test_a_certificate_is_renewed_in_time(tmp_path: Path, days_left: int, renewed: bool) -> None:
    keys, made = make(tmp_path)
    age(keys, made, days_left)
    old = contents(tmp_path)
    make(tmp_path)
    new = contents(tmp_path)
    changed = {p for p in new if old.get(p) != new[p]}
    assert changed == ({made.files[CERT], made.files[KEY]} if renewed else set())
    assert verifies(made.files[CERT], keys.ca_cert, "-verify_hostname", "localhost")


def test_a_certificate_of_the_future_is_renewed(tmp_path: Path) -> None:
    keys, made = make(tmp_path)
    age(keys, made, 397 + 10)
    assert not verifies(made.files[CERT], keys.ca_cert)
    make(tmp_path)
    assert verifies(made.files[CERT], keys.ca_cert)


def test_another_hostname_renews(tmp_path: Path) -> None:
    keys, made = make(tmp_path)
    host = ("-verify_hostname", "rave-full-pipe.localhost")
    before = made.files[CERT].read_bytes()
    make(tmp_path, hostname="rave-full-pipe")
    assert made.files[CERT].read_bytes() != before
    assert verifies(made.files[CERT], keys.ca_cert, *host)


def test_another_authority_renews(tmp_path: Path) -> None:
    keys, made = make(tmp_path)
    shutil.rmtree(tmp_path / "ca")
    assert make(tmp_path)[0] == keys
    assert verifies(made.files[CERT], keys.ca_cert)


def test_a_certificate_of_another_key_is_replaced(tmp_path: Path) -> None:
    """A crash between the writing of the two leaves this."""
    _, one = make(tmp_path, "one")
    keys, two = make(tmp_path, "two")
    shutil.copy(two.files[KEY], one.files[KEY])
    make(tmp_path, "one")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(one.files[CERT], one.files[KEY])
    assert verifies(one.files[CERT], keys.ca_cert)
    assert one.files[KEY].read_bytes() != two.files[KEY].read_bytes()


def test_an_ageing_authority_is_renewed_and_old_trust_holds(tmp_path: Path) -> None:
    keys, made = make(tmp_path)
    key = credentials._parse_tls_key(keys.ca_key.read_bytes())
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3650 - 400)
    keys.ca_cert.write_bytes(credentials._ca_certificate(key, long_ago))
    trusted = tmp_path / "in-the-browser.crt"
    shutil.copy(keys.ca_cert, trusted)
    make(tmp_path)
    assert keys.ca_cert.read_bytes() != trusted.read_bytes()
    for ca in (keys.ca_cert, trusted):
        assert verifies(made.files[CERT], ca)


# --- damage ----------------------------------------------------------------------------------


def damaged(root: Path, path: Path, content: bytes) -> RavectlError:
    path.write_bytes(content)
    with pytest.raises(RavectlError) as caught:
        make(root)
    return caught.value


@pytest.mark.parametrize(
    "name", ["ca/ca.key", "ca/ca.crt", "ssh/id_ed25519", "main/ingress.password",
             "main/credentials/ssh.host-key", "main/credentials/ingress.tls-key",
             "main/credentials/ingress.tls-cert", "main/credentials/ccr.api-key"],
)  # fmt: skip
def test_damage_is_named_with_its_remedy_which_works(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\xff\x00" * 40):
        error = damaged(tmp_path, path, content)
        assert error.message == f"{path} is damaged"
        assert error.hint.endswith(f"rm {path}")
        assert error.__suppress_context__, "the cause may quote the file"
    path.unlink()
    keys, made = make(tmp_path)
    assert verifies(made.files[CERT], keys.ca_cert)
    assert made.ingress_password()
    assert made.router_key()


def test_a_key_of_the_wrong_kind_is_damage(tmp_path: Path) -> None:
    keys, made = make(tmp_path)
    ssh = keys.operator_key.read_bytes()
    assert "is damaged" in damaged(tmp_path, keys.ca_key, ssh).message
    keys.ca_key.unlink()
    make(tmp_path)
    tls = made.files[KEY].read_bytes()
    assert "is damaged" in damaged(tmp_path, keys.operator_key, tls).message


def test_an_authority_of_two_halves_is_told(tmp_path: Path) -> None:
    keys, _ = make(tmp_path)
    other, _ = make(tmp_path / "other")
    error = damaged(tmp_path, keys.ca_cert, other.ca_cert.read_bytes())
    assert "does not belong to" in error.message
    assert error.hint.endswith(f"rm {keys.ca_cert} {keys.ca_key}")


def test_a_password_file_that_is_gone_is_told(tmp_path: Path) -> None:
    _, made = make(tmp_path)
    made.ingress_password_file.unlink()
    with pytest.raises(RavectlError, match="is gone"):
        made.ingress_password()


def test_a_lost_password_makes_a_new_one_that_signs_in(tmp_path: Path) -> None:
    _, made = make(tmp_path)
    old, line = made.ingress_password(), made.files["ingress/htpasswd"].read_text()
    made.ingress_password_file.unlink()
    make(tmp_path)
    assert made.ingress_password() != old
    assert made.files["ingress/htpasswd"].read_text() != line


# --- many at once ----------------------------------------------------------------------------


def _make_many(root: Path, gate: Any, results: Any) -> None:
    gate.wait(60)
    keys, made = make(root)
    results.put((keys.operator_public, keys.ca_cert.read_text(), made.host_key))


def test_processes_at_once_get_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(4), context.Queue()
    many = [context.Process(target=_make_many, args=(tmp_path, gate, results)) for _ in range(4)]
    for process in many:
        process.start()
    seen = {results.get(timeout=120) for _ in many}
    for process in many:
        process.join()
    assert len(seen) == 1
    assert make(tmp_path)[1].host_key == seen.pop()[2]


def test_threads_at_once_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(make, [tmp_path] * 8))
    assert all(s == seen[0] for s in seen)
    keys, made = seen[0]
    assert public_of(keys.operator_key) == keys.operator_public
    assert verifies(made.files[CERT], keys.ca_cert)


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
def nginx(made: InstanceCredentials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
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


def test_nginx_lets_in_whom_it_should(
    nginx: Path, keys: WorkspaceKeys, made: InstanceCredentials
) -> None:
    password = made.ingress_password()
    assert ask(nginx, keys.ca_cert, f"{OPERATOR}:{password}") == 404, "let in; nothing is there"
    for login in (None, "", ":", f"{OPERATOR}:", f"{OPERATOR}:{password}x", f"x:{password}",
                  f"{OPERATOR}:{password[:-1]}", f"{OPERATOR}:{made.router_key()}"):  # fmt: skip
        assert ask(nginx, keys.ca_cert, login) == 401, login
