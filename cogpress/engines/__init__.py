"""The engines, one file each: a class `Engine` as `cogpress.engines.base.Engine` describes it, and `prepare(serve)`.

A new file here is an engine that `serve.engine` can name. `tests/engines/test_engines.py` asks the same of all of them.
"""
