"""The proof, in a process of its own: `python -m finetune.merge.prove RUN FOLDER` writes parity.json and answers.json.

The adapter beside its base and the merged files, read from disk by stock transformers, get the same held-out prompts;
and every byte of the merged files is compared with the base's.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.base import load_base, read_config
from finetune.compose import read_recipe
from finetune.failures import explain
from finetune.foreign.rendering import rendered
from finetune.merge import how_of
from finetune.merge.changed import Changed, compare
from finetune.merge.plan import make_plan
from finetune.parity import FP32_LIMIT_GIB, Parity
from finetune.recipe import Recipe
from finetune.rundir import RunDir, open_run, read_json, write_json
from finetune.shards import check_shards
from finetune.stop import end_with_parent
from finetune.whole import load_trained

TOKENS = 128
"""Answer tokens of a prompt that are compared, at most."""

SECONDS = 10
"""Between two sentences about how far the proof is."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One held-out row as the proof uses it."""

    messages: list[dict[str, str]]
    """The conversation before the answer; empty where the row is no conversation."""
    text: str
    """The same as the chat template writes it."""
    ids: list[int]
    """The same as tokens."""
    row: list[int]
    """Prompt and expected answer as tokens."""
    places: list[int]
    """Where in `row` the answer's tokens are."""


@dataclass(slots=True)
class Side:
    """What one model says to every prompt."""

    logs: list[torch.Tensor]
    """Log-probabilities (answer tokens, vocabulary) of the expected answers, fp32."""
    answers: list[list[int]]
    """Greedy answers, with the token that ended them."""


def prove(run_dir: RunDir, folder: Path) -> None:
    """Writes the proof of what was merged into `folder`. Whether it is good enough, `parity.refuse` says."""
    from finetune.data import load_splits
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    base = base_folder(recipe)
    plan = make_plan(base, run_dir.trained, how_of(recipe))
    changed = compare(plan, folder)
    del plan
    heldout = load_splits(run_dir).heldout
    rows = heldout.select(range(min(recipe.export.parity_prompts, len(heldout))))
    parity, answers = compared(base, run_dir.trained, folder, rows, recipe, changed)
    write_json(folder / "answers.json", answers)
    write_json(folder / "parity.json", parity.as_dict())


def compared(
    base: Path, adapter: Path, merged: Path, rows: Any, recipe: Recipe, changed: Changed
) -> tuple[Parity, dict[str, Any]]:
    """(figures, content of answers.json) of the adapter beside its base against `merged` on held-out `rows`.

    With merge.base=dequantised the reference is the adapter beside the base in 4 bits, else beside the original one.
    """
    told = read_json(merged / "merge.json")
    size_gib = sum(path.stat().st_size for path in check_shards(base)) / 2**30
    precision = "fp32" if size_gib <= FP32_LIMIT_GIB else "bf16"
    from_4bit = recipe.merge.base == "dequantised"
    length = recipe.evaluate.max_new_tokens
    four_bit: Side | None = None
    prompts: list[Prompt] = []
    tuned_logs: list[list[float]] = []
    tick = _ticker(len(rows) * (4 if recipe.adapter.load_in_4bit else 3))
    if recipe.adapter.load_in_4bit:
        with _adapted(base, adapter, precision, recipe, tick) as (model, tokenizer, say):
            prompts = [prompt_of(row, tokenizer) for row in rows]
            four_bit = say(model, prompts, length if from_4bit else 0)
            tuned_logs = [_chosen(model, p.ids, ids) for p, ids in zip(prompts, four_bit.answers, strict=False)]
    with _adapted(base, adapter, precision, None, tick) as (model, tokenizer, say):
        prompts = prompts or [prompt_of(row, tokenizer) for row in rows]
        original = say(model, prompts, 0 if from_4bit else length)
        reference = four_bit if from_4bit and four_bit is not None else original
        with model.disable_adapter():
            bare = say(model, prompts, length)
            under_base = [_chosen(model, p.ids, ids) for p, ids in zip(prompts, reference.answers, strict=True)]
            bare_logs = [_chosen(model, p.ids, ids) for p, ids in zip(prompts, bare.answers, strict=True)]
        if not from_4bit:
            tuned_logs = [_chosen(model, p.ids, ids) for p, ids in zip(prompts, original.answers, strict=True)]
    loaded_by = "finetune" if told["quantised"] == "requantise" else "transformers"
    with _stock(merged, precision, loaded_by, tick) as (model, say):
        stored = say(model, prompts, length)
    kl = divergences(reference, stored)
    agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(reference.logs, stored.logs, strict=True)])
    parity = Parity(
        prompts=len(prompts),
        tokens=kl.numel(),
        precision=precision,
        reference="four_bit" if from_4bit else "original",
        mean_kl=kl.mean().item(),
        max_kl=kl.max().item(),
        top1_agreement=agree.float().mean().item(),
        effect_kl=divergences(reference, bare).mean().item(),
        base_kl=divergences(stored, bare).mean().item(),
        original_kl=divergences(original, stored).mean().item(),
        four_bit_kl=None if four_bit is None else divergences(four_bit, stored).mean().item(),
        same_answers=sum(a == b for a, b in zip(reference.answers, stored.answers, strict=True)),
        answers=len(prompts),
        tensors=changed.tensors,
        tensors_changed=changed.changed,
        tensors_zero=changed.zero,
        tensors_rounded_away=changed.rounded_away,
        strangers=changed.strangers,
        loaded_by=loaded_by,
        rounding=told["rounding_over_update"],
        quantised=told["quantised"],
    )

    def answer(ids: list[int], logs: list[float]) -> dict[str, Any]:
        return {"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True), "logprobs": logs}

    each = [
        {
            "messages": prompt.messages,
            "text": prompt.text,
            "ids": prompt.ids,
            "base": answer(bare.answers[i], bare_logs[i]),
            "tuned": answer(reference.answers[i], tuned_logs[i]),
            "tuned_under_base": under_base[i],
        }
        for i, prompt in enumerate(prompts)
    ]
    answers = {"schema": 1, "precision": precision, "reference": parity.reference, "max_new_tokens": length}
    return parity, answers | {"prompts": each}


def prompt_of(row: Any, tokenizer: Any) -> Prompt:
    """A held-out row as a prompt: the tokens before the first trained one, and the conversation that makes them."""
    tokens = list(row["input_ids"])
    ids = tokens[: row["prompt_length"]]
    places = [t for t, label in enumerate(row["labels"]) if label != -100 and t > 0][:TOKENS]
    messages = [dict(message) for message in row["messages"]]
    for end in range(1, len(messages)):
        text = rendered(tokenizer, messages[:end])
        if list(tokenizer(text, add_special_tokens=False).input_ids) == ids:
            return Prompt(messages[:end], text, ids, tokens[: places[-1] + 1], places)
    return Prompt([], tokenizer.decode(ids), ids, tokens[: places[-1] + 1], places)


def divergences(p: Side, q: Side) -> torch.Tensor:
    """KL(p || q) of every answer token, in nats."""
    return torch.cat([kl(a, b) for a, b in zip(p.logs, q.logs, strict=True)])


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per row of two (tokens, vocabulary) log-probabilities, in float64 against cancellation."""
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(-1)


Say = Callable[[Any, Sequence[Prompt], int], Side]
"""(model, prompts, longest answer in tokens or 0 for none) -> what it says."""


def _ticker(total: int) -> Callable[[], None]:
    """A function that is told of every prompt that was answered, and says now and then how many there are."""
    done, said = 0, time.monotonic()

    def tick() -> None:
        nonlocal done, said
        done += 1
        if time.monotonic() - said >= SECONDS:
            said = time.monotonic()
            print(f"proof: {done} of {total} answers, of adapter, base and merged files", file=sys.stderr, flush=True)

    return tick


@contextmanager
def _adapted(
    base: Path, adapter: Path, precision: str, recipe: Recipe | None, tick: Callable[[], None]
) -> Iterator[tuple[Any, Any, Say]]:
    """(model, tokenizer, how to ask it) of the adapter beside its base: the original, or with a recipe in 4 bits."""
    double = recipe is not None and recipe.adapter.double_quantisation
    loaded = load_base(base, load_in_4bit=recipe is not None, precision=precision, double_quantisation=double)
    model = load_trained(loaded, adapter).eval()
    say = _asker(_stops(model, loaded.tokenizer), loaded.tokenizer, tick, use_cache=not loaded.family.routing_table)
    try:
        with loaded.arithmetic(), torch.inference_mode():
            yield model, loaded.tokenizer, say
    finally:
        del model, loaded
        gc.collect()


@contextmanager
def _stock(folder: Path, precision: str, loaded_by: str, tick: Callable[[], None]) -> Iterator[tuple[Any, Say]]:
    """(model, how to ask it) of a merged folder as anyone would load it: nothing of ours where transformers can."""
    import transformers

    family, _ = read_config(folder)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if loaded_by == "finetune":
        model = load_base(folder, load_in_4bit=False, precision=precision).model
    else:
        kind = getattr(transformers, family.auto_class)
        model = kind.from_pretrained(folder, dtype=dtype, local_files_only=True)
        model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    say = _asker(_stops(model, tokenizer), tokenizer, tick, use_cache=not family.routing_table)
    mixed = family.mixed_dtypes and precision == "bf16"
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
        yield model, say


def _asker(stops: list[int], tokenizer: Any, tick: Callable[[], None], *, use_cache: bool) -> Say:
    from transformers import GenerationConfig

    def say(model: Any, prompts: Sequence[Prompt], longest: int) -> Side:
        logs, answers = [], []
        for prompt in prompts:
            logs.append(_log_probs(model, prompt.row, prompt.places))
            if not longest:
                tick()
                continue
            ids = torch.tensor([prompt.ids], device=model.device)
            settings = GenerationConfig(
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,  # a published one would be taken: greedy is the likeliest token alone
                no_repeat_ngram_size=0,
                max_new_tokens=longest,
                eos_token_id=stops,
                pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                use_cache=use_cache,
            )
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
            )
            answers.append(out[0, ids.shape[1] :].tolist())
            tick()
        return Side(logs, answers)

    return say


def _stops(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the folder's settings for generation and the tokenizer's own."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})


def _log_probs(model: Any, row: list[int], places: list[int]) -> torch.Tensor:
    """fp32 log-probabilities (places, vocabulary) of the tokens at some places of a row."""
    ids = torch.tensor([row], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, [place - 1 for place in places]]
    return torch.log_softmax(logits.float(), -1).cpu()


def _chosen(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probability of every token of an answer."""
    if not answer:
        return []
    row = [*prompt, *answer]
    logs = _log_probs(model, row, list(range(len(prompt), len(row))))
    return [float(value) for value in logs.gather(1, torch.tensor(answer)[:, None])[:, 0]]


def main(words: list[str]) -> int:
    """The exit code of `python -m finetune.merge.prove RUN FOLDER`."""
    end_with_parent()
    run_dir = None
    try:
        run_dir = open_run(words[0])
        prove(run_dir, Path(words[1]))
    except BaseException as error:
        return explain(error, run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
