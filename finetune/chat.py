"""A prompt to talk to the tuned model, with its base beside it. In a pipe: prompts in and answers out, line by line."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import WeightsError
from finetune.foreign.rendering import rendered
from finetune.recipe import Recipe
from finetune.rundir import RunDir

if TYPE_CHECKING:
    from rich.console import Console

    Ask = Callable[[], str]
    Message = dict[str, str]

MAX_NEW_TOKENS = 512
"""Longest answer in tokens."""

HELP = """\
/base   also show what the base says, without the training (again: only the tuned model).
        Both see the same conversation; the tuned answers are the ones that are kept in it
/reset  forget the conversation
/help   this list
/quit   leave (or Ctrl-D); Ctrl-C stops an answer
A prompt that begins with a slash is sent when a space stands before it."""


SIDES = ("adapter", "merged")
"""What one can talk to: the adapter over its base, as it was trained, or the merged weights, as a server loads them."""


def chat(run_dir: RunDir, of: str = SIDES[0]) -> None:
    """Talks on the terminal with a run's tuned model, or answers the lines of a pipe, each on its own.

    The adapter is loaded over its base; `of` merged loads merged/ as it is on disk, and the whole base beside it when
    /base is typed. Raises RunError when the run does not have them.
    """
    from finetune.compose import read_recipe
    from finetune.foreign.templates import vet
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    merged = of == "merged"
    if merged:
        folder = run_dir.require(run_dir.merged, "merge")
        vet(folder)  # a run folder may come from somebody else
        base = _base(recipe, folder, packed=False)
        model = _to_talk(base.model, base)
    else:
        model, base = _tuned(recipe, run_dir)
    opening = _opening(run_dir)

    @functools.cache
    def bare() -> Any:
        other = _base(recipe, base_folder(recipe), packed=False)
        return _to_talk(other.model, other)

    if sys.stdin.isatty():
        from rich.console import Console

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history in input()
        console = Console()
        who = "the merged weights answer" if merged else "the tuned model answers"
        console.print(f"{recipe.name}: {who}. /base compares, /help lists the rest.", highlight=False)
        with base.arithmetic():
            talk(model, base.tokenizer, _typed, console, opening, bare if merged else None)
    else:
        with base.arithmetic():
            answer_lines(model, base.tokenizer, sys.stdin, sys.stdout.write, opening)


def answers(run_dir: RunDir, questions: Sequence[str], max_new_tokens: int) -> list[tuple[str, str, str]]:
    """(question, what the base says, what the tuned model says), each question a conversation of its own.

    Raises RunError when the run has no adapter, ValueError when a question is longer than the model can read.
    """
    from finetune.compose import read_recipe

    model, base = _tuned(read_recipe(run_dir.recipe), run_dir)
    opening, said = _opening(run_dir), []
    with base.arithmetic():
        for question in questions:
            asked = [*opening, {"role": "user", "content": question}]
            old, new = (
                reply(model, base.tokenizer, asked, base=side, longest=max_new_tokens) for side in (True, False)
            )
            said.append((question, old, new))
    return said


def _tuned(recipe: Recipe, run_dir: RunDir) -> tuple[Any, Any]:
    """The adapter over its base, ready to answer, and the base."""
    from finetune.source import base_folder
    from finetune.whole import load_trained

    trained = run_dir.require(run_dir.trained, "train")
    base = _base(recipe, base_folder(recipe), packed=True)
    return _to_talk(load_trained(base, trained), base), base


def _base(recipe: Recipe, folder: Path, packed: bool) -> Any:
    """A base as it was trained on, or with `packed` false in the precision of its files."""
    from finetune.base import load_base

    return load_base(
        folder,
        load_in_4bit=recipe.adapter.load_in_4bit and packed,
        precision=recipe.train.precision,
        double_quantisation=recipe.adapter.double_quantisation and packed,
    )


def _opening(run_dir: RunDir) -> list[Message]:
    """What the model saw at the start of every row."""
    from finetune.data import load_splits

    return opening_of(load_splits(run_dir).heldout[0]["messages"])


def _to_talk(model: Any, base: Any) -> Any:
    """The model, ready to answer."""
    model.eval()
    # A router that looks tokens up needs all of them in every step.
    model.generation_config.use_cache = not base.family.routing_table
    return model


def opening_of(messages: list[Message]) -> list[Message]:
    """The system message of a conversation, if it has one: what the model saw at the start of every row."""
    return [{"role": m["role"], "content": m["content"]} for m in messages[:1] if m["role"] == "system"]


def talk(
    model: Any,
    tokenizer: Any,
    ask: Ask,
    console: Console,
    opening: list[Message] | None = None,
    bare: Callable[[], Any] | None = None,
) -> list[Message]:
    """A conversation of many turns until /quit or the end of the input; returns its messages.

    `bare` loads the base of a model that has no adapter to leave out; it is called when it is first compared with.
    """
    start = list(opening or [])
    messages = list(start)
    compare = False
    while True:
        try:
            typed = ask()
        except EOFError:
            return messages
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D leaves.", highlight=False)
            continue
        word = typed.rstrip()
        if word == "/quit":
            return messages
        if word == "/reset":
            messages[:] = start
            console.print("The conversation is forgotten.")
        elif word == "/base":
            compare = not compare
            if compare and bare:
                console.print("loading the base beside the merged weights ...")
                bare()
            console.print("Base and tuned answer." if compare else "The tuned model alone answers.")
        elif word.startswith("/"):
            if word != "/help":
                console.print(f"{word} is not a command.", markup=False, highlight=False)
            console.print(HELP, markup=False, highlight=False)
        elif word.strip():
            _turn(model, tokenizer, messages, typed.strip(), compare, console, bare)


def answer_lines(
    model: Any, tokenizer: Any, lines: Iterable[str], write: Callable[[str], Any], opening: list[Message] | None = None
) -> None:
    """One line of answer per line of `lines`. Each prompt is a conversation of its own; line breaks become spaces."""
    try:
        for line in lines:
            prompt = line.strip()
            answer = reply(model, tokenizer, [*(opening or []), {"role": "user", "content": prompt}]) if prompt else ""
            write(" ".join(answer.split("\n")) + "\n")
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the answers has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reply(
    model: Any,
    tokenizer: Any,
    messages: list[Message],
    write: Callable[[str], None] = lambda text: None,
    base: bool = False,
    longest: int = 0,
) -> str:
    """The greedy answer to a conversation, handed to `write` piece by piece as it grows; `base` leaves the adapter out.

    It has at most `longest` tokens, or 512. Ctrl-C ends the answer: what was said until then is returned. Raises
    ValueError when nothing fits after it, WeightsError (FRN-009) when the chat template takes too much for it.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    said: list[str] = []

    class Stream(TextStreamer):  # a class here because transformers is imported late
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            clean = _printable(text)
            said.append(clean)
            write(clean)

    text = rendered(tokenizer, messages)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    room = model.config.get_text_config().max_position_embeddings - tokens.shape[1]
    if room < 1:
        raise ValueError(f"the conversation has {tokens.shape[1]} tokens, {1 - room} more than the model can read")
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(longest or MAX_NEW_TOKENS, room),
        eos_token_id=sorted({token for token in (*stops, tokenizer.eos_token_id) if token is not None}),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        use_cache=model.generation_config.use_cache,
    )
    streamer = Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode(), model.disable_adapter() if base else contextlib.nullcontext():
        try:
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=settings,
                streamer=streamer,
            )
        except KeyboardInterrupt:
            streamer.end()
            write(" [stopped]")
    return "".join(said).strip()


def _turn(
    model: Any,
    tokenizer: Any,
    messages: list[Message],
    prompt: str,
    compare: bool,
    console: Console,
    bare: Callable[[], Any] | None,
) -> None:
    """One prompt and its answer or answers. The conversation grows by the prompt and the tuned answer."""

    def write(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    conversation = [*messages, {"role": "user", "content": prompt}]
    try:
        if compare:
            console.print("[bold]base[/bold]  ", end="")
            reply(bare() if bare else model, tokenizer, conversation, write, base=bare is None)
            console.print("\n[bold]tuned[/bold] ", end="")
        answer = reply(model, tokenizer, conversation, write)
    except (ValueError, WeightsError) as error:
        console.print(f"{str(error).rstrip('.')}. /reset begins a new conversation.", markup=False, highlight=False)
        return
    console.print()
    messages[:] = [*conversation, {"role": "assistant", "content": answer}]


def _typed() -> str:
    return input("> ")


def _printable(text: str) -> str:
    """The text without control characters, which could otherwise steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
