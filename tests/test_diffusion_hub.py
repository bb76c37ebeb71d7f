"""`--push_to_hub`, with the hub itself replaced: every request that the client makes ends here."""

import base64
import json

import httpx
import huggingface_hub
import pytest

from dreambooth import train
from reslora_diffusion.problems import BadInput


class Hub:
    """Answers as the hub does to a client that makes a repository and commits to it."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.files = status, {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
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
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def put(hub: Hub) -> Hub:
        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(hub)))
        return hub

    yield put
    huggingface_hub.set_client_factory(httpx.Client)


def test_what_is_uploaded_is_what_was_exported(tmp_path, hub, capsys):
    there = hub(Hub())
    options = {"push_to_hub": True, "hub_model_id": "nobody/sks", "hub_token": "hf_secret"}
    folder = train(tmp_path / "sks", checkpointing_steps=2, report_to="tensorboard", **options)
    assert "pushed to https://huggingface.co/nobody/sks/commit/1" in capsys.readouterr().out
    local = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    kept_back = {name for name in local if name.startswith(("checkpoint-", "logs/"))}
    assert kept_back
    assert there.files.keys() == local.keys() - kept_back
    assert 'pipe.load_lora_weights("nobody/sks", ' in there.files["README.md"].decode()
    assert {"README.md", "pytorch_lora_weights.safetensors", "kohya/sks.safetensors"} <= there.files.keys()
    assert all(content == local[name].read_bytes() for name, content in there.files.items())
    assert not any(b"hf_secret" in content for content in there.files.values())


def test_a_repository_that_cannot_be_written_to_is_said_before_training(tmp_path, hub):
    hub(Hub(403))
    with pytest.raises(BadInput, match="--push_to_hub: nobody/sks cannot be written to: .*403"):
        train(tmp_path / "sks", push_to_hub=True, hub_model_id="nobody/sks", hub_token="hf_secret")
    assert not (tmp_path / "sks").exists()
