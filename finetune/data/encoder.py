"""Conversations -> token ids and a loss mask, for any chat template, without marks in it: by comparing renders.

What is trained of an assistant turn is the difference between the template's text up to that turn with the generation
prompt (which is what a server will send) and its text up to the end of the turn. Tags in the template are not needed,
and a template that would train something else than what is served is found out. A template that has `generation` tags
says itself what is trained, and is taken at its word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from finetune.data.calls import as_json, bare, lost
from finetune.data.nested import leaves
from finetune.data.rows import Row, quoted
from finetune.data.tokens import IGNORED, Tokens
from finetune.errors import DataError
from finetune.foreign.rendering import AS_PUBLISHED, bounded, write


class Encoder:
    """Turns rows into tokens with one tokenizer.

    `turns`: `all` answers train, or the `last` one. `reasoning`: `keep` it (an error where the template drops it),
    `strip` it, or leave it to the `template`. `end_of_turn` is a token to write behind a last answer that the template
    does not end. `vocabulary` is the number of rows of the embedding: no id may reach it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: set[int],
        *,
        vocabulary: int = 0,
        turns: str = "all",
        reasoning: str = "keep",
        end_of_turn: str = "",
    ) -> None:
        self.tokenizer, self.stop, self.vocabulary = tokenizer, stop, vocabulary
        self.turns, self.reasoning, self.end_of_turn = turns, reasoning, end_of_turn
        self.pad = tokenizer.pad_token_id
        self.special = {str(t) for t in tokenizer.all_special_tokens}
        self.special |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._firsts = {t[0] for t in self.special if t}
        self._control = re.compile(
            "|".join(re.escape(t) for t in sorted(self.special, key=len, reverse=True) if t) or "$^"
        )
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self.tagged = re.search(r"\{%-?\s*generation\b", template) is not None
        self._thought = next((k for k in ("reasoning_content", "thinking", "reasoning") if k in template), "")
        # Special tokens that end what stands before them; one that eats white space around it does not.
        added = tokenizer.added_tokens_decoder.items()
        self._cutters = {i for i, t in added if t.special and not t.lstrip and not t.rstrip and t.content}
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self._tail = lru_cache(maxsize=1000)(self._tokenize_one)

    def encode(self, rows: Sequence[Row]) -> list[Tokens | DataError]:
        """Tokens of each row, or the error that it has.

        Errors: DATA-005 a control token in a text; TPL-002 a prompt that is no beginning of the conversation; TPL-003 a
        template that refuses it; TOK-002 an id without a row in the embedding; TOK-003 padding that would be trained;
        TOK-004 a turn that would never end; MASK-002 an answer that is not what would be trained; MASK-003 a question
        that the model would not see.
        """
        made: list[Tokens | DataError | None] = [None] * len(rows)
        drafts: dict[int, _Draft] = {}
        with bounded() as bounds:  # a template is a stranger's program, and some of its words may be for these rows
            for i, row in enumerate(rows):
                bounds.begin()
                try:
                    if row.messages:
                        drafts[i] = self._draft(row)
                except DataError as error:
                    made[i] = error
        for i, row in enumerate(rows):
            if not row.messages:
                try:
                    made[i] = self._checked(row, self._plain(row))
                except DataError as error:
                    made[i] = error
        if drafts:
            ids, encodings = self._tokenize([draft.text for draft in drafts.values()])
            for (i, draft), tokens, places in zip(drafts.items(), ids, encodings, strict=True):
                try:
                    made[i] = self._checked(rows[i], self._masked(rows[i], draft, tokens, places))
                except DataError as error:
                    made[i] = error
        return [m for m in made if m is not None]

    def decoded(self, row: Row) -> list[str]:
        """What a row that came as tokens says, but for control tokens: before the first trained one, and from it on."""
        at, known = Tokens(input_ids=row.input_ids, labels=row.labels).prompt_length, range(len(self.tokenizer))
        parts = ([i for i in part if i in known] for part in (row.input_ids[:at], row.input_ids[at:]))
        return [str(self.tokenizer.decode(part, skip_special_tokens=True)) for part in parts]

    def _plain(self, row: Row) -> Tokens:
        if row.input_ids:
            return Tokens(input_ids=row.input_ids, labels=row.labels)
        self._refuse_control(row.where, "the text", row.text)
        ids = list(self.tokenizer(row.text)["input_ids"])
        if not row.goes_on and self.tokenizer.eos_token_id not in (None, *ids[-1:]):
            ids.append(self.tokenizer.eos_token_id)
        return Tokens(input_ids=ids, labels=list(ids))

    def _draft(self, row: Row) -> _Draft:
        """The text of a conversation and the spans of it that are trained, in characters."""
        for i, message in enumerate(row.messages):
            self._refuse_control(row.where, f"messages[{i}] ({message['role']})", message)
        self._refuse_control(row.where, "tools", row.tools)
        messages = [self._worded(m, row.where, i) for i, m in enumerate(row.messages)]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        wanted = [
            i
            for i in (answers if self.turns == "all" else answers[-1:])
            if "weight" not in row.messages[i] or row.messages[i]["weight"]
        ]
        if not wanted:
            why = "data.turns=last and the last answer has the weight 0"
            raise DataError("DATA-003", f"{row.where} has no answer that is trained", why, "data.turns=all")
        if self.tagged:
            return self._by_tags(row, messages, answers, wanted)
        whole = self._render(row, messages, False)
        spans = []
        for i in wanted:
            before = self._render(row, messages[:i], True)
            upto = whole if i == len(messages) - 1 else self._render(row, messages[: i + 1], False)
            self._refuse_other_beginning(row, i, before, whole)
            self._refuse_other_beginning(row, i, upto, whole)
            spans.append((i, len(before), len(upto)))
        if self.end_of_turn and not whole.rstrip().endswith(
            tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.stop)))
        ):
            whole += self.end_of_turn
            spans = [(i, begin, end if i != len(messages) - 1 else len(whole)) for i, begin, end in spans]
        return _Draft(text=whole, spans=spans)

    def _by_tags(self, row: Row, messages: list[dict[str, Any]], answers: list[int], wanted: list[int]) -> _Draft:
        """The spans that the template's own `generation` tags mark."""
        whole, marked = self._render_marked(row, messages)
        for i in wanted:
            if not whole.startswith(self._render(row, messages[:i], True)):
                self._refuse_other_beginning(row, i, self._render(row, messages[:i], False), whole)
        if len(marked) != len(answers):
            what = f"{row.where} has {len(answers)} answers and the template marks {len(marked)}"
            raise DataError("TPL-005", what, "its generation tags do not stand around every answer", AS_PUBLISHED)
        return _Draft(text=whole, spans=[(i, *span) for i, span in zip(answers, marked, strict=True) if i in wanted])

    def _worded(self, message: dict[str, Any], where: str, i: int) -> dict[str, Any]:
        """A message as the template reads it: reasoning under the template's own name, or taken out."""
        made = {key: value for key, value in message.items() if key not in ("weight", "reasoning")}
        if message["role"] != "assistant":
            return made
        if self.reasoning == "strip":
            made["content"] = re.sub(r"^\s*<think>.*?</think>\s*", "", made["content"], flags=re.DOTALL)
        elif "reasoning" in message:
            if not self._thought and self.reasoning == "template":
                return made
            if not self._thought:
                why = "the chat template has no place for it"
                raise DataError("TPL-004", f"{where} messages[{i}] has reasoning", why, "data.reasoning=strip")
            made[self._thought] = message["reasoning"]
        return made

    def _masked(self, row: Row, draft: _Draft, ids: list[int], encoding: Any) -> Tokens:
        """The draft's spans as labels. `encoding` knows which characters a token is from; None: it has to be found."""
        if not ids:
            raise DataError("TPL-003", f"{row.where}: the chat template writes nothing", "", AS_PUBLISHED)
        labels = [IGNORED] * len(ids)
        dark: list[str] = []
        shown = 0
        for i, begin, end in draft.spans:
            if encoding is None:
                first, past = len(self._tail(draft.text[:begin])), len(self._tail(draft.text[:end]))
            else:
                first, past = (_token_at(encoding, at, len(draft.text), len(ids)) for at in (begin, end))
            if not self.tagged:
                self._refuse_other_tokens(row, draft.text[:begin], i, ids, first, encoding)
            last = i == draft.spans[-1][0]
            if not any(ids[k] in self.stop for k in range(first, past)) and (last or not self.tagged):
                if past == len(ids) or ids[past] not in self.stop:  # where the next turn ends this one, that is learnt
                    raise self._endless(row.where, i, ids[past - 1])
                past += 1
            labels[first:past] = ids[first:past]
            dark.append(draft.text[shown:begin])
            shown = end
            self._refuse_other_answer(row, i, draft.text[begin:end])
        dark.append(draft.text[shown:])
        self._refuse_unseen(row, "".join(dark))
        return Tokens(input_ids=ids, labels=labels)

    def _refuse_other_tokens(self, row: Row, prompt: str, i: int, ids: list[int], first: int, encoding: Any) -> None:
        """TPL-002 unless the prompt alone has the tokens with which the conversation begins.

        Texts between special tokens are tokenised apart, so the prompt's last piece decides; it is mostly the same one.
        """
        tail = prompt
        last = next((k for k in range(min(first, len(ids)) - 1, -1, -1) if ids[k] in self._cutters), -1)
        if encoding is not None and last >= 0:
            tail = prompt[encoding.token_to_chars(last)[0] :]
        alone = self._tail(tail)
        if list(ids[max(0, first - len(alone)) : first]) != list(alone):
            told = self.tokenizer.decode(ids[max(0, first - 4) : first + 4])
            asked = self.tokenizer.decode(alone[-4:])
            why = f"a server would send ...{quoted(asked)}, training would see ...{quoted(told)}"
            raise self._other_beginning(row, i, why)

    def _refuse_other_beginning(self, row: Row, i: int, prefix: str, whole: str) -> None:
        if whole.startswith(prefix):
            return
        k = next((k for k, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), len(whole))
        raise self._other_beginning(row, i, f"behind {k} characters the template writes something else")

    @staticmethod
    def _other_beginning(row: Row, i: int, why: str) -> DataError:
        return DataError(
            "TPL-002",
            f"{row.where}: the prompt of messages[{i}] is no beginning of the conversation",
            why,
            "data.turns=last to train the last answer only, or remove white space around the answer",
        )

    def _endless(self, where: str, i: int, token: int) -> DataError:
        last = self.tokenizer.convert_ids_to_tokens(token)
        names = ", ".join(sorted(map(str, self.tokenizer.convert_ids_to_tokens(sorted(self.stop)))))
        why = f"the template ends it with {last!r}; stop tokens: {names}. A model trained on this would never stop"
        return DataError(
            "TOK-004",
            f"{where} messages[{i}] has no end-of-turn token",
            why,
            "data.end_of_turn=TOKEN, or mend eos_token",
        )

    def _refuse_other_answer(self, row: Row, i: int, text: str) -> None:
        message = self._worded(row.messages[i], row.where, i)
        parts = [message["content"]]
        if self._thought in message and self.reasoning == "keep":
            parts.append(message[self._thought])
        missing = lost(message["tool_calls"], text) if "tool_calls" in message else ""
        for part in parts:
            if part.strip() not in text and bare(part) not in bare(text):
                thought = self._thought in message and part == message[self._thought]
                missing = "its reasoning" if thought else "part of it"
        if missing:
            raise DataError(
                "MASK-002",
                f"{row.where} messages[{i}] is not what would be trained",
                f"the chat template drops or changes {missing}",
                "data.reasoning=strip if it is the reasoning; else look at chat_template.jinja",
            )

    def _refuse_unseen(self, row: Row, untrained: str) -> None:
        """MASK-003 where a user's or the system's words are not in the part that is read and not trained."""
        for i, message in enumerate(row.messages):
            text = message["content"].strip()
            if message["role"] in ("user", "system") and text not in untrained and bare(text) not in bare(untrained):
                raise DataError(
                    "MASK-003",
                    f"{row.where} messages[{i}] ({message['role']}) is not in the prompt as it stands",
                    "the chat template drops or changes it, or it would be trained",
                    "look at chat_template.jinja",
                )

    def _refuse_control(self, where: str, what: str, value: Any) -> None:
        """DATA-005 where a text has a control token, or one in a value of texts: a template may write each of them."""
        for text in leaves(value):
            if not isinstance(text, str) or not any(first in text for first in self._firsts):
                continue
            if found := self._control.search(text):
                why = "inside a text it would end or fake a turn"
                raise DataError("DATA-005", f"{where} has the control token {found[0]} in {what}", why, "remove it")

    def _checked(self, row: Row, tokens: Tokens) -> Tokens:
        least, most = min(tokens.input_ids), max(tokens.input_ids)
        if least < 0 or (self.vocabulary and most >= self.vocabulary):
            rows = f"the embedding of the base has {self.vocabulary} rows" if self.vocabulary else "ids count from 0"
            what = f"{row.where} has the token id {least if least < 0 else most}"
            raise DataError("TOK-002", what, rows, "the tokenizer of this base")
        if self.pad is not None and self.pad not in self.stop and self.pad in tokens.labels:
            raise DataError("TOK-003", f"{row.where} would train the padding token", "", "another pad_token")
        return tokens

    def _render(self, row: Row, messages: list[dict[str, Any]], prompt: bool) -> str:
        """The template's text. Some templates want a call's arguments as an object, others as JSON: both are tried."""
        import jinja2

        error: Exception | None = None
        for wording in (messages, as_json(messages)):
            try:
                return write(self.tokenizer, wording, prompt, row.tools)
            except Exception as wrong:  # a template is somebody's program, and fails in every way that programs do
                error = error or wrong
                if wording == messages and not any("tool_calls" in m for m in messages):
                    break
        roles = ", ".join(m["role"] for m in messages)
        first = " ".join(str(error).split())
        if not isinstance(error, jinja2.UndefinedError) and first not in str(self.tokenizer.chat_template):
            first = quoted(first) if isinstance(error, jinja2.TemplateError) else first
        what = f"{row.where}: the chat template refuses this conversation"
        fix = "this row with other roles, data.on_bad_row=drop, or a template of your own as chat_template.jinja"
        raise DataError("TPL-003", what, f"{first} (roles: {roles})", fix)

    def _render_marked(self, row: Row, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The template's text and the spans (first character, past the last) that its generation tags mark."""
        from transformers.utils.chat_template_utils import render_jinja_template

        for wording in (messages, as_json(messages)):
            try:
                texts, marked = render_jinja_template(
                    [wording],
                    tools=row.tools or None,
                    chat_template=self.tokenizer.chat_template,
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                )
                texts[0].encode()
                break
            except Exception as wrong:  # as in _render
                why = " ".join(quoted(str(wrong)).split())
                self._render(row, wording, False)  # says what is wrong, where it is not the calls' wording
        else:
            what = f"{row.where}: the chat template refuses this conversation"
            fix = "the same template without its generation tags"
            raise DataError("TPL-003", what, f"its generation tags cannot be read: {why}", fix)
        spans: list[tuple[int, int]] = []
        for begin, end in marked[0]:
            if spans and spans[-1][1] == begin:  # the end of a turn in a mark of its own
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((begin, end))
        return texts[0], spans

    def _tokenize(self, texts: list[str]) -> tuple[list[list[int]], Iterable[Any]]:
        """Ids of each text, and what tells the characters of each token (None where the tokenizer does not know)."""
        if self.tokenizer.is_fast:
            made = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            return [encoding.ids for encoding in made], made
        return [list(self._tokenize_one(text)) for text in texts], [None] * len(texts)

    def _tokenize_one(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenize(tokenizer: Any, stop: set[int], messages: list[dict[str, Any]], where: str) -> Tokens:
    """One conversation as tokens, every answer trained. Raises DataError as `Encoder.encode` says, naming `where`."""
    file, _, line = where.rpartition(":")
    row = Row(file=file, line=int(line), id=where, sha256="", messages=messages)
    (made,) = Encoder(tokenizer, stop).encode([row])
    if isinstance(made, DataError):
        raise made
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A rendered conversation."""

    text: str
    spans: list[tuple[int, int, int]]
    """(message, first character, past the last character) of every trained turn."""


def _token_at(encoding: Any, at: int, end: int, tokens: int) -> int:
    """The token with the character `at`, or with the first one behind it that belongs to a token."""
    for place in range(at, end):
        token = encoding.char_to_token(place)
        if token is not None:
            return int(token)
    return tokens
