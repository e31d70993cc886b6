"""From a Pair to token ids: the model's own chat template, and which tokens are answers.

Long inputs (Eq. 13), one conversation each; the rejected ones have rejected answers in the same places:

    [system?] [user: join(document, I_1)] [assistant: y_1] [user: I_2] [assistant: y_2] ...

Short inputs of the reference, one conversation per turn i and answer:

    [system?] [user: join(chunk_i, I_i)] [assistant: y_i]

Where contents lie is found by rendering: the template is rendered once per number of turns with unmistakable stand-ins
for the contents, and what stands between them is template text. Every real conversation must render to the same
template text around its contents, character for character, so nothing here knows a marker of any model.

The rendered text is tokenised as a whole, as it is at inference, and the tokenizer's character offsets say which tokens
hold which characters. A token on the border of a content and template text (" Yes" after "[/INST]") belongs to the
content; but an added token that swallows the white space beside it (Phi-3's "<|assistant|>" with rstrip) stays template
text, and what it swallowed is in no token, in training as at inference.
  labels      answer contents, each with its end of turn: template text through the first added token that follows the
              last answer. Where a template writes none, the end-of-sequence token is put after every answer.
  nll_labels  documents, questions and answers with their ends of turn, but no system prompt and no role markers; or every
              token, where tokenized_pairs is asked for all.
Template text around an answer may differ between long and short inputs (Qwen3 writes an empty thinking block before the
last answer only). If that changes the answer's tokens, every sequence of the pair is tokenised in pieces instead,
answers with their ends of turn on their own: the answer tokens of long and short inputs are always identical.

Cost: each long sequence is rendered and tokenised once, so a pair reads its document 1 + R times. Not covered: tool
calls, pictures, and roles beside system, user and assistant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..kinds import check_choice, check_flag, check_object, check_whole
from ..pretrained import render_chat
from ..pretrained.template_kwargs import check_template_kwargs
from .context import ContextPair, TextFormat, no_template, tokenize_context
from .pairs import Pair, Turn, pair_of
from .records import BadRecord, DataReport, keep_good, parse_record, read_records
from .tokenized import IGNORE, NLL_TOKENS, TokenizedPair, TokenSequence, tokenizer_fingerprint

PROBE = "a  b\n\nc <i>&amp;'d' \"e\" {{ f }}\t\u00e9"  # contents that a template must write unchanged

Turns = list[tuple[str, str]]  # (user content, answer) of each turn


def join_context(context: str, instruction: str) -> str:
    """A document or chunk and a question about it as one user message: an empty line between them."""
    return f"{context}\n\n{instruction}"


@dataclass(frozen=True)
class _Piece:
    """A stretch of rendered text: kind is template, system, user, answer or end (of an answer's turn)."""

    kind: str
    text: str


@dataclass(frozen=True)
class _Encoded:
    """Token ids with the token ranges [first, last) of user contents, answer contents, and answers with their ends of
    turn. swallowed: whether white space of a content went into a token of the template.
    """

    ids: np.ndarray  # (T,) int64
    users: list[tuple[int, int]]
    contents: list[tuple[int, int]]
    answers: list[tuple[int, int]]
    swallowed: bool

    def answer_ids(self, i: int) -> bytes:
        first, last = self.answers[i]
        return self.ids[first:last].tobytes()

    def sequence(self) -> TokenSequence:
        labels, nll_labels = np.full_like(self.ids, IGNORE), np.full_like(self.ids, IGNORE)
        for first, last in self.answers:
            labels[first:last] = self.ids[first:last]
        for first, last in self.users + self.answers:
            nll_labels[first:last] = self.ids[first:last]
        return TokenSequence(self.ids, labels, nll_labels)


class ChatFormat:
    """Turns pairs into token ids and labels with a tokenizer's chat template.

    tokenizer: a fast transformers tokenizer with a chat template.
    system: optional system prompt of every conversation. join(context, instruction): the first user message.
    max_length: longest allowed sequence, long or short, in tokens. A longer record is refused, unless cut_document:
    then the document, never a question or an answer, loses its end until the sequence fits, and the report counts it.
    template_kwargs: variables of the template (enable_thinking=False), JSON values.

    Raises ValueError at construction for a tokenizer or template that cannot be used: no offsets, no template, no
    generation prompt, contents changed or written twice, no end of turn and no end-of-sequence token, a refused system
    prompt, a variable that the template does not read. Whitespace around contents that the template trims is trimmed from
    all inputs alike, and counted in the report.
    """

    def __init__(
        self,
        tokenizer,
        system: str | None = None,
        join: Callable[[str, str], str] = join_context,
        max_length: int | None = None,
        cut_document: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ):
        if not getattr(tokenizer, "is_fast", False):
            came = type(tokenizer).__name__
            raise ValueError(
                f"{came} gives no character offsets; load a fast tokenizer (AutoTokenizer does by default)"
            )
        if not getattr(tokenizer, "chat_template", None):
            raise no_template(tokenizer)
        check_object("system", system, str | None, "text or None")
        check_object("join", join, Callable, "a function of a context and an instruction")
        cut_document = check_flag("cut_document", cut_document)
        if max_length is not None:
            max_length = check_whole("max_length", max_length, 1, "a positive number of tokens, or None")
        if cut_document and max_length is None:
            raise ValueError("cut_document needs max_length: to how many tokens should documents be cut?")
        self.tokenizer, self.system, self.join = tokenizer, system, join
        self._template = f"model {tokenizer.name_or_path!r}: the chat template"
        self.max_length, self.cut_document = max_length, cut_document
        self.template_kwargs = check_template_kwargs(tokenizer, template_kwargs)
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self._added = set(tokenizer.added_tokens_decoder)
        self._swallowing = {token for token, t in tokenizer.added_tokens_decoder.items() if t.lstrip or t.rstrip}
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._special.discard(
            tokenizer.unk_token_id
        )  # a character that the tokenizer does not know is no control token
        self._trims = self._trims_contents()
        self._check_generation_prompt()
        self._end, self._adds_eos = self._end_of_turn()

    def tokenize(self, pair: Pair, report: DataReport | None = None) -> TokenizedPair:
        """The long and short token sequences of a pair.

        Raises BadRecord for an answer that tokenises to nothing or holds a special token, contents the template does
        not write as they are, and sequences longer than max_length.
        """
        check_object("pair", pair, Pair, "a Pair")
        check_object("report", report, DataReport | None, "a DataReport or None")
        report = DataReport() if report is None else report
        pair, trimmed = _trim(pair) if self._trims else (pair, 0)
        encoded, split = self._encode_pair(pair)
        before = length = _longest(encoded)
        while self.cut_document and length > self.max_length:
            pair = self._cut(pair, length - self.max_length, before)
            encoded, split = self._encode_pair(pair)
            length = _longest(encoded)
        for key, conversation in encoded.items():
            self._check_answers(pair, key, conversation)
            if self.max_length is not None and len(conversation.ids) > self.max_length:
                where = "document" if key[0] == "long" else f"turns[{key[2]}].chunk"
                advice = f"{len(conversation.ids)} tokens came, max_length is {self.max_length}; raise it"
                advice += ", or allow cutting documents" if key[0] == "long" else " or use shorter chunks"
                raise BadRecord(pair.id, where, "longer than max_length", advice)
        report.trimmed_contents += trimmed
        report.piecewise_pairs += split
        unsaid = {} if "engine" in pair.provenance else self.template_kwargs  # the generator says what it set
        made_with = pair.provenance.get("template_kwargs", unsaid)
        report.other_variables += made_with != self.template_kwargs
        report.swallowed_pairs += any(conversation.swallowed for conversation in encoded.values())
        report.cut_documents += length < before
        report.cut_tokens += before - length
        return _assemble(pair, {key: conversation.sequence() for key, conversation in encoded.items()})

    def _cut(self, pair: Pair, excess: int, before: int) -> Pair:
        """The pair without the last `excess` tokens of its document."""
        ids, starts, _ = self._offsets(pair.document)
        keep = len(ids) - excess
        document = pair.document[: min(int(starts[keep]), len(pair.document) - 1)] if keep > 0 else ""
        if not document.strip():
            advice = f"{before} tokens came, and without its document it still exceeds {self.max_length}; raise it"
            raise BadRecord(pair.id, "turns", "longer than max_length", advice)
        return replace(pair, document=document)

    def _check_answers(self, pair: Pair, key: tuple, encoded: _Encoded) -> None:
        for i, (first, last) in enumerate(encoded.contents):
            turn = i if key[0] == "long" else key[2]
            field = f"turns[{turn}].{'chosen' if key[1] == 0 else f'rejected[{key[1] - 1}]'}"
            if first == last:
                advice = "none of its characters becomes a token; remove the record or write an answer"
                raise BadRecord(pair.id, field, "an answer tokenises to nothing", advice)
            found = {token for token in encoded.ids[first:last].tolist() if token in self._special}
            if found:
                names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(found)))
                raise BadRecord(pair.id, field, "an answer holds a special token", f"{names} came; take it out")

    # text to tokens

    def _offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids (T,) of a text with the character range [start, end) of each token."""
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        # Ranges tile the text; some tokenizers leave leading spaces out, and the bytes of a character share its range.
        return np.array(encoded["input_ids"], dtype=np.int64), offsets[:, 0], offsets[:, 1]

    def _encode(self, pieces: list[_Piece], split: bool) -> _Encoded:
        """Tokenise pieces as one text, or with `split` every answer on its own and the texts between as one each."""
        runs: list[list[_Piece]] = [[]]
        for piece in pieces:
            if split and runs[-1] and (piece.kind == "answer" or runs[-1][-1].kind == "end"):
                runs.append([])
            runs[-1].append(piece)
        ids, spans, base, swallowed = [], [], 0, False
        for run in runs:
            text = "".join(piece.text for piece in run)
            tokens = self._offsets(text)
            begin = 0
            for piece in run:
                end = begin + len(piece.text)
                first, last = _covering(*tokens[1:], begin, end)
                if piece.kind in ("user", "answer"):
                    inner = self._without_swallowing(tokens, text, (begin, end), (first, last))
                    swallowed |= inner != (first, last)
                    first, last = inner
                spans.append((piece.kind, base + first, base + max(first, last)))
                begin = end
            ids.append(tokens[0])
            base += len(tokens[0])
        contents = [(first, last) for kind, first, last in spans if kind == "answer"]
        ends_of_turn = [last for kind, _, last in spans if kind == "end"]
        users = [(first, last) for kind, first, last in spans if kind == "user"]
        answers = [(first, end) for (first, _), end in zip(contents, ends_of_turn, strict=True)]
        return _Encoded(np.concatenate(ids), users, contents, answers, swallowed)

    def _without_swallowing(
        self, tokens: tuple[np.ndarray, ...], text: str, content: tuple[int, int], span: tuple[int, int]
    ) -> tuple[int, int]:
        """A content's range of tokens [first, last) without the template's on its borders that took its white space."""
        (ids, starts, ends), (begin, end), (first, last) = tokens, content, span
        if first < last and starts[first] < begin and int(ids[first]) in self._swallowing:
            first += not text[begin : min(end, int(ends[first]))].strip()
        if first < last and end < ends[last - 1] and int(ids[last - 1]) in self._swallowing:
            last -= not text[max(begin, int(starts[last - 1])) : end].strip()
        return first, last

    def _encode_pair(self, pair: Pair) -> tuple[dict[tuple, _Encoded], bool]:
        """All conversations of a pair, and whether they had to be tokenised in pieces."""
        pieces = {key: self._pieces(turns, pair.id, key[0]) for key, turns in _conversations(pair, self.join).items()}
        encoded = {key: self._encode(parts, split=False) for key, parts in pieces.items()}
        agree = all(
            encoded["long", key[1]].answer_ids(key[2]) == conversation.answer_ids(0)
            for key, conversation in encoded.items()
            if key[0] == "short"
        )
        if not agree:
            encoded = {key: self._encode(parts, split=True) for key, parts in pieces.items()}
        return encoded, not agree

    # conversations to text

    def _render(self, turns: Turns, system: str | None, generation_prompt: bool | None = None) -> str:
        """The template's text; with `generation_prompt` given, the conversation stops at its last question."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        for user, answer in turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        messages = messages if generation_prompt is None else messages[:-1]
        try:
            return render_chat(self.tokenizer, messages, bool(generation_prompt), **self.template_kwargs)
        except ValueError as error:
            advice = "use another template" + ("" if system is None else ", or leave the system prompt out")
            raise ValueError(f"{error}; {advice}") from error

    def _fill(self, turns: Turns) -> list[_Piece]:
        """The pieces of a conversation: template text as it stands between stand-ins, and the contents in their places.

        Not kept between calls: a template may write today's date.
        """
        marks = [(_mark(2 * i), _mark(2 * i + 1)) for i in range(len(turns))]
        contents = [("user", marks[i][0], turns[i][0]) for i in range(len(turns))]
        contents += [("answer", marks[i][1], turns[i][1]) for i in range(len(turns))]
        system = None if self.system is None else _mark(2 * len(turns))
        contents += [] if system is None else [("system", system, self.system)]
        text = self._render(marks, system)
        for kind, mark, _ in contents:
            if text.count(mark) != 1:
                came = f"writes a {kind} content {text.count(mark)} times"
                raise ValueError(f"{self._template} {came}; expected once, as it is: use another template")
        pieces, at = [], 0
        for kind, mark, content in sorted(contents, key=lambda item: text.index(item[1])):
            pieces += [_Piece("template", text[at : text.index(mark)]), _Piece(kind, content)]
            at = text.index(mark) + len(mark)
        return [*pieces, _Piece("template", text[at:])]

    def _pieces(self, turns: Turns, record_id: str, kind: str) -> list[_Piece]:
        """The pieces of a real conversation, each answer followed by its end of turn."""
        pieces = self._fill(turns)
        try:
            same = self._render(turns, self.system) == _text(pieces)
        except ValueError as error:
            raise BadRecord(record_id, "turns", "the chat template refuses the contents", str(error)) from error
        if not same:
            advice = (
                f"the {kind} conversation does not render to its contents as they are; see the template's conditions"
            )
            raise BadRecord(record_id, "turns", "the chat template changes the contents", advice)
        parts = []
        for piece in pieces:
            if parts and parts[-1].kind == "end" and not self._adds_eos:
                piece = _Piece("template", piece.text.removeprefix(self._end))
            parts += [piece, _Piece("end", self._end)] if piece.kind == "answer" else [piece]
        return parts

    # what a template must do

    def _trims_contents(self) -> bool:
        """Whether whitespace around contents is trimmed; ValueError if contents are changed in any other way."""
        trims = False
        for count in (1, 2):
            turns = [(PROBE, PROBE)] * count
            if self._render(turns, self.system) != _text(self._fill(turns)):
                raise ValueError(
                    f"{self._template} changes contents (it escapes, cuts or rewrites a message, or trims the system "
                    "prompt); use one that writes them as they are"
                )
            padded = [("\n z \n", "\n z \n")] * count
            trims |= self._render(padded, self.system) != _text(self._fill(padded))
        return trims

    def _check_generation_prompt(self) -> None:
        """What precedes an answer must begin with the prompt a model answers to: text with a generation prompt."""
        turn = [("Question", _mark(0))]
        prompt = self._render(turn, self.system, generation_prompt=True)
        before = self._render(turn, self.system).split(_mark(0))[0]
        ignored = prompt == self._render(turn, self.system, generation_prompt=False)
        # A template with a prompt of its own may write more before an answer, such as an empty thinking block; another
        # one no more than the whitespace that an answer's first token brings along.
        if not before.startswith(prompt) or (ignored and before[len(prompt) :].strip()):
            raise ValueError(
                f"{self._template} has no generation prompt that fits its answers: with add_generation_prompt=True it "
                f"ends in {prompt[-60:]!r}, but before an answer it writes {before[-60:]!r}; add the generation "
                "prompt to the template"
            )

    def _end_of_turn(self) -> tuple[str, bool]:
        """The text that ends every answer, and whether it is an eos token that the template itself does not write."""
        tail = self._fill([("Question", "Answer")])[-1].text
        ids, _, ends = self._offsets(tail)
        control = self._added | {self.tokenizer.eos_token_id}
        end = next((tail[: int(end)] for token, end in zip(ids.tolist(), ends, strict=True) if token in control), None)
        if end is None:
            if not self.tokenizer.eos_token:
                raise ValueError(
                    f"{self._template} writes no end of turn after an answer and the tokenizer has no eos_token, so a "
                    "model could not learn to stop; set tokenizer.eos_token"
                )
            return self.tokenizer.eos_token, True
        pieces = self._fill([("Question", "Answer")] * 2)
        after = next(pieces[i + 1].text for i, piece in enumerate(pieces) if piece.kind == "answer")
        if not after.startswith(end):
            raise ValueError(
                f"{self._template} ends the last answer with {end!r} but an earlier one with {after[:40]!r}; "
                "expected the same end of turn after every answer"
            )
        return end, False


def format_of(tokenizer, max_length: int | None = None, **options) -> ChatFormat | TextFormat:
    """A ChatFormat, or for a tokenizer without a chat template, where no option needs one, a TextFormat."""
    if not tokenizer.chat_template and not any(options.values()):
        return TextFormat(tokenizer, max_length)
    return ChatFormat(tokenizer, max_length=max_length, **options)


def tokenized_pairs(
    path,
    chat: ChatFormat | TextFormat,
    vocab_size: int | None = None,
    on_bad_record: str = "raise",
    report: DataReport | None = None,
    allow_equal: bool = False,
    nll_tokens: str = "contents",
) -> Iterator[TokenizedPair]:
    """Stream tokenised pairs from files of text pairs, contexts with answers, official unformatted records or tokenised
    columns, told apart by record.

    vocab_size: rows of the model's embedding; len(chat.tokenizer) if None. nll_tokens: which tokens the NLL labels hold
    (TokenizedPair.counting), of text and of tokenised records alike. Raises BadRecord and ValueError as the
    readers do, and for tokenised records longer than chat.max_length.
    """
    check_object("chat", chat, ChatFormat | TextFormat, "a ChatFormat")
    vocab_size = len(chat.tokenizer) if vocab_size is None else check_whole("vocab_size", vocab_size, 1)
    check_choice("nll_tokens", nll_tokens, NLL_TOKENS)
    report = DataReport() if report is None else report

    def make(record, where):
        return read(parse_record(record, where), where).counting(nll_tokens)

    def read(record, where):
        if "chosen_input_ids" not in record:
            pair = pair_of(record, where, allow_equal)
            context = isinstance(pair, ContextPair)
            return _with_rows(
                tokenize_context(pair, chat, report) if context else chat.tokenize(pair, report), vocab_size
            )
        pair = TokenizedPair.from_record(record, where, vocab_size, chat.fingerprint, allow_equal)
        if chat.max_length is not None and pair.length > chat.max_length:
            advice = (
                f"{pair.length} tokens came, max_length is {chat.max_length}; raise it, tokenised data is never cut"
            )
            raise BadRecord(pair.id, "chosen_input_ids", "longer than max_length", advice)
        return pair

    return keep_good(read_records(path), make, on_bad_record, report)


def _with_rows(pair: TokenizedPair, vocab_size: int) -> TokenizedPair:
    """A text may name a token that the model has no embedding for. Raises BadRecord."""
    short = [sequence for turns in (pair.ref_chosen, *pair.ref_rejected) for sequence in turns]
    largest = max(int(sequence.ids.max()) for sequence in (pair.chosen, *pair.rejected, *short))
    if largest >= vocab_size:
        advice = f"token {largest} came, the model's embedding has {vocab_size} rows; take it out of the text"
        raise BadRecord(pair.id, "document or turns", "a token without an embedding", advice)
    return pair


def _mark(number: int) -> str:
    return f"Content{number}Mark"


def _conversations(pair: Pair, join: Callable[[str, str], str]) -> dict[tuple, Turns]:
    """The conversations of a pair: ('long', j) and ('short', j, turn), with j = 0 for the chosen answers."""
    conversations: dict[tuple, Turns] = {}
    for j in range(1 + len(pair.turns[0].rejected)):
        answers = [turn.chosen if j == 0 else turn.rejected[j - 1] for turn in pair.turns]
        users = [turn.instruction for turn in pair.turns]
        users[0] = check_object("join(...)", join(pair.document, users[0]), str, "text")
        conversations["long", j] = list(zip(users, answers, strict=True))
        for i, turn in enumerate(pair.turns):
            conversations["short", j, i] = [(join(turn.chunk, turn.instruction), answers[i])]
    return conversations


def _covering(starts: np.ndarray, ends: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """The range of tokens [first, last) from the first that ends after `begin` up to the first that starts at `end` or
    later."""
    return int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(starts, end, side="left"))


def _text(pieces: list[_Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _longest(encoded: dict[tuple, _Encoded]) -> int:
    return max(len(conversation.ids) for key, conversation in encoded.items() if key[0] == "long")


def _trim(pair: Pair) -> tuple[Pair, int]:
    """The pair without whitespace around its contents, and the number of contents that had some."""
    texts = [pair.document]
    for turn in pair.turns:
        texts += [turn.instruction, turn.chunk, turn.chosen, *turn.rejected]
    turns = tuple(
        Turn(t.instruction.strip(), t.chunk.strip(), t.chosen.strip(), tuple(text.strip() for text in t.rejected))
        for t in pair.turns
    )
    return replace(pair, document=pair.document.strip(), turns=turns), sum(text != text.strip() for text in texts)


def _assemble(pair: Pair, sequences: dict[tuple, TokenSequence]) -> TokenizedPair:
    turns, rejected = range(len(pair.turns)), range(1, 1 + len(pair.turns[0].rejected))
    return TokenizedPair(
        id=pair.id,
        chosen=sequences["long", 0],
        rejected=tuple(sequences["long", j] for j in rejected),
        ref_chosen=tuple(sequences["short", 0, i] for i in turns),
        ref_rejected=tuple(tuple(sequences["short", j, i] for i in turns) for j in rejected),
        ref_chosen_logp=pair.ref_chosen_logp,
        ref_rejected_logps=pair.ref_rejected_logps,
    )
