"""Requests to the Hugging Face Hub for a publication, by its own client, with retries and errors a user understands.

Downloads are in `cogpress.weights.hub`.
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
from cogpress.errors import CogpressError, reason

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.hf_api import ModelInfo

Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each retry of a request that the library does not retry itself."""

RETRIED = {408, 429, 500, 502, 503, 504}
"""HTTP statuses worth a retry."""

CONNECT_SECONDS, WRITE_SECONDS, READ_SECONDS = 20.0, 120.0, 300.0
"""Timeouts of connecting, sending a block and waiting for an answer; the Hub checks large files before it answers. The
library has none."""

AGAIN = "Run the same command again: files that have arrived are not sent again."


class Hub:
    """The Hub and the account that a token belongs to.

    Args:
        console: where failed tries are reported.
        endpoint: the Hub's address; the library's default (HF_ENDPOINT, or the public one) where not given.
        anonymous: use a token if there is one, but do not require it.

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
        found = self._call("look up the token's owner", self.api.whoami)
        token = (found.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise CogpressError(
                f"The token of {found.get('name')} is read-only. Make one with write access at "
                f"{self.endpoint}/settings/tokens and set HF_TOKEN to it."
            )
        return str(found.get("name"))

    def info(self, repo: str, revision: str | None = None) -> ModelInfo | None:
        """A repository's files with their sizes and hashes; None where there is no such repository or revision.

        Raises:
            CogpressError: the Hub refuses or cannot be reached.
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
            CogpressError: the Hub refuses or cannot be reached.
        """
        found = self.info(repo, revision)
        return {} if found is None or found.card_data is None else dict(found.card_data.to_dict())  # type: ignore[no-untyped-call]

    def read_json(self, repo: str, name: str, revision: str) -> dict[str, Any]:
        """The content of a small JSON file of a repository; empty where it is no JSON object.

        Raises:
            CogpressError: the Hub refuses or cannot be reached.
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
        """Create a model repository unless it exists.

        Raises:
            CogpressError: the token lacks the permission.
        """
        self._call(
            f"create {repo}", lambda: self.api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        )

    def branch(self, repo: str, branch: str) -> None:
        """Create a branch from main unless it exists.

        Raises:
            CogpressError: the token lacks the permission, or the name is invalid.
        """
        self._call(f"create the branch {branch}", lambda: self.api.create_branch(repo, branch=branch, exist_ok=True))

    def check_card(self, repo: str, card: str) -> None:
        """Have the Hub validate a model card's metadata before anything is uploaded.

        Raises:
            CogpressError: in the Hub's own words.
        """

        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        def validate() -> None:
            # create_commit validates too, but only after everything has been uploaded.
            content = {"content": card, "repoType": "model"}
            headers = build_hf_headers(token=self._token)
            hf_raise_for_status(get_session().post(f"{self.endpoint}/api/validate-yaml", json=content, headers=headers))

        self._call(f"check the model card of {repo}", validate)

    def send(self, repo: str, branch: str, additions: Sequence[CommitOperationAdd]) -> None:
        """Upload large files ahead of the commit; files that the Hub has are not uploaded again.

        Raises:
            CogpressError: after the library's own retries.
        """
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        def upload() -> None:
            self.api.preupload_lfs_files(repo, additions, revision=branch, free_memory=False)

        # The library's progress bars would be thousands of lines in a log.
        quiet = not self.console.is_terminal and not are_progress_bars_disabled()
        if quiet:
            disable_progress_bars()
        try:
            self._call(f"upload to {repo}", upload, waits=())
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
        """Make one commit of all operations and return its revision.

        Args:
            repo: the repository.
            branch: the branch to commit to.
            operations: additions, with large files uploaded before, and deletions.
            message: the commit's message.
            parent: the revision that the branch must still be at.
            landed: finds the revision if an earlier try reached the Hub and only its answer was lost.

        Raises:
            CogpressError: the Hub refuses, cannot be reached, or the branch has changed.
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
        """Call the library with retries, and turn its errors into messages for users."""
        import httpx2

        for wait in (*waits, None):
            try:
                with self._logs_shown():
                    return function()
            # The library and its transport raise all of these; the cause tells them apart.
            except (httpx2.HTTPError, httpx2.StreamError, OSError, RuntimeError, ValueError) as error:
                cause = _cause(error)
                if wait is None or not _may_pass(cause):
                    raise self._explained(doing, cause) from None
                self._report(f"{_reason(cause)}; retrying in {wait:.0f} s")
                time.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def _explained(self, doing: str, error: BaseException) -> CogpressError:
        from huggingface_hub.errors import OfflineModeIsEnabled

        settings = f"{self.endpoint}/settings/tokens"
        said = self._redacted(_words(error))
        status = _status(error)
        if isinstance(error, OfflineModeIsEnabled):
            text = f"Could not {doing}: HF_HUB_OFFLINE is set. Unset it."
        elif status == 401:
            text = f"Could not {doing}: the Hub rejects the token (401). Make one with write access at {settings}."
        elif status == 403:
            text = (
                f"The token may not {doing} (403: {said}). Check the organisation's name, and that the token has write "
                f"access to it: {settings}"
            )
        elif status == 412:
            text = f"Could not {doing}: somebody changed it meanwhile. Look at it, then run the same command again."
        elif status is not None and (status in RETRIED or status >= 500):
            text = f"Could not {doing}: the Hub still answered {status} after several tries. {AGAIN}"
        elif status is not None:
            text = f"Could not {doing}: the Hub refuses ({status}: {said}). Correct that and run again."
        elif _is_network(error):
            text = f"Could not {doing}: {self.endpoint} could not be reached or broke off ({said}). {AGAIN}"
        else:
            text = f"Could not {doing}: {said}"
        return CogpressError(text)

    def _redacted(self, text: str) -> str:
        """Redact the token and the queries of URLs, which sign uploads."""
        known = text.replace(self._token, "***") if self._token else text
        return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", known)

    def _report(self, text: str) -> None:
        # The host of a URL is enough here.
        shown = re.sub(r"(https?://[^\s/'\"]+)/[^\s'\"]*", r"\1/…", self._redacted(text))
        self.console.print(Text(f"  {shown}", style="dim"), soft_wrap=True)

    @contextmanager
    def _logs_shown(self) -> Iterator[None]:
        """Show the library's logs and warnings on our console, redacted: they hold whole URLs."""
        logger = logging.getLogger("huggingface_hub")
        before, propagates = logger.handlers[:], logger.propagate
        logger.handlers, logger.propagate = [_Handler(self._report)], False
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                yield
        finally:
            logger.handlers, logger.propagate = before, propagates
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                self._report(str(warning.message))


def _bounded_client() -> httpx2.Client:
    """The library's HTTP client with timeouts: its own waits for ever for a server that does not answer."""
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
    """The cause behind the library's `RuntimeError: Error while uploading ...`, or the error itself."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _is_network(error: BaseException) -> bool:
    import httpx2

    # An answer that is no JSON is the error page of a proxy.
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
    """The Hub's own message if it sent one, else the exception's, in one line."""
    words = getattr(error, "server_message", None) or str(error) or reason(error)
    return " ".join(str(words).split())[:500]
