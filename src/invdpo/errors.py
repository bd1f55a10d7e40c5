"""The one exception that users are meant to read."""


class InvdpoError(Exception):
    """Something outside the program is wrong: the message says what, where, and what to do about it."""


class Unreachable(InvdpoError):
    """The hub does not answer; what its cache holds may do without it."""
