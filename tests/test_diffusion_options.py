"""The command line: diffusers' flags with diffusers' defaults, configuration files, and what wins over what."""

import json
import re
from dataclasses import fields

import pytest
import yaml

from dreambooth import arguments, script
from other_trainers import DATASETS, DIFFUSERS, KOHYA, NETWORKS
from reslora_diffusion.diffusion.models.families import FAMILIES
from reslora_diffusion.diffusion.objective.noise import FlowMatching
from reslora_diffusion.diffusion.options import DreamBoothOptions, known_flags, parse, stored_options
from reslora_diffusion.diffusion.options.answers import (
    DEFAULT_HERE,
    INSTEAD,
    NOT_HERE,
    NOT_SUPPORTED,
    answer,
    renamed,
    unanswered,
)
from reslora_diffusion.diffusion.options.checks import bad_combinations
from reslora_diffusion.diffusion.options.model_checks import adapter_settings
from reslora_diffusion.diffusion.options.peers.kohya_dataset import ANSWERED, WITHOUT
from reslora_diffusion.diffusion.options.peers.kohya_layers import NOT_TRANSLATED, TRANSLATED
from reslora_diffusion.utils.options import facts_of
from reslora_diffusion.utils.problems import BadInput

# What `DreamBoothOptions` leaves open (None) and the family, or the code that trains it, decides.
OPEN = {
    "max_sequence_length": lambda family, options: family.t5_length(options),
    "guidance_scale": lambda family, options: family.training_guidance({"guidance_embeds": True}, options),
    "image_column": lambda family, options: options.image_column or "image",
    **{
        name: lambda family, options, name=name: {**FLOW, **family.flow}[name]
        for name in ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs")
    },
}
COPIED = {("QwenImagePipeline", "output_dir")}  # from the script for HiDream
FLOW = {item.name: item.default for item in fields(FlowMatching)}


def resolved(family: str, *words: str) -> DreamBoothOptions:
    """Options as they are for models of a family."""
    options = parse(words)
    options.take_defaults(FAMILIES[family])
    return options


@pytest.mark.parametrize("family", DIFFUSERS)
def test_flags_of_diffusers_are_here_with_the_defaults_of_the_script_for_the_family(family):
    wanted, words = dict(DIFFUSERS[family]), []
    if "train_text_encoder" in wanted:
        wanted, words = wanted | {"train_text_encoder": True}, ["--train_text_encoder"]
    else:  # their scripts read none of these
        unread = ["text_encoder_lr", "adam_weight_decay_text_encoder"]
        unread += [] if FAMILIES[family].is_guided else ["guidance_scale"]
        wanted = {name: value for name, value in wanted.items() if name not in unread}
    options, found = resolved(family, *words), {}
    for name in wanted:
        if name in NOT_SUPPORTED or name in INSTEAD or (family, name) in COPIED:
            found[name] = wanted[name]
        elif name in OPEN:
            found[name] = OPEN[name](FAMILIES[family], options)
        else:
            found[name] = getattr(options, {"lora_layers": "target_modules"}.get(name, name))
    assert found | {"optimizer": None} == wanted | {"optimizer": None}
    assert options.optimizer == wanted.get("optimizer", "AdamW").lower()
    assert not options.problems


def test_what_diffusers_scripts_have_without_a_flag_is_the_same_too():
    """Those without a flag for it resize bilinearly, and have the rank as alpha."""
    for family in DIFFUSERS:
        options = resolved(family, "--rank", "16")
        assert options.image_interpolation_mode == DIFFUSERS[family].get("image_interpolation_mode", "bilinear")
        assert adapter_settings(options)["lora_alpha"] == DIFFUSERS[family].get("lora_alpha", 16)


def test_what_is_given_wins_over_the_defaults_of_a_family():
    words = ["--learning_rate", "5e-4", "--resolution", "512", "--lora_alpha", "8", "--text_encoder_lr", "1e-5"]
    for family in DIFFUSERS:
        options = resolved(family, "--train_text_encoder", *words)
        given = (options.learning_rate, options.resolution, options.lora_alpha, options.text_encoder_lr)
        assert given == (5e-4, 512, 8, 1e-5)


def test_prodigy_has_one_learning_rate_as_in_diffusers_scripts():
    options = resolved("FluxPipeline", "--train_text_encoder", "--optimizer", "Prodigy", "--learning_rate", "1.0")
    assert (options.text_encoder_lr, options.adam_weight_decay_text_encoder) == (None, 1e-3)
    options = resolved("FluxPipeline", "--optimizer=prodigy", "--loraplus_lr_ratio=16", "--train_text_encoder")
    assert [p for p in bad_combinations(options) if "prodigy has one learning rate" in p and "loraplus" in p]


@pytest.mark.parametrize("family", DIFFUSERS)
def test_guidance_scale_means_what_it_means_in_the_scripts_that_have_it(family):
    options = resolved(family, "--guidance_scale=1")
    trained = FAMILIES[family].training_guidance({"guidance_embeds": True}, options)
    generated = FAMILIES[family].validation_guidance(options)
    assert (trained, generated) == ((1.0, 3.5) if FAMILIES[family].is_guided else (None, 1.0))
    assert "guidance_scale" not in options.recorded()


def test_clip_skip_is_never_guessed():
    """2 leaves out one layer in kohya's scripts, and two in diffusers' pipelines."""
    (problem,) = parse(["--clip_skip", "2"]).problems
    assert "--skip_clip_layers 1 is diffusers' clip_skip=1 and kohya's --clip_skip 2" in problem


def test_the_newer_scripts_of_diffusers_have_their_flag_for_buckets():
    assert parse(["--use_aspect_ratio_buckets"]).aspect_ratio_buckets == "auto"
    assert parse(["--use_aspect_ratio_buckets", "--aspect_ratio_buckets=64,64"]).aspect_ratio_buckets == "64,64"


def test_every_option_of_kohyas_is_answered():
    assert len(KOHYA) == len(set(KOHYA)) == 234
    assert unanswered(KOHYA) == []
    here = set(facts_of(DreamBoothOptions))
    answered = [*renamed(), *DEFAULT_HERE, *NOT_HERE]
    assert len(answered) == len(set(answered))
    assert not here & set(answered)
    assert set(answered) <= set(KOHYA), "an answer to an option that kohya's scripts do not have"
    named = {word.rstrip(":;,.)`") for name in answered for word in answer(name).split() if word.startswith("--")}
    ours = named - {f"--{name}" for name in KOHYA}
    assert ours <= {*known_flags(), "--base"}, "an answer names an option that is not here"
    assert sorted(DATASETS) == sorted([*ANSWERED, *WITHOUT])
    assert set(NETWORKS) <= {*TRANSLATED, *NOT_TRANSLATED}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--network-dim", "--network_dim of kohya's scripts is --rank here"),
        ("--cache_text_encoder_outputs", "is not needed: prompts are encoded once unless --train_text_encoder"),
        ("--blocks_to_swap", "is not here: no part of the model moves to the CPU"),
        ("--caption_dropout", "of diffusers' scripts is --caption_dropout_rate, which drops"),
        ("--offload", "of diffusers' scripts is not needed: text encoders and autoencoder are freed"),
        ("--sdpa", "is not needed: attention is PyTorch's scaled_dot_product_attention"),
        ("--network_alpha", "is --lora_alpha here, whose default is 1 in kohya's scripts and --rank here"),
        ("--rnak", "unknown option --rnak (did you mean --rank?)"),
        ("--unheard_of", "unknown option --unheard_of"),
    ],
)
def test_an_option_that_is_not_here_is_answered_on_the_command_line_and_in_a_file(tmp_path, word, said):
    path = tmp_path / "run.yaml"
    path.write_text(f"{word[2:]}: 0.5\n")
    for words in ([word, "0.5"], [f"{word}=0.5"], ["--config", str(path)]):
        (problem,) = parse(words).problems
        assert said in problem


def test_every_option_explains_itself():
    assert [name for name, facts in facts_of(DreamBoothOptions).items() if not facts.help] == []


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
    assert not args.problems


def test_the_resolved_options_are_a_configuration_that_gives_the_same_options(tmp_path):
    args = arguments(tmp_path, rank_pattern=["attn2=2"], optimizer_args=["amsgrad=True"], validation_prompt=["a", "b"])
    path = tmp_path / "run.json"
    path.write_text(json.dumps(args.recorded()))
    assert script.parse_args(["--config", str(path)]).recorded() == args.recorded()


def test_secrets_are_not_recorded(tmp_path):
    assert "hf_secret" not in json.dumps(arguments(tmp_path, hub_token="hf_secret").recorded())


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


def test_all_problems_of_a_command_line_come_in_one_message(tmp_path):
    """Nothing stops at the first one: missing, unknown and stray words, wrong kinds, choices and bounds, folders."""
    words = ["--rank", "many", "--lora_dropout", "1.5", "--shortcut", "sideways", "--num_previous", "some"]
    words += ["--network_dim", "8", "--min_snr_gamma=5", "stray", "--rnak", "1", "--seed", "--center_crop=perhaps"]
    words += ["--learning_rate", "1e-4", "2e-4", "--lr_pattern", "attn", "--instance_data_dir", str(tmp_path / "none")]
    with pytest.raises(BadInput) as error:
        script.main(script.parse_args(words))
    assert error.value.problems == [
        "--pretrained_model_name_or_path is required",
        "--network_dim of kohya's scripts is --rank here",
        "--min_snr_gamma of kohya's scripts is --snr_gamma here",
        "got 'stray', which belongs to no option",
        "unknown option --rnak (did you mean --rank?)",
        "got '2e-4', which belongs to no option",
        "--rank: got 'many', wanted a whole number",
        "--num_previous: got 'some', wanted a whole number or all",
        "--seed: got nothing, wanted a whole number",
        "--center_crop: got 'perhaps', wanted true or false",
        "--lr_pattern: got 'attn', wanted name=a number",
        "--shortcut: got 'sideways', wanted none, input, block, middle",
        "--lora_dropout: got 1.5, wanted 0 or more and below 1",
        f"{tmp_path / 'none'} is missing; wanted images",
    ]


def test_a_file_is_read_by_the_same_rules_as_a_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "rank: many\nlearning_rate: 1e-4\nmixed_precision: no\nseed: [1, 2]\ncenter_crop: 3\nvariant: 1.0\n"
    )
    options = parse(["--config", str(path), "--resolution", "big"])
    assert (options.learning_rate, options.mixed_precision, options.variant) == (1e-4, "no", "1.0")
    assert options.problems == [
        "--rank: got 'many', wanted a whole number",
        "--seed: got '1 2', wanted a whole number",
        "--center_crop: got '3', wanted true or false",
        "--resolution: got 'big', wanted a whole number",
    ]


def test_names_are_read_with_hyphens_too():
    """transformers' parser reads them so; `--no_flag` is `--no-flag`."""
    read = parse(["--learning-rate", "0.5", "--train-text-encoder", "--no_center_crop", "--validation-prompt=a-b c"])
    assert (read.learning_rate, read.train_text_encoder, read.center_crop) == (0.5, True, False)
    assert read.validation_prompt == ["a-b c"]
    assert not read.problems


def test_help_names_every_option_and_the_defaults_of_families(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(re.search(rf"--{name}[ ,]", said) for name in facts_of(DreamBoothOptions))
    assert "cropped to. (default: 512, SDXL 1024)" in said


def test_records_of_earlier_versions_are_read_with_their_meaning(tmp_path):
    """`guidance_scale` was that of images for every model, `clip_skip` diffusers', and the default shortcut `input`."""
    old = {"rank": 4, "guidance_scale": 3.5, "training_guidance_scale": 1.0, "clip_skip": 1, "use_dora": None}
    old |= {
        "method": "reslora",
        "shortcut": None,
        "lora_blocks": "12,30",
        "rank_pattern": {"attn2": 2},
        "output_kohya_format": False,
        "frugal_layers": True,
    }
    (tmp_path / "run.json").write_text(json.dumps({"command": [], "options": old}))
    for read in (parse(["--config", str(tmp_path / "run.json")]), stored_options(old)):
        read.take_defaults(FAMILIES["FluxPipeline"])
        assert (read.training_guidance_scale, read.validation_guidance_scale, read.shortcut) == (1.0, 3.5, "input")
        assert (read.skip_clip_layers, read.lora_blocks, read.rank_pattern) == (1, [12, 30], {"attn2": 2})
        assert read.low_memory_layers is True
        assert not read.problems


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", "rank: 4\nseed: 1\nrank: 8\n"), ("a.json", '{"rank": 4, "rank": 8}'), ("a.toml", "rank = 4\nrank = 8")],
)
def test_an_option_that_a_file_has_twice_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match="twice|overwrite"):
        parse(["--config", str(tmp_path / name)])
