"""What a model says about held-out rows: the loss of their answers, which choice it prefers, and what it writes.

One forward pass per batch serves the loss and the choice. Rows are padded on the right: in a causal model nothing to
the right of a token reaches it, so that padding needs no position ids and no family can get it wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.errors import DataError, NumbersError
from finetune.foreign.rendering import rendered

NOT_TRAINED = -100
"""Label of a token that is not part of the answer."""

Row = Mapping[str, Any]
"""A prepared row: the columns of `finetune.data.load_splits`."""


@dataclass(frozen=True, slots=True)
class RowScore:
    """What one model makes of one row."""

    logprobs: np.ndarray
    """Log-probability of every answer token, in nats; float32, one per trained token."""
    choice: str | None
    """The choice the model prefers; None when the row has no choices."""
    tied: bool
    """Two choices had the same best score; the one that the row lists first was taken."""

    @property
    def loss(self) -> float:
        """Mean loss per answer token of this row, in nats."""
        return float(-self.logprobs.mean(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class _Text:
    """Tokens of which some are to be predicted."""

    tokens: Sequence[int]
    positions: Sequence[int]
    """Places in `tokens` whose tokens are predicted; each at least 1."""


def score_rows(
    model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int, advance: Callable[[], None] = lambda: None
) -> list[RowScore]:
    """One score per row, in the order of `rows`. `advance` is called once per row.

    A choice is read at the place before the answer's first token, by comparing the choices' first tokens; where two
    choices begin alike, the full log-likelihood of every choice is compared instead (summed, not divided by length).
    Raises NumbersError EVAL-001 when a loss is not finite, DataError EVAL-003 when a row cannot be scored.
    """
    texts = [_answer_of(row) for row in rows]
    options = [continuations(tokenizer, row) if row["choices"] else {} for row in rows]
    scores: list[RowScore | None] = [None] * len(rows)
    alike: list[int] = []
    for index, logits in answer_logits(model, texts, batch_size):
        text, choices = texts[index], options[index]
        targets = torch.tensor([text.tokens[p] for p in text.positions], device=logits.device)
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise NumbersError(
                "EVAL-001",
                f"the loss of held-out row {rows[index]['row']} is not finite",
                "the model's logits hold NaN or infinity there",
                "train.precision=fp32, or a lower train.lr",
            )
        choice, tied = None, False
        if choices:
            first = [tokens[0] for tokens in choices.values()]
            if len(set(first)) == len(first):
                place = list(text.positions).index(_answer_start(rows[index]))
                choice, tied = _best(list(choices), logits[place, first].tolist())
            else:
                alike.append(index)
        scores[index] = RowScore(logprobs, choice, tied)
        advance()
    for index, (choice, tied) in _by_likelihood(model, rows, options, alike, batch_size).items():
        score = scores[index]
        assert score is not None
        scores[index] = RowScore(score.logprobs, choice, tied)
    return [score for score in scores if score is not None]


@torch.inference_mode()
def answer_logits(model: Any, texts: Sequence[_Text], batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(index, float32 logits of shape (positions, vocabulary)) per text: what the model predicts at its positions.

    Longest first, so that memory runs out at once or never. The head is applied only where a prediction is asked for.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
    narrow = "logits_to_keep" in inspect.signature(_core(model).forward).parameters
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        width = len(texts[batch[0]].tokens)
        tokens = torch.zeros((len(batch), width), dtype=torch.long)  # the value of padding is never looked at
        mask = torch.zeros_like(tokens)
        for line, index in enumerate(batch):
            length = len(texts[index].tokens)
            tokens[line, :length] = torch.tensor(texts[index].tokens)
            mask[line, :length] = 1
        columns = sorted({p - 1 for index in batch for p in texts[index].positions})
        keep = torch.tensor(columns, device=model.device)
        asked = {"logits_to_keep": keep} if narrow else {}
        with fp32_head(model):
            out = model(
                input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False, **asked
            ).logits
        if not narrow:
            out = out[:, keep]
        column = {c: i for i, c in enumerate(columns)}
        for line, index in enumerate(batch):
            yield index, out[line, [column[p - 1] for p in texts[index].positions]].float()


@contextmanager
def fp32_head(model: Any) -> Iterator[None]:
    """While it lasts, the head of a bf16 model multiplies in fp32.

    A bf16 logit of 20 has steps of 0.125: 29 of 240 choices between three answers came out as ties on a real run.
    """

    def multiply(head: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        with torch.autocast(output.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return torch.nn.functional.linear(inputs[0].float(), head.weight.float(), bias)

    handle = model.get_output_embeddings().register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


def continuations(tokenizer: Any, row: Row) -> dict[str, list[int]]:
    """Choice -> the tokens that would stand in the answer's place, with whatever ends the turn.

    The choice's own tokens are used when the row's trained answer shows that they appear unchanged after the prompt;
    otherwise the row is rendered with every choice. Raises DataError EVAL-003 when neither gives the trained answer.
    """
    tokens, answer = list(row["input_ids"]), row["answer"]
    choices = list(dict.fromkeys(row["choices"]))
    start, end = _answer_start(row), _answer_of(row).positions[-1] + 1
    own = tokens[start:end]
    if answer not in choices:
        what = f"row {row['row']}: the answer {answer!r} is not one of its choices"
        raise DataError("EVAL-003", what, f"{choices}", "the row with its answer among its choices, or without choices")
    bare = {c: list(tokenizer(c, add_special_tokens=False).input_ids) for c in choices}
    length = len(bare[answer])
    if length and own[:length] == bare[answer]:
        found = {c: [*bare[c], *own[length:]] for c in choices}
    else:
        head, last = list(row["messages"][:-1]), row["messages"][-1]
        full = {c: _rendered(tokenizer, [*head, {"role": last["role"], "content": c}]) for c in choices}
        after = len(full[answer]) - end
        found = {c: full[c][start : len(full[c]) - after] for c in choices}
        if found[answer] != own or any(full[c][:start] != tokens[:start] for c in choices):
            raise DataError(
                "EVAL-003",
                f"row {row['row']}: the choices cannot be put in the place of the answer",
                "neither the choice's own tokens nor the chat template give the tokens that were trained",
                "a tokenizer with the chat template that the rows were prepared with",
            )
    if not all(found.values()):
        what, fix = f"row {row['row']}: a choice is empty", "the row without it"
        raise DataError("EVAL-003", what, f"there is nothing to compare in {choices}", fix)
    return found


def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, use_cache: bool = True
) -> list[str]:
    """The continuation of each prompt (tokens) by the likeliest token each time, as text; ` …` marks one that was cut.

    All together, because a step of a packed model costs nearly the same for one row as for many. Here the padding is on
    the left, where `generate` expects it and makes position ids for it.
    """
    return _generated(model, tokenizer, prompts, max_new_tokens, use_cache, do_sample=False)


def sampled(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    use_cache: bool,
    *,
    seed: int,
    temperature: float,
) -> list[str]:
    """The same with tokens drawn by their probability at a temperature, nothing cut off. Equal seeds draw alike."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return _generated(model, tokenizer, prompts, max_new_tokens, use_cache, **how)


def _generated(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, use_cache: bool, **how: Any
) -> list[str]:
    from transformers import GenerationConfig

    stops = stop_tokens(model, tokenizer)
    settings = GenerationConfig(
        **how,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        use_cache=use_cache,
    )
    width = max(map(len, prompts))
    tokens = torch.tensor([[settings.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = model.generate(
            input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
    texts = []
    for new in out[:, width:].tolist():
        end = next((i for i, token in enumerate(new) if token in stops), None)
        text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
        texts.append(text if end is not None else f"{text} …")
    return texts


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the model's generation settings and the tokenizer's own."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})


def prompt_of(row: Row) -> list[int]:
    """The tokens before the final answer: what a sample is generated from."""
    return list(row["input_ids"][: _answer_start(row)])


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[], None]]:
    """A function that advances a bar by one row; off a terminal one line when it begins and none after."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    if not console.is_terminal:
        console.print(f"{title}: {total} rows")
        yield lambda: None
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def _by_likelihood(
    model: Any, rows: Sequence[Row], options: Sequence[Mapping[str, list[int]]], alike: Sequence[int], batch_size: int
) -> dict[int, tuple[str, bool]]:
    """Row index -> (choice, tied) by the log-likelihood of the whole choice."""
    owners: list[tuple[int, str]] = [(i, c) for i in alike for c in options[i]]
    texts = []
    for index, choice in owners:
        prompt = prompt_of(rows[index])
        tokens = [*prompt, *options[index][choice]]
        texts.append(_Text(tokens, range(len(prompt), len(tokens))))
    totals: dict[int, dict[str, float]] = {i: dict.fromkeys(options[i], 0.0) for i in alike}
    for number, logits in answer_logits(model, texts, batch_size):
        index, choice = owners[number]
        targets = torch.tensor(options[index][choice], device=logits.device)
        chosen = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])
        totals[index][choice] = float(chosen.double().sum())
    return {i: _best(list(totals[i]), list(totals[i].values())) for i in alike}


def _best(choices: Sequence[str], values: Sequence[float]) -> tuple[str, bool]:
    """The choice with the largest value, the earliest of several, and whether there were several."""
    top = max(values)
    return choices[list(values).index(top)], list(values).count(top) > 1


def _answer_of(row: Row) -> _Text:
    """The row's tokens with the places of its trained tokens; the very first token has nothing that predicts it."""
    positions = [t for t, label in enumerate(row["labels"]) if label != NOT_TRAINED and t > 0]
    if not positions:
        fix = "a larger data.max_length, or the held-out rows without this one"
        raise DataError("EVAL-003", f"row {row['row']} has no answer token", "every label is masked", fix)
    return _Text(row["input_ids"], positions)


def _answer_start(row: Row) -> int:
    """Where the final answer begins: the start of the last run of trained tokens."""
    labels = row["labels"]
    t = max(t for t, label in enumerate(labels) if label != NOT_TRAINED)
    while t > 1 and labels[t - 1] != NOT_TRAINED:
        t -= 1
    return t


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    text = rendered(tokenizer, messages, prompt=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _core(model: Any) -> Any:
    """The model itself, without PEFT's wrapper, whose forward hides its signature."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
