"""The command line: diffusers' flags with diffusers' defaults, configuration files, and what wins over what."""

import json

import pytest
import yaml

from dreambooth import arguments, script
from reslora_diffusion.diffusion.flags import KOHYA_NAMES
from reslora_diffusion.diffusion.options import build_parser, known_flags
from reslora_diffusion.diffusion.record import options
from reslora_diffusion.problems import BadInput

# examples/dreambooth/train_dreambooth_lora.py of diffusers 0.40; flags that are off by default have False.
DIFFUSERS = {
    "pretrained_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "tokenizer_name": None,
    "instance_data_dir": None,
    "class_data_dir": None,
    "instance_prompt": None,
    "class_prompt": None,
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 50,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_dir": "lora-dreambooth-model",
    "seed": None,
    "resolution": 512,
    "center_crop": False,
    "train_text_encoder": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 5e-4,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "dataloader_num_workers": 0,
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-08,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "prior_generation_precision": None,
    "local_rank": -1,
    "enable_xformers_memory_efficient_attention": False,
    "pre_compute_text_embeddings": False,
    "tokenizer_max_length": None,
    "text_encoder_use_attention_mask": None,
    "validation_images": None,
    "class_labels_conditioning": None,
    "rank": 4,
    "image_interpolation_mode": "lanczos",
    "lora_dropout": 0.0,
}


def test_flags_of_diffusers_are_here_with_their_defaults():
    ours = vars(build_parser().parse_args([]))
    assert {name: ours.get(name, "missing") for name in DIFFUSERS} == DIFFUSERS


def test_every_option_explains_itself():
    assert [action.dest for action in build_parser()._actions if not action.help] == []


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml"])
def test_a_configuration_file_sets_options_and_the_command_line_wins(tmp_path, suffix):
    chosen = {
        "rank": 16,
        "learning_rate": 2e-4,
        "train_text_encoder": True,
        "validation_prompt": ["a dog", "a cat"],
        "rank_pattern": {"attn1.to_q": 2},
    }
    toml = 'rank = 16\nlearning_rate = 2e-4\ntrain_text_encoder = true\nvalidation_prompt = ["a dog", "a cat"]\n'
    text = {
        ".yaml": yaml.safe_dump(chosen),
        ".json": json.dumps(chosen),
        ".toml": toml + '[rank_pattern]\n"attn1.to_q" = 2\n',
    }
    path = tmp_path / f"run{suffix}"
    path.write_text(text[suffix])
    args = script.parse_args(["--config", str(path), "--rank", "8", "--no-train_text_encoder"])
    assert (args.rank, args.learning_rate, args.train_text_encoder) == (8, 2e-4, False)
    assert args.validation_prompt == ["a dog", "a cat"]
    assert dict(args.rank_pattern) == {"attn1.to_q": 2}
    assert args.unknown == []


def test_the_resolved_options_are_a_configuration_that_gives_the_same_options(tmp_path):
    args = arguments(tmp_path, rank_pattern=["attn2=2"], optimizer_args=["amsgrad=True"], validation_prompt=["a", "b"])
    path = tmp_path / "run.json"
    path.write_text(json.dumps(options(args)))
    assert options(script.parse_args(["--config", str(path)])) == options(args)


def test_secrets_are_not_recorded(tmp_path):
    assert "hf_secret" not in json.dumps(options(arguments(tmp_path, hub_token="hf_secret")))


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("run.yaml", "rank: [1", "does not parse"),
        ("run.json", "[1]", "got list"),
        ("run.ini", "", "wanted a file named"),
        ("missing.yaml", None, "No such file"),
    ],
)
def test_a_bad_configuration_file_is_one_clear_error(tmp_path, name, text, wanted):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=wanted):
        script.parse_args(["--config", str(tmp_path / name)])


def test_unknown_keys_of_a_file_and_unknown_words_fail(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("rnak: 8\n")
    args = script.parse_args(["--config", str(path), "--shortcutt", "block"])
    with pytest.raises(BadInput) as error:
        script.main(args)
    assert "--rnak" in str(error.value)
    assert "wanted --rank?" in str(error.value)
    assert "wanted --shortcut?" in str(error.value)


def test_flags_of_kohyas_scripts_are_answered_with_ours(tmp_path):
    assert {word for ours in KOHYA_NAMES.values() for word in ours.split() if word.startswith("--")} <= {
        f"{flag}{comma}" for flag in known_flags() for comma in ("", ",")
    }
    assert not {f"--{name}" for name in KOHYA_NAMES} & set(known_flags())
    words = ["--network_dim", "8", "--min_snr_gamma=5", "stray", "--enable_bucket", "--unheard_of", "1"]
    with pytest.raises(BadInput) as error:
        script.main(script.parse_args(words))
    assert error.value.problems[1:6] == [
        "got '--network_dim', which is no option; wanted --rank?",
        "got '--min_snr_gamma=5', which is no option; wanted --snr_gamma?",
        "got 'stray', which is no option",
        "got '--enable_bucket', which is no option; wanted --aspect_ratio_buckets auto?",
        "got '--unheard_of', which is no option",
    ]


def test_a_word_of_a_wrong_type_is_bad_input():
    with pytest.raises(BadInput, match="--rank: invalid int value: 'many'"):
        script.parse_args(["--rank", "many"])
