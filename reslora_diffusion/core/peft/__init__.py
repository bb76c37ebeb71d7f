"""All of PEFT that is not its public interface, in one folder; written for the versions of `VERSIONS`.

    PEFT_TYPE_TO_{CONFIG,TUNER,PREFIX}_MAPPING   where a method is looked up by the name in `adapter_config.json`
    LoraModel.inject_adapter                     what `get_peft_model` and every `add_adapter` come to
    LoraModel._get_adapter_state_dict, _remap_adapter_state_dict_for_load   what is saved of an adapter
    LoraLayer.lora_variant, LoraVariant          what a LoRA layer calls instead of `lora_B(lora_A(x))`
    LoraLayer._cast_input_dtype                  casts x to the adapter's precision, at full width

A process without this package does not know the type RESLORA and says so, rather than load the adapter as plain LoRA.
"""

import peft  # noqa: F401  (registers `.model`, which must not be half imported by then)

VERSIONS = ("0.21",)  # of PEFT, that the tests have run with
