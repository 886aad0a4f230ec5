"""Checks of the suite `security`: who SSH lets in, and what listens to the outside."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ravectl.model import BLOCK_SECONDS, LOGIN_FAILURES, EngineName, Suite
from ravectl.verify import firewall, guest, listeners, sshprobe
from ravectl.verify.framework import (
    Check,
    Judgement,
    Probe,
    Subject,
    VerifyTarget,
    at_once,
    judged,
    unreadable,
)

MAX_AUTH_TRIES = 4
# logins under way at once, in all and of one address, and seconds for each
AT_MOST = {"maxstartups": 16, "persourcemaxstartups": 8, "logingracetime": 30}

# ssh-audit's hardening guide, with the post-quantum exchanges of OpenSSH 9 and 10 alone: it warns
# of all others.
KEX = frozenset({
    "mlkem768x25519-sha256", "sntrup761x25519-sha512", "sntrup761x25519-sha512@openssh.com",
})  # fmt: skip
# not exchanges but signals (RFC 8308; OpenSSH's PROTOCOL, 1.10)
KEX_SIGNALS = frozenset({"ext-info-s", "kex-strict-s-v00@openssh.com"})
CIPHERS = frozenset({
    "chacha20-poly1305@openssh.com", "aes256-gcm@openssh.com", "aes128-gcm@openssh.com",
    "aes256-ctr", "aes192-ctr", "aes128-ctr",
})  # fmt: skip
MACS = frozenset({
    "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256-etm@openssh.com",
    "umac-128-etm@openssh.com",
})  # fmt: skip
HOST_KEYS = frozenset({
    "ssh-ed25519", "ssh-ed25519-cert-v01@openssh.com", "sk-ssh-ed25519@openssh.com",
    "sk-ssh-ed25519-cert-v01@openssh.com", "rsa-sha2-512", "rsa-sha2-256",
    "rsa-sha2-512-cert-v01@openssh.com", "rsa-sha2-256-cert-v01@openssh.com",
})  # fmt: skip

MUST_BE = {
    "pubkeyauthentication": ("yes",),
    "passwordauthentication": ("no",),
    "kbdinteractiveauthentication": ("no",),
    "permitemptypasswords": ("no",),
    "permitrootlogin": ("no",),
    "hostbasedauthentication": ("no",),
    "gssapiauthentication": ("no",),
    "authenticationmethods": ("any", "publickey"),
    "disableforwarding": ("yes",),
    "allowtcpforwarding": ("no",),
    "allowagentforwarding": ("no",),
    "allowstreamlocalforwarding": ("no",),
    "permittunnel": ("no",),
    "x11forwarding": ("no",),
    "permituserenvironment": ("no",),
    # nobody else says who may sign in, and nobody may guess for ever
    "authorizedkeysfile": ("/run/secrets/ssh/authorized-keys",),
    "authorizedkeyscommand": ("none",),
    "authorizedprincipalscommand": ("none",),
    "trustedusercakeys": ("none",),
    "persourcepenaltyexemptlist": ("none",),
}
OPTIONAL = {"gssapiauthentication"}  # builds without GSSAPI do not print it
MODERN = {
    "kexalgorithms": KEX,
    "ciphers": CIPHERS,
    "macs": MACS,
    "hostkeyalgorithms": HOST_KEYS,
}
OFFERED = {
    "kexalgorithms": KEX | KEX_SIGNALS,
    "hostkeyalgorithms": HOST_KEYS,
    "ciphers-in": CIPHERS,
    "ciphers-out": CIPHERS,
    "macs-in": MACS,
    "macs-out": MACS,
}

# Debian's, whose rules no service adds to; NixOS gives its own to nft from the store
RULES_FILE = "/etc/nftables.conf"

# One script and one sudo for both checks. -T prints what sshd would do with a configuration
# file, so the file and the program must be those of the daemon that listens.
ACCESS_SCRIPT = """\
listeners=$(ss -Hltnup)
echo '== listeners =='
printf '%%s\n' "$listeners"
echo '== owners =='
text=$listeners
while [[ $text =~ ,pid=([0-9]+),(.*) ]]; do
  pid=${BASH_REMATCH[1]} text=${BASH_REMATCH[2]}
  if read -r path <"/proc/$pid/cgroup"; then echo "$pid $path"; else echo "$pid gone"; fi
done 2>/dev/null
echo '== firewall =='
nft -j list ruleset
echo
echo '== rules =='
nft -s -t list ruleset
echo '== planned =='
[ ! -e %(rules)s ] || unshare --net sh -c 'nft -f %(rules)s && nft -s -t list ruleset' 2>&1
echo '== outer =='
while read -r _ _ _ address _; do
  address=${address%%%%/*}
  for port in %(ports)s; do
    if (: <>"/dev/tcp/$address/$port") 2>/dev/null; then
      echo "$address $port open"
    else
      echo "$address $port closed"
    fi
  done
done < <(ip -o -4 addr show scope global)
echo '== inner =='
for uid in %(uids)s; do
  setpriv --reuid "$uid" --regid "$uid" --clear-groups bash -c '
    for port in %(ports)s; do
      if (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then said=open; else said=closed; fi
      echo "$0 $port $said"
    done' "$uid"
done
echo '== sshd =='
file=() words=()
daemon=':%(ssh)s [^,]*"sshd",pid=([0-9]+)' option=' -f *([^ ]+)'
if [[ $listeners =~ $daemon ]]; then
  pid=${BASH_REMATCH[1]}
  mapfile -d '' -t words <"/proc/$pid/cmdline"
  [[ "${words[*]}" =~ $option ]] && file=(-f "${BASH_REMATCH[1]}")
  "/proc/$pid/exe" -T "${file[@]}" -C user=%(user)s,host=x,addr=10.0.2.2 2>&1
  echo '== conditions =='
  grep -hiE '^[[:space:]]*(match|include)([[:space:]]|=)' "${file[1]:-/etc/ssh/sshd_config}"
  echo '== loaded =='
  # it writes its number anew each time that it has read its configuration
  stat -c 'read %%.9Y' /run/sshd.pid
  # on NixOS it is a link, in whose place another file may have been
  stat -c 'changed %%.9Z' "${file[1]:-/etc/ssh/sshd_config}"
  stat -L -c 'changed %%.9Z' "${file[1]:-/etc/ssh/sshd_config}"
  printf 'words %%s\n' "${words[*]}"
fi
"""


def access_script(subject: Subject) -> str:
    """The script that shows what listens, what the firewall lets in, and sshd's settings."""
    plan = subject.plan
    ports = sorted({*plan.listeners(), *plan.network.open_ports})
    ssh_port = plan.service("ssh").ports[0]
    values = {"ports": " ".join(map(str, ports)), "ssh": ssh_port, "user": plan.operator}
    values["rules"] = RULES_FILE
    values["uids"] = " ".join(str(account.uid) for account, _ in plan.closed_to())
    return ACCESS_SCRIPT % values


def _collect_access(target: VerifyTarget, deadline: float) -> str:
    login, left = target.connection.target, max(deadline - time.monotonic(), 0.1)
    script = access_script(target.subject)
    output, *tries = at_once(
        [
            lambda: guest.run_script(target, script, deadline, root=True),
            lambda: _lines(sshprobe.try_password(login, target.plan.operator, left)),
            lambda: _lines(sshprobe.try_key(login, "root", left)),
        ]
    )
    return output.removesuffix(f"{guest.END}\n") + f"== tries ==\n{''.join(tries)}{guest.END}\n"


ACCESS = Probe("access", _collect_access, 120.0)


def _lines(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def judge_sshd(subject: Subject, output: str) -> Judgement:
    """sshd takes keys only and modern algorithms only, and refused a password and root."""
    expected = "keys only, no root login, modern algorithms; a password and root are refused"
    parts = guest.sections(output)
    if parts is None or not {"sshd", "conditions", "loaded", "tries"} <= parts.keys():
        return unreadable(expected, "sshd's configuration or the logins tried are missing")
    settings = {k.lower(): v for k, _, v in (x.partition(" ") for x in parts["sshd"].splitlines())}
    if "passwordauthentication" not in settings:
        return unreadable(expected, f"sshd -T did not print its settings: {parts['sshd'][:200]}")
    loading = loading_faults(parts["loaded"])
    if loading is None:
        return unreadable(expected, "the machine does not say when sshd read its configuration")
    rows = _json_rows(parts["tries"])
    offer = next((r["offer"] for r in rows if isinstance(r.get("offer"), dict)), None)
    password = _try(rows, "password", subject.plan.operator)
    root = _try(rows, "key", "root")
    if offer is None or password is None or root is None:
        return unreadable(expected, _why_no_try(rows))
    faults = [*setting_faults(settings), *loading]
    if settings.get("allowusers") != subject.plan.operator:
        faults.append(f"allowusers is {settings.get('allowusers', 'not set')}")
    # what was asked is what sshd does for the operator who comes from the host, and for nobody else
    faults += [f"sshd makes exceptions: {line}" for line in parts["conditions"].splitlines()]
    faults += [f"sshd offers {f}" for f in _algorithm_faults(offer, OFFERED)]
    if password["outcome"] != sshprobe.REFUSED or password.get("methods") != ["publickey"]:
        faults.append(f"a password login: {password['outcome']}, methods {password.get('methods')}")
    elif password.get("key") != sshprobe.LET_IN:
        faults.append(f"the operator's key is {password.get('key')}")
    if root["outcome"] != sshprobe.REFUSED:
        faults.append("root was let in with the operator's key")
    return judged(
        expected,
        "so configured and so offered; a password and root were refused, the key let in",
        faults,
        f"undo it, then ravectl exec -- sudo systemctl reload {subject.units()['ssh']}; or get the "
        "image's own disk: ravectl reset",
    )


def loading_faults(text: str) -> list[str] | None:
    """Where sshd may have other settings than its file; None when that is not told.

    A file that was changed, read and put back looks as it should.
    """
    rows = [line.partition(" ")[::2] for line in text.splitlines()]
    said = dict(rows)
    try:
        read, times = float(said["read"]), [float(v) for k, v in rows if k == "changed"]
    except (KeyError, ValueError):
        return None
    if not times or not all(map(math.isfinite, [read, *times])):
        return None
    changed = max(times)
    faults = ["sshd's configuration was changed after it was read"] if changed > read else []
    if re.search(r"\s-\w*o", said.get("words", "")):
        faults.append(f"sshd was given settings as it was started: {said['words']}")
    return faults


def setting_faults(settings: Mapping[str, str]) -> list[str]:
    """Where sshd's effective settings are not what they must be."""
    faults = []
    for name, allowed in MUST_BE.items():
        value = settings.get(name)
        if value not in allowed and not (value is None and name in OPTIONAL):
            faults.append(f"{name} is {value or 'not set'}")
    tries = guest.number(settings.get("maxauthtries"))
    if tries is None or not 1 <= tries <= MAX_AUTH_TRIES:
        faults.append(f"maxauthtries is {settings.get('maxauthtries', 'not set')}")
    for name, most in AT_MOST.items():
        first = re.split("[:, ]", settings.get(name, ""))[-1]
        if not 1 <= (guest.number(first) or 0) <= most:
            faults.append(f"{name} is {settings.get(name, 'not set')}, not 1 to {most}")
    faults += penalty_faults(settings.get("persourcepenalties", ""))
    lists = {name: settings.get(name, "").split(",") for name in MODERN}
    return faults + [f"sshd is set to {f}" for f in _algorithm_faults(lists, MODERN)]


def penalty_faults(text: str) -> list[str]:
    """Where three failed logins would not block the next, or would do so for too long."""
    values = dict(re.findall(r"([a-z0-9-]+):(\d+)", text))
    fail, least, most = (int(values.get(k, 0)) for k in ("authfail", "min", "max"))
    blocks = (LOGIN_FAILURES - 1) * fail < least < LOGIN_FAILURES * fail
    if blocks and least <= most <= BLOCK_SECONDS:
        return []
    return [f"persourcepenalties is {text or 'not set'}"]


def _algorithm_faults(lists: Mapping[str, Any], modern: Mapping[str, frozenset[str]]) -> list[str]:
    faults = []
    for name, allowed in modern.items():
        algorithms = lists.get(name)
        if not isinstance(algorithms, list) or not any(algorithms):
            faults.append(f"no {name}")
            continue
        faults += [f"{a} ({name})" for a in algorithms if a not in allowed]
    return faults


def _json_rows(text: str) -> list[dict[str, Any]]:
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _try(rows: Sequence[Mapping[str, Any]], how: str, user: str) -> Mapping[str, Any] | None:
    """The record of a login that reached our machine and was answered."""
    for row in rows:
        answered = isinstance(row.get("outcome"), str) and "error" not in row
        pinned = row.get("host_key") == "pinned"
        if row.get("try") == how and row.get("user") == user and pinned and answered:
            return row
    return None


def _why_no_try(rows: Sequence[Mapping[str, Any]]) -> str:
    errors = [str(r["error"]) for r in rows if "error" in r]
    if any(r.get("host_key") == "other" for r in rows):
        return "the SSH port is answered with another host key"
    return f"a login could not be tried: {errors[0]}" if errors else "no record of the logins"


# --- X2 --------------------------------------------------------------------------------------


def judge_border(subject: Subject, output: str) -> Judgement:
    """Only the open ports listen to the outside, and the firewall lets in nothing else."""
    ports = subject.plan.network.open_ports
    named = " and ".join(map(str, ports))
    expected = f"only {named} answer from outside; all else is on loopback and of the Plan"
    parts = guest.sections(output)
    wanted = {"listeners", "owners", "firewall", "rules", "planned", "outer"}
    if parts is None or not wanted <= parts.keys():
        return unreadable(expected, "the listeners or the firewall are missing")
    sockets = listeners.parse(parts["listeners"])
    if not sockets:
        return unreadable(expected, "the list of listeners cannot be read")
    rules = firewall.parse(parts["firewall"])
    if rules is None:
        return unreadable(expected, "the firewall's rules cannot be read")
    answers = _outer(parts["outer"])
    if not answers:
        return unreadable(expected, "the machine's outer address could not be tried")
    inner = _inner_faults(subject, _outer(parts.get("inner", "")))
    if inner is None:
        return unreadable(expected, "what the machine's accounts reach could not be tried")
    owners, units = listeners.parse_owners(parts["owners"]), subject.units()
    planned = {port: units[s.name] for s in subject.plan.services for port in s.ports}
    faults = inner + listeners.faults(sockets, ports, planned, owners)
    faults += firewall.faults(rules, ports)
    if subject.engine is EngineName.DEBIAN and parts["rules"] != parts["planned"]:
        faults.append(f"the rules are not those of {RULES_FILE}: {_first_other(parts)}")
    faults += [
        f"new connections to port {p} are not limited" for p in firewall.unlimited(rules, ports)
    ]
    if not subject.plan.network.egress:
        faults += firewall.outward_faults(rules)
    for address, port, is_open in answers:
        if is_open != (port in ports):
            faults.append(f"{address}:{port} {'answers' if is_open else 'does not answer'}")
    return judged(
        expected,
        f"{len(sockets)} listeners, each of its unit; {named} open, the firewall drops the rest",
        faults,
        "stop what listens, or give it a place in the profile and build the machine anew",
    )


def _first_other(parts: Mapping[str, str]) -> str:
    """The first line of the firewall's rules that is not the planned one."""
    pairs = itertools.zip_longest(
        parts["rules"].splitlines(), parts["planned"].splitlines(), fillvalue="(nothing)"
    )
    there, planned = next((a.strip(), b.strip()) for a, b in pairs if a != b)
    return f"{there!r} where {planned!r} was"


def _inner_faults(subject: Subject, answers: Sequence[tuple[str, int, bool]]) -> list[str] | None:
    """Ports that accounts reach and must not, or the other way; None when one was not tried."""
    seen = {(uid, port): is_open for uid, port, is_open in answers}
    faults = []
    for account, closed in subject.plan.closed_to():
        for port in subject.plan.listeners():
            is_open = seen.get((str(account.uid), port))
            if is_open is None:
                return None
            if is_open == (port in closed):
                word = "reaches" if is_open else "does not reach"
                faults.append(f"{account.name} {word} port {port}")
    return faults


def _outer(text: str) -> list[tuple[str, int, bool]]:
    """What connecting to the machine's own outer address gave; empty when it is not readable."""
    found = []
    for line in text.splitlines():
        words = line.split()
        port = guest.number(words[1]) if len(words) == 3 else None
        if port is None or words[2] not in ("open", "closed"):
            return []
        found.append((words[0], port, words[2] == "open"))
    return found


CHECKS = (
    Check(
        "X1", Suite.SECURITY, "SSH takes keys only, never root, modern algorithms only",
        ACCESS, judge_sshd,
    ),
    Check(
        "X2", Suite.SECURITY, "only the open ports can be reached from outside",
        ACCESS, judge_border,
    ),
)  # fmt: skip
