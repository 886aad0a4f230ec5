"""Secrets on their way into a running machine: staged, activated, proven, kept or taken back.

Each step is a command in the guest (its /usr/lib/rave/secrets), or a try from outside. Values
travel by standard input. Whatever is found here is held against files in the guest, so it
does not matter how the machine came to be in the state that it is in.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from ravectl import credentials, health, ssh, vault
from ravectl.errors import DeadlineError, RavectlError
from ravectl.instance import Instance
from ravectl.model import Activation, EngineName, Plan
from ravectl.verify import web

HELPER = "/usr/lib/rave/secrets"
STEP_SECONDS = 60.0
PROOF_SECONDS = 60.0  # for a service to take a value; under TCG most need one or two
PAUSE_SECONDS = 0.3


@dataclass(frozen=True)
class Values:
    """What a guest has or gets, and what its users show: everything by which it is tried."""

    files: Mapping[str, str] = field(repr=False)  # by name below /run/secrets
    password: str = field(repr=False)
    api_key: str = field(repr=False)
    exporter: str = field(repr=False)
    api_token: str = field(repr=False)
    host_key: str  # public
    ca_cert: str
    operator_file: Path


def values_of(
    plan: Plan, shared: vault.Vault, machine: vault.Vault, operator: credentials.OperatorKey
) -> Values:
    """The values that these vaults come to for a machine."""
    return Values(
        files=vault.delivery(plan, shared, machine, [operator.public]),
        password=shared.values["ingress/password"],
        api_key=shared.values["ccr/api-key"],
        exporter=shared.values["postgres/exporter-password"],
        api_token=shared.values["dispatcher/api-token"],
        host_key=credentials.ssh_public(machine.values["ssh/host-key"]),
        ca_cert=shared.values["ca/cert"],
        operator_file=operator.file,
    )


@dataclass(frozen=True)
class State:
    """Serials in a guest: in use, kept for a reboot, staged; 0 for none."""

    active: int
    kept: int
    staged: int


class Guest:
    """A running machine that secrets are delivered to."""

    def __init__(self, instance: Instance, connection: ssh.Connection) -> None:
        self.instance = instance
        self.connection = connection
        record = instance.require_record()
        self.plan: Plan = record.plan
        self.engine: EngineName = record.engine

    # --- steps -----------------------------------------------------------------------------------

    def state(self) -> State:
        """What is in use, kept and staged."""
        words = self._helper("state").split()
        try:
            active, kept, staged = (0 if w == "-" else int(w) for w in words)
        except ValueError:
            raise RavectlError(
                f"{self._name} does not say which secrets it uses",
                "its image is of another ravectl: use that; or ravectl build, then ravectl reset, "
                "which loses what is on its disk",
            ) from None
        return State(active, kept, staged)

    def differing(self, files: Mapping[str, str]) -> tuple[str, ...]:
        """The names of files that the guest lacks, has beyond these, or has with other content."""
        there = self.digests()
        wanted = {n: hashlib.sha256(v.encode()).hexdigest() for n, v in files.items()}
        names = sorted(there.keys() | wanted.keys())
        return tuple(n for n in names if there.get(n) != wanted.get(n))

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file below /run/secrets; of long random values, so safe to tell."""
        script = "cd /run/secrets/ && find . -type f -exec sha256sum -- {} +"
        found = {}
        for line in self._root(script).splitlines():
            digest, _, name = line.partition("  ")
            found[name.removeprefix("./")] = digest
        return found

    def stage(self, bundle: bytes) -> None:
        """Unpack a bundle beside what is in use."""
        self._helper("stage", stdin=bundle)

    def activate(self, serial: int) -> None:
        """Let readers find the staged files."""
        self._helper("activate", str(serial))

    def commit(self, serial: int) -> None:
        """Keep what is in use, for reboots too, and forget what was before."""
        self._helper("commit", str(serial))

    def discard(self, serial: int) -> None:
        """Go back to what was in use before."""
        self._helper("discard", str(serial))

    def apply(self, names: Iterable[str]) -> None:
        """Have the readers of these files take them."""
        for command in commands(self.plan, self.engine, names):
            self._run(["sudo", "-n", *command], "a reader could not be made to take its secrets")
        if restarts(self.plan, names):
            self._wait_healthy()

    def _wait_healthy(self) -> None:
        last = health.Progress(("every service",), ())

        def take(line: str) -> bool:
            nonlocal last
            last = health.parse(line) or last
            return bool(last.waiting) and not last.failed

        script = f"bash -c {shlex.quote(health.script(self.plan, self.engine))}"
        deadline = time.monotonic() + PROOF_SECONDS
        with contextlib.suppress(DeadlineError):
            self.connection.stream(script, take, deadline=deadline)
        if not last.healthy:
            name = (last.failed or last.waiting)[0]
            raise RavectlError(
                f"service {name} does not answer with its new secrets",
                f"look at its journal: {self.instance.verb('logs ' + name)}",
            )

    # --- proofs ----------------------------------------------------------------------------------

    def prove(self, good: Values, bad: Values | None, names: Iterable[str]) -> None:
        """Try that `good` works and, of what differs in it, that `bad` is refused.

        `names` are the files that changed. Raises RavectlError naming what did not hold within
        60 s. What overlaps (webhooks) is accepted both ways, so nothing is tried of it.
        """
        if wrong := self.differing(good.files):
            raise RavectlError(
                f"{self._name} does not hold what was delivered: {', '.join(wrong)}",
                "run the command again",
            )
        deadline = time.monotonic() + PROOF_SECONDS
        for what, holds in self._proofs(good, bad, set(names)):
            why = _until(holds, deadline)
            if why is not None:
                raise RavectlError(
                    f"{what}: {why}", f"look at the machine: {self.instance.verb('logs')}"
                )

    def _proofs(
        self, good: Values, bad: Values | None, names: set[str]
    ) -> list[tuple[str, Callable[[], str | None]]]:
        rows: list[tuple[str, Callable[[], str | None]]] = []
        if "ingress/htpasswd" in names or "ingress/tls-cert" in names or "ccr/api-key" in names:
            rows.append(("the ingress", lambda: self._try_ingress(good, bad)))
        if "dispatcher/api-token" in names:
            rows.append(("the dispatcher", lambda: self._try_dispatcher(good, bad)))
        if "postgres/exporter-scram" in names:
            rows.append(("PostgreSQL", lambda: self._try_database(good, bad)))
        if "ssh/host-key" in names or "ssh/authorized-keys" in names:
            rows.append(("SSH", lambda: self._try_ssh(good, bad)))
        return rows

    def _try_ingress(self, good: Values, bad: Values | None) -> str | None:
        user = self.plan.operator
        cert = x509.load_pem_x509_certificate(good.files["ingress/tls-cert"].encode())
        tries = [("/", web.basic(user, good.password), 200, "the password")]
        tries.append(("/ccr/health", {"x-api-key": good.api_key}, 200, "the API key"))
        if bad is not None and bad.password != good.password:
            tries.append(("/", web.basic(user, bad.password), 401, "the password before"))
        if bad is not None and bad.api_key != good.api_key:
            tries.append(("/ccr/health", {"x-api-key": bad.api_key}, 401, "the API key before"))
        seen, fault = self._ask(good, tries)
        if fault is not None:
            return fault
        der = cert.public_bytes(serialization.Encoding.DER)
        return None if seen == der else "another certificate is shown"

    def _try_dispatcher(self, good: Values, bad: Values | None) -> str | None:
        path = "/api/v1/tasks?limit=1"
        tries = [(path, web.bearer(good.api_token), 200, "the API token")]
        if bad is not None and bad.api_token != good.api_token:
            tries.append((path, web.bearer(bad.api_token), 401, "the API token before"))
        return self._ask(good, tries)[1]

    def _ask(
        self, good: Values, tries: Iterable[tuple[str, dict[str, str], int, str]]
    ) -> tuple[bytes | None, str | None]:
        """The certificate that was shown last, and which request was not answered as it is to."""
        port = self.instance.endpoint().https_port
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=good.ca_cert)
        deadline = time.monotonic() + 10
        seen = None
        for path, headers, status, what in tries:
            # each on a connection of its own: one of before would still be served as before
            with web.Client(port, web.DEFAULT_HOST, context, deadline) as client:
                seen = client.certificate
                answer = client.get(path, headers | web.trial(good.api_key))
                if answer.status != status:
                    return seen, f"{what} is answered with {answer.status}, not {status}"
        return seen, None

    def _try_database(self, good: Values, bad: Values | None) -> str | None:
        words = [good.exporter]
        if bad is not None and bad.exporter != good.exporter:
            words.append(bad.exporter)
        seen = self._root(_PSQL_SCRIPT + "".join(f"try {shlex.quote(w)}\n" for w in words))
        wanted = ["in", "refused"][: len(words)]
        if seen.split() != wanted:
            return f"the password of exporter (and the one before): {' '.join(seen.split())}"
        return None

    def _try_ssh(self, good: Values, bad: Values | None) -> str | None:
        endpoint = self.instance.endpoint()

        def target(key: Path) -> ssh.Target:
            return ssh.Target(endpoint.ssh_port, endpoint.operator, key, (good.host_key,))

        with ssh.Connection(target(good.operator_file)):
            pass
        if bad is None or bad.operator_file == good.operator_file:
            return None
        if bad.files["ssh/authorized-keys"] == good.files["ssh/authorized-keys"]:
            return None
        try:
            with ssh.Connection(target(bad.operator_file)):
                return "the key before is let in"
        except ssh.RefusedError:
            return None

    # --- commands --------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"machine {self.instance.name!r}"

    def _helper(self, *words: str, stdin: bytes = b"") -> str:
        return self._run(["sudo", "-n", HELPER, *words], "its secrets could not be changed", stdin)

    def _root(self, script: str) -> str:
        text = f"{{ export LC_ALL=C\n{script}\nexit 0; }}\n"
        return self._run(["sudo", "-n", "bash", "-s"], "it could not be asked", text.encode())

    def _run(self, argv: Sequence[str], what: str, stdin: bytes = b"") -> str:
        result = self.connection.run(list(argv), stdin=stdin, timeout=STEP_SECONDS)
        if result.returncode != 0:
            raise RavectlError(
                f"{self._name}: {what} (exit {result.returncode})",
                f"see the reason above and in: {self.instance.verb('logs')}",
                details="\n".join(result.stderr.splitlines()[-5:]),
            )
        return result.stdout


# the password goes in a file of the tmpfs: psql takes it from there or from its environment, and
# that shows in /proc
_PSQL_SCRIPT = """\
umask 077
pass=/run/secrets.d/.pgpass
trap 'rm -f "$pass"' EXIT
try() {
  local said
  printf '127.0.0.1:5432:*:exporter:%s\\n' "$1" >"$pass"
  if said=$(PGPASSFILE=$pass psql -X -w -h 127.0.0.1 -U exporter -d postgres -Atc 'select 1' 2>&1)
  then echo in
  elif [[ $said == *"password authentication failed"* ]]; then echo refused
  else echo unclear
  fi
}
"""


def commands(plan: Plan, engine: EngineName, names: Iterable[str]) -> list[list[str]]:
    """What makes readers take these files, in the order in which it is to be done. Pure.

    Roles first, since clients come after servers; SSH last, since it carries us.
    """
    found = [vault.declared(plan, n) for n in names]
    asked = {a: [s for s in found if s.activation is a] for a in Activation}
    rows = []
    if asked[Activation.ROLE]:
        rows.append(["-u", "postgres", "/usr/lib/rave/roles"])
    for activation, verb in ((Activation.RESTART, "restart"), (Activation.RELOAD, "reload")):
        services = {r.name for s in asked[activation] for r in plan.readers(s.name)}
        units = [s.unit[engine.value] for s in plan.services if s.name in services]
        rows += [["systemctl", verb, u] for u in _ssh_last(plan, engine, units)]
    return rows


def restarts(plan: Plan, names: Iterable[str]) -> bool:
    """Whether a reader has to be started anew for these files."""
    return any(vault.declared(plan, n).activation is Activation.RESTART for n in names)


def _ssh_last(plan: Plan, engine: EngineName, units: list[str]) -> list[str]:
    last = plan.service("ssh").unit[engine.value]
    return [u for u in units if u != last] + [u for u in units if u == last]


def _until(holds: Callable[[], str | None], deadline: float) -> str | None:
    """Try until it holds or the deadline passes; why it did not, at the last try."""
    while True:
        try:
            why = holds()
        except (OSError, ssh.HostKeyError) as e:
            why = web.explain(e) if isinstance(e, OSError) else e.message
        if why is None or time.monotonic() > deadline:
            return why
        time.sleep(PAUSE_SECONDS)
