"""The Hugging Face Hub, as its own client library reaches it: who asks, what a repository holds, what is sent.

Knows tokens, retries and what each refusal of the Hub means to a user; leaves to `publish` what goes up and to `base`
what comes down.
"""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.text import Text

import cogpress
from cogpress.errors import CogpressError

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.hf_api import ModelInfo

Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try of a request that the library itself does not repeat."""

RETRIED = {408, 429, 500, 502, 503, 504}
"""Answers that a later try may change."""

CONNECT_SECONDS, WRITE_SECONDS, READ_SECONDS = 20.0, 120.0, 300.0
"""The longest that connecting, sending a block and waiting for an answer may take; the Hub checks large files before it
answers. The library itself would wait for ever."""

AGAIN = "Run the same command again: what has arrived is not sent again."


class Hub:
    """The Hub and the account that a token belongs to.

    Args:
        console: where tries that failed are told.
        endpoint: the Hub's address; the library's own (HF_ENDPOINT, or the public one) where not given.
        anonymous: a token is used where there is one, and not needed.

    Raises:
        CogpressError: there is no token.
    """

    def __init__(self, console: Console, endpoint: str | None = None, *, anonymous: bool = False) -> None:
        from huggingface_hub import HfApi, get_token, set_client_factory

        self._token = get_token() or ""
        if not self._token and not anonymous:
            raise CogpressError(
                "There is no token for the Hugging Face Hub. Set HF_TOKEN to one with write access, or log in with: "
                "hf auth login"
            )
        self.console = console
        set_client_factory(_bounded_client)
        self.api = HfApi(
            endpoint=endpoint, token=self._token or False, library_name="cogpress", library_version=cogpress.__version__
        )

    @property
    def endpoint(self) -> str:
        """The Hub's address."""
        return str(self.api.endpoint)

    def account(self) -> str:
        """The name that the token belongs to.

        Raises:
            CogpressError: the Hub does not know the token, or the token may only read.
        """
        found = self._call("ask who the token belongs to", self.api.whoami)
        token = (found.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise CogpressError(
                f"The token of {found.get('name')} may only read. Make one with write access at "
                f"{self.endpoint}/settings/tokens and set HF_TOKEN to it."
            )
        return str(found.get("name"))

    def info(self, repo: str, revision: str | None = None) -> ModelInfo | None:
        """What a repository holds, with each file's size and hash; None where there is no such repository or revision.

        Raises:
            CogpressError: the Hub refuses or can not be reached.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def ask() -> ModelInfo | None:
            try:
                return self.api.model_info(repo, revision=revision, files_metadata=True, timeout=READ_SECONDS)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

        return self._call(f"look at {repo}", ask)

    def card_data(self, repo: str, revision: str | None) -> dict[str, Any]:
        """The metadata of a repository's model card; empty where there is no such repository or card.

        Raises:
            CogpressError: the Hub refuses or can not be reached.
        """
        found = self.info(repo, revision)
        return {} if found is None or found.card_data is None else dict(found.card_data.to_dict())  # type: ignore[no-untyped-call]

    def read_json(self, repo: str, name: str, revision: str) -> dict[str, Any]:
        """What a small JSON file of a repository holds; empty where it is no JSON object.

        Raises:
            CogpressError: the Hub refuses or can not be reached.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        def fetch() -> bytes:
            url = hf_hub_url(repo, name, revision=revision, endpoint=self.endpoint)
            response = get_session().get(url, headers=build_hf_headers(token=self._token))
            hf_raise_for_status(response)
            return bytes(response.content)

        try:
            content = json.loads(self._call(f"read {name} of {repo}", fetch))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def create(self, repo: str, *, private: bool) -> None:
        """Make a repository for a model; nothing happens where it is there.

        Raises:
            CogpressError: the token may not.
        """
        self._call(
            f"make {repo}", lambda: self.api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        )

    def branch(self, repo: str, branch: str) -> None:
        """Make a branch from the main one; nothing happens where it is there.

        Raises:
            CogpressError: the token may not, or the name is none.
        """
        self._call(f"make the branch {branch}", lambda: self.api.create_branch(repo, branch=branch, exist_ok=True))

    def check_card(self, repo: str, card: str) -> None:
        """Let the Hub judge a model card's metadata, before anything is sent.

        Raises:
            CogpressError: with the Hub's own words.
        """

        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        def validate() -> None:
            # create_commit asks the same, but only when everything has been sent.
            content = {"content": card, "repoType": "model"}
            headers = build_hf_headers(token=self._token)
            hf_raise_for_status(get_session().post(f"{self.endpoint}/api/validate-yaml", json=content, headers=headers))

        self._call(f"check the model card of {repo}", validate)

    def send(self, repo: str, branch: str, additions: Sequence[CommitOperationAdd]) -> None:
        """Store the content of large files, not yet in any commit; what the Hub has stored before is not sent again.

        Raises:
            CogpressError: after the library's own tries of each request.
        """
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        def upload() -> None:
            self.api.preupload_lfs_files(repo, additions, revision=branch, free_memory=False)

        # The library's bars show speed and time left; in a log they would be thousands of lines.
        quiet = not self.console.is_terminal and not are_progress_bars_disabled()
        if quiet:
            disable_progress_bars()
        try:
            self._call(f"send files to {repo}", upload, waits=())
        finally:
            if quiet:
                enable_progress_bars()

    def commit(
        self,
        repo: str,
        branch: str,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
        parent: str | None,
        landed: Callable[[], str | None],
    ) -> str:
        """Put all operations into one commit, which is there as a whole or not at all, and return its revision.

        Args:
            repo: the repository.
            branch: the branch that it is for.
            operations: the large files among them sent before.
            message: the commit's.
            parent: the revision that the branch must still be at.
            landed: finds the revision where an earlier try did reach the Hub and only its answer was lost.

        Raises:
            CogpressError: the Hub refuses, can not be reached, or the branch has changed.
        """
        tried = False

        def attempt() -> str:
            nonlocal tried
            if tried and (revision := landed()):
                return revision
            tried = True
            done = self.api.create_commit(
                repo, list(operations), commit_message=message, revision=branch, parent_commit=parent
            )
            return str(done.oid)

        return self._call(f"commit to {repo}", attempt)

    def _call(self, doing: str, function: Callable[[], Result], waits: Sequence[float] = WAITS) -> Result:
        """Call the library, again after a moment where that may help, and say what is wrong where it does not."""
        import httpx2

        for wait in (*waits, None):
            try:
                with self._telling():
                    return function()
            # The library and its transport raise all of these; what they mean is read from the cause.
            except (httpx2.HTTPError, httpx2.StreamError, OSError, RuntimeError, ValueError) as error:
                cause = _cause(error)
                if wait is None or not _may_pass(cause):
                    raise self._explained(doing, cause) from None
                self._say(f"{_reason(cause)}; trying again in {wait:.0f} s")
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _explained(self, doing: str, error: BaseException) -> CogpressError:
        from huggingface_hub.errors import OfflineModeIsEnabled

        settings = f"{self.endpoint}/settings/tokens"
        said = self._scrubbed(_words(error))
        status = _status(error)
        if isinstance(error, OfflineModeIsEnabled):
            text = f"Can not {doing}: HF_HUB_OFFLINE is set. Unset it."
        elif status == 401:
            text = f"Can not {doing}: the Hub does not know the token (401). Make one with write access at {settings}."
        elif status == 403:
            text = (
                f"The token may not {doing} (403: {said}). Check the organisation's name, and that the token has write "
                f"access to it: {settings}"
            )
        elif status == 412:
            text = f"Can not {doing}: somebody changed it meanwhile. Look at it, then run the same command again."
        elif status is not None and (status in RETRIED or status >= 500):
            text = f"Can not {doing}: the Hub answered {status}, after several tries. {AGAIN}"
        elif status is not None:
            text = f"Can not {doing}: the Hub refuses ({status}: {said}). Correct that and run again."
        elif _is_network(error):
            text = f"Can not {doing}: {self.endpoint} can not be reached or broke off ({said}). {AGAIN}"
        else:
            text = f"Can not {doing}: {said}"
        return CogpressError(text)

    def _scrubbed(self, text: str) -> str:
        """A text without the token and without the queries of addresses, which sign uploads."""
        known = text.replace(self._token, "***") if self._token else text
        return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", known)

    def _say(self, text: str) -> None:
        # Of an address its host is enough here.
        shown = re.sub(r"(https?://[^\s/'\"]+)/[^\s'\"]*", r"\1/…", self._scrubbed(text))
        self.console.print(Text(f"  {shown}", style="dim"), soft_wrap=True)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What the library logs and warns of goes to our console, scrubbed: it names whole addresses."""
        logger = logging.getLogger("huggingface_hub")
        before, propagates = logger.handlers[:], logger.propagate
        logger.handlers, logger.propagate = [_Handler(self._say)], False
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                yield
        finally:
            logger.handlers, logger.propagate = before, propagates
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                self._say(str(warning.message))


def _bounded_client() -> httpx2.Client:
    """The library's client, but one that gives up: its own waits for ever for a server that does not answer."""
    import httpx2
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = httpx2.Timeout(connect=CONNECT_SECONDS, write=WRITE_SECONDS, read=READ_SECONDS, pool=None)
    return client


class _Handler(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


def _cause(error: BaseException) -> BaseException:
    """What an upload's own `RuntimeError: Error while uploading ...` hides, or the error itself."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _is_network(error: BaseException) -> bool:
    import httpx2

    # An answer that is no JSON is the error page of something between here and the Hub.
    return isinstance(
        error, httpx2.TransportError | httpx2.StreamError | ConnectionError | TimeoutError | json.JSONDecodeError
    )


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    return status in RETRIED or (status is None and _is_network(error) and not isinstance(error, OfflineModeIsEnabled))


def _reason(error: BaseException) -> str:
    status = _status(error)
    return f"The Hub answered {status}" if status else f"The Hub did not answer ({_words(error)})"


def _words(error: BaseException) -> str:
    """The Hub's own words where it said any, else the exception's, in one line."""
    words = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())[:500]
