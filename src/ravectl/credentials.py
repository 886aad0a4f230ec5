"""Keys, certificates and passwords: of the workspace, and of each instance.

They are made once, kept in private files (mode 0600 in folders of mode 0700) and handed to a
machine at boot; none is ever part of an image, an argument or a message. Callers at the same
time get the same ones.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import ipaddress
import secrets
import shlex
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ravectl import files
from ravectl.errors import RavectlError

T = TypeVar("T")

CA_VALID = datetime.timedelta(days=3650)
SERVER_VALID = datetime.timedelta(days=397)  # browsers refuse more than 398
RENEW_BEFORE = datetime.timedelta(days=30)
CLOCK_SLACK = datetime.timedelta(hours=1)  # how far a client's clock may be behind ours

PASSWORD_CHARACTERS = string.ascii_letters + string.digits
PASSWORD_LENGTH = 24  # 142 bits
_PASSWORD_MINIMUM = 22  # 130 bits: what a hash as fast as the ingress's needs
_SALT_BYTES = 16
_SHA1_BYTES = 20


@dataclass(frozen=True)
class WorkspaceKeys:
    """The files that all instances of a workspace share."""

    ca_cert: Path
    ca_key: Path
    operator_key: Path
    operator_public: str  # "ssh-ed25519 AAAA..."


@dataclass(frozen=True)
class InstanceCredentials:
    """What an instance is given at boot, and what its user needs. Holds paths, no secret."""

    files: dict[str, Path]  # by the Plan's name of the secret
    host_key: str  # "ssh-ed25519 AAAA...", public
    ingress_user: str
    ingress_password_file: Path
    router_key_file: Path

    def ingress_password(self) -> str:
        """The password of the ingress; raises RavectlError when its file is damaged."""
        return _read_password(self.ingress_password_file)

    def router_key(self) -> str:
        """The API key of Claude Code Router; raises RavectlError when its file is damaged."""
        return _read_password(self.router_key_file)


def ensure_workspace_keys(ca_dir: Path, ssh_dir: Path) -> WorkspaceKeys:
    """The certificate authority and the operator's key of a workspace, made if need be.

    Raises RavectlError naming a damaged file, HostError when the folders cannot be written.
    """
    files.make_private_dir(ca_dir)
    files.make_private_dir(ssh_dir)
    ca_cert, ca_key, operator_key = ca_dir / "ca.crt", ca_dir / "ca.key", ssh_dir / "id_ed25519"
    with files.lock(ca_dir / ".lock", "the workspace's keys", wait=True):
        _ensure_ca(ca_cert, ca_key)
        public = _ensure_ssh_key(operator_key)
        _ensure_content(operator_key.with_suffix(".pub"), f"{public} ravectl\n")
    return WorkspaceKeys(ca_cert, ca_key, operator_key, public)


def ensure_instance(
    folder: Path, keys: WorkspaceKeys, *, hostname: str, operator: str
) -> InstanceCredentials:
    """The credentials of the instance that is kept in `folder`, made or renewed if need be.

    `operator` is the machine's account that may log in and the user of the ingress. The
    certificate is renewed when less than 30 days of it are left, or when the authority or
    `hostname` is another. Raises RavectlError naming a damaged file, HostError when the folder
    cannot be written.
    """
    files.make_private_dir(folder)
    store = files.make_private_dir(folder / "credentials")
    paths = {
        name: store / name.replace("/", ".")
        for name in (
            "ssh/host-key", "ssh/authorized-keys", "ingress/tls-key", "ingress/tls-cert",
            "ingress/htpasswd", "ccr/api-key",
        )
    }  # fmt: skip
    password_file = folder / "ingress.password"
    with files.lock(store / ".lock", f"the credentials in {folder}", wait=True):
        host_key = _ensure_ssh_key(paths["ssh/host-key"])
        _ensure_content(paths["ssh/authorized-keys"], f"{keys.operator_public} {operator}\n")
        _ensure_server(paths["ingress/tls-cert"], paths["ingress/tls-key"], keys, hostname)
        _ensure_password(paths["ccr/api-key"])
        _ensure_htpasswd(paths["ingress/htpasswd"], operator, _ensure_password(password_file))
    return InstanceCredentials(paths, host_key, operator, password_file, paths["ccr/api-key"])


# --- SSH -------------------------------------------------------------------------------------


def _ensure_ssh_key(path: Path) -> str:
    """The public half of the key in `path`, in OpenSSH's form without a comment."""
    key = _load(path, _parse_ssh_key)
    if key is None:
        key = ed25519.Ed25519PrivateKey.generate()
        _write(path, _private_pem(key, serialization.PrivateFormat.OpenSSH))
    public = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(*public).decode()


def _parse_ssh_key(data: bytes) -> ed25519.Ed25519PrivateKey:
    key = serialization.load_ssh_private_key(data, password=None)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")
    return key


# --- TLS -------------------------------------------------------------------------------------


def _ensure_ca(cert_file: Path, key_file: Path) -> None:
    key = _load(key_file, _parse_tls_key)
    if key is None:
        # first, so that a crash after it never leaves a certificate beside another's key
        cert_file.unlink(missing_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        _write(key_file, _private_pem(key, serialization.PrivateFormat.PKCS8))
    cert = _load(cert_file, x509.load_pem_x509_certificate)
    if cert is not None and cert.public_key() != key.public_key():
        raise RavectlError(
            f"{cert_file} does not belong to {key_file}",
            f"remove both, and ravectl makes new ones: {_rm(cert_file, key_file)}",
        )
    # the same key and name once more: who trusted the old certificate need not act
    if cert is None or not _is_current(cert, SERVER_VALID + RENEW_BEFORE):
        _write(cert_file, _ca_certificate(key, _now()))


def _ensure_server(cert_file: Path, key_file: Path, keys: WorkspaceKeys, hostname: str) -> None:
    ca = _load(keys.ca_cert, x509.load_pem_x509_certificate)
    ca_key = _load(keys.ca_key, _parse_tls_key)
    if ca is None or ca_key is None:
        raise RavectlError(
            f"the workspace's certificate authority is gone from {keys.ca_cert.parent}",
            "run the command again: it makes a new one",
        )
    key = _load(key_file, _parse_tls_key)
    cert = _load(cert_file, x509.load_pem_x509_certificate)
    if key and cert and cert.public_key() == key.public_key() and _serves(cert, ca, hostname):
        return
    key = ec.generate_private_key(ec.SECP256R1())
    _write(key_file, _private_pem(key, serialization.PrivateFormat.PKCS8))
    _write(cert_file, _server_certificate(key.public_key(), ca, ca_key, hostname, _now()))


def _serves(cert: x509.Certificate, ca: x509.Certificate, hostname: str) -> bool:
    """Whether `cert` can go on being used: in time, for these names, signed by `ca`."""
    try:
        cert.verify_directly_issued_by(ca)
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
        return False
    return _is_current(cert, RENEW_BEFORE) and names == _server_names(hostname)


def _is_current(cert: x509.Certificate, margin: datetime.timedelta) -> bool:
    now = _now()
    return cert.not_valid_before_utc <= now < cert.not_valid_after_utc - margin


def _server_names(hostname: str) -> x509.SubjectAlternativeName:
    # each by name too, because OpenSSL takes no wildcard right below a top level
    hosts = ("localhost", "*.localhost", "kanban.localhost", "ccr.localhost")
    addresses = ("127.0.0.1", "::1")
    return x509.SubjectAlternativeName([
        *(x509.DNSName(h) for h in (*hosts, f"{hostname}.localhost")),
        *(x509.IPAddress(ipaddress.ip_address(a)) for a in addresses),
    ])  # fmt: skip


def _ca_certificate(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> bytes:
    key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # two authorities of one name confuse clients that know both, so each has its own
    subject = _common_name(f"RAVE workspace CA {key_id.digest.hex()[:8]}")
    # A person may tell a browser to trust this authority; its key lies unencrypted on the
    # person's disk. Whoever steals it can then pose as this host, and as nobody else.
    local = x509.NameConstraints(
        permitted_subtrees=[
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_network("127.0.0.0/8")),
            x509.IPAddress(ipaddress.ip_network("::1/128")),
        ],
        excluded_subtrees=None,
    )
    builder = (
        _builder(subject, subject, key.public_key(), now, CA_VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(local, critical=True)
        .add_extension(key_id, critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _server_certificate(
    key: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    hostname: str,
    now: datetime.datetime,
) -> bytes:
    key_id = x509.SubjectKeyIdentifier.from_public_key(key)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = (
        _builder(_common_name(f"{hostname}.localhost"), ca.subject, key, now, SERVER_VALID)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(server, critical=False)
        .add_extension(_server_names(hostname), critical=False)
        .add_extension(key_id, critical=False)
        .add_extension(issuer_id, critical=False)
    )
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    valid: datetime.timedelta,
) -> x509.CertificateBuilder:
    begin = now - CLOCK_SLACK
    return x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), begin, begin + valid
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _parse_tls_key(data: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(data, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic curve key")
    return key


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


# --- passwords -------------------------------------------------------------------------------


def _ensure_password(path: Path) -> str:
    if (known := _load(path, _parse_password)) is not None:
        return known
    password = "".join(secrets.choice(PASSWORD_CHARACTERS) for _ in range(PASSWORD_LENGTH))
    _write(path, password + "\n")
    return password


def _read_password(path: Path) -> str:
    if (known := _load(path, _parse_password)) is None:
        raise RavectlError(f"{path} is gone", "ravectl down and ravectl up make a new one")
    return known


def _parse_password(data: bytes) -> str:
    text = data.decode().removesuffix("\n")
    if len(text) < _PASSWORD_MINIMUM or set(text) - set(PASSWORD_CHARACTERS):
        raise ValueError("not a password of ours")
    return text


def _ensure_htpasswd(path: Path, user: str, password: str) -> None:
    known = _load(path, lambda data: data)
    if known is None or not _admits(known, user, password):
        salt = secrets.token_bytes(_SALT_BYTES)
        hashed = base64.b64encode(_ssha(password, salt) + salt).decode()
        _write(path, f"{user}:{{SSHA}}{hashed}\n")


def _admits(line: bytes, user: str, password: str) -> bool:
    prefix = f"{user}:{{SSHA}}".encode()
    try:
        raw = base64.b64decode(line.removeprefix(prefix).strip(), validate=True)
    except ValueError:
        return False
    digest, salt = raw[:_SHA1_BYTES], raw[_SHA1_BYTES:]
    return line.startswith(prefix) and hmac.compare_digest(digest, _ssha(password, salt))


def _ssha(password: str, salt: bytes) -> bytes:
    # nginx checks this at every request, which a slow hash would make felt. Slowness protects
    # passwords that can be guessed; ours are random, of 128 bits and more, and cannot.
    return hashlib.sha1(password.encode() + salt, usedforsecurity=False).digest()


# --- files -----------------------------------------------------------------------------------


def _load(path: Path, parse: Callable[[bytes], T]) -> T | None:
    """What `parse` makes of a file, None when there is none; sees to the file's mode."""
    try:
        data = path.read_bytes()
        if path.stat().st_mode & 0o777 != files.PRIVATE_FILE:
            path.chmod(files.PRIVATE_FILE)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise RavectlError(
            f"cannot read {path}: {(e.strerror or str(e)).lower()}",
            f"see to its owner: ls -l {shlex.quote(str(path))}",
        ) from None
    try:
        return parse(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # the cause is dropped: it may quote what is in the file
        raise RavectlError(
            f"{path} is damaged", f"remove it, and ravectl makes a new one: {_rm(path)}"
        ) from None


def _ensure_content(path: Path, content: str) -> None:
    if _load(path, lambda data: data) != content.encode():
        _write(path, content)


def _write(path: Path, content: bytes | str) -> None:
    files.write_atomic(path, content, files.PRIVATE_FILE)


def _private_pem(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey,
    form: serialization.PrivateFormat,
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _rm(*paths: Path) -> str:
    return shlex.join(["rm", *map(str, paths)])
