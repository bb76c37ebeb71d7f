#!/usr/bin/env python
"""Answer the questions of a JSON lines file by a base model and a LoRA folder, with transformers and PEFT alone.

    python train_scripts/answer_with_peft.py --model_name_or_path assets/tiny-llm --adapter demo/llm/reslora \\
        --questions questions.jsonl --output answers.jsonl

A line of questions holds "messages", up to the user's turn; a line of answers holds "response". This program imports
nothing of reslora_diffusion: what it says is what everybody who loads the folder will get.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import cast

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", required=True)
parser.add_argument("--adapter", required=True, help="folder with adapter_config.json; or none, for the base alone")
parser.add_argument("--questions", type=Path, required=True)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--max_new_tokens", type=int, default=40)
parser.add_argument("--batch_size", type=int, default=100)


def main() -> None:
    args = parser.parse_args()
    import torch  # after the options, so that `--help` answers at once
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path).eval()
    if args.adapter != "none":
        model = PeftModel.from_pretrained(model, args.adapter).eval()
    with args.questions.open(encoding="utf-8") as lines:  # not str.splitlines, which divides at U+2028 too
        questions = [json.loads(line)["messages"] for line in lines if line.strip()]
    responses = []
    for start in range(0, len(questions), args.batch_size):
        encoded = tokenizer.apply_chat_template(
            questions[start : start + args.batch_size],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        inputs = cast(BatchEncoding, encoded)  # as `return_dict` asks
        out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        responses += [text.strip() for text in texts]
    args.output.write_text(
        "".join(f"{json.dumps({'response': response})}\n" for response in responses), encoding="utf-8"
    )
    assert not any(name.startswith("reslora") for name in sys.modules)


if __name__ == "__main__":
    main()
