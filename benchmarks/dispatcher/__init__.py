"""What the dispatcher does in a second, and what it loses: nothing."""
