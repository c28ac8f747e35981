"""Take secrets out of text before anybody reads it: what looks like a token, and the tokens that are known."""

from __future__ import annotations

import re

PATTERNS = {
    kind: re.compile(form)
    for kind, form in {
        "a token of the Hugging Face Hub": r"\bhf_[A-Za-z0-9]{30,}",
        "a token of Replicate": r"\br8_[A-Za-z0-9]{30,}",
        "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
        "a token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})",
        "a token of GitLab": r"\bglpat-[A-Za-z0-9_-]{20,}",
        "an access key of AWS": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
        "a key of OpenAI or Anthropic": r"\bsk-(proj-|ant-)?[A-Za-z0-9_-]{32,}",
        "a key of Google": r"\bAIza[A-Za-z0-9_-]{35}\b",
        "a token of Slack": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
        "a live key of Stripe": r"\b[rs]k_live_[A-Za-z0-9]{20,}",
        "a webhook secret": r"\bwhsec_[A-Za-z0-9+/=]{24,}",
        "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
        "a password in a URL": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"{}$<>]+:[^\s/:@'\"{}$<>]{3,}@[^\s/'\"]+",
        "a signed URL": r"[?&](X-Amz-Signature|X-Goog-Signature|sig)=[A-Za-z0-9%]{20,}",
    }.items()
}
"""How a secret looks, by its kind."""


def redacted(text: str, *known: str | None) -> str:
    """The text with `(secret)` in the place of each known secret and of whatever looks like one."""
    for secret in filter(None, known):
        text = text.replace(secret, "(secret)")
    for pattern in PATTERNS.values():
        text = pattern.sub("(secret)", text)
    return text
