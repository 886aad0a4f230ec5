"""What runs agents.

systemd     a transient unit for each task, with its limits and its own cgroup
unconfined  a plain process, for development; its cgroup only counts
"""
