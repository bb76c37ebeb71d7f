"""A hub whose every request ends in this process: what programs upload to it, and how it refuses them."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import huggingface_hub
import pytest

from reslora_diffusion.utils.hub import unreachable


class Hub:
    """Answers as the hub does to a client that makes a repository and commits to it."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.files = status, {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if request.method == "HEAD":  # is it there?
            return httpx.Response(200, request=request)
        assert request.headers["authorization"] == "Bearer hf_secret"
        if self.status != 200:
            return httpx.Response(self.status, json={"error": "not yours"}, request=request)
        if path.endswith("/repos/create"):
            return httpx.Response(200, json={"url": "https://huggingface.co/nobody/sks", "id": "nobody/sks"})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(request.content)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return httpx.Response(200, json={"files": modes})
        if "/commit/" in path:
            for line in map(json.loads, request.content.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = "https://huggingface.co/nobody/sks/commit/1"
            return httpx.Response(200, json={"commitUrl": address, "commitOid": "1", "pullRequestUrl": None})
        return httpx.Response(200, json={"errors": [], "warnings": [], "id": "nobody/sks"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Hub], Hub]]:
    unreachable.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def put(hub: Hub) -> Hub:
        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(hub)))
        return hub

    yield put
    huggingface_hub.set_client_factory(httpx.Client)
    unreachable.cache_clear()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every `time.sleep` of this thread, which returns at once: the same on a machine of any load."""
    asked: list[float] = []
    sleep, own = time.sleep, threading.get_ident()
    monkeypatch.setattr(time, "sleep", lambda s: asked.append(s) if threading.get_ident() == own else sleep(s))
    return asked
