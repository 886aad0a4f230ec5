"""Attacks on a running machine's two doors, while who is signed in is served.

What comes from this host is 10.0.2.2 to the machine. What comes from an address of its own is made
in the machine, in another network namespace.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Iterator

import pytest

from ravectl.verify import sshprobe, web
from tests.conftest import Tool
from tests.vm.test_hardening_system import alerted

pytestmark = pytest.mark.vm

ATTACKER, DOOR = "198.51.100.2", "198.51.100.1"
BETWEEN = f"""
ip netns add attacker
ip link add attack0 type veth peer name attack1 netns attacker
ip addr add {DOOR}/24 dev attack0
ip link set attack0 up
ip -n attacker addr add {ATTACKER}/24 dev attack1
ip -n attacker link set attack1 up
"""
# as many connections at once as asked for, none of which says anything
FLOOD = """
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
found = []
for _ in range(int(sys.argv[3])):
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex((sys.argv[1], int(sys.argv[2])))
    found.append(sock)
time.sleep(1)
def is_up(sock):
    try:
        return bool(sock.getpeername())
    except OSError:
        return False
print(sum(map(is_up, found)))
"""


def root(machine: Tool, script: str) -> str:
    return machine("exec", "--", "sudo", "bash", "-euc", script).stdout


def signed_in(machine: Tool, seconds: float) -> web.Client:
    ca = machine.workspace / ".rave" / "ca" / "ca.crt"
    port = machine.instance().endpoint().https_port
    end = time.monotonic() + seconds
    return web.Client(port, web.DEFAULT_HOST, web.trusting(ca), end)


@pytest.fixture(scope="module")
def attacker(machine: Tool) -> Iterator[None]:
    root(machine, BETWEEN)
    yield
    root(machine, "ip netns delete attacker")


def flood(machine: Tool, port: int, count: int) -> int:
    """How many of `count` connections at once came about."""
    run = ("sudo", "ip", "netns", "exec", "attacker", "python3", "-", DOOR, str(port), str(count))
    return int(machine("exec", "--", *run, stdin=FLOOD).stdout)


def dropped(machine: Tool, port: int) -> int:
    rules = root(machine, "nft list chain inet rave input")
    (found,) = re.findall(rf"tcp dport {port} ct .* counter packets (\d+) bytes \d+ drop", rules)
    return int(found)


@pytest.mark.parametrize(("port", "count", "most"), [(3002, 1500, 1000), (22, 200, 60)])
def test_a_flood_from_one_address_is_cut(
    machine: Tool, attacker: None, port: int, count: int, most: int
) -> None:
    before = dropped(machine, port)
    with signed_in(machine, 60) as client:
        headers = web.basic("rave", machine.secret("ingress/password"))
        assert client.get("/", headers).status == 200
        assert flood(machine, port, count) <= most
        assert dropped(machine, port) - before >= count - most
        assert client.get("/", headers).status == 200, "who is connected is served"
    with signed_in(machine, 60) as client:
        assert client.get("/", headers).status == 200, "and so is who comes from elsewhere"
    assert machine("exec", "--", "true").returncode == 0


def test_headers_that_do_not_come_hold_no_door_shut(machine: Tool) -> None:
    """150 connections of this host send half a header and wait."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = machine.instance().endpoint().https_port
    headers = web.basic("rave", machine.secret("ingress/password"))
    held: list[socket.socket] = []
    try:
        with signed_in(machine, 150) as client:
            assert client.get("/", headers).status == 200
            for _ in range(150):
                sock = socket.create_connection(("127.0.0.1", port), timeout=30)
                held.append(context.wrap_socket(sock))
                held[-1].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
            assert client.get("/", headers).status == 200, "who is connected is served"
        with signed_in(machine, 60) as client:
            assert client.get("/", headers).status == 200, "and so is who comes anew"
        time.sleep(10)
        # the server has given up on them: nothing but an end or a reset comes
        held[-1].settimeout(5)
        try:
            left = held[-1].recv(1)
        except TimeoutError:
            pytest.fail("the ingress still waits for its header")
        except OSError:
            left = b""
        assert left == b""
    finally:
        for one in held:
            one.close()


def test_guesses_of_a_key_lock_the_operator_out_for_less_than_a_minute(machine: Tool) -> None:
    target = machine.instance().target()
    since = time.time()
    time.sleep(16)
    said = [sshprobe.try_stranger(target, "rave", 30)[1] for _ in range(3)]
    time.sleep(3)  # sshd counts when the session has ended
    said.append(sshprobe.try_stranger(target, "rave", 30)[1])
    assert [r.get("outcome") for r in said[:3]] == [sshprobe.REFUSED] * 3
    assert said[3].get("error") == sshprobe.LOCKED_OUT
    with signed_in(machine, 30) as client:
        headers = web.basic("rave", machine.secret("ingress/password"))
        assert client.get("/", headers).status == 200, "the other door is open"
    began = time.monotonic()
    assert machine("exec", "--", "echo", "in").stdout == "in\n", "ravectl waits for the end"
    assert 1 < time.monotonic() - began < 75
    figures = root(machine, "cat /run/rave-bans/rave-bans.prom")
    assert int(figures.split()[-1]) >= 1
    alerted(machine, {"BruteForce"}, since, 60)


def test_an_address_of_its_own_is_blocked_alone(machine: Tool, attacker: None) -> None:
    """Where real addresses are seen, an attacker locks out himself."""
    tries = f"""
ssh-keygen -q -t ed25519 -N '' -f /run/guess
for n in 1 2 3 4; do
  [ $n = 4 ] && sleep 3
  ip netns exec attacker ssh -i /run/guess -o IdentitiesOnly=yes -o BatchMode=yes \\
    -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null rave@{DOOR} true 2>&1 | tail -1
done
rm /run/guess /run/guess.pub
"""
    said = root(machine, f"set +e; {tries}").splitlines()
    assert ["Permission denied" in line for line in said] == [True, True, True, False], said
    began = time.monotonic()
    assert machine("exec", "--", "true").returncode == 0
    assert time.monotonic() - began < 15, "nobody else waits"


def test_x3_holds(machine: Tool) -> None:
    assert "X3  passed" in machine("verify", "--check", "X3").stdout
