"""Responses that are kept for a while, so that the next request may go on from one by its id.

They are held in memory only, as JSON: bounded in number and in bytes, and the one used longest ago goes first. Whoever
has another API key does not find them.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

from gossamer.errors import ResponseNotFoundError
from gossamer.protocol.encoding import encode_json
from gossamer.protocol.responses import Json

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 2**20


class ResponseStore:
    """The responses of one server. Safe to use from several threads.

    Args:
        max_bytes: of JSON that are held; 0 holds nothing.
        max_responses: how many are held.
        tag: part of the ids of what is kept here; tells it from what another server keeps.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_responses: int = MAX_RESPONSES, tag: str = "") -> None:
        self.max_bytes, self.max_responses, self.tag = max_bytes, max_responses, tag
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._items: dict[tuple[str, str], str] = {}  # ids of items, and the responses that they are part of
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Bytes in use."""
        return self._bytes

    def of(self, owner: str) -> OwnedResponses:
        """The responses of one owner."""
        return OwnedResponses(self, owner)

    def put(self, owner: str, response: Json, items: list[Json]) -> None:
        """Keep a response, and all items that came before it. One that does not fit at all is not kept."""
        entry = encode_json({"response": response, "items": items})
        if len(entry) > self.max_bytes:
            return
        with self._lock:
            key = owner, response["id"]
            self._kept[key] = entry
            self._bytes += len(entry)
            self._items |= {(owner, item["id"]): response["id"] for item in response["output"]}
            while self._bytes > self.max_bytes or len(self._kept) > self.max_responses:
                self._drop(next(iter(self._kept)))

    def get(self, owner: str, id: str) -> Json:
        """A response, and the items before it: ``{"response": ..., "items": [...]}``.

        Raises:
            ResponseNotFoundError: there is none of this id, or no more.
        """
        with self._lock:
            key = owner, id
            if key not in self._kept:
                raise ResponseNotFoundError(
                    f"there is no response {id[:80]!r} here: it was not stored, is another key's, or was dropped for "
                    "newer ones; send all items of the conversation as input",
                    param="previous_response_id",
                )
            self._kept.move_to_end(key)
            entry = self._kept[key]
        found: Json = json.loads(entry)
        return found

    def response_with(self, owner: str, item: str) -> str:
        """The id of the response that an item of an answer is part of; the item's own if there is none."""
        with self._lock:
            return self._items.get((owner, item), item)

    def delete(self, owner: str, id: str) -> None:
        """Forget a response.

        Raises:
            ResponseNotFoundError: as in :meth:`get`.
        """
        self.get(owner, id)
        with self._lock:
            if (owner, id) in self._kept:
                self._drop((owner, id))

    def _drop(self, key: tuple[str, str]) -> None:
        entry = self._kept.pop(key)
        self._bytes -= len(entry)
        for item in json.loads(entry)["response"]["output"]:
            self._items.pop((key[0], item["id"]), None)


class OwnedResponses:
    """The responses that one owner finds in a store."""

    def __init__(self, store: ResponseStore, owner: str) -> None:
        self._store, self._owner = store, owner

    @property
    def tag(self) -> str:
        """See :class:`ResponseStore`."""
        return self._store.tag

    def keep(self, response: Json, items: list[Json]) -> None:
        """See :meth:`ResponseStore.put`."""
        self._store.put(self._owner, response, items)

    def response(self, id: str) -> Json:
        """A response.

        Raises:
            ResponseNotFoundError: it is not there.
        """
        found: Json = self._store.get(self._owner, id)["response"]
        return found

    def input(self, id: str) -> list[Json]:
        """The items before a response.

        Raises:
            ResponseNotFoundError: it is not there.
        """
        items: list[Json] = self._store.get(self._owner, id)["items"]
        return items

    def delete(self, id: str) -> None:
        """Forget a response.

        Raises:
            ResponseNotFoundError: it is not there.
        """
        self._store.delete(self._owner, id)

    def conversation(self, id: str) -> list[Json]:
        """All items up to the end of a response.

        Raises:
            ResponseNotFoundError: it is not there.
        """
        found = self._store.get(self._owner, id)
        items: list[Any] = [*found["items"], *found["response"]["output"]]
        return items

    def item(self, id: str) -> Json:
        """An item of an answer.

        Raises:
            ResponseNotFoundError: it is not there.
        """
        found = self._store.get(self._owner, self._store.response_with(self._owner, id))
        output: list[Json] = found["response"]["output"]
        return next(item for item in output if item["id"] == id)
