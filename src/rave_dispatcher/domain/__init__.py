"""What events, tasks and rules are. Pure: no clock, no randomness, no I/O."""
