"""`--push_to_hub`, with the hub itself replaced: every request that the client makes ends here."""

import pytest

from dreambooth import train
from hub import Hub
from reslora_diffusion.utils.problems import BadInput


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
