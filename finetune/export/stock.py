"""Greedy answers of an exported folder by stock transformers, and PEFT: `stock_answers(...)`, or as a process.

`python -m finetune.export.stock FOLDER ANSWERS OUT [ADAPTER]` answers the prompts in the file ANSWERS and writes a list
of answers to OUT. Nothing of ours touches the model.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.asking import TOP, Answer
from finetune.stop import end_with_parent


def stock_answers(folder: Path, answers: dict[str, Any], adapter: Path | None = None) -> list[Answer]:
    """What the model in `folder`, with the PEFT adapter in `adapter` if there is one, answers to the same prompts."""
    import torch
    import transformers

    from finetune.families import family_of

    family = family_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    fp32 = answers["precision"] == "fp32"
    kind = getattr(transformers, family.auto_class)
    model = kind.from_pretrained(folder, dtype=torch.float32 if fp32 else torch.bfloat16, local_files_only=True)
    if adapter is not None:
        from peft import PeftModel

        with warnings.catch_warnings():  # about ranks per map and tied ends: the answers are compared, which says more
            for kind in (UserWarning, RuntimeWarning):
                warnings.simplefilter("ignore", kind)
            model = PeftModel.from_pretrained(model, str(adapter))
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    told = []
    with (
        torch.inference_mode(),
        torch.autocast(model.device.type, torch.bfloat16, enabled=family.mixed_dtypes and not fp32),
    ):
        for prompt in answers["prompts"]:
            ids = torch.tensor([prompt["ids"]], device=model.device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=answers["max_new_tokens"],
                do_sample=False,
                repetition_penalty=1.0,
                use_cache=not family.routing_table,
                output_logits=True,
                return_dict_in_generate=True,
            )
            chosen = out.sequences[0, ids.shape[1] :].tolist()
            logs = [torch.log_softmax(step[0].float(), -1) for step in out.logits]
            likeliest = [log.topk(TOP) for log in logs]
            told.append(
                Answer(
                    text=tokenizer.decode(chosen, skip_special_tokens=True),
                    tokens=[tokenizer.decode([token]) for token in chosen],
                    logprobs=[log[token].item() for log, token in zip(logs, chosen, strict=True)],
                    top=[
                        {tokenizer.decode([i]): v for v, i in zip(t.values.tolist(), t.indices.tolist(), strict=True)}
                        for t in likeliest
                    ],
                )
            )
    return told


def main(words: list[str]) -> int:
    """Answers the prompts of a file into another one."""
    folder, answers, out, *adapter = map(Path, words)
    told = stock_answers(folder, json.loads(answers.read_text(encoding="utf-8")), adapter[0] if adapter else None)
    out.write_text(json.dumps([asdict(answer) for answer in told]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1:]))
