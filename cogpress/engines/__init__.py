"""The engines, one file each: token ids in, text out as it is generated.

`base` states what every engine offers. A file beside it with a class `Engine` and a function `prepare` is an engine
that `serve.engine` can name.
"""
