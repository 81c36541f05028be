"""Errors that a user can cause."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input, settings or environment. The message is one line: what is wrong, where, and what to do."""
