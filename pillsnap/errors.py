"""The errors that a user can cause."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in input, settings or environment. The message says what, where, and what to do, in one line."""
