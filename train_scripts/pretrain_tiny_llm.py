"""Train the tiny language model from nothing: the recipe behind the weights in `assets/tiny-llm/`.

    python train_scripts/pretrain_tiny_llm.py --work_dir runs/tiny-llm --output_dir assets/tiny-llm

Four stages, each resumable and each skipped when its result is there; `--until STAGE` stops after one:

    tokenizer   a byte-level byte-pair vocabulary of 2048 tokens, digits one by one, with a chat template
    train       LlamaForCausalLM, 8 layers of width 192, grouped-query attention, tied embeddings: next-token loss
    task        the held-out word problems in SVAMP's columns: 700 train, 150 validation, 500 test
    evaluate    exact match of generated answers on problems like those of pretraining and on the held-out test set

It reads what any machine has: generated arithmetic word problems (`word_problems.py`) and the documentation strings of
Python's standard library. The held-out task shares no sentence with either.

A smoke run of everything on a CPU, in half a minute:

    python train_scripts/pretrain_tiny_llm.py --work_dir /tmp/tiny --output_dir /tmp/tiny-llm --steps 20 --problems 32
"""

import argparse
import ast
import json
import platform
import random
import re
import sys
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from reslora_diffusion.diffusion.train.training_state import load_training_state, save_training_state
from reslora_diffusion.llm.encoding import encode_prompt
from reslora_diffusion.llm.generation import Question
from reslora_diffusion.llm.generation import evaluate as evaluate_generations
from reslora_diffusion.llm.tasks import TASKS, read_number
from word_problems import SPLITS, bare_sum, held_out_split, pretraining_problem

STAGES = ("tokenizer", "train", "task", "evaluate")
SPECIAL = ("<pad>", "<s>", "</s>")
SEQUENCE_LENGTH = 128
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Answer:{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}Question: {{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/tiny-llm"), help="checkpoints")
    parser.add_argument("--output_dir", type=Path, default=Path("assets/tiny-llm"), help="the finished model")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument("--steps", type=int, default=2100, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32, help=f"sequences of {SEQUENCE_LENGTH} tokens")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--problems", type=int, default=500, help="problems per evaluation")
    parser.add_argument("--checkpointing_minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------- text


def documentation_strings() -> list[str]:
    """Every documentation string of the standard library of the running Python, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # lib2to3 keeps files that are not Python 3
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[ast.get_docstring(node) or ""] = None
    return [text for text in found if len(text) > 40]


def document(tokenizer: PreTrainedTokenizerFast, texts: list[str], rng: random.Random) -> str:
    """One document with its special tokens: six in ten are word problems, a quarter sums, the rest documentation."""
    kind = rng.random()
    if kind < 0.15:
        return f"{tokenizer.bos_token}{rng.choice(texts)[:1000]}{tokenizer.eos_token}"
    question, answer = pretraining_problem(rng) if kind < 0.75 else bare_sum(rng)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def sequence(tokenizer: PreTrainedTokenizerFast, texts: list[str], rng: random.Random) -> list[int]:
    """Documents one after another, [SEQUENCE_LENGTH] tokens; the first one from its beginning."""
    ids: list[int] = []
    while len(ids) < SEQUENCE_LENGTH:
        ids += tokenizer(document(tokenizer, texts, rng), add_special_tokens=False).input_ids
    return ids[:SEQUENCE_LENGTH]


# ---------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(folder: Path, seed: int) -> None:
    """Byte-level pairs, so that nothing is unknown; digits one by one, so that arithmetic is about digits."""
    rng = random.Random(f"tokenizer {seed}")
    problems = [rng.choice((pretraining_problem, bare_sum))(rng) for _ in range(20_000)]
    corpus = [f"Question: {question}\nAnswer: {answer}" for question, answer in problems] + documentation_strings()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- the loop


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """AdamW, warm-up, cosine decay, bf16 autocast. Every batch is a function of (seed, step), so that a resumed run
    goes on exactly where it was. Ends with fp16 weights in `folder`."""
    torch.manual_seed(args.seed)
    model = make_model(tokenizer).to(args.device).train()
    texts = documentation_strings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, args.steps // 10), args.steps)
    state, done, smooth, seconds = args.work_dir / "train-state", 0, None, 0.0
    if state.exists():
        tensors, facts = load_training_state(state, model=model, optimizer=optimizer)
        model.load_state_dict(tensors, strict=False)  # the output layer is the embedding and is stored once
        model.tie_weights()
        schedule.load_state_dict(facts["schedule"])
        done, smooth, seconds = facts["step"], facts["loss"], facts["processor_seconds"]
    started, saved_at = time.process_time() - seconds, time.monotonic()
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, desc="tiny-llm", mininterval=5)
    for index in bar:
        rng = random.Random(f"train {args.seed} {index}")
        batch = torch.tensor([sequence(tokenizer, texts, rng) for _ in range(args.batch_size)], device=args.device)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if index + 1 == args.steps or time.monotonic() - saved_at > 60 * args.checkpointing_minutes:
            facts = {
                "step": index + 1,
                "loss": smooth,
                "schedule": schedule.state_dict(),
                "processor_seconds": time.process_time() - started,
            }
            tensors = {name: p for name, p in model.named_parameters()}
            save_training_state(state, tensors, model=model, optimizer=optimizer, facts=facts)
            saved_at = time.monotonic()
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers loads in the dtype its configuration names: half the disk, but trained and run in fp32.
    config = folder / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}, indent=2) + "\n",
        encoding="utf-8",
    )


# ---------------------------------------------------------------------------------------------- task and figures


def write_task(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(problem) for problem in held_out_split(split, seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pretraining_questions(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[Question]:
    """Problems told as in pretraining, with numbers and words drawn anew."""
    rng = random.Random(f"evaluate {args.seed}")
    problems = [pretraining_problem(rng) for _ in range(args.problems)]
    talks = [([{"role": "user", "content": question}], answer) for question, answer in problems]
    return [Question(encode_prompt(talk, tokenizer), str(read_number(answer))) for talk, answer in talks]


def held_out_questions(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[Question]:
    task = TASKS["svamp"]
    rows = held_out_split("test", args.seed)[: args.problems]
    return [Question(encode_prompt(task.messages(row)[:1], tokenizer), task.answer(row)) for row in rows]


def evaluate(args: argparse.Namespace) -> dict:
    """Exact match of greedy answers, before any fine-tuning."""
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    model = AutoModelForCausalLM.from_pretrained(args.output_dir).to(args.device)
    _, facts = load_training_state(args.work_dir / "train-state")
    figures = {}
    for name, questions in (
        ("like_pretraining", pretraining_questions(tokenizer, args)),
        ("held_out_test", held_out_questions(tokenizer, args)),
    ):
        found = evaluate_generations(model, tokenizer, questions, read_number, max_new_tokens=40, batch_size=100)
        figures[name] = {"exact_match": found.exact_match, "of": len(questions), "text": str(found)}
    return {
        "exact_match": figures,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": facts["step"],
        "training_loss": facts["loss"],
        "processor_seconds": facts["processor_seconds"],
        "machine": machine(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def machine() -> str:
    """Return the processor's name, and the number of threads that were used."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def readme(args: argparse.Namespace, figures: dict) -> str:
    size = (args.output_dir / "model.safetensors").stat().st_size / 1e6
    known, new = (figures["exact_match"][name]["text"] for name in ("like_pretraining", "held_out_test"))
    command = f"python train_scripts/pretrain_tiny_llm.py --steps {args.steps} --batch_size {args.batch_size}"
    millions, rows = figures["parameters"] / 1e6, list(SPLITS.values())
    batch = f"{args.batch_size} sequences of {SEQUENCE_LENGTH} tokens"
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    return f"""# tiny-llm

A language model small enough to be fine-tuned on two CPU cores in a minute: Llama's architecture, 8 layers of width
192, grouped-query attention (6 heads, 2 for keys and values), tied embeddings, {millions:.2f} million parameters
({size:.1f} MB in fp16), and a byte-pair vocabulary of 2048 tokens of its own. It was trained from nothing, on text that
any machine has: generated arithmetic word problems, bare sums, and the documentation strings of Python's standard
library.

    {command}

| | |
|---|---|
| steps | {figures["steps"]} of {batch}, learning rate {args.learning_rate}, seed {args.seed} |
| processor time | {figures["processor_seconds"] / 60:.0f} minutes; {figures["machine"]} |
| training loss at the end | {figures["training_loss"]:.3f} nats per token |
| exact match on problems told as in pretraining | {known} |
| exact match on the held-out task below, untrained | {new} |
| versions | {versions} |

`word_problems/` is a fine-tuning task of which pretraining saw no sentence, in SVAMP's columns: {rows[0]} problems
to train on, {rows[1]} to choose a step by, {rows[2]} to report on. Each story is asked in several ways
and holds a number that is not needed. `make demo-llm` fine-tunes on it with LoRA and ResLoRA.

It knows nothing but small sums, and is licensed as this repository is.
"""


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stages = STAGES[: STAGES.index(args.until) + 1]
    tokenizer_folder = args.work_dir / "tokenizer"
    if not tokenizer_folder.exists():
        train_tokenizer(tokenizer_folder, args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    if "train" in stages and not (args.output_dir / "model.safetensors").exists():
        train(args, tokenizer, args.output_dir)
    if "task" in stages:
        write_task(args.output_dir / "word_problems", args.seed)
    if "evaluate" in stages:
        figures = evaluate(args)
        (args.output_dir / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        (args.output_dir / "README.md").write_text(readme(args, figures), encoding="utf-8")
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
