"""The project's environments, made from the lock files and entered by every script.

It runs before anything is installed: standard library only, in syntax that Python 3.8 reads.
"""
