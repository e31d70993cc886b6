"""The 13 tasks: as long as asked, true to an independent reader, repeatable; and the files of questions."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from longpo_ops.evaluate.own import load_tasks
from longpo_ops.evaluate.samples import Sample, score
from longpo_ops.evaluate.sources import Texts
from longpo_ops.evaluate.tasks import CATEGORIES, LOADED, TASKS, comparable, make_samples
from longpo_ops.evaluate.tracing import VariableTracking
from longpo_ops.evaluate.vocabulary import words
from longpo_ops.evaluate.words import CommonWords
from tests.evaluate.readers import answer, chain, common, tokenizer, used

TINY_MODEL = Path(__file__).parents[2] / "longpo_ops/tiny/model"
LENGTHS = (2048, 6000, 20_000)
# What a length may fall short by: a share, or the tokens of the largest unit (a paragraph, a line of two uuids).
LARGEST_UNIT = {"qa_1": 600, "qa_2": 600, "niah_multikey_3": 140}
SETTINGS = [(name, length) for name in TASKS for length in LENGTHS]


def test_the_thirteen():
    names = [name for names in CATEGORIES.values() for name in names]
    assert sorted(names) == sorted(TASKS) and len(names) == 13
    limits = {name.split("_")[0]: task.max_tokens for name, task in TASKS.items()}
    assert limits == {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert {name for name, task in TASKS.items() if task.metric == "any"} == {"qa_1", "qa_2"}


@pytest.mark.parametrize(("name", "length"), SETTINGS)
def test_samples_fit_and_tell_the_truth(name, length):
    samples = make_samples(name, length, 3, tokenizer())
    for number, sample in enumerate(samples):
        assert sample.id == f"{name}/{length}/{number}" and (sample.task, sample.length) == (name, length)
        tokens = used(sample)
        assert tokens <= length
        assert length - tokens <= max(0.03 * length, LARGEST_UNIT.get(name, 0)), tokens
        assert all(reference in sample.prompt for reference in sample.references) or name == "qa_2"
        told = answer(sample)
        if name == "qa_2":
            assert f"{told[0]}, {told[1]}" == sample.references[0]
        else:
            assert sorted(told) == sorted(sample.references)
        assert score(sample, f"They are {', '.join(told)}.") == 1.0
        assert score(sample, "I do not know.") == 0.0
        if sample.depth is not None:
            assert sample.depth == pytest.approx(where(sample), abs=0.01)
    assert len({sample.references for sample in samples}) == len(samples)


def where(sample: Sample) -> float:
    """The depth of what answers, found by looking for it."""
    if sample.task.startswith("qa"):
        context = sample.prompt.split("given documents.\n\n", 1)[1].rpartition("\n\nAnswer the question")[0]
        sentence = re.search(r"Which word is missing here: \"(.*)\"$", sample.prompt)[1]
        found = re.search(re.escape(sentence).replace("____", r"\w+"), context).start()
        return context.rindex("Document ", 0, found) / len(context)
    context = sample.prompt.partition("\n")[2].rpartition("\n")[0]
    return re.search(rf"One of the special magic \w+ for \S+ is: {sample.references[0]}", context).start() / len(
        context
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_its_number_and_the_seed_alone(name):
    three = make_samples(name, 2500, 3, tokenizer())
    assert make_samples(name, 2500, 1, tokenizer()) == three[:1]
    assert make_samples(name, 2500, 3, tokenizer(), texts=Texts()) == three
    other = make_samples(name, 2500, 3, tokenizer(), seed=1)
    assert all(a.prompt != b.prompt for a, b in zip(three, other))


@pytest.mark.parametrize("name", TASKS)
def test_a_length_too_short_names_the_least(name):
    with pytest.raises(ValueError, match=rf"{name}: 150 tokens are too few; sample 0 takes at least \d+") as error:
        make_samples(name, 150, 1, tokenizer())
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    (sample,) = make_samples(name, least, 1, tokenizer())
    assert used(sample) <= least
    with pytest.raises(ValueError, match="too few"):
        make_samples(name, least - 1, 1, tokenizer())


def test_more_than_the_text_goes_round(tmp_path):
    (tmp_path / "short.txt").write_text("\n\n".join(f"{paragraph(i)}" for i in range(12)))
    texts = Texts((str(tmp_path),))
    for name in ("niah_multiquery", "qa_1", "qa_2"):
        (sample,) = make_samples(name, 20_000, 1, tokenizer(), texts=texts)
        assert 0.96 * 20_000 <= used(sample) <= 20_000
        assert sorted(answer(sample)) == sorted(
            sample.references if name != "qa_2" else sample.references[0].split(", ")
        )
        if name == "qa_1":
            assert sample.prompt.count(sample.references[0]) == 1  # the needed document stands there once


def paragraph(number: int) -> str:
    """Thirty words, and two of its own in one sentence."""
    own = "abcdefghijkl"[number] * 6
    return (
        "The harbour of this town has a pier, and on the pier there is a lamp that burns at night. "
        f"Its keeper was known as {own} to all who came from {own[:5]} by boat in those days."
    )


def test_arguments():
    with pytest.raises(ValueError, match=r"no task 'niah'; there are niah_single_1, .*qa_2"):
        make_samples("niah", 1000, 1, tokenizer())
    with pytest.raises(ValueError, match=r"length is 1000\.0"):
        make_samples("vt", 1000.0, 1, tokenizer())
    with pytest.raises(ValueError, match="count is 0"):
        make_samples("vt", 1000, 0, tokenizer())


# -- RULER's definitions -----------------------------------------------------------------------------------------------


def test_variable_tracking_as_ruler_has_it():
    draft = VariableTracking(example_lines=15).draft("0", 0, 4096, 50, Texts())
    asked = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    example, question = (asked + text for text in draft.prompt.split(asked)[1:])
    assert draft.prompt.startswith(asked) and re.search(r"[A-Z]{3}\n\n\Z", example)  # one empty line between them
    solved, _, told = example.partition(" Answer: According to the chain(s) of variable assignment in the text above, ")
    value = re.search(r"5 variables are assgined the value (\d{5}), they are: ", told)
    assert told[value.end() :].split() == chain(solved) and all(len(name) == 3 for name in chain(solved))
    assert len(draft.references) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in draft.references)
    told = re.findall(r"VAR (\w+) = ", question)
    assert tuple(told) == draft.references  # the chain runs down the text
    assert question.count("The grass is green.") == 50 and solved.count("The grass is green.") == 15
    assert re.fullmatch(
        r" Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assgined the "
        r"value \d{5}, they are: ",
        draft.prefill,
    )


def test_the_solved_chain_fills_500_tokens_with_its_question_and_the_beginning_of_the_answer():
    def split(text: str, **_) -> dict[str, list[str]]:  # about what usual tokenizers make of it
        return {"input_ids": re.findall(r"[A-Za-z]+|\d|[^\w ]", text)}

    def example(task: VariableTracking) -> str:
        return re.match(r"(?s)Memorize.*?they are: ", task.draft("0", 0, 4096, 50, Texts()).prompt)[0]

    full = VariableTracking().filled(split)
    assert full.example_lines == 15 and len(split(example(full))["input_ids"]) <= 500
    assert len(split(example(VariableTracking(example_lines=16)))["input_ids"]) > 500
    for letters, lines in ((AutoTokenizer.from_pretrained(TINY_MODEL), 7), (tokenizer(), 5)):  # five at least
        (sample,) = make_samples("vt", 4000, 1, letters)
        assert sample.prompt.partition("Question: ")[0].count("The grass is green.") == lines


@pytest.mark.parametrize("name", TASKS)
def test_another_length_asks_the_same(name):
    def asked(sample: Sample) -> tuple:
        question = re.split(r"\n(?=What|Question)", sample.prompt)[-1]
        return question, sample.prefill, sample.references

    few = [asked(sample) for sample in make_samples(name, 3000, 2, tokenizer())]
    assert few[0] != few[1]
    assert [asked(sample) for sample in make_samples(name, 6000, 2, tokenizer())] == few


ANY = ("words", "uuids", {"digits": 4})


@pytest.mark.parametrize(
    ("keys", "counts"),
    [
        *((keys, {"needles_per_sample": 3, "haystack": "needles"}) for keys in ANY),
        *((keys, {"every": 150}) for keys in (*ANY, [f"town {i}" for i in range(60)])),
    ],
)
def test_another_length_asks_the_same_of_ones_own_needles(keys, counts, tmp_path):
    own = {
        "name": "own",
        "needle": " {key}: {value}.",
        "question": "What is {key}?",
        "keys": keys,
        "value": {"digits": 5},
    }
    (tmp_path / "own.yaml").write_text(json.dumps(own | counts))
    load_tasks(tmp_path / "own.yaml")
    try:
        short, long = (make_samples("own", length, 3, tokenizer()) for length in (1000, 6000))
    finally:
        LOADED.clear()
    assert [sample.references for sample in short] == [sample.references for sample in long]
    assert [sample.prompt.rpartition("\n")[2] for sample in short] == [
        sample.prompt.rpartition("\n")[2] for sample in long
    ]


@pytest.mark.parametrize(
    ("length", "units", "often", "seldom", "example"), [(8192, 60, 30, 3, (10, 3, 40)), (4095, 60, 6, 1, (3, 1, 20))]
)
def test_common_words_as_ruler_has_them(length, units, often, seldom, example):
    draft = CommonWords().draft("0", 0, length, units, Texts())
    solved, _, question = draft.prompt.partition("\nBelow is")
    for text, high, low, size in ((question, often, seldom, units), (solved.partition("Question")[0], *example)):
        entries = re.findall(r"(\d+)\. (\S+)", text)
        assert [int(number) for number, _ in entries] == list(range(1, 10 * high + (size - 10) * low + 1))
        counts = [[word for _, word in entries].count(word) for word in {word for _, word in entries}]
        assert sorted(set(counts)) == [low, high] and counts.count(high) == 10
    told = solved.rpartition("list are:")[2]
    assert sorted(re.findall(r"\d+\. (\S+)", told)) == sorted(common(solved.partition("Question")[0]))


def test_words_are_of_one_kind_at_all_lengths():
    for units in (11, 300, 5000, len(words()), 3 * len(words()) + 1):
        draft = CommonWords().draft("0", 0, 100_000, units, Texts())
        counts = Counter(re.findall(r"\d+\. (\S+)", draft.prompt.rpartition("\nBelow is")[2]))
        assert set(counts) <= set(words()) and len(counts) == min(units, len(words()))
        common = {counts.pop(word) for word in draft.references}
        fold = max(1, (units - 10) / (len(words()) - 10))  # beyond the words there are, each recurs more often
        assert common == {int(30 * fold)} and set(counts.values()) <= {int(3 * fold), int(3 * fold) + 1}
        assert (
            sum(counts.values()) == 3 * (units - 10)
            and draft.references == CommonWords().draft("0", 0, 4096, 11, Texts()).references
        )


def test_the_words_are_as_many_as_rulers_and_none_is_part_of_another():
    every = set(words())
    assert len(every) == len(words()) >= 8166 and list(words()) == sorted(every)
    for word in every:
        assert re.fullmatch("[a-z]{3,10}", word)
        inside = {word[i:j] for i in range(len(word)) for j in range(i + 3, len(word) + 1)} - {word}
        assert not inside & every, word


# -- questions ---------------------------------------------------------------------------------------------------------


def squad(articles: int = 6, paragraphs: int = 5) -> dict:
    """SQuAD's format, with a question that has no answer."""
    data = []
    for a in range(articles):
        texts = [f"Town {a}, harbour {p}. The keeper of lamp {a}-{p} is Keeper{a}x{p}." for p in range(paragraphs)]
        data.append({
            "title": f"Town {a}",
            "paragraphs": [{
                "context": text,
                "qas": [
                    {"question": f"Who keeps lamp {a}-{p}?", "id": f"{a}{p}", "is_impossible": False,
                     "answers": [{"text": f"Keeper{a}x{p}", "answer_start": 0}] * 2},
                    {"question": "Who knows?", "id": f"{a}{p}n", "is_impossible": True, "answers": []},
                ],
            } for p, text in enumerate(texts)],
        })  # fmt: skip
    return {"version": "v2.0", "data": data}


def hotpotqa(rows: int = 8) -> list:
    """HotpotQA's format: two of ten paragraphs are needed, and all ten belong to the question."""
    return [
        {
            "_id": str(i),
            "question": f"Where was the keeper of lamp {i} born?",
            "answer": f"Town{i}",
            "context": [
                [f"Title {i}-{j}", [f"Sentence one of {i}-{j}.", f" Keeper {i} of Town{i}."]] for j in range(10)
            ],
        }
        for i in range(rows)
    ]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(squad()))
    (tmp_path / "hotpot.json").write_text(json.dumps(hotpotqa()))
    return tmp_path


def test_squad_questions(files):
    texts = Texts(questions=str(files / "squad.json"))
    first, second, *_ = make_samples("qa_1", 900, 40, tokenizer(), texts=texts)
    assert first.prompt.endswith("\n\nQuestion: Who keeps lamp 0-0?") and first.references == ("Keeper0x0",)
    assert second.references == ("Keeper0x1",)  # the file's order
    documents = re.findall(r"Document \d+:\n(.*)", first.prompt)
    assert len(set(documents)) == len(documents) > 5
    assert {text for text in documents if text.startswith("Town 0")} == {
        f"Town 0, harbour {p}. The keeper of lamp 0-{p} is Keeper0x{p}." for p in range(5)
    }  # the article's others come before any other
    assert comparable("qa_1", texts) and not comparable("qa_2", texts)
    assert make_samples("qa_2", 3000, 1, tokenizer(), texts=texts)[0].prompt.count("____") == 2


def test_hotpotqa_questions(files):
    texts = Texts(questions=str(files))
    (sample,) = make_samples("qa_2", 2500, 1, tokenizer(), texts=texts)
    assert sample.references == ("Town0",) and sample.depth is None
    assert all(f"\nTitle 0-{j}\nSentence one of 0-{j}. Keeper 0 of Town0." in sample.prompt for j in range(10))
    assert comparable("qa_1", texts) and comparable("qa_2", texts)


def test_numbered_documents(files):
    (sample,) = make_samples("qa_1", 4000, 1, tokenizer(), texts=Texts(questions=str(files)))
    numbers = [int(number) for number in re.findall(r"Document (\d+):\n", sample.prompt)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 30  # more than there are: round again
    assert sample.prompt.count("lamp 0-0 is") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"rows": []}', "neither SQuAD's JSON"),
        ('[{"question": "a"}]', "neither SQuAD's JSON"),
        ('"text"', "neither SQuAD's JSON"),
        ('{"data": []}', "no question with an answer"),
        ("[]", "no question with an answer"),
    ],
)
def test_bad_question_files(tmp_path, content, message):
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        make_samples("qa_1", 2000, 1, tokenizer(), texts=Texts(questions=str(tmp_path / "questions.json")))


def test_folders_of_questions(tmp_path):
    with pytest.raises(ValueError, match="no questions in"):
        _ = Texts(questions=str(tmp_path)).published
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(squad(1, 1)))
    with pytest.raises(ValueError, match="second file in the format of squad"):
        _ = Texts(questions=str(tmp_path)).published


def test_texts_without_paragraphs_make_no_questions(tmp_path):
    (tmp_path / "a.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="too few paragraphs to make questions from"):
        make_samples("qa_1", 2000, 1, tokenizer(), texts=Texts((str(tmp_path / "a.txt"),)))


def test_what_is_comparable():
    local = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "qa_1", "qa_2"}
    assert {name for name in TASKS if not comparable(name)} == local
    with pytest.raises(ValueError, match="no task 'other'"):
        comparable("other")
