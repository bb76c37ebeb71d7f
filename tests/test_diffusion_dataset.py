"""`--dataset_name`, and the other options of diffusers' sibling scripts."""

import json
import shutil

import pytest
from pyarrow import parquet
from safetensors.torch import load_file

from dreambooth import PROMPT, SUBJECTS, arguments, train
from reslora_diffusion.diffusion.options import parse
from reslora_diffusion.diffusion.options.checks import check
from reslora_diffusion.diffusion.train.optimizers import parameter_groups, settings
from reslora_diffusion.utils.problems import BadInput
from tiny import saved, tiny_pipeline_3, tiny_pipeline_folder

datasets = pytest.importorskip("datasets")
IMAGES = sorted((SUBJECTS / "octopus").glob("*.png"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder that `datasets` reads, of five captioned images."""
    folder = tmp_path_factory.mktemp("dataset") / "octopus"
    folder.mkdir()
    rows = []
    for number, path in enumerate(IMAGES):
        shutil.copy(path, folder)
        rows.append({"file_name": path.name, "title": f"octopus number {number}", "stars": number})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def of_dataset(tmp_path, dataset, **options):
    given = {"instance_data_dir": None, "dataset_name": dataset, "cache_dir": tmp_path / "cache"}
    return arguments(tmp_path / "run", **(given | options))


def test_the_images_and_captions_of_a_dataset_are_those_of_a_folder(tmp_path, dataset):
    (concept,) = check(of_dataset(tmp_path, dataset, caption_column="title")).concepts
    assert [image.path.read_bytes() for image in concept.instance.images] == [p.read_bytes() for p in IMAGES]
    assert [image.caption for image in concept.instance.images] == [f"octopus number {n}" for n in range(5)]
    made = concept.instance.folder.stat().st_mtime_ns
    (again,) = check(of_dataset(tmp_path, dataset, caption_column="title")).concepts
    assert again.instance.folder.stat().st_mtime_ns == made
    (plain,) = check(of_dataset(tmp_path, dataset)).concepts
    assert plain.instance.folder != concept.instance.folder
    assert len(plain.instance.uncaptioned) == 5
    assert [path.name for path in concept.instance.folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_run_on_a_dataset_is_the_run_on_its_folder(tmp_path, dataset):
    own, other = tmp_path / "own", tmp_path / "other"
    train(own, instance_data_dir=None, dataset_name=dataset, cache_dir=tmp_path / "cache", instance_prompt=PROMPT)
    train(other, instance_data_dir=SUBJECTS / "octopus")
    name = "pytorch_lora_weights.safetensors"
    assert (own / name).read_bytes() == (other / name).read_bytes()


def test_every_problem_is_named(tmp_path, dataset):
    with pytest.raises(BadInput) as problem:
        check(of_dataset(tmp_path, dataset, image_column="stars", caption_column="words", rank=0))
    said = str(problem.value)
    assert "--image_column: 'stars' holds no images; wanted image" in said
    assert "--caption_column" in said
    assert "no column 'words'; it has image, title, stars" in said
    assert "--rank" in said
    with pytest.raises(BadInput, match="--caption_column: 'stars' holds Value.*wanted text"):
        check(of_dataset(tmp_path, dataset, caption_column="stars"))
    with pytest.raises(BadInput, match="missing.*cannot be loaded"):
        check(of_dataset(tmp_path, tmp_path / "missing"))
    with pytest.raises(BadInput, match="both say what to train on"):
        check(of_dataset(tmp_path, dataset, instance_data_dir=SUBJECTS / "octopus"))
    with pytest.raises(BadInput, match="--caption_column is used only with --dataset_name"):
        check(arguments(tmp_path / "run", caption_column="title"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match="unreadable images: 00000"):
        check(of_dataset(tmp_path, broken))


def test_rows_without_an_image_are_named(tmp_path):
    first, second = ({"bytes": path.read_bytes(), "path": None} for path in IMAGES[:2])
    rows = {"image": [first, None], "other": [second] * 2}
    images = datasets.Features({"image": datasets.Image(), "other": datasets.Image()})
    folder = tmp_path / "rows"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=images).to_parquet(folder / "train.parquet")
    with pytest.raises(BadInput, match="--image_column: rows without an image in 'image': 1"):
        check(of_dataset(tmp_path, folder))
    (concept,) = check(of_dataset(tmp_path, folder, image_column="other")).concepts
    assert [image.path.read_bytes() for image in concept.instance.images] == [IMAGES[1].read_bytes()] * 2


def test_images_are_in_the_column_image_wherever_it_stands(tmp_path):
    """diffusers' scripts choose it by name; a column of masks or conditions may come first."""
    features = datasets.Features({"condition": datasets.Image(), "image": datasets.Image()})
    folder = tmp_path / "rows"
    folder.mkdir()
    first, second = ({"bytes": path.read_bytes(), "path": None} for path in IMAGES[:2])
    rows = {"condition": [first], "image": [second]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    (concept,) = check(of_dataset(tmp_path, folder)).concepts
    assert [image.path.read_bytes() for image in concept.instance.images] == [IMAGES[1].read_bytes()]


def test_options_of_the_sibling_scripts():
    args = parse(
        ["--lora_layers", "attn.to_k, attn.to_q", "--upcast_before_saving", "--prodigy_decouple=False"]
        + ["--prodigy_safeguard_warmup", "--no-prodigy_use_bias_correction", "--output_kohya_format", "--cache_latents"]
    )
    assert not args.problems
    assert args.target_modules == ["attn.to_k", "attn.to_q"]
    assert args.save_precision == "fp32"
    prodigy = args.prodigy_decouple, args.prodigy_safeguard_warmup, args.prodigy_use_bias_correction
    assert prodigy == (False, True, False)
    assert parse([]).target_modules is None
    assert parse([]).save_precision == "fp16"

    class Prodigy:
        def __init__(self, params, lr=1.0, beta3=None, decouple=True, use_bias_correction=False):
            pass

    assert settings(Prodigy, args) == {"beta3": None, "decouple": False, "use_bias_correction": False}


def test_adapters_in_some_blocks_alone(tmp_path):
    pipeline = saved(tiny_pipeline_3)
    own = {"pretrained_model_name_or_path": pipeline, "max_train_steps": 1}
    train(tmp_path / "run", lora_blocks="1", lora_layers="attn.to_k,attn.to_q", **own)
    names = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors").keys()
    assert {name.split(".lora")[0] for name in names} == {
        f"transformer.transformer_blocks.1.attn.{part}" for part in ("to_k", "to_q")
    }
    kept = parse(["--config", str(tmp_path / "run" / "run.json")])
    assert (kept.lora_blocks, kept.target_modules) == ([1], ["attn.to_k", "attn.to_q"])
    with pytest.raises(BadInput, match="--lora_blocks: got 99, wanted blocks from 0 to"):
        check(arguments(tmp_path / "other", lora_blocks="0,99", **own))
    with pytest.raises(BadInput, match="--lora_blocks: got 'one', wanted a whole number"):
        check(arguments(tmp_path / "other", lora_blocks="one", **own))


def test_weight_decay_of_the_text_encoder():
    import torch

    args = parse(["--adam_weight_decay_text_encoder", "0.5", "--train_text_encoder"])
    parameters = {"a.lora_A.weight": torch.nn.Parameter(torch.zeros(2, 2))}
    unet, text = parameter_groups({"unet": parameters, "text_encoder": parameters}, args, 1)
    assert "weight_decay" not in unet
    assert text["weight_decay"] == 0.5


def test_what_is_not_supported_says_why(tmp_path):
    args = parse(
        ["--pretrained_model_name_or_path", str(tiny_pipeline_folder()), "--output_dir", str(tmp_path / "run")]
        + ["--instance_data_dir", str(SUBJECTS / "octopus"), "--instance_prompt", PROMPT, "--resolution", "64"]
        + ["--validation_images", "x", "--do_edm_style_training", "--lora_blocks", "12,30"]
    )
    with pytest.raises(BadInput) as problem:
        check(args)
    assert [line.split()[1] for line in str(problem.value).splitlines()[1:]] == [
        "--validation_images",
        "--do_edm_style_training",
        "--lora_blocks",
    ]


@pytest.mark.parametrize("kind", ["a file of the machine", "a link", "an address", "a folder above"])
def test_rows_name_no_files_outside_their_dataset(tmp_path, kind):
    """A row of a parquet file may hold a path instead of an image."""
    folder, outside = tmp_path / "octopus", tmp_path / "private.png"
    folder.mkdir()
    shutil.copy(IMAGES[0], outside)
    if kind == "a link":
        (folder / "link.png").symlink_to(outside)
    path = {
        "a file of the machine": str(outside),
        "a link": str(folder / "link.png"),
        "an address": "https://example.org/a.png",
        "a folder above": str(folder / ".." / "private.png"),
    }[kind]
    rows = datasets.Dataset.from_dict({"image": [{"bytes": IMAGES[1].read_bytes(), "path": None}, {"path": path}]})
    table = rows.cast_column("image", datasets.Image()).data.table  # its own writer would fetch the address
    parquet.write_table(table, folder / "train.parquet")
    with pytest.raises(BadInput, match="may name files of its own folder alone") as raised:
        check(of_dataset(tmp_path, folder))
    assert f"{path!r} in row 1" in str(raised.value)
    assert not list((tmp_path / "cache").rglob("*.png"))
    parquet.write_table(table.slice(0, 1), folder / "train.parquet")
    check(of_dataset(tmp_path, folder))
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 1, "the images of a dataset that is taken are there"
