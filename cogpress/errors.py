"""The one exception that means "the user can fix this"."""


class CogpressError(Exception):
    """A user's mistake or a missing thing: what was wrong, where, and what to do, in one or two sentences.

    Commands print its text alone; anything else that escapes is a fault of cogpress and keeps its stack trace.
    """
