"""What the dispatcher does, in terms of the domain and of ports. No library of the outside."""
