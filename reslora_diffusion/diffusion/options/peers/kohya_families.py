"""An option of kohya's means what the script for the family of models makes of it.

The family is known once the model's files are read, so that what is here waits in `Translation.of_families`. Sources:
`get_noisy_model_input_and_timesteps` of library/sd3_train_utils.py, flux_train_utils.py and lumina_train_util.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..model import CHROMA, FLUX, LUMINA_2, SD3
from .translation import OfFamily, Translation, is_off

FLOW_SHIFTS = {FLUX: 3.0, LUMINA_2: 6.0}  # defaults of discrete_flow_shift
DRAWN_BY_WEIGHTING = ("logit_normal", "mode")
# The values of `timestep_sampling` that use an option.
USED_BY = {"discrete_flow_shift": ("sigma", "shift"), "sigmoid_scale": ("sigmoid", "shift", "flux_shift")}
LATER = {  # options here by those of kohya's that mean something for one family alone
    "training_shift": "--discrete_flow_shift",
    "gemma2_max_token_length": "--max_sequence_length",
    "model_prediction_type": "--precondition_outputs",
}
OF_FLOWS = (*USED_BY, *LATER, "weighting_scheme")
NO_SHAPE = "its program draws plain noise for this family"
OFFSETS = dict.fromkeys(
    "noise_offset noise_offset_random_strength adaptive_noise_scale multires_noise_iterations "
    "multires_noise_discount".split(),
    NO_SHAPE,
)
NO_SPAN = "its program trains all noise levels of this family"
OF_SD3 = OFFSETS | {
    "ip_noise_gamma": NO_SHAPE,
    "ip_noise_gamma_random_strength": NO_SHAPE,
    "timestep_sampling": "its program draws noise levels of this family by weighting_scheme",
    "sigmoid_scale": "its program draws noise levels of this family by weighting_scheme",
}
OF_FLUX = OFFSETS | {"min_timestep": NO_SPAN, "max_timestep": NO_SPAN}
OF_CHROMA = OF_FLUX | {"guidance_scale": "Chroma takes no guidance as an input"}
NO_TARGET = (
    "got {}, which compares a prediction of the image with a velocity; the loss compares velocities here, as with "
    "model_prediction_type raw"
)


def noise_levels(given: Mapping[str, Any], out: Translation) -> None:
    """Translate options of noise levels before the family is known; those that `timestep_sampling` does not use would
    be refused, and are not needed."""
    sampling = said(given, "timestep_sampling", "sigma")
    for name in OF_FLOWS:
        value = given.get(name)
        if is_off(value):
            continue
        if name == "weighting_scheme":
            drawn = sampling == "sigma" or value not in DRAWN_BY_WEIGHTING
            out.take(name, weighting_scheme=weighting(given) if drawn else "none")
        elif name in USED_BY and sampling in USED_BY[name]:
            out.take(name, **{name: value})
        elif name in USED_BY:
            out.not_needed.append(name)
        elif name == "model_prediction_type" and value == "raw":
            out.take(name, precondition_outputs=0)
        else:
            out.names[name] = LATER[name]


def of_families(given: Mapping[str, Any]) -> dict[str, OfFamily]:
    """Return what a configuration means for SD3, FLUX.1, Chroma and Lumina 2, where they differ from Stable Diffusion.

    Args:
        given: options under kohya's names, defaults left out.
    """
    families = {SD3: sd3(given), FLUX: flux(given, FLUX), LUMINA_2: flux(given, LUMINA_2)}
    return families | {CHROMA: replace(families[FLUX], ignored=OF_CHROMA)}


def said(given: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if is_off(given.get(name)) else given[name]


def sd3(given: Mapping[str, Any]) -> OfFamily:
    """sigma is u itself, and is 1 - u in diffusers' script: the mean of a logit-normal u changes its sign."""
    values: dict[str, Any] = {
        "weighting_scheme": weighting(given),
        "discrete_flow_shift": said(given, "training_shift", 1.0),
        "precondition_outputs": 1,
        "max_sequence_length": said(given, "t5xxl_max_token_length", 256),
    }
    if mean := given.get("logit_mean"):
        values["logit_mean"] = -float(mean)
    different = joined_projections(given)
    if values["discrete_flow_shift"] != 1 and not all(is_off(given.get(f"{end}_timestep")) for end in ("min", "max")):
        different["training_shift"] = "it moves noise levels between min_timestep and max_timestep; here before them"
    return OfFamily(values, OF_SD3, different)


def flux(given: Mapping[str, Any], kind: str) -> OfFamily:
    """Only the sampling `sigma` draws by a weighting scheme; none weights a loss that compares velocities."""
    sampling = said(given, "timestep_sampling", "sigma" if kind == FLUX else "shift")
    scheme, values, different = weighting(given), dict[str, Any](), joined_projections(given)
    drawn = sampling == "sigma" and scheme in DRAWN_BY_WEIGHTING
    values |= {"weighting_scheme": scheme if drawn else "none", "precondition_outputs": 0}
    if sampling in USED_BY["discrete_flow_shift"]:
        values["discrete_flow_shift"] = said(given, "discrete_flow_shift", FLOW_SHIFTS[kind])
    if kind == LUMINA_2:
        values["timestep_sampling"] = "flux_shift" if sampling == "nextdit_shift" else sampling
        values["max_sequence_length"] = said(given, "gemma2_max_token_length", 256)
        if is_off(given.get("system_prompt")):
            different["system_prompt"] = "prompts have none there; here that of diffusers' pipeline stands before each"
        if sampling in USED_BY["sigmoid_scale"] and (scale := said(given, "sigmoid_scale", None)):
            values["sigmoid_scale"] = scale
        if sampling == "nextdit_shift":
            different["timestep_sampling"] = "it shifts levels that are uniform; flux_shift those that are logit-normal"
        elif sampling == "sigma":
            values |= from_noise(values["discrete_flow_shift"], given.get("logit_mean"))
    target = said(given, "model_prediction_type", "sigma_scaled" if kind == FLUX else "raw")
    if target != "raw":
        different["model_prediction_type"] = NO_TARGET.format(target)
    return OfFamily(values, OF_FLUX, different)


def from_noise(shift: float, mean: Any = None) -> dict[str, Any]:
    """Settings of the sampling `sigma` by which Lumina 2 has the noise levels of a schedule of the share of the noise:
    here the schedule has the share of the data, so that the shift is its inverse, and a mean changes its sign."""
    return {"discrete_flow_shift": 1 / float(shift)} | ({"logit_mean": -float(mean)} if mean else {})


def joined_projections(given: Mapping[str, Any]) -> dict[str, str]:
    """One layer computes q, k and v in the original models, three do in diffusers'."""
    split = "split_qkv=true" in str(given.get("network_args")).lower()
    return {} if split else {"network_args, split_qkv": "q, k and v have an adapter each, as with split_qkv=True"}


def weighting(given: Mapping[str, Any]) -> str:
    """Their uniform is none here."""
    scheme = said(given, "weighting_scheme", "uniform")
    return "none" if scheme == "uniform" else scheme
