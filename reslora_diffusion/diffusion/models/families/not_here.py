"""Options that do not apply to a family, and why: what several families say of themselves."""

OF_CLIP_ALONE = {
    "max_token_length": "lengthens the prompts of models that read CLIP alone; see --max_sequence_length",
    "weighted_captions": "weights words of models that read CLIP alone, as in kohya's scripts",
}
OF_ONE_CLIP = {"skip_clip_layers": "leaves out layers of the one CLIP of Stable Diffusion 1.x and 2.x"}
OF_FLOWS = dict.fromkeys(
    "weighting_scheme logit_mean logit_std mode_scale precondition_outputs timestep_sampling sigmoid_scale "
    "discrete_flow_shift".split(),
    "belongs to flow matching",
)
NEEDS_T5 = {"skip_t5": "cannot do without T5, whose states are all that it reads of a prompt"}
OF_DIFFUSION = dict.fromkeys(
    "prediction_type rescale_betas_zero_snr snr_gamma debiased_estimation_loss scale_v_pred_loss_like_noise_pred "
    "v_pred_like_loss".split(),
    "belongs to diffusion; this family is trained by flow matching, see --weighting_scheme",
) | dict.fromkeys(("conv_rank", "conv_alpha"), "is for the convolutions of a UNet, and this family has a transformer")
