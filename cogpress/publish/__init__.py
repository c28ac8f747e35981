"""Verified weights on the Hugging Face Hub.

In come a folder of weights and the run that made it; out come one commit with a model card, compared with the manifest
after it has arrived.
"""
