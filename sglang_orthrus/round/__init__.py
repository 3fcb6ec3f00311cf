"""A round: draft, verify, accept."""
