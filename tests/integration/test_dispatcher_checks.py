"""H5, H6, D2 and O4 against the real dispatcher, as the machine configures it, behind a real nginx.

What only a machine has is said so: its agent runs as a plain process here, and scripts for the
guest run on this host.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from ravectl import credentials, images, ssh
from ravectl.model import Endpoint, EngineName, Health, SecretKind
from ravectl.verify import events
from ravectl.verify.framework import Subject, VerifyTarget
from tests import dispatcher
from tests.plans import PLAN

SECRETS = {
    "dispatcher/api-token": dispatcher.TOKEN,
    "dispatcher/github-secret": dispatcher.GITHUB.decode(),
    "dispatcher/gitlab-token": dispatcher.GITLAB.decode(),
}
NGINX = """
user root; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_max_body_size 10m;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_protocols TLSv1.3;
    ssl_certificate {folder}/cert; ssl_certificate_key {folder}/key;
    location /api/ {{ proxy_pass http://127.0.0.1:{upstream}/; }}
    location /webhooks/ {{ proxy_pass http://127.0.0.1:{upstream}; }}
  }}
}}
"""


class FakeGuestOnThisHost:
    """Runs a script for the guest here."""

    def run(self, argv: list[str], *, stdin: bytes, timeout: float) -> Any:
        done = subprocess.run(
            ["bash", "-s"], input=stdin, capture_output=True, timeout=timeout, check=False
        )
        return SimpleNamespace(
            returncode=done.returncode, stdout=done.stdout.decode(), stderr=done.stderr.decode()
        )


def configured(folder: Path) -> dispatcher.Dispatcher:
    """The configuration of the machine, but for where things are and what runs agents."""
    made = dispatcher.make(folder)
    machine = yaml.safe_load(images.render_debian(PLAN).file("etc/rave/dispatcher.yaml").content)
    here = ("listen", "store", "secrets_dir", "runner")
    made.config = {**machine, **{k: made.config[k] for k in here}}
    return made


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifyTarget]:
    folder = tmp_path_factory.mktemp("checks")
    folder.chmod(0o755)
    ca_key = credentials.new_value(SecretKind.CA_KEY)
    ca_cert = credentials.ca_certificate(ca_key)
    key = credentials.new_value(SecretKind.TLS_KEY)
    (folder / "ca").write_text(ca_cert)
    (folder / "key").write_text(key)
    (folder / "cert").write_text(credentials.server_certificate(key, ca_cert, ca_key, "rave-x"))
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    assert nginx is not None
    d = configured(folder / "d")
    d.start()
    port = dispatcher.free_port()
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, upstream=d.port))
    process = subprocess.Popen([nginx, "-c", folder / "nginx.conf", "-p", folder])
    try:
        end = time.monotonic() + 10
        while not (folder / "nginx.pid").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        yield make_target(d, port, folder / "ca")
    finally:
        process.terminate()
        process.wait(10)
        d.kill()


def make_target(d: dispatcher.Dispatcher, port: int, ca_cert: Path) -> VerifyTarget:
    services = tuple(
        dataclasses.replace(s, health=Health(d.port, "/healthz")) if s.name == "dispatcher" else s
        for s in PLAN.services
    )
    return VerifyTarget(
        instance="x", plan=dataclasses.replace(PLAN, services=services), engine=EngineName.DEBIAN,
        image_digest="", endpoint=Endpoint(0, port, "rave"),
        connection=cast(ssh.Connection, FakeGuestOnThisHost()), ca_cert=ca_cert,
        ingress_user="", ingress_password="", router_key="",
        delivery={k: v + "\n" for k, v in SECRETS.items()}, hidden={}, disks={"store": d.store},
        host_started=None,
    )  # fmt: skip


CHECKS = {c.id: c for c in (*events.HTTP_CHECKS, *events.DATA_CHECKS, *events.OBSERVABILITY_CHECKS)}


@pytest.mark.parametrize("name", ["H5", "H6", "O4"])
def test_a_machine_that_is_as_it_should_be_holds(target: VerifyTarget, name: str) -> None:
    output = CHECKS[name].probe.collect(target, time.monotonic() + 60)
    found = CHECKS[name].judge(target.subject, output)
    assert found.ok, found.seen
    for value in SECRETS.values():
        assert value not in output


def test_d2_reads_what_the_dispatcher_says_of_its_store(
    target: VerifyTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = target.disks["store"].parent / "dispatcher.yaml"
    here = f"{sys.executable} -m rave_dispatcher --config {config}"
    script = events.STORE_SCRIPT.replace("runuser -u rave-dispatcher -- rave-dispatcher", here)
    assert script != events.STORE_SCRIPT
    monkeypatch.setattr(events, "STORE_SCRIPT", script)
    output = CHECKS["D2"].probe.collect(target, time.monotonic() + 60)
    found = CHECKS["D2"].judge(target.subject, output)
    assert found.ok, found.seen


def test_without_the_right_secret_h5_fails_and_says_why(target: VerifyTarget) -> None:
    other = dataclasses.replace(
        target, delivery={**target.delivery, "dispatcher/github-secret": "another"}
    )
    output = CHECKS["H5"].probe.collect(other, time.monotonic() + 10)
    found = CHECKS["H5"].judge(Subject(PLAN, EngineName.DEBIAN), output)
    assert not found.ok
    assert found.ran
    assert "got 401, not 202" in found.seen
