#!/usr/bin/env python3
"""In the place of sops-install-secrets, whose real one needs a Go toolchain: MANIFEST -> files.

It does what the real one (sops-nix, July 2026) does with the manifests that we give it, by the real
sops: it decrypts every file before it writes anything, makes the generation that follows the one
its link names, leaves a copy of the identity beside it, moves the link, and links secrets whose
path is elsewhere. Like the real one it fails on a name that the file lacks.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def main(path: str) -> None:
    manifest = json.loads(Path(path).read_text())
    mount = Path(manifest["secretsMountPoint"])
    mount.mkdir(parents=True, exist_ok=True)
    keys = mount / "age-keys.txt"
    keys.write_text(Path(manifest["ageKeyFile"]).read_text())
    values = {s["name"]: value_of(s, keys) for s in manifest["secrets"]}

    link = Path(manifest["symlinkPath"])
    before = int(link.readlink().name) if link.is_symlink() else 0
    target = mount / str(before + 1)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(0o751)
    for s in manifest["secrets"]:
        file = target / s["name"]
        file.parent.mkdir(0o751, parents=True, exist_ok=True)
        file.write_text(values[s["name"]])
        file.chmod(int(s["mode"], 8))
        os.chown(file, pwd.getpwnam(s["owner"]).pw_uid, grp.getgrnam(s["group"]).gr_gid)
    fresh = link.with_name(f"{link.name}.tmp")
    fresh.symlink_to(target)
    fresh.replace(link)
    for s in manifest["secrets"]:
        if Path(s["path"]) != link / s["name"]:
            Path(s["path"]).parent.mkdir(parents=True, exist_ok=True)
            Path(s["path"]).unlink(missing_ok=True)
            Path(s["path"]).symlink_to(link / s["name"])


def value_of(secret: dict[str, Any], keys: Path) -> str:
    found: Any = decrypted(secret["sopsFile"], keys)
    for part in secret["key"].split("/"):
        if not isinstance(found, dict) or part not in found:
            sys.exit(f"the key '{secret['key']}' cannot be found")
        found = found[part]
    return str(found)


def decrypted(file: str, keys: Path, cache: dict[str, Any] = {}) -> Any:  # noqa: B006
    if file not in cache:
        done = subprocess.run(
            ["sops", "decrypt", file], env={**os.environ, "SOPS_AGE_KEY_FILE": str(keys)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            sys.exit(f"failed to decrypt '{file}': {done.stderr}")
        cache[file] = yaml.safe_load(done.stdout)
    return cache[file]


if __name__ == "__main__":
    main(sys.argv[1])
