"""Check D1: what PostgreSQL commits is on the disk, and it would notice if it were damaged."""

from __future__ import annotations

from ravectl.model import Suite
from ravectl.verify import guest
from ravectl.verify.framework import (
    Check,
    Judgement,
    Probe,
    Subject,
    VerifyTarget,
    judged,
    unreadable,
)

SETTINGS = {
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "data_checksums": "on",
}

# Read back in another session, which sees only what was committed. That it was flushed is told by
# the log's own account: its flushed end is behind the row, where the commit's record is. (The log's
# end after the commit would not do: others write to it, too, and need not flush.)
SCRIPT = """\
echo '== database =='
sudo -n -u postgres psql -XAtq -v ON_ERROR_STOP=1 -d postgres 2>&1 <<'SQL'
select 'setting', name, setting from pg_settings
  where name in ('fsync', 'full_page_writes', 'synchronous_commit', 'data_checksums');
select 'failures', coalesce(sum(checksum_failures), 0) from pg_stat_database;
drop table if exists rave_verify;
create table rave_verify (value text not null);
begin;
insert into rave_verify values ('written ' || pg_backend_pid());
select pg_current_wal_insert_lsn() as written, pg_backend_pid() as writer \\gset
commit;
select 'flushed', pg_wal_lsn_diff(pg_current_wal_flush_lsn(), :'written') > 0;
\\connect postgres
select 'session', pg_backend_pid() <> :writer;
select 'read', value = 'written ' || :writer from rave_verify;
drop table rave_verify;
select 'gone', to_regclass('rave_verify') is null;
SQL
"""


def _collect(target: VerifyTarget, deadline: float) -> str:
    return guest.run_script(target, SCRIPT, deadline, root=True)


DATABASE = Probe("database", _collect, 120.0)


def judge_database(_: Subject, output: str) -> Judgement:
    """A row was written, committed, flushed and read back; durability and checksums are on."""
    expected = "a row written, committed and read back; " + ", ".join(
        f"{k} {v}" for k, v in SETTINGS.items()
    )
    text = (guest.sections(output) or {}).get("database")
    if not text:
        return unreadable(expected, "PostgreSQL was not asked")
    rows = [line.split("|") for line in text.splitlines()]
    settings = {r[1]: r[2] for r in rows if r[0] == "setting" and len(r) == 3}
    answers = {r[0]: r[1] for r in rows if len(r) == 2}
    problems = [line for line in text.splitlines() if "ERROR:" in line or "psql: error" in line]
    if not settings and not problems:
        return unreadable(expected, f"no answer of PostgreSQL: {text[:200]}")
    faults = [line.strip() for line in problems]
    faults += [
        f"{name} is {settings.get(name, 'not told')}, not {value}"
        for name, value in SETTINGS.items()
        if settings and settings.get(name) != value
    ]
    if answers.get("failures", "0") != "0":
        faults.append(f"{answers['failures']} blocks did not have their checksum")
    if not problems:
        steps = {
            "flushed": "the commit was not flushed",
            "session": "it was not read in another session",
            "read": "what was read is not what was written",
            "gone": "the table is still there",
        }
        faults += [fault for step, fault in steps.items() if answers.get(step) != "t"]
    return judged(
        expected, "written, flushed, read back; all on", faults,
        "see what it says: ravectl logs postgresql; its settings are in the rendered tree",
    )  # fmt: skip


CHECKS = (
    Check("D1", Suite.DATA, "PostgreSQL keeps what it commits", DATABASE, judge_database),
)  # fmt: skip
