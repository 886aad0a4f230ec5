"""HTTP: webhooks, the API, and what operations look at."""
