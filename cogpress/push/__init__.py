"""Push a project to a model on Replicate: first to a test model, where it is tried, then to the model that people use.

In come the project and a target, owner/name; out come a tested version, a report and programs that call it.
"""
