"""A model's files, from anywhere, checked.

In comes a source: a folder, a tar, a URL or a repository on the Hub. Out comes a local folder of safetensors whose
files are whole and, with a manifest, the ones that were written.
"""
