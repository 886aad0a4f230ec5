"""The console page: what an operator sees at `/`. Read-only, behind the ingress's sign-in."""
