"""The proof that an export answers as the adapter does: the same held-out prompts, token by token."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.base import check_shards, load_base
from finetune.recipe import Recipe
from finetune.whole import load_trained

FP32_LIMIT_GIB = 4.0
"""Checkpoints up to this size are compared in fp32, larger ones in bf16."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the export is from the adapter on its original (not quantised) base, and both from the base."""

    prompts: int
    """Held-out rows that were compared."""
    tokens: int
    """Answer tokens in them."""
    precision: str
    """Arithmetic of both sides, fp32 or bf16."""
    mean_kl: float
    """Mean KL divergence of the export from the adapter, nats per token."""
    max_kl: float
    """The largest of them."""
    top1_agreement: float
    """Share of tokens at which both find the same token likeliest."""
    effect_kl: float
    """Mean KL divergence of the bare base from the adapter: what the training changed."""
    same_answers: int
    """Prompts that both answer with the same text, greedily."""
    answers: int
    """Prompts that were answered."""

    def as_dict(self) -> dict[str, Any]:
        """For parity.json."""
        return asdict(self)

    def sentence(self) -> str:
        """One line a person understands."""
        return (
            f"export against adapter: mean KL {self.mean_kl:.2e}, max {self.max_kl:.2e} nats per token, same likeliest "
            f"token {self.top1_agreement:.1%} of {self.tokens}, same answer to {self.same_answers}/{self.answers}; "
            f"base against adapter: mean KL {self.effect_kl:.2e} ({self.precision})"
        )


def prove(base: Path, adapter: Path, merged: Path, rows: Any, recipe: Recipe) -> Parity:
    """Compares `merged`, loaded by stock transformers, with `adapter` on the unquantised `base`, on held-out `rows`."""
    size_gib = sum(path.stat().st_size for path in check_shards(base)) / 2**30
    precision = "fp32" if size_gib <= FP32_LIMIT_GIB else "bf16"
    chosen = rows.select(range(min(recipe.export.parity_prompts, len(rows))))
    loaded = load_base(base, load_in_4bit=False, precision=precision)
    tokenizer, auto_class, family = loaded.tokenizer, loaded.family.auto_class, loaded.family
    model = load_trained(loaded, adapter).eval()
    answer = _answerer(tokenizer, recipe.evaluate.max_new_tokens, use_cache=not family.routing_table)
    with loaded.arithmetic():
        tuned, tuned_answers = _log_probs(model, chosen), [answer(model, row) for row in chosen]
        with model.disable_adapter():
            bare = _log_probs(model, chosen)
    arithmetic = loaded.arithmetic()
    del model, loaded
    gc.collect()
    stock = _load_stock(merged, auto_class, precision)
    with arithmetic:
        exported, exported_answers = _log_probs(stock, chosen), [answer(stock, row) for row in chosen]
    kl = torch.cat([_kl(a, b) for a, b in zip(tuned, exported, strict=True)])
    effect = torch.cat([_kl(a, b) for a, b in zip(tuned, bare, strict=True)])
    agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(tuned, exported, strict=True)])
    return Parity(
        prompts=len(chosen),
        tokens=kl.numel(),
        precision=precision,
        mean_kl=kl.mean().item(),
        max_kl=kl.max().item(),
        top1_agreement=agree.float().mean().item(),
        effect_kl=effect.mean().item(),
        same_answers=sum(a == b for a, b in zip(tuned_answers, exported_answers, strict=True)),
        answers=len(tuned_answers),
    )


def _load_stock(folder: Path, auto_class: str, precision: str) -> Any:
    """The export as anyone would load it: nothing of ours."""
    import transformers

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = getattr(transformers, auto_class).from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _log_probs(model: Any, rows: Any) -> list[torch.Tensor]:
    """Per row, fp32 log-probabilities (answer tokens, vocabulary) at the positions that predict the answer."""
    found = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=model.device)
            keep = len(row["input_ids"]) - row["prompt_length"] + 1
            logits = model(input_ids=ids).logits[0, -keep:-1].float()
            found.append(torch.log_softmax(logits, -1).cpu())
    return found


def _answerer(tokenizer: Any, max_new_tokens: int, use_cache: bool) -> Callable[[Any, Any], str]:
    def answer(model: Any, row: Any) -> str:
        ids = torch.tensor([row["input_ids"][: row["prompt_length"]]], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=tokenizer.pad_token_id,
            )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return answer


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per row of two (tokens, vocabulary) log-probabilities, in float64 against cancellation."""
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(-1)
