"""The one form of every complaint: which argument, what was given, what is expected, and how to put it right."""

from __future__ import annotations


def complaint(argument: str, given: object, expected: str, remedy: str) -> str:
    """Return ``"<argument>: got <given>, expected <expected>. <remedy>."``, the message of every error raised here."""
    return f"{argument}: got {given}, expected {expected}. {remedy}."


class UnsupportedError(RuntimeError):
    """A call that an implementation cannot do although it can run here: the automatic choice then takes another one."""
