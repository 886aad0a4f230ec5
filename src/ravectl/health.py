"""Is every service of the Plan up? Asked inside the guest, by one script that streams. Pure.

The script uses bash's own means (/dev/tcp), because a process costs 50-100 ms under TCG and
the machine has better to do while it boots. Each line it prints is `STATE name ...`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from ravectl.model import EngineName, Plan

PAUSE_SECONDS = 0.5
UNIT_EVERY = 6  # rounds between two looks at the units' states


@dataclass(frozen=True)
class Progress:
    """A line of the script: what is not up yet, what has failed for good."""

    waiting: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is left to wait for."""
        return not self.waiting and not self.failed


def script(plan: Plan, engine: EngineName) -> str:
    """The bash script that tells how the services do, until it is stopped."""
    rows = "\n".join(
        f"row {s.name} {s.unit[engine.value]} {s.health.port} "
        f"{shlex.quote(s.health.path or '')} {s.health.status}"
        for s in plan.services
    )
    return _SCRIPT.replace("@ROWS@", rows)


_SCRIPT = f"""\
names=() units=() ports=() paths=() codes=()
row() {{ names+=("$1") units+=("$2") ports+=("$3") paths+=("$4") codes+=("$5"); }}
@ROWS@
declare -A up bad
answers() {{
  local head ok=1
  {{ exec 3<>"/dev/tcp/127.0.0.1/$2"; }} 2>/dev/null || return 1
  if [ -n "$3" ]; then
    printf 'GET %s HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n' "$3" >&3
    read -t 5 -r head <&3
    case "$head" in "HTTP/"*" $4 "*) ok=0 ;; esac
  else
    ok=0
  fi
  exec 3>&-
  return $ok
}}
look() {{
  local line name= state= i
  bad=()
  while read -r line; do
    case "$line" in
      Id=*) name=${{line#Id=}} ;;
      ActiveState=*) state=${{line#ActiveState=}} ;;
      "") ;;
    esac
    if [ -n "$name" ] && [ -n "$state" ]; then
      for i in "${{!units[@]}}"; do
        [ "${{units[i]}}" = "$name" ] || continue
        [ "$state" = failed ] && bad[${{names[i]}}]=1
        [ "$state" = active ] || unset "up[${{names[i]}}]"
      done
      name= state=
    fi
  done < <(systemctl show -p Id -p ActiveState "${{units[@]}}" 2>/dev/null)
}}
round=0
while :; do
  for i in "${{!names[@]}}"; do
    [ -n "${{up[${{names[i]}}]}}" ] && continue
    answers "${{names[i]}}" "${{ports[i]}}" "${{paths[i]}}" "${{codes[i]}}" && up[${{names[i]}}]=1
  done
  round=$((round + 1))
  if [ ${{#up[@]}} = ${{#names[@]}} ] || [ $((round % {UNIT_EVERY})) = 0 ]; then look; fi
  left=
  for n in "${{names[@]}}"; do [ -n "${{up[$n]}}" ] || left="$left $n"; done
  echo "waiting$left failed ${{!bad[*]}}"
  read -t {PAUSE_SECONDS} -r _
done
"""


def parse(line: str) -> Progress | None:
    """A line of the script's output, None when it is none."""
    words = line.split()
    if not words or words[0] != "waiting" or "failed" not in words:
        return None
    cut = words.index("failed")
    return Progress(tuple(words[1:cut]), tuple(words[cut + 1 :]))
