"""cogpress: from an open LLM and a file of examples to a fine-tuned model on Replicate."""

__version__ = "0.1.0"
