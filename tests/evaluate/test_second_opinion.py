"""RULER's 13 tasks here beside lm-evaluation-harness's generator and scores of them, where that package is installed.

What both make is read by the same readers, from the prompts alone. Where the two differ, ours is what RULER's own code has:

    vt    theirs puts an assignment and the line after it on one line, as an earlier RULER did
    cwe   theirs makes the solved example and does not show it
    qa    theirs gives the share of the references that an answer contains, RULER and ours 1 for any
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from longpo_ops.evaluate import TASKS, Texts, make_samples, score
from longpo_ops.evaluate.samples import Sample
from tests.evaluate import readers

NEEDED = ("lm_eval", "wonderwords", "nltk")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")
LENGTHS, SAMPLES = (2048, 8192), 2  # on both sides of 4,096, where cwe repeats its words more often
NEEDLES = {  # task: haystack, and what theirs is asked for
    "niah_single_1": ("repeat", {}),
    "niah_single_2": ("essay", {}),
    "niah_single_3": ("essay", {"type_needle_v": "uuids"}),
    "niah_multikey_1": ("essay", {"num_needle_k": 4}),
    "niah_multikey_2": ("needle", {}),
    "niah_multikey_3": ("needle", {"type_needle_k": "uuids", "type_needle_v": "uuids"}),
    "niah_multivalue": ("essay", {"num_needle_v": 4}),
    "niah_multiquery": ("essay", {"num_needle_q": 4}),
}
FILES = {"vt": "vt", "cwe": "cwe", "fwe": "fwe", "qa_1": "qa_squad", "qa_2": "qa_hotpot"}
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.fixture(scope="module")
def theirs():
    """The package's modules; its sentences are found by a full stop where its data for that is not there."""
    import nltk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *args, **kwargs: False)
        from lm_eval.tasks.ruler import common_utils, cwe_utils, fwe_utils, niah_utils, prepare_niah, qa_utils, vt_utils
    with pytest.MonkeyPatch.context() as patch:
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            patch.setattr(prepare_niah, "cached_sent_tokenize", lambda text: re.split(r"(?<=[.!?]) ", text))
        yield SimpleNamespace(
            common=common_utils,
            cwe=cwe_utils,
            fwe=fwe_utils,
            niah=niah_utils,
            make=prepare_niah,
            qa=qa_utils,
            vt=vt_utils,
        )


def documents(count: int) -> list[str]:
    draw = random.Random(3)
    return [
        f"Paper {i}. " + " ".join(draw.choices(["the", "of", "in", "old", "grey", "tall"], k=30)) for i in range(count)
    ]


QUESTIONS = [
    {
        "query": f"What is in paper {i}?",
        "outputs": ["grey", f"paper {i}"],
        "context": [i],
        "more_context": [i + 1, i + 2],
    }
    for i in range(4)
]


def tokens(text: str) -> SimpleNamespace:
    """Words and marks: their loops for vt never end where an example takes more than 500 tokens."""
    return SimpleNamespace(input_ids=re.findall(r"\w+|[^\w\s]", text))


def made_there(theirs, task: str, length: int) -> list[dict]:
    """Their samples."""
    random.seed(7)
    if task in NEEDLES:
        kind, asked = NEEDLES[task]
        words = Texts().essay.words[:4000]
        haystack = "".join(words).split() if kind == "essay" else theirs.make.get_haystack(kind)
        given = dict(type_needle_k="words", type_needle_v="numbers") | asked
        return theirs.make.generate_samples(
            haystack, TOKENIZER=tokens, max_seq_length=length, type_haystack=kind, template=theirs.niah.TEMPLATE,
            num_samples=SAMPLES, **given,
        )  # fmt: skip
    if task == "vt":
        make = theirs.vt.sys_vartrack_w_noise_random
        example = make(tokenizer=tokens, num_samples=1, max_seq_length=500, incremental=5)[0]
        return make(tokenizer=tokens, num_samples=SAMPLES, max_seq_length=length, icl_example=example)
    if task == "cwe":
        return theirs.cwe.sys_word_pair_random(num_samples=SAMPLES, max_seq_length=length, tokenizer=tokens)
    if task == "fwe":
        return theirs.fwe.sys_kwext(tokenizer=tokens, max_seq_length=length, num_samples=SAMPLES)
    given = dict(docs=documents(60), qas=QUESTIONS, max_seq_length=length, num_samples=SAMPLES)
    return theirs.qa.generate_samples(tokens, **given)


def as_ours(task: str, length: int, doc: dict) -> Sample:
    return Sample("theirs", task, length, doc["input"], doc["gen_prefix"], tuple(doc["outputs"]))


def structure(sample: Sample) -> dict:
    """What a prompt is made of; numbers that depend on the words and their tokens are left out."""
    read = {"niah": needles, "vt": tracking, "cwe": common, "fwe": frequent, "qa": answering}[sample.task.split("_")[0]]
    found = {"references": sample.task[:2] == "qa" or len(sample.references)} | read(sample)
    return found | {"prefill": plain(sample, sample.prefill.strip())}


def plain(sample: Sample, text: str) -> str:
    """A text without what was drawn for it."""
    for each in sorted(
        {*sample.references, *re.findall(rf"{UUID}|[a-z]+-[a-z]+(?:-[a-z]+)*", text)}, key=len, reverse=True
    ):
        text = text.replace(each, "X")
    return re.sub(r"\d+", "N", re.sub(r"X(?:, (?:and )?X)+", "Xs", text))


def needles(sample: Sample) -> dict:
    head, _, rest = sample.prompt.partition("\n")
    told = re.findall(r"One of the special magic (\w+) for (.+?) is: ([\w-]+)\.", rest)
    kinds = {kind for kind, _, _ in told}
    keys, values = Counter(key for _, key, _ in told), [value for _, _, value in told]
    haystack = sample.task in ("niah_multikey_2", "niah_multikey_3")
    forms = [
        "uuid" if re.fullmatch(UUID, text) else "number" if re.fullmatch(r"\d{7}", text) else "words"
        for text in (*keys, *values)
    ]
    return {
        "head": head,
        "question": plain(sample, sample.prompt.rpartition("\n")[2]),
        "needles": "all" if haystack else len(told),
        "keys": "all" if haystack else len(keys),
        "values per key": sorted(set(keys.values())),
        "kinds": kinds,
        "forms": sorted(set(forms)),
        "noise": sample.prompt.count("The grass is green. The sky is blue.") > 3,
    }


def tracking(sample: Sample) -> dict:
    example, _, text = sample.prompt.rpartition("Memorize and track")
    hops = re.findall(r"VAR (\w+) = (VAR )?(\w+)", text)
    shown = re.findall(r"VAR (\w+) = (?:VAR )?\w+", example)
    return {
        "assignments": len(hops),
        "from a number": sum(not of for _, of, _ in hops),
        "letters": {len(name) for name, _, _ in hops},
        "in the example": (len(shown), {len(name) for name in shown}, "they are:" in example),
        "question": plain(sample, sample.prompt.rpartition("\n")[2]),
    }


def common(sample: Sample) -> dict:
    text = sample.prompt.rpartition("Memorize the ones")[2]
    counts = Counter(re.findall(r"\d+\. (\S+(?: [^\d\s]\S*)*)", text))
    return {
        "times": sorted(set(counts.values())),
        "most common": sorted(word for word, _ in counts.most_common(10)) == sorted(sample.references),
        "question": sample.prompt.rpartition("\n")[2],
        "head": sample.prompt.rpartition("Below is")[2].partition("\n")[0],
    }


def frequent(sample: Sample) -> dict:
    words = re.search(r"coded words\. (.*)\nQuestion", sample.prompt)[1].split()
    counts = [count for _, count in Counter(words).most_common(4)]
    return {
        "first": Counter(words).most_common(1)[0][0],
        "letters": {len(word) for word in words} - {3},
        "as 1 / rank^2": all(abs(count - counts[0] / rank**2) <= 1 for rank, count in enumerate(counts, 1)),
        "question": sample.prompt.rpartition("\n")[2],
        "head": sample.prompt.partition("coded words. ")[0],
    }


def answering(sample: Sample) -> dict:
    numbers = re.findall(r"^Document (\d+):$", sample.prompt, re.MULTILINE)
    return {
        "numbered": numbers == [str(i) for i in range(1, len(numbers) + 1)],
        "head": sample.prompt.partition("Document 1:")[0],
        "foot": sample.prompt.rpartition("Question: ")[0].rpartition("\n\nAnswer the")[2],
    }


@pytest.mark.parametrize("task", TASKS)
def test_what_a_sample_is_made_of_is_the_same(task, theirs):
    for length in LENGTHS:
        ours = make_samples(task, length, SAMPLES, readers.tokenizer())
        others = [as_ours(task, length, doc) for doc in made_there(theirs, task, length)]
        expected, found = ([structure(sample) for sample in samples] for samples in (others, ours))
        assert expected == found == [found[0]] * SAMPLES, length
        if not task.startswith("qa"):
            for sample in (*ours, *others):
                assert sorted(readers.answer(sample)) == sorted(sample.references)


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_may_be_as_long(task, theirs):
    name, limit = f"{FILES.get(task, task)}.yaml", None
    while limit is None:
        text = (Path(theirs.common.__file__).parent / name).read_text()
        limit, included = re.search(r"max_gen_toks: (\d+)", text), re.search(r"include: (\S+)", text)
        name = included and included[1]
    assert int(limit[1]) == TASKS[task].max_tokens


@pytest.mark.parametrize("task", TASKS)
def test_the_same_answers_to_the_same_samples_have_the_same_scores(task, theirs):
    draw = random.Random(11)
    process = theirs.common.process_results_part if task.startswith("qa") else theirs.common.process_results
    seen = set()
    for doc in made_there(theirs, task, 2048):
        sample, references = as_ours(task, 2048, doc), doc["outputs"]
        sample = Sample(sample.id, task, 2048, sample.prompt, "", sample.references, metric=TASKS[task].metric)
        for _ in range(20):
            said = draw.sample(references, draw.randrange(len(references) + 1)) + draw.choices(
                ["so", "x9", "\x07"], k=2
            )
            text = " ".join(draw.choice([each, each.upper()]) for each in draw.sample(said, len(said)))
            came = process(doc, [text])["2048"]
            ours = score(sample, text)
            assert ours == (float(came > 0) if task.startswith("qa") else pytest.approx(came)), text
            seen.add(ours)
    assert {0.0, 1.0} <= seen and (len(seen) > 2) == (len(sample.references) > 1 and not task.startswith("qa"))


def test_where_they_differ_ours_is_as_ruler_has_it(theirs):
    doc = {"outputs": ["grey", "tall"], "max_length": 2048}
    assert theirs.common.process_results_part(doc, ["grey"])["2048"] == 0.5  # RULER: max over the references
    sample = Sample("a", "qa_1", 2048, "", "", ("grey", "tall"), metric="any")
    assert score(sample, "grey") == 1.0
    (shown, *_), (hidden, *_) = make_samples("cwe", 2048, 1, readers.tokenizer()), made_there(theirs, "cwe", 2048)
    assert (
        shown.prompt.count("Below is a numbered list") == 2 and hidden["input"].count("Below is a numbered list") == 1
    )
    assert hidden["input_example"].count("Below is a numbered list") == 1
    (ours, *_), (other, *_) = make_samples("vt", 2048, 1, readers.tokenizer()), made_there(theirs, "vt", 2048)
    assert re.search(r"VAR \w+ = \w+ The grass", other["input"]) and not re.search(
        r"VAR \w+ = \w+ +The grass", ours.prompt
    )
