"""Needle tasks: RULER's wording, places between sentences, and a user's own from YAML."""

import re
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from longpo_ops.evaluate.needles import RULER, NeedleTask
from longpo_ops.evaluate.own import load_tasks
from longpo_ops.evaluate.samples import score
from longpo_ops.evaluate.sources import Texts
from longpo_ops.evaluate.tasks import LOADED, comparable, make_samples
from longpo_ops.evaluate.text import NOISE, Prose, fill, scatter
from tests.evaluate.readers import tokenizer, used

CODES = """
name: codes
needle: " The code: {key} {value}."
question: "What is the code of {key}?"
keys: [Alice, Bob, Cleo, Dan, Eve, Finn, Gil, Hal, Ida, Jon, Kim, Lea, Max, Nia, Ola, Pia, Quin, Rob, Sue, Tom]
value: {digits: 4}
every: 110
max_tokens: 24
"""


@pytest.fixture
def load(tmp_path):
    """load(yaml): the task of tmp_path/task.yaml with that text; forgotten afterwards."""

    def read(text: str):
        (tmp_path / "task.yaml").write_text(text)
        (task,) = load_tasks(tmp_path / "task.yaml").values()
        return task

    yield read
    LOADED.clear()


def test_rulers_wording():
    by_name = {task.name: task for task in RULER}
    single, several = by_name["niah_single_3"], by_name["niah_multiquery"]
    one = single.draft("0", 0, 1000, 40, Texts())
    assert one.prompt.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "uuid afterwards.\n"
    )
    key = re.search(r"One of the special magic uuids for ([a-z]+-[a-z]+) is: ([0-9a-f-]{36})\.", one.prompt)
    assert one.references == (key[2],)
    assert one.prompt.endswith(f"\nWhat is the special magic uuid for {key[1]} mentioned in the provided text?")
    assert one.prefill == f" The special magic uuid for {key[1]} mentioned in the provided text is"
    four = several.draft("0", 0, 1000, 40, Texts())
    assert four.prompt.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n"
    )
    keys = re.search(
        r"\nWhat are all the special magic numbers for (.*) mentioned in the provided text\?$", four.prompt
    )
    assert re.fullmatch(r"[a-z-]+, [a-z-]+, [a-z-]+, and [a-z-]+", keys[1])
    assert four.prefill == f" The special magic numbers for {keys[1]} mentioned in the provided text are"
    assert all(re.fullmatch(r"[1-9]\d{6}", value) for value in four.references)


@pytest.mark.parametrize(
    ("name", "keys", "needles", "references"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_multikey_1", 4, 4, 1),
        ("niah_multikey_2", 41, 41, 1),
        ("niah_multikey_3", 41, 41, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_rulers_numbers_of_needles(name, keys, needles, references):
    (task,) = (task for task in RULER if task.name == name)
    draft = task.draft("0", 0, 1000, 40, Texts())
    found = re.findall(r"One of the special magic \w+ for (\S+) is: \S+\.", draft.prompt)
    assert (len(set(found)), len(found), len(draft.references)) == (keys, needles, references)
    assert (draft.depth is None) == (references > 1)


def test_noise_lines_stand_alone():
    draft = RULER[0].draft("0", 0, 1000, 40, Texts())
    lines = Counter(draft.prompt.split("\n"))
    assert lines[NOISE] == 40 and len(lines) == 4  # beside the needle, what comes before and the question


def test_a_needle_is_written_between_sentences(load):
    """Around every needle the text is as it was, and it ends a sentence or a paragraph before the needle."""
    task, texts = load(CODES), Texts()
    prompt = task.draft("3", 0, 1100, 700, texts).prompt
    context = prompt.rpartition("\n\n")[0]
    pieces = re.split(r"(?:\A| )The code: [A-Z][a-z]+ \d{4}\.", context)
    assert len(pieces) == 11
    source = "\n\n".join(text.strip() for text in texts.documents)
    assert all(piece.strip() in source for piece in pieces)
    assert "".join(pieces).strip() in source
    for before, after in pairwise(pieces):
        assert not before.strip() or re.search(r"[.!?]['\")\]]*$", before) or re.match(r"\s*\n\s*\n", after)


def test_no_needle_behind_a_sentence_cut_short(load, tmp_path):
    (tmp_path / "four.txt").write_text("One two three four. " * 30)
    task, texts = load(CODES.replace("every: 110", "needles_per_sample: 1")), Texts((str(tmp_path / "four.txt"),))
    prompts = [task.draft(str(i), 0, 0, 7, texts).prompt for i in range(60)]
    assert {prompt.partition("The code: ")[0] for prompt in prompts} == {"", "One two three four. "}


def test_own_task(load):
    load(CODES)
    samples = make_samples("codes", 1024, 6, tokenizer())
    assert [sample.id for sample in samples] == [f"codes/1024/{i}" for i in range(6)]
    for sample in samples:
        assert 0.97 * 1024 <= used(sample) <= 1024 and sample.max_tokens == 24
        needles = re.findall(r"The code: ([A-Z][a-z]+) (\d{4})\.", sample.prompt)
        assert len(needles) == 9 and len({key for key, _ in needles}) == 9
        key = re.search(r"\n\nWhat is the code of (\w+)\?$", sample.prompt)[1]
        assert sample.references == (dict(needles)[key],)
        context = sample.prompt.rpartition("\n\n")[0]
        assert sample.depth == pytest.approx(context.index(f"The code: {key}") / len(context), abs=0.001)
    assert len({sample.prompt[:200] for sample in samples}) > 1 and not comparable("codes")


def test_depths_spread_over_the_whole_text():
    depths = [RULER[0].draft(str(i), 0, 1000, 40, Texts()).depth for i in range(200)]
    assert min(depths) < 0.05 and max(depths) > 0.95
    assert 0.4 < sum(depths) / 200 < 0.6


def test_asking_for_several_with_a_prefill(load):
    text = CODES.replace("every: 110", "needles_per_sample: 5\nasked: 2\nprefill: 'The codes of {key} are'")
    draft = load(text).draft("0", 0, 300, 100, Texts())
    names = re.search(r"What is the code of (\w+), and (\w+)\?$", draft.prompt)
    assert draft.prefill == f"The codes of {names[1]}, and {names[2]} are" and len(draft.references) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: codes\n", ""), "name missing"),
        (("every: 110", "evry: 110"), "unknown evry; the fields are name, needle"),
        (("every: 110", "every: 110\nneedles_per_sample: 4"), "give one of them"),
        (("every: 110", "every: 0"), "every is 0; expected a whole number"),
        (("every: 110", "needles_per_sample: 21"), "needs 21 keys and there are 20"),
        (("every: 110", "needles_per_sample: 2\nasked: 3"), "asks for 3 keys of 2"),
        (("{key} {value}.", "{key}."), r"needle ' The code: {key}\.' lacks {value}"),
        (("code of {key}?", "code?"), "lacks {key}"),
        (("value: {digits: 4}", "value: {digits: 4}\ntemplate: 'Read: {context}'"), "lacks {question}"),
        (("value: {digits: 4}", "value: {letters: 4}"), "expected a list, words, uuids"),
        (("value: {digits: 4}", "value: {digits: many}"), "value is 'many'"),
        (("Alice, Bob", "Alice, Alice"), "keys has an entry twice: 'Alice'"),
        (("Alice, Bob", "no, 12"), "quote numbers, yes and no"),
        (("max_tokens: 24", "max_tokens: 24\nhaystack: hay"), "haystack is 'hay'; expected one of prose"),
        (("max_tokens: 24", "max_tokens: 24\nhaystack: needles"), "takes any number of keys"),
        (("name: codes", "name: niah_single_1"), "is one of RULER's tasks"),
        (("name: codes", "name: a b"), "has letters, digits"),
        (("name: codes", "name: [codes"), "no valid YAML"),
    ],
)
def test_bad_files(load, change, message):
    assert change[0] in CODES
    with pytest.raises(ValueError, match=message):
        load(CODES.replace(*change))
    assert not LOADED


def test_files_that_are_none(load, tmp_path):
    with pytest.raises(ValueError, match="expected the fields of a needle task"):
        load("- a list")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tasks(tmp_path / "missing.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no needle tasks in"):
        load_tasks(tmp_path / "empty")
    for name in "ab":
        (tmp_path / "empty" / f"{name}.yaml").write_text(CODES)
    with pytest.raises(ValueError, match="name 'codes' is another file's too"):
        load_tasks(tmp_path / "empty")


def test_too_few_keys_at_a_length_are_told(load):
    load(CODES)
    with pytest.raises(ValueError, match="needs 37 keys at 4096 tokens and there are 20"):
        make_samples("codes", 4096, 1, tokenizer())


# -- haystacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "One. Two is\nlonger here! A third?\n\nNew paragraph, no end\n\nLast.",
        "# Head\n\nText one. Text two.\n\n```\ncode. more\n```\nend",
        "\u6e2f\u53e3\u7684\u65e5\u5fd7\u3002\u8239\u957f\u56de\u5bb6\u3002",
        "word",
    ],
)
def test_prose_is_the_text_it_was_read_from(text):
    prose = Prose.read(text)
    assert "".join(prose.words) == text and prose.sentences[0] == 0


def test_sentences_begin_where_a_reader_says():
    prose = Prose.read("One. Two is\nlonger here! A third?\n\nNew paragraph, no end\n\nLast.")
    words = [prose.words[i].strip() for i in prose.sentences]
    assert words == ["One.", "Two", "A", "New", "Last."]


def test_a_stretch_goes_round():
    prose = Prose.read("\n\na b. c d. e f.")
    words, gaps = prose.stretch(Random(1), 14)
    assert len(words) == 14 and gaps == [0, 2, 4, 6, 8, 10, 12, 14]
    assert "".join(words).split() == ("".join(words).split()[:6] * 3)[:14]
    assert prose.stretch(Random(1), 3)[1] == [0, 2] and prose.stretch(Random(1), 6)[1] == [0, 2, 4, 6]


def test_scatter_keeps_all_and_tells_where():
    units = [f" u{i}" for i in range(30)]
    for seed in range(20):
        text, starts = scatter(Random(seed), units, [" <1>", " <2>", " <3>"])
        assert re.sub(r"<\d> ?", "", text).split() == [unit.strip() for unit in units]
        assert [text[start:].lstrip()[:3] for start in starts] == ["<1>", "<2>", "<3>"]
    text, starts = scatter(Random(0), units[:1], [" <1>", " <2>", " <3>"])
    assert len(text) == len("".join([*units[:1], " <1>", " <2>", " <3>"]).lstrip())


def test_what_is_filled_in_is_not_looked_at():
    assert fill("{a} and {b} {c}", a="{b}", b="x") == "{b} and x {c}"


def test_users_texts(tmp_path, load):
    (tmp_path / "story.txt").write_text("The harbour was quiet that day. Nobody came. " * 400)
    load(CODES.replace("every: 110", "needles_per_sample: 1"))
    texts = Texts((str(tmp_path / "story.txt"),))
    (sample,) = make_samples("codes", 600, 1, tokenizer(), texts=texts)
    assert "harbour was quiet" in sample.prompt and score(sample, sample.prompt) == 1.0


def test_unreadable_texts(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00\x00\x01")
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match=r"no text in .*binary file.*expected files with readable text"):
        _ = Texts((str(tmp_path),)).documents
    with pytest.raises(ValueError, match="no documents at"):
        _ = Texts((str(tmp_path / "missing"),)).documents


def test_bad_tasks_in_code():
    fields = dict(name="t", needle="{key} {value}", question="{key}", keys="words", value="words")
    assert NeedleTask(**fields).haystack == "prose"
    with pytest.raises(ValueError, match="needle is 5; expected text"):
        NeedleTask(**fields | {"needle": 5})
    with pytest.raises(ValueError, match="keys is 19"):
        NeedleTask(**fields | {"keys": 19})
