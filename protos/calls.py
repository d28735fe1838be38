"""What a call of the clients is, apart from sending it.

A call is described once, by a method of a class that both clients inherit (`GenerationCalls`,
`SessionCalls`, `BatchCalls`): it returns what is to be asked and how the answer is read, an `Ask`,
a `Stream` or `Pages`. The decorator gives it the type that users see. So of

    @asks
    def list_models(self) -> Ask[list[generation_pb2.Model]]: ...

`Client.list_models()` returns a list, and `AsyncClient.list_models()` a coroutine with a list. How
something is sent is said once for threads (`protos.client`) and once for an event loop
(`protos.async_client`); when and to which router, in `protos.retry`.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from protos.routers import RouterConnection

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def _as_is(answer: Any) -> Any:
    return answer


@dataclass(frozen=True, slots=True)
class Ask(Generic[T]):
    """One request with one answer."""

    method: Callable[[RouterConnection], Any]
    """Picks what takes the request."""
    request: Any
    read: Callable[[Any], T] = _as_is
    """Returns what the caller gets of the answer."""


@dataclass(frozen=True, slots=True)
class Pages(Generic[T]):
    """A list that is asked for page by page."""

    method: Callable[[RouterConnection], Any]
    request: Any
    """Of the next page."""
    read: Callable[[Any], Iterable[T]]
    """Returns what is on a page."""

    def page(self) -> Ask[Any]:
        """Return what to ask next."""
        return Ask(self.method, self.request)

    def turn(self, page: Any) -> bool:
        """Go on behind a page that has come; return whether there is another."""
        self.request.page_token = page.next_page_token
        return bool(page.next_page_token)


class Stream(ABC, Generic[T]):
    """A request with a stream of answers, over all the streams that it takes."""

    timeout_s: float | None = None
    """Deadline; None: the client's for generations."""
    is_endless: bool = False
    """The deadline is of each stream; when it has passed, the next one follows."""
    can_resume: bool = True
    """Whether a stream that breaks can go on where it broke."""

    @abstractmethod
    def method(self, router: RouterConnection) -> Any:
        """Return what takes the request."""

    @abstractmethod
    def next_request(self) -> Any:
        """Return the request of the next stream, which asks for what has not come yet."""

    @abstractmethod
    def take(self, message: Any) -> Iterable[T]:
        """Return what the caller gets of a message: nothing, where it says nothing new."""


class Blocking(ABC):
    """What makes the calls of `Client`."""

    @abstractmethod
    def _ask(self, ask: Ask[T]) -> T:
        """Ask until a router answers."""

    @abstractmethod
    def _stream(self, stream: Stream[T]) -> Iterator[T]:
        """Yield what a stream says, on whichever routers it takes."""

    @abstractmethod
    def _pages(self, pages: Pages[T]) -> Iterator[T]:
        """Yield what is on all pages."""


class Awaiting(ABC):
    """What makes the calls of `AsyncClient`; see `Blocking`."""

    @abstractmethod
    async def _ask(self, ask: Ask[T]) -> T: ...

    @abstractmethod
    def _stream(self, stream: Stream[T]) -> AsyncIterator[T]: ...

    @abstractmethod
    def _pages(self, pages: Pages[T]) -> AsyncIterator[T]: ...


class AskMethod(Protocol[P, T_co]):
    """A method that returns one thing, or a coroutine with it."""

    @overload
    def __get__(self, client: Blocking, owner: type[Any]) -> Callable[P, T_co]: ...

    @overload
    def __get__(
        self, client: Awaiting, owner: type[Any]
    ) -> Callable[P, Coroutine[Any, Any, T_co]]: ...


class YieldMethod(Protocol[P, T_co]):
    """A method that returns an iterator, or an asynchronous one."""

    @overload
    def __get__(self, client: Blocking, owner: type[Any]) -> Callable[P, Iterator[T_co]]: ...

    @overload
    def __get__(self, client: Awaiting, owner: type[Any]) -> Callable[P, AsyncIterator[T_co]]: ...


def asks(describe: Callable[Concatenate[Any, P], Ask[T]]) -> AskMethod[P, T]:
    """Make the methods of both clients of what describes an `Ask`."""
    return cast(AskMethod[P, T], _method(describe, lambda client: client._ask))


def streams(describe: Callable[Concatenate[Any, P], Stream[T]]) -> YieldMethod[P, T]:
    """Make the methods of both clients of what describes a `Stream`."""
    return cast(YieldMethod[P, T], _method(describe, lambda client: client._stream))


def lists(describe: Callable[Concatenate[Any, P], Pages[T]]) -> YieldMethod[P, T]:
    """Make the methods of both clients of what describes `Pages`."""
    return cast(YieldMethod[P, T], _method(describe, lambda client: client._pages))


def _method(describe: Callable[..., Any], sender: Callable[[Any], Callable[[Any], Any]]) -> Any:
    """Return a method that describes a call and has the client send it."""

    @functools.wraps(describe)
    def method(client: Blocking | Awaiting, *args: Any, **kwargs: Any) -> Any:
        return sender(client)(describe(client, *args, **kwargs))

    shown = inspect.signature(describe).replace(return_annotation=inspect.Signature.empty)
    method.__signature__ = shown  # type: ignore[attr-defined]
    return method
