"""Keys, certificates and passwords: how they are made, and what a good one looks like. Pure.

Values are text, as they stand in the encrypted file and in the guest. Who keeps them and who
gets them is said in vault.py; the operator's SSH key is the one that is a file here, because
OpenSSH's client reads it.
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
from ravectl.model import SecretKind

T = TypeVar("T")

CA_VALID = datetime.timedelta(days=3650)
SERVER_VALID = datetime.timedelta(days=397)  # browsers refuse more than 398
RENEW_BEFORE = datetime.timedelta(days=30)
CLOCK_SLACK = datetime.timedelta(hours=1)  # how far a client's clock may be behind ours

PASSWORD_CHARACTERS = string.ascii_letters + string.digits
_WEBHOOK_PREFIX = "whsec_"
PASSWORD_LENGTH = 24  # 142 bits
_PASSWORD_MINIMUM = 22  # 130 bits: what a hash as fast as the ingress's needs
_SALT_BYTES = 16
_SCRAM_ITERATIONS = 4096  # PostgreSQL's scram_iterations: its clients compute them at each login
_GIVEN_LENGTHS = (12, 16384)  # shorter ones stand by chance in many a file that is searched


@dataclass(frozen=True)
class OperatorKey:
    """The operator's SSH key: a private file, and its public half."""

    file: Path
    public: str  # "ssh-ed25519 AAAA..."


def new_value(kind: SecretKind) -> str:
    """A new random value of a kind that depends on no other value; ValueError for the others."""
    if kind is SecretKind.PASSWORD:
        return "".join(secrets.choice(PASSWORD_CHARACTERS) for _ in range(PASSWORD_LENGTH))
    if kind is SecretKind.WEBHOOK:
        return _WEBHOOK_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
    if kind is SecretKind.SSH_KEY:
        return _private_text(
            ed25519.Ed25519PrivateKey.generate(), serialization.PrivateFormat.OpenSSH
        )
    if kind in (SecretKind.TLS_KEY, SecretKind.CA_KEY):
        key = ec.generate_private_key(ec.SECP256R1())
        return _private_text(key, serialization.PrivateFormat.PKCS8)
    raise ValueError(f"a secret of kind {kind.value} is not made at random")


def fault(kind: SecretKind, text: str) -> str | None:
    """What is wrong with a value of `kind`, in words that do not quote it; None when it is good."""
    try:
        _parse(kind, text)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return _EXPECTED[kind]
    return None


_EXPECTED = {
    SecretKind.PASSWORD: f"not {_PASSWORD_MINIMUM} or more letters and digits",
    SecretKind.WEBHOOK: "not whsec_ and 24 to 64 bytes in base64",
    SecretKind.SSH_KEY: "not an Ed25519 private key in OpenSSH's format",
    SecretKind.TLS_KEY: "not an unencrypted elliptic curve key in PEM",
    SecretKind.CA_KEY: "not an unencrypted elliptic curve key in PEM",
    SecretKind.TLS_CERT: "not a certificate in PEM",
    SecretKind.CA_CERT: "not a certificate in PEM",
    SecretKind.GIVEN: "not one line of {} to {} characters".format(*_GIVEN_LENGTHS),
}


def _parse(kind: SecretKind, text: str) -> None:
    if kind is SecretKind.PASSWORD:
        if len(text) < _PASSWORD_MINIMUM or set(text) - set(PASSWORD_CHARACTERS):
            raise ValueError
    elif kind is SecretKind.WEBHOOK:
        _parse_webhook(text)
    elif kind is SecretKind.SSH_KEY:
        _parse_ssh_key(text.encode())
    elif kind in (SecretKind.TLS_KEY, SecretKind.CA_KEY):
        _parse_tls_key(text)
    elif kind in (SecretKind.TLS_CERT, SecretKind.CA_CERT):
        x509.load_pem_x509_certificate(text.encode())
    elif not text.isprintable() or not _GIVEN_LENGTHS[0] <= len(text.strip()) <= _GIVEN_LENGTHS[1]:
        raise ValueError


def _parse_webhook(text: str) -> None:
    # 24 to 64 bytes: standard-webhooks' specification, "Signature scheme"
    key = base64.b64decode(text.removeprefix(_WEBHOOK_PREFIX), validate=True)
    if not text.startswith(_WEBHOOK_PREFIX) or not 24 <= len(key) <= 64:
        raise ValueError


# --- SSH -------------------------------------------------------------------------------------


def ensure_operator_key(ssh_dir: Path) -> OperatorKey:
    """The operator's key of a workspace, made if need be.

    Raises RavectlError naming a damaged file, HostError when the folder cannot be written.
    """
    return _ensure_key(ssh_dir, "the operator's key")


def ensure_signing_key(folder: Path) -> OperatorKey:
    """The key that a workspace signs images by, made if need be; raises as the above does."""
    return _ensure_key(folder, "the signing key")


def _ensure_key(ssh_dir: Path, what: str) -> OperatorKey:
    files.make_private_dir(ssh_dir)
    path = ssh_dir / "id_ed25519"
    with files.lock(ssh_dir / ".lock", what, wait=True):
        key = _load(path, _parse_ssh_key)
        if key is None:
            text = new_value(SecretKind.SSH_KEY)
            files.write_atomic(path, text, files.PRIVATE_FILE)
            key = _parse_ssh_key(text.encode())
        public = _public_line(key)
        line = f"{public} ravectl\n"
        if _load(path.with_suffix(".pub"), bytes.decode) != line:
            files.write_atomic(path.with_suffix(".pub"), line, files.PRIVATE_FILE)
    return OperatorKey(path, public)


def ssh_public(private: str) -> str:
    """The public half of a private key, in OpenSSH's form without a comment."""
    return _public_line(_parse_ssh_key(private.encode()))


def is_ssh_public(line: str) -> bool:
    """Whether a line is a public key in OpenSSH's form."""
    try:
        serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        return False
    return True


def _public_line(key: ed25519.Ed25519PrivateKey) -> str:
    public = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(*public).decode()


def _parse_ssh_key(data: bytes) -> ed25519.Ed25519PrivateKey:
    key = serialization.load_ssh_private_key(data, password=None)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")
    return key


# --- TLS -------------------------------------------------------------------------------------


def ca_certificate(ca_key: str) -> str:
    """A new certificate of the authority that has this key."""
    return _ca_certificate(_parse_tls_key(ca_key), _now()).decode()


def ca_fault(ca_cert: str, ca_key: str) -> str | None:
    """What keeps an authority from signing: it is another key's, or ends soon; None if nothing."""
    key = _parse_tls_key(ca_key)
    try:
        cert = x509.load_pem_x509_certificate(ca_cert.encode())
    except ValueError:
        return "it is no certificate"
    if cert.public_key() != key.public_key():
        return "the certificate belongs to another key"
    # what it signs must not outlive it
    return None if _is_current(cert, SERVER_VALID + RENEW_BEFORE) else "it ends too soon"


def server_certificate(tls_key: str, ca_cert: str, ca_key: str, hostname: str) -> str:
    """A new certificate for the machine's names, signed by the workspace's authority."""
    ca = x509.load_pem_x509_certificate(ca_cert.encode())
    public = _parse_tls_key(tls_key).public_key()
    return _server_certificate(public, ca, _parse_tls_key(ca_key), hostname, _now()).decode()


def serves(tls_cert: str, tls_key: str, ca_cert: str, hostname: str) -> bool:
    """Whether a certificate can go on being used: in time, for these names, signed by the CA."""
    ca = x509.load_pem_x509_certificate(ca_cert.encode())
    try:
        cert = x509.load_pem_x509_certificate(tls_cert.encode())
    except ValueError:
        return False
    ours = cert.public_key() == _parse_tls_key(tls_key).public_key()
    return ours and _serves(cert, ca, hostname)


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


def _parse_tls_key(text: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(text.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic curve key")
    return key


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


# --- passwords -------------------------------------------------------------------------------


def htpasswd(user: str, password: str) -> str:
    """The line by which nginx knows a user; the same for the same password."""
    salt = _salt("ingress", password)
    # nginx checks this at every request, which a slow hash would make felt. Slowness protects
    # passwords that can be guessed; ours are random, of 128 bits and more, and cannot.
    digest = hashlib.sha1(password.encode() + salt, usedforsecurity=False).digest()
    return f"{user}:{{SSHA}}{base64.b64encode(digest + salt).decode()}\n"


def scram_verifier(role: str, password: str) -> str:
    """What PostgreSQL keeps of a password (RFC 5803): with it SQL never holds the password."""
    salt = _salt(f"postgres {role}", password)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _SCRAM_ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    parts = [base64.b64encode(x).decode() for x in (salt, stored, server)]
    return f"SCRAM-SHA-256${_SCRAM_ITERATIONS}:{parts[0]}${parts[1]}:{parts[2]}\n"


def _salt(purpose: str, password: str) -> bytes:
    # of the password itself, so that nothing changes in the guest when nothing was rotated; a
    # salt keeps equal passwords from looking equal, and random ones are never equal
    return hmac.digest(password.encode(), f"rave {purpose}".encode(), "sha256")[:_SALT_BYTES]


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


def _private_text(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey,
    form: serialization.PrivateFormat,
) -> str:
    pem = serialization.Encoding.PEM
    return key.private_bytes(pem, form, serialization.NoEncryption()).decode()


def _rm(*paths: Path) -> str:
    return shlex.join(["rm", *map(str, paths)])
