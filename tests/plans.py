"""The Plan of the shipped profile safe, for tests that need any."""

from __future__ import annotations

from ravectl import plan, profile

PLAN = plan.make_plan(**profile.select("safe", {}, None).plan_arguments())
