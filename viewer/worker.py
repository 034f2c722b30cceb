"""`Worker`: a thread that owns the session, so that the window answers while frames compute and kernels compile."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nrc.launch import prepare
from nrc.viewer.session import Picture, Request, Session

IDLE_SECONDS = 0.05  # between looks at a session that has nothing to do

log = logging.getLogger("nrc.viewer")


@dataclass(frozen=True)
class Message:
    """Something to tell the user; errors stay until they are dismissed."""

    text: str
    is_error: bool = False


@dataclass(frozen=True)
class _Call:
    function: Callable[[Any], Any]
    then: Callable[[Any], None] | None
    what: str
    settled: bool


class Worker:
    """Answers the newest request again and again, and runs calls between two frames, in their order.

    What the window's thread reads is `picture` (under `lock`, while it copies the pixels), `session` and `activity`;
    it collects results of calls with `take_results`, which runs their `then` on its own thread.

    Attributes:
        lock: Held while the picture is exchanged: holding it keeps `picture`'s pixels as they are.
        picture: The newest answer.
        n_pictures: How many there were.
        session: What is looked at now.
        activity: What takes long at the moment, for the window to say; "" while frames are computed.
        limit: Pictures after which it rests; None for no end. May be set at any time.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.picture: Picture | None = None
        self.n_pictures = 0
        self.session: Session | None = None
        self.activity = ""
        self._changed = threading.Condition()
        self._limit: int | None = None
        self._request: Request | None = None
        self._failed: Request | None = None  # not tried again until the window wants something else
        self._calls: deque[_Call] = deque()
        self._results: deque[tuple[_Call, Any]] = deque()
        self._unsettled = 0  # results not yet taken without which the window may ask for what is no longer there
        self._messages: deque[Message] = deque()
        self._stopping = False
        self._began = 0.0
        self._thread = threading.Thread(target=self._run, name="nrc worker", daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> None:
        """Answer `request` from now on."""
        with self._changed:
            self._request = request
            self._changed.notify()

    def call(
        self,
        function: Callable[[Any], Any],
        then: Callable[[Any], None] | None = None,
        *,
        what: str = "",
        settled: bool = False,
    ) -> None:
        """Run `function` with the session between two frames; `then` gets its result in `take_results`.

        Args:
            what: It does, if it takes long, for the window to say.
            settled: It changes settings: no request made before `then` has run is answered after it.
        """
        with self._changed:
            self._calls.append(_Call(function, then, what, settled))
            self._changed.notify()

    def open(self, make_session: Callable[[], Session], then: Callable[[Session], None], *, what: str) -> None:
        """Replace the session by one that `make_session` gives; the old one stays where that fails."""

        def replace(_old: Session | None) -> Session:
            session = make_session()
            session.report = self._report
            prepare(session.kernels(), session.device, report=self._report)
            with self.lock:
                self.session, self.picture = session, None
            return session

        self.call(replace, then, what=f"loading {what}", settled=True)

    def take_results(self) -> list[Message]:
        """Run the `then` of finished calls, and give what is to be said."""
        while self._results:
            call, result = self._results.popleft()
            try:
                if call.then is not None:
                    call.then(result)
            except Exception as error:
                self._fail(error)
            if call.settled:
                with self._changed:
                    self._request = self._failed = None
                    self._unsettled -= 1
        messages = []
        while self._messages:
            messages.append(self._messages.popleft())
        return messages

    def publish(self, picture: Picture) -> None:
        """Show a picture from within a call."""
        with self.lock:
            self.picture = picture
            self.n_pictures += 1

    @property
    def limit(self) -> int | None:
        return self._limit

    @limit.setter
    def limit(self, n_pictures: int | None) -> None:
        with self._changed:
            self._limit = n_pictures
            self._changed.notify()

    @property
    def activity_seconds(self) -> float:
        """How long the activity lasts by now."""
        return time.perf_counter() - self._began

    @property
    def is_busy(self) -> bool:
        """Whether calls wait or run, or `take_results` has something to take."""
        return bool(self._calls or self._results or self._messages)

    def stop(self) -> None:
        """End the thread after the calls that wait."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not (self._stopping or self._calls or self._answerable()):
                    self._changed.wait()
                if self._stopping and not self._calls:
                    return
                call = self._calls[0] if self._calls else None
                request = self._answerable()
            if call is not None:
                self._run_call(call)
            elif request is not None and self.session is not None:
                self._answer(self.session, request)

    def _answerable(self) -> Request | None:
        """The request to answer next, if any."""
        is_over = self._limit is not None and self.n_pictures >= self._limit
        rests = self.session is None or is_over or self._unsettled > 0 or self._request is self._failed
        return None if rests else self._request

    def _run_call(self, call: _Call) -> None:
        self.activity, self._began = call.what, time.perf_counter()
        try:
            result = call.function(self.session)
            if call.settled:
                with self._changed:
                    self._unsettled += 1
            self._results.append((call, result))
        except Exception as error:
            self._fail(error)
        self.activity = ""
        self._calls.popleft()

    def _answer(self, session: Session, request: Request) -> None:
        try:
            picture = session.frame(request)
        except Exception as error:
            self._failed = request
            self._fail(error)
            return
        self.activity = ""
        self.publish(picture)
        if picture.stats.get("idle"):
            with self._changed:
                if self._request is request and not self._calls:
                    self._changed.wait(IDLE_SECONDS)

    def _fail(self, error: Exception) -> None:
        """Tell the user; a traceback only of what is not a mistake in files or settings."""
        expected = isinstance(error, ValueError | OSError)
        if not expected:
            log.error("in the viewer", exc_info=error)
        text = str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
        self._messages.append(Message(text, is_error=True))

    def _report(self, line: str) -> None:
        self.activity, self._began = line, time.perf_counter()
