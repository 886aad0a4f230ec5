"""Parts that no distribution signs: nothing is unpacked that has another hash than was pinned."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from ravectl import command, files
from ravectl.engines import debian
from ravectl.errors import RavectlError


def tarball(path: Path, text: bytes, name: str = "package/dist/cli.js") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
    return path


def integrity(path: Path) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def fetch(folder: Path, part: debian.NpmPart) -> Path:
    """What `npm pack` says and leaves, without a registry."""
    said = json.dumps([{"filename": "part-1.0.0.tgz"}])
    with command.background(["echo", said]) as running:
        return debian._fetched(part, running, folder)


def test_an_npm_part_is_what_was_pinned(tmp_path: Path) -> None:
    packed = tarball(tmp_path / "part-1.0.0.tgz", b"good")
    part = debian.NpmPart("@scope/part", "1.0.0", integrity(packed))
    assert fetch(tmp_path, part) == packed
    debian._unpack_part(part, packed, tmp_path / "root", tmp_path / "stage")
    assert (tmp_path / "root/opt/part/dist/cli.js").read_bytes() == b"good"


@pytest.mark.parametrize("name", ["package/dist/../../../x", "package/dist//x"])
def test_an_npm_part_writes_nowhere_else(tmp_path: Path, name: str) -> None:
    packed = tarball(tmp_path / "part-1.0.0.tgz", b"evil", name)
    part = debian.NpmPart("part", "1.0.0", integrity(packed))
    with pytest.raises(RavectlError, match="would write to package/dist/"):
        debian._unpack_part(part, packed, tmp_path / "root", tmp_path / "stage")
    assert not [p for p in tmp_path.rglob("*") if p.name == "x"]


def test_another_npm_part_is_refused(tmp_path: Path) -> None:
    pinned = integrity(tarball(tmp_path / "part-1.0.0.tgz", b"good"))
    tarball(tmp_path / "part-1.0.0.tgz", b"evil")
    with pytest.raises(RavectlError, match="is not what was pinned") as e:
        fetch(tmp_path, debian.NpmPart("@scope/part", "1.0.0", pinned))
    assert "do not use it" in e.value.hint


def test_every_npm_part_is_pinned_by_sha512() -> None:
    for part in debian.NPM_PARTS:
        assert re.fullmatch(r"\d+\.\d+\.\d+", part.version)
        assert len(base64.b64decode(part.integrity.removeprefix("sha512-"), validate=True)) == 64


def wheel_rows() -> dict[str, list[str]]:
    text = files.find_data(debian.WHEELS_LOCK).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return {line.split()[0]: re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line) for line in lines}


def test_every_wheel_is_pinned_by_sha256() -> None:
    rows = wheel_rows()
    assert len(rows) > 10
    for name, hashes in rows.items():
        assert re.fullmatch(r"[\w.-]+==[\w.]+", name), f"{name} is no exact version"
        assert hashes, f"{name} has no hash"


@pytest.mark.parametrize("evil", [False, True], ids=["pinned", "another"])
def test_a_wheel_of_another_hash_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: bool
) -> None:
    """By the real pip and its index."""
    name, hashes = next((n, h) for n, h in wheel_rows().items() if n.startswith("annotated-doc"))
    lock = tmp_path / "wheels.lock"
    pinned = ["0" * 64] if evil else hashes
    lock.write_text(f"{name} " + " ".join(f"--hash=sha256:{h}" for h in pinned) + "\n")
    monkeypatch.setattr(debian, "WHEELS_LOCK", str(lock))
    with debian._fetching_wheels(tmp_path / "wheels") as running:
        if evil:
            with pytest.raises(RavectlError) as e:
                running.result()
            assert "DO NOT MATCH THE HASHES" in e.value.details
        else:
            running.result()
    assert len(list((tmp_path / "wheels").glob("*.whl"))) == (0 if evil else 1)


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "twice.py"])
def test_a_wheel_stays_in_its_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "wheels").mkdir()
    for wheel in ("a.whl", "b.whl"):
        with zipfile.ZipFile(tmp_path / "wheels" / wheel, "w") as z:
            z.writestr(name, "x")
    with pytest.raises(RavectlError, match="would overwrite"):
        debian.unpack_wheels(tmp_path / "wheels", tmp_path / "site")
