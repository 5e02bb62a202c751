"""Capsules: votes, dynamic routing by agreement in one call, and the squash."""
