"""Dropout: one definition of which elements are kept, for every kernel that drops some."""
