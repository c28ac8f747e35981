"""The text of the model's page on Replicate, from the card of the weights in `weights/`."""

from __future__ import annotations

from cogpress.config import Config
from cogpress.publish import bundle, card
from cogpress.push.target import PushTarget


def texts(target: PushTarget, settings: Config) -> dict[str, str]:
    """The page's `readme` and `description`.

    Raises:
        CogpressError: the weights have no manifest, or the licence of their base is unknown.
    """
    folder = target.root / "weights"
    facts = bundle.read_manifest(folder)
    request = bundle.Publication(target.destination, folder, target.root / "runs")
    # The Hub is not asked: preflight has shown the licence, and the page must not depend on another server.
    found = bundle.card_facts(request, facts, None, lambda _repository, _revision: {}, [])
    return {"readme": card.page(found), "description": f"{settings.name}: {found.origin.shown}, fine-tuned."}
