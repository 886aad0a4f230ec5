"""What turns a rendered Plan into an image: one module per engine."""
