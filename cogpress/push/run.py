"""A push, step by step: preflight, the test model, its tests, then the real model and its deployment."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from cogpress.cog import program as cog
from cogpress.cog import schema
from cogpress.cog.process import read_cog_yaml
from cogpress.config import Config
from cogpress.errors import CogpressError
from cogpress.files import sha256, write_json
from cogpress.plan import hardware
from cogpress.preflight import machine
from cogpress.preflight import run as preflight
from cogpress.preflight.facts import Request
from cogpress.push import compatibility, deployment, fuzz, journal, page, parity, summary, testcases
from cogpress.push.context import build_context, code_beside_weights
from cogpress.push.journal import RejectedError, Say, StepRunner
from cogpress.push.summary import Shipped
from cogpress.push.target import PushTarget, example, fingerprint
from cogpress.push.testcases import Outcome
from cogpress.replicate import api, routes, training
from cogpress.replicate.api import RefusedError, Replicate
from cogpress.verify import limits
from cogpress.verify import run as verify

APPEAR_SECONDS = 300.0
"""How long a pushed version may take to be listed."""

PREFLIGHT, MODELS = "Preflight", "Models on Replicate"
BESIDE, PUSHED = "Schema compared with the live version", "Schema of the pushed version compared"
TEST_PUSH, REAL_PUSH = "Push to the test model", "Push to the model"
TESTS, SAME = "Test predictions", "Answers compared with the live version"
FUZZ, PARITY = "Fuzz", "Answers compared with the local weights"
TRAINING, DEPLOYMENT = "Training with the pushed version", "Deployment"
PAGE, CLEAN = "Text of the model's page", "Old test versions"
"""The steps' names in the terminal and the journal."""


class PushRun:
    """One push, from preflight to the model that people use."""

    def __init__(self, target: PushTarget, settings: Config, replicate: Replicate, console: Console) -> None:
        """Read the journal of earlier pushes to the same destination; nothing runs yet.

        Args:
            target: what is pushed where.
            settings: of `model.yaml`.
            replicate: the client.
            console: for progress.
        """
        self.target, self.settings, self.replicate, self.console = target, settings, replicate, console
        self.journal = journal.Journal(target.folder / "journal.json", fresh=target.fresh)
        self._steps = StepRunner(self.journal, console)
        self.notes: list[str] = []
        self._sku: str | None = None

    def run(self) -> Shipped:
        """Run every step that an earlier push did not do.

        Raises:
            CogpressError: a step fails; the next push resumes there.
        """
        target, settings = self.target, self.settings
        self._steps.once(PREFLIGHT, self._preflight)
        image = fingerprint(target.root, settings, target.file)
        created = self._steps.once(MODELS, self._models)["made"]
        live = (self.replicate.find(routes.model(target.destination)) or {}).get("latest_version") or {}
        self._compatible(BESIDE, live, self.local_schema(), "the project")
        tested = self._pushed(TEST_PUSH, target.test_model, image)
        document = self._document(target.test_model, tested)
        self._compatible(PUSHED, live, document, f"version {tested[:12]}")
        self._tests(tested)
        self._same(tested, live, image)
        self._fuzz(tested, document)
        self._parity(tested)
        self._training(tested)
        if fingerprint(target.root, settings, target.file) != image:
            raise CogpressError("The project changed during the push. Run this again to test it as it is now.")
        shipped = self._pushed(REAL_PUSH, target.destination, image, after=tested)
        final = self._document(target.destination, shipped)
        if schema.fields(final) != schema.fields(document):
            raise CogpressError(
                f"Version {shipped[:12]} of {target.destination} takes other inputs than the version that was tested. "
                "Check whether something else was pushed there meanwhile."
            )
        self._deployment(shipped)
        self._page(any(name.startswith(f"{target.destination} ") for name in created))
        self._clean(tested)
        model = self.replicate.find(routes.model(target.destination)) or {}
        made = Shipped(
            model,
            shipped,
            final,
            self._steps.done,
            tuple(self.notes),
            cold_boot=summary.cold_boot(self._steps.done.get(TESTS, {})),
            cost=self._cost(),
            deployment=self._steps.done.get(DEPLOYMENT, {}).get("deployment"),
        )
        content = {"format": 1, "model": target.destination, "version": shipped, "steps": self._steps.done}
        content |= {"cold_boot": made.cold_boot, "cost": made.cost.to_dict()}
        write_json(target.folder / "report.json", {**content, "notes": self.notes})
        return made

    def _cost(self) -> summary.Cost:
        """What this push's predictions and trainings cost, at the price of the hardware that a new model gets."""
        spent = sum(float(one.get(summary.SPENT) or 0.0) for one in self._steps.done.values() if not one["before"])
        path = self.target.root / self.settings.plan.hardware if self.settings.plan.hardware else None
        try:
            sku = self.hardware
            price = hardware.table(path, self.settings.plan.prices).machine(sku).price_per_second
        except CogpressError:
            return summary.Cost(spent)  # its price is unknown
        return summary.Cost(spent, sku, price)

    def push_depends(self, model: str, image: str, after: str | None) -> Any:
        """What a push depends on: the image, the command, and the version tested before."""
        return [image, cog.command(model, self.settings.push), after]

    def tests_depend(self, version: str) -> Any:
        """What the test predictions depend on."""
        push = self.settings.push
        asked = [case.model_dump(mode="json") for case in push.tests]
        return [version, asked, self.settings.verify.score, push.timeout]

    def fuzz_depends(self, version: str, asked: list[dict[str, Any]]) -> Any:
        """What the fuzzing depends on."""
        return [version, asked, example(self.settings), self.settings.push.timeout]

    # -----------------------------------------------------------------------------------------------------------------
    # The steps
    # -----------------------------------------------------------------------------------------------------------------

    def _preflight(self, say: Say) -> dict[str, Any]:
        try:
            named: str | None = self.hardware
        except CogpressError:
            named = None  # reported later, if a model has to be created
        report = preflight.run(Request(self.target.root, self.target.destination, named, self.target.file))
        if not report.passed:
            report.print(self.console)
            raise CogpressError(
                f"Preflight found {len(report.of('failed'))} problems that would make the push fail, listed above. "
                "Fix them and run this again."
            )
        warnings = len(report.of("warning"))
        say(
            f"{len(report.of('passed'))} passed"
            + (f", {warnings} warnings (see scripts/preflight)" if warnings else "")
        )
        if machine.logged_in() is False:
            cog.login(self.target.root, cog.cli_token(), self.replicate.token)
        placed = next(row.finding for row in report.rows if (row.topic, row.name) == ("Image", "size"))
        if placed.outcome == "warning":
            self.notes.append(f"{placed.message} {placed.fix}")
        return {"passed": len(report.of("passed")), "warnings": warnings, "weights": placed.message}

    def _models(self, say: Say) -> dict[str, Any]:
        made = []
        wanted = {self.target.test_model: "private", self.target.destination: self.target.visibility}
        for name, visibility in wanted.items():
            found = self.replicate.find(routes.model(name))
            if found is None:
                self.replicate.make_model(name, visibility, self.hardware)
                made.append(f"{name} created, {visibility}, on {self.hardware}")
            elif name == self.target.destination and found.get("visibility") not in (None, visibility):
                self.notes.append(f"{name} stays {found['visibility']}: change that in its settings on Replicate.")
        say("; ".join(made) or "both exist")
        return {"made": made}

    @property
    def hardware(self) -> str:
        """The SKU, chosen by the plan where none is named."""
        if self._sku is None:
            self._sku = self.target.sku(self.settings)
        return self._sku

    def local_schema(self) -> dict[str, Any]:
        """The OpenAPI document that the image will have."""
        named = read_cog_yaml(self.target.root, self.target.file)
        return schema.openapi(self.target.root, named.get("run") or named.get("predict"), named.get("train"))

    def _compatible(self, name: str, live: dict[str, Any], new: dict[str, Any], what: str) -> None:
        old = live.get("openapi_schema")
        version = str(live.get("id") or "")[:12]

        def act(say: Say) -> dict[str, Any]:
            if not isinstance(old, dict):
                say("there is no live version")
                return {"breaking": []}
            found = compatibility.breaking(old, new)
            if found and not self.target.allow_breaking:
                raise RejectedError(
                    f"Breaking changes for callers of {self.target.destination}: {'; '.join(found)}. Undo them, or "
                    "push with --allow-breaking."
                )
            if found:
                self.notes.append(f"Breaking changes since version {version}: {'; '.join(found)}.")
            say(f"{len(found)} breaking changes, allowed" if found else f"{what} is compatible with version {version}")
            return {"breaking": found}

        self._steps.kept(name, [live.get("id"), new, self.target.allow_breaking], act)

    def _pushed(self, name: str, model: str, image: str, after: str | None = None) -> str:
        """The id of the version that a push of the image creates.

        Cog gives each push a digest of its own, by a label, so that it is the layers that tell whether what ships is
        what was tested.
        """
        command = cog.command(model, self.settings.push)

        def act(say: Say) -> dict[str, Any]:
            before = {version["id"] for version in self._versions(model)}
            log = self.target.folder / f"{model.rpartition('/')[2]}.log"
            secrets = [self.replicate.token, cog.cli_token()]
            if "--separate-weights" in command and (code := code_beside_weights(self.target.root)):
                note = f"The weights have no layer of their own, because {code[0]} lies among them. Leave it out."
                self.notes += [] if note in self.notes else [note]
            with (
                self.console.status(" ".join(command)) as status,
                build_context(self.target.root, self.target.folder, self.target.file) as place,
            ):
                digest = cog.push(place, command, secrets, log, lambda line: status.update(Text(line[:70])))
                version = self._appeared(model, before, digest)
            layers = cog.layers(model, *secrets)
            tested = self._steps.done.get(TEST_PUSH, {}).get("layers") if after else None
            told = ""
            if layers and tested:
                told = self._compared(layers, tested)
            say(f"version {version[:12]} of {model}{told}")
            return {"model": model, "version": version, "layers": layers}

        def still(result: dict[str, Any]) -> bool:
            return self.replicate.find(routes.version(model, result["version"])) is not None

        return str(self._steps.kept(name, self.push_depends(model, image, after), act, still)["version"])

    def _compared(self, layers: list[str], tested: list[str]) -> str:
        """How the image that ships differs from the one that was tested, in words; noted where it does."""
        changed = [layer for layer in layers if layer not in tested]
        if not changed:
            return f", with the {len(layers)} layers that were tested (the last is {layers[-1][:19]})"
        self.notes.append(
            f"{len(changed)} of the image's {len(layers)} layers were built anew after the tests, the first of them "
            f"{changed[0][:19]}: Docker's cache did not have them. The version that ships is not tested byte for byte."
        )
        return ""

    def _versions(self, model: str) -> list[dict[str, Any]]:
        return list((self.replicate.find(routes.versions(model)) or {"results": []})["results"])

    def _appeared(self, model: str, before: set[str], digest: str | None) -> str:
        began = time.monotonic()
        while True:
            now = [str(version["id"]) for version in self._versions(model)]
            if digest in now:
                return str(digest)
            if new := [identifier for identifier in now if identifier not in before]:
                return new[0]
            if time.monotonic() - began > APPEAR_SECONDS:
                raise CogpressError(
                    f"cog push succeeded, but no new version of {model} appeared within {APPEAR_SECONDS:.0f} s. Look "
                    "at its page on Replicate, then run this again."
                )
            time.sleep(1.0)

    def _document(self, model: str, version: str) -> dict[str, Any]:
        found = (self.replicate.find(routes.version(model, version)) or {}).get("openapi_schema")
        if not isinstance(found, dict):
            raise CogpressError(f"Version {version[:12]} of {model} has no schema. Look at its page on Replicate.")
        return found

    def _tests(self, version: str) -> None:
        push = self.settings.push
        if not push.tests:
            self.notes.append("model.yaml has no push.tests, so no test predictions ran.")
            return
        score = verify.scorer(self.settings.verify.score)

        def act(say: Say) -> dict[str, Any]:
            outcomes = testcases.run(
                self.replicate, version, push.tests, score, timeout=push.timeout, parallel=push.parallel
            )
            self.console.print(testcases.table(outcomes))
            testcases.judge(outcomes, "test predictions", version)
            say(f"{len(outcomes)}/{len(outcomes)} passed")
            spent = sum(outcome.seconds for outcome in outcomes)
            return {"outcomes": [asdict(outcome) for outcome in outcomes], summary.SPENT: spent}

        self._steps.kept(TESTS, self.tests_depend(version), act)

    def compared_inputs(self) -> dict[str, dict[str, Any]]:
        """The inputs of tests that expect an answer, by title."""
        numbered = enumerate(self.settings.push.tests, 1)
        return {testcases.title(at, one): one.input for at, one in numbered if one.error is None and not one.cancels}

    def _same(self, version: str, live: dict[str, Any], image: str) -> None:
        """The same inputs on both versions: different answers are noted, or fail with `push.same_answers`."""
        asked, old = self.compared_inputs(), str(live.get("id") or "")
        if not asked or not old or old == version:
            return
        done = self.journal.find(REAL_PUSH, journal.key(self.push_depends(self.target.destination, image, version)))
        if done is not None and done.result.get("version") == old:
            return  # an earlier run of this push made the live one
        required = self.settings.push.same_answers

        def act(say: Say) -> dict[str, Any]:
            both = [
                testcases.answers(self.replicate, one, asked.values(), self.settings.push) for one in (old, version)
            ]
            pairs = zip(asked, *both, strict=True)
            other = [name for name, (before, _), (now, _) in pairs if before is None or before != now]
            if other and required:
                raise RejectedError(
                    f"Version {version[:12]} answers differently from the live version {old[:12]}: {', '.join(other)}."
                )
            say(f"{len(asked) - len(other)} of {len(asked)} equal")
            spent = sum(seconds for one in both for _, seconds in one)
            return {"asked": len(asked), "other": other, summary.SPENT: spent}

        found = self._steps.kept(SAME, [version, old, asked, required, self.settings.push.timeout], act)
        if found["other"]:
            self.notes.append(f"Answers differ from the previous version's: {', '.join(found['other'])}.")

    def _fuzz(self, version: str, document: dict[str, Any]) -> None:
        push = self.settings.push
        asked = fuzz.inputs(document, push.fuzz)
        if not asked:
            return
        again = example(self.settings)

        def act(say: Say) -> dict[str, Any]:
            outcomes = fuzz.run(self.replicate, version, asked, timeout=push.timeout, parallel=push.parallel)
            if again is not None:  # an input may have broken it
                made = testcases.predict(self.replicate, version, again, push.timeout)
                alive = made.get("status") == "succeeded"
                told = str(made.get("error") or made.get("status"))
                outcomes.append(Outcome("the first test again", alive, told, testcases.seconds_of(made)))
            bad = [outcome for outcome in outcomes if not outcome.passed]
            if bad:
                self.console.print(testcases.table(bad))
            told = "; ".join(
                f"{outcome.name} {_shown(asked, at)}" for at, outcome in enumerate(outcomes) if outcome in bad
            )
            testcases.judge(outcomes, "generated inputs", version, f" Inputs: {told}" if told else "")
            say(f"{len(asked)} generated inputs answered, or refused with a reason")
            return {"inputs": len(asked), summary.SPENT: sum(outcome.seconds for outcome in outcomes)}

        self._steps.kept(FUZZ, self.fuzz_depends(version, asked), act)

    def _parity(self, version: str) -> None:
        if not self.settings.push.parity:
            self.notes.append("push.parity is false: answers on Replicate were not compared with the local weights.")
            return
        found = parity.reference(self.settings, self.target.root)
        known, asked = sum(answer is not None for answer in found.answers), len(found.examples)
        if known < asked:
            self.notes.append(
                f"Of {asked} held-out examples the reference's own answers are known for {known}, so the score on "
                "Replicate was compared on those alone. scripts/verify with more --rows answers the others."
            )
        allowed = vars(limits.of(self.settings.verify, found.scheme))

        def act(say: Say) -> dict[str, Any]:
            inputs = schema.fields(self.local_schema())
            checks, metrics = parity.compare(self.replicate, version, self.settings, found, inputs)
            failed = [check for check in checks if not check.passed]
            if failed:
                told = "; ".join(f"{check.name} {check.shown[0]}, required {check.shown[1]}" for check in failed)
                raise RejectedError(f"{told}. {failed[0].cause}")
            say(
                f"{metrics['served_agreement']:.1%} of tokens agree, {metrics['tokens_per_second']:.0f} tokens/s, "
                f"first after {metrics['time_to_first_token']:.2f} s"
            )
            spent = metrics.pop(summary.SPENT)
            return {"metrics": metrics, "checks": [check.to_dict() for check in checks], summary.SPENT: spent}

        self._steps.kept(PARITY, [version, found.depends(), allowed, self.settings.verify.score], act)

    def _training(self, version: str) -> None:
        wanted = self.settings.push.training
        if wanted is None:
            return
        data = self.target.root / wanted.data
        if not data.is_file():
            raise CogpressError(f"push.training.data names {data}, which does not exist. Correct model.yaml.")

        def act(say: Say) -> dict[str, Any]:
            trainer, model = f"{self.target.test_model}:{version}", self.target.trained_model
            made = training.start(self.replicate, trainer, model, data, wanted.input, lambda: self.hardware)
            trained = training.follow(
                self.replicate,
                made,
                lambda text: self.console.print(Text(text.rstrip("\n"), "dim")),
                timeout=wanted.timeout,
            )
            if not trained.version:
                raise CogpressError(f"Training {trained.id} succeeded but made no version of {model}.")
            outcomes = testcases.run(
                self.replicate,
                trained.version.rpartition(":")[2],
                wanted.tests,
                verify.scorer(self.settings.verify.score),
                timeout=self.settings.push.timeout,
                parallel=1,
            )
            if outcomes:
                self.console.print(testcases.table(outcomes))
                testcases.judge(outcomes, "predictions of the trained version", trained.version.rpartition(":")[2])
            say(f"{trained.seconds:.0f} s, {len(outcomes)}/{len(outcomes)} predictions passed")
            spent = float(trained.metrics.get("predict_time") or 0.0) + sum(outcome.seconds for outcome in outcomes)
            return {"training": trained.id, "version": trained.version, summary.SPENT: spent}

        self._steps.kept(TRAINING, [version, wanted.model_dump(mode="json"), sha256(data)], act)

    def _deployment(self, version: str) -> None:
        wanted = self.settings.push.deployment
        if wanted is None:
            return

        def act(say: Say) -> dict[str, Any]:
            name = f"{self.replicate.ask(routes.account())['username']}/{wanted.name}"
            if self.replicate.find(routes.deployment(name)) is None:
                self.replicate.ask(
                    routes.create_deployment(wanted, self.target.destination, version, wanted.hardware or self.hardware)
                )
                say(f"{name} created with version {version[:12]}")
            else:
                made = self.replicate.ask(routes.update_deployment(name, version=version, **deployment.named(wanted)))
                say(f"{name} updated to version {version[:12]}")
                if deployment.is_off(made):
                    self.notes.append(f"{name} is switched off (no instances): set max_instances to switch it on.")
            return {"deployment": name}

        def still(result: dict[str, Any]) -> bool:
            found = self.replicate.find(routes.deployment(result["deployment"]))
            return found is not None and found.get("current_release", {}).get("version") == version

        self._steps.kept(DEPLOYMENT, [version, wanted.model_dump(), self.target.hardware], act, still)

    def _page(self, created: bool) -> None:
        """The model's page, where this push made the model or was asked to."""
        if not (created or self.target.page):
            return

        def act(say: Say) -> dict[str, Any]:
            try:
                texts = page.texts(self.target, self.settings)
            except CogpressError as error:
                self.notes.append(f"The text of the model's page was not written: {error}")
                return {"written": False}
            self.replicate.ask(routes.update_model(self.target.destination, **texts))
            say(f"{len(texts['readme']):,} characters")
            return {"written": True}

        self._steps.once(PAGE, act)

    def _clean(self, tested: str) -> None:
        """Delete the test models' versions but those that were tested."""
        if not self.target.clean:
            return
        kept_versions = {self.target.test_model: tested}
        if trained := self._steps.done.get(TRAINING):
            kept_versions[self.target.trained_model] = trained["version"].rpartition(":")[2]

        def act(say: Say) -> dict[str, Any]:
            deleted, kept = 0, []
            for model, keep in kept_versions.items():
                for identifier in (one["id"] for one in self._versions(model) if one["id"] != keep):
                    try:
                        self.replicate.ask(routes.delete_version(model, identifier))
                        deleted += 1
                    except RefusedError as error:
                        kept.append(f"{identifier[:12]} of {model} ({error})")
            if kept:
                self.notes.append(f"Test versions that Replicate keeps: {'; '.join(kept)}")
            say(f"{deleted} deleted, {len(kept)} kept")
            return {"deleted": deleted, "kept": kept}

        self._steps.once(CLEAN, act)


def push(target: PushTarget, settings: Config, console: Console) -> Shipped:
    """Push, and print how to call what was pushed.

    Raises:
        CogpressError: a step fails; the next push resumes there.
    """
    replicate = api.connect()
    try:
        shipped = PushRun(target, settings, replicate, console).run()
    finally:
        replicate.close()
    asked = example(settings)
    programs = None
    if asked is not None:
        programs = summary.programs(target.destination, shipped, asked, replicate.base)
        (target.folder / summary.PROGRAMS).write_text(summary.page(target.destination, programs), encoding="utf-8")
    summary.show(shipped, target.destination, programs, target.folder.relative_to(target.root), console)
    return shipped


def _shown(asked: list[dict[str, Any]], at: int) -> str:
    return repr(asked[at])[:200] if at < len(asked) else ""
