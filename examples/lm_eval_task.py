"""lm-eval-harness on a quantized model: which of four lines goes on from a piece of Python, a task made of local text.

pip install lm-eval; python examples/lm_eval_task.py
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpass

MODEL = Path(__file__).parent / "tinypy"
QUESTIONS, CONTEXT = 40, 6


def questions(folder: Path) -> dict[str, object]:
    """A multiple-choice task: six lines of validation text, the seventh, and three from elsewhere."""
    lines = [line for line in (MODEL / "validation.txt").read_text().splitlines() if len(line.strip()) > 12]
    drawn = random.Random(0)
    rows = []
    for at in drawn.sample(range(len(lines) - CONTEXT), QUESTIONS):
        choices = [lines[at + CONTEXT], *drawn.sample(lines, 3)]
        drawn.shuffle(choices)
        right = choices.index(lines[at + CONTEXT])
        rows.append({"text": "\n".join(lines[at : at + CONTEXT]), "choices": choices, "answer": right})
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "next_line", "dataset_path": "json", "test_split": "train", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": str(folder / "task.jsonl")}, "doc_to_text": "{{text}}\n",
        "doc_to_choice": "choices", "doc_to_target": "answer", "target_delimiter": "",
    }  # fmt: skip


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        task = questions(Path(folder))
        for recipe in (None, "int4"):
            model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
            if recipe is not None:
                model = qpass.quantize(model, recipe, inner="eager")
            found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=[task], bootstrap_iters=0)
            print(f"{recipe or 'float'}: accuracy {found['results']['next_line']['acc,none']:.3f}")


if __name__ == "__main__":
    main()
