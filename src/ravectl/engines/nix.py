"""The nix engine."""

from __future__ import annotations

from ravectl.model import SecretKind

LOCK_FILE = "flake.lock"
# image formats of NixOS that boot by themselves -> whether it is GRUB by which they do
FORMATS = {
    "qemu": True,
    "raw-efi": False,
    "vmware": True,
    "virtualbox": True,
    "iso": False,
    "amazon": True,
    "kubevirt": True,
}
# the values of the flake's own VM test: shell words, in a folder where these files were made
TEST_VALUES = {
    SecretKind.PASSWORD: "test-password",
    SecretKind.SSH_KEY: "$(cat host)",
    SecretKind.TLS_KEY: "$(cat tls.key)",
    SecretKind.TLS_CERT: "$(cat tls.crt)",
    SecretKind.HTPASSWD: "$(cat htpasswd)",
    SecretKind.SCRAM: "$(cat scram)",
    SecretKind.AUTHORIZED_KEYS: "$(cat host.pub)",
    SecretKind.GIVEN: "",
}
