"""Every reason why a push would fail, found in seconds.

In comes a project; out come findings, each with its fix. Facts are gathered once, each check is a function of them, and
each topic's checks are in the file of its name.
"""
