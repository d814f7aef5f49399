"""What is the loss on held-out problems of GSM8K, and what do the completions consist of?

    python bench/gsm8k_analysis.py --model DIR --held-out held_out.jsonl --adapter DIR [DIR ...]
    python bench/gsm8k_analysis.py --completions eval_results/base-gsm8k_test.jsonl [FILE ...]

The first serves to choose targets and rate without the test set: nats per target token of the base
and of each adapter. The second takes seconds and prints, of completions that eval_gsm8k.py wrote:
    marker     share whose last line has "The answer is" or "####"
    steps      arithmetic steps "a op b = c" a completion, with as many operands as are written
    right      share of the steps with the right c, rounded to the decimals that are written; 95%
               interval by resampling problems, because the steps of one are not independent
    loops      share in which 20 or more characters come three times in a row
"""
import json
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from lora import load_adapter
from train_math import (Parser, count_targets, encode, load_model, loading, pick_device,
                        pick_dtype, read_rows, run_script, validation_loss)

NUMBER = r"\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
# Only whole steps: in "(2 + 3) * 4 = 20", "3) * 4 = 20" is none.
STEP = re.compile(rf"(?<![\w.,)%*/+-])(?<![)%*/+-] )({NUMBER}(?: ?[-+*/x] ?{NUMBER})+) ?= ?"
                  rf"(-?{NUMBER})(?![\d%])")
MARKER = re.compile(r"(?:the answer is|####)[^\n]*$", re.IGNORECASE)
LOOP = re.compile(r"(.{20,200}?)\1\1", re.DOTALL)


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--completions", nargs="+", default=[], type=Path, help="files of eval_gsm8k.py")
    add("--model", help="folder of the model")
    add("--held-out", help="problems not trained on")
    add("--adapter", nargs="+", default=[], help="folders of adapters")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the model (default: auto)")
    args = parser.parse_args()
    losses = bool(args.held_out)
    if bool(args.model) != losses or (args.adapter or not args.completions) and not losses:
        parser.error("give --completions, or --held-out and --model")
    return args


def exact(expression):
    """Return the value of numbers joined by + - * x /, or None for a division by zero."""
    plain = expression.replace("$", "").replace(",", "").replace("x", "*")
    fractions = re.sub(r"[\d.]+", lambda number: f"Fraction('{number[0]}')", plain)
    try:
        return eval(fractions, {"Fraction": Fraction})  # STEP lets nothing else in
    except ZeroDivisionError:
        return None


def judge_steps(completion):
    """Return True or False for each arithmetic step of a completion."""
    judged = []
    for left, right in STEP.findall(completion):
        value, written = exact(left), exact(right)
        decimals = len(right.partition(".")[2])
        tolerance = Fraction(1, 2 * 10**decimals) if decimals else 0
        judged.append(value is not None and abs(value - written) <= tolerance)
    return judged


def resample(problems, draws=2000):
    """Return the 95% interval of the share of right steps, problems drawn with replacement."""
    rng, shares = random.Random(0), []
    for _ in range(draws):
        drawn = rng.choices(problems, k=len(problems))
        shares.append(sum(map(sum, drawn)) / max(1, sum(map(len, drawn))))
    shares.sort()
    return shares[draws // 40], shares[-draws // 40 - 1]


def describe_completions(path):
    records = map(json.loads, path.read_text(encoding="utf8").splitlines())
    texts = [record["completion"].split("Question:")[0].strip() for record in records]
    problems = [judge_steps(text) for text in texts]
    n, count = len(texts), sum(map(len, problems))
    marker = sum(bool(MARKER.search(text)) for text in texts) / n
    loops = sum(bool(LOOP.search(text)) for text in texts) / n
    low, high = resample(problems)
    print(f"{path.stem}: n {n}, marker {marker:.1%}, steps {count / n:.2f}, right "
          f"{sum(map(sum, problems)) / max(1, count):.1%} [{low:.1%}, {high:.1%}] of {count}, "
          f"loops {loops:.1%}", flush=True)


def describe_losses(args):
    device = pick_device("auto")
    dtype, _ = pick_dtype(args.dtype, device)
    model, tokenizer = load_model(args.model, dtype, device)
    examples = encode(read_rows(args.held_out, "train"), tokenizer, 512)
    targets = count_targets(examples)
    for adapter in [None, *args.adapter]:
        if adapter:
            load_adapter(model, adapter)
        loss = validation_loss(model, examples, 8)
        print(f"{adapter or 'base'}: {loss:.4f} nats a target token, "
              f"{len(examples)} problems, {targets:,} targets", flush=True)


def main(args):
    for path in args.completions:
        with loading("--completions", path):
            describe_completions(path)
    if args.held_out:
        describe_losses(args)


if __name__ == "__main__":
    run_script("gsm8k_analysis.py", main, parse_args)
