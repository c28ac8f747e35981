"""Check that the runner's inputs are those that `model.yaml` describes."""

from __future__ import annotations

from collections.abc import Iterator

from cogpress.cog import form
from cogpress.preflight.check import Check, Finding, failed, passed, skipped, some
from cogpress.preflight.facts import Facts


def _form(facts: Facts) -> Iterator[Finding]:
    reference = (facts.cog or {}).get("run")
    file = str(reference).partition(":")[0]
    if facts.settings is None or facts.text(file) is None:
        yield skipped("model.yaml or the runner cannot be read.")
        return
    if not form.marked(facts.root / file) and not facts.settings.prompt.fields:
        yield passed(f"{file} has inputs of its own.")
        return
    if different := form.stale(facts.root / file, facts.settings):
        yield failed(
            f"{file} has other inputs than model.yaml describes: {some(different, 2)}.",
            "Run scripts/form, which writes them.",
        )
        return
    yield passed(f"{file} has the {len(form.inputs(facts.settings))} inputs that model.yaml describes.")


CHECKS = [Check("Inputs", "form", _form)]
