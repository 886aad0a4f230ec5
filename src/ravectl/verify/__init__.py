"""Verification: hold a running machine against the Plan that it was built from.

report = run(VerifyTarget(...), suites={Suite.SECURITY})
print(render(report, "junit"))
"""

from ravectl.verify.checks import CHECKS, explain, run, select
from ravectl.verify.framework import Check, Judgement, Probe, Subject, VerifyTarget
from ravectl.verify.report import Format, changes, lines, render, schema, summary

__all__ = [
    "CHECKS",
    "Check",
    "Format",
    "Judgement",
    "Probe",
    "Subject",
    "VerifyTarget",
    "changes",
    "explain",
    "lines",
    "render",
    "run",
    "schema",
    "select",
    "summary",
]
