"""New answers for pairs whose questions are there (your own, or an earlier round's), asked for through a Ray cluster.

    python examples/ray/answers.py --pairs pairs/ --out answered.jsonl --url http://head:8000/v1 --model my-model

Every turn is asked twice, as `longpo generate` does: with its chunk, for the answer to prefer, and with the whole document,
for the one to reject. The workers need longpo_ops, the machine that calls this the pairs. README.md says when to use it.
"""

import argparse
import os
from dataclasses import replace
from functools import partial

from longpo_ops.data import join_context, read_pairs, write_pairs


def questions(pairs):
    """A row per request: of which answer it is, and the message."""
    for pair in pairs:
        for number, turn in enumerate(pair.turns):
            for kind, text in (("chosen", turn.chunk), ("rejected", pair.document)):
                yield {"key": f"{pair.id} {number} {kind}", "content": join_context(text, turn.instruction)}


def payload(row, model, tokens):
    message = {"role": "user", "content": row["content"]}
    return {"payload": {"model": model, "messages": [message], "max_tokens": tokens, "temperature": 0.0}}


def answer(row):
    (choice,) = row["http_response"]["choices"]
    return {"key": row["key"], "text": choice["message"]["content"] or "", "finish": choice["finish_reason"]}


def answered(pairs, given):
    """The pairs with their new answers; without those whose chosen answer is empty or was cut off, or is the rejected one."""
    for pair in pairs:
        both = [[given[f"{pair.id} {i} {kind}"] for kind in ("chosen", "rejected")] for i in range(len(pair.turns))]
        if all(c["text"].strip() and c["finish"] == "stop" and c["text"] != r["text"] for c, r in both):
            turns = [replace(t, chosen=c["text"], rejected=(r["text"],)) for t, (c, r) in zip(pair.turns, both)]
            yield replace(pair, turns=tuple(turns), ref_chosen_logp=None, ref_rejected_logps=None)


def main(arguments=None):
    import ray
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--pairs", "--out", "--url", "--model"):
        parser.add_argument(name, required=True)
    parser.add_argument("--tokens", type=int, default=1024, help="of the longest answer")
    parser.add_argument("--at-once", type=int, default=8, help="workers that send requests")
    options = parser.parse_args(arguments)
    key = os.environ.get("OPENAI_API_KEY")
    config = HttpRequestProcessorConfig(
        url=f"{options.url}/chat/completions",
        headers={"Authorization": f"Bearer {key}"} if key else None,
        concurrency=options.at_once,
        batch_size=16,
        max_retries=5,
    )
    ask = build_processor(config, partial(payload, model=options.model, tokens=options.tokens), answer)
    rows = ray.data.from_items(list(questions(read_pairs(options.pairs, allow_equal=True))))
    given = {row["key"]: row for row in ask(rows).iter_rows()}
    made = write_pairs(answered(read_pairs(options.pairs, allow_equal=True), given), options.out)
    print(f"{len(given)} answers, {made} pairs in {options.out}")
    return made


if __name__ == "__main__":
    main()
