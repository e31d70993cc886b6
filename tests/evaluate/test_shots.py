"""What is asked of the harness: read, counted once, and named by all that decides its number."""

from __future__ import annotations

import pytest

from longpo_ops.evaluate.shots import HarnessTask, harness_names, harness_tasks

SHORT = {  # the first Open LLM Leaderboard's, written out
    "mmlu": (5, "acc"),
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
    "winogrande": (5, "acc"),
}


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("mmlu", HarnessTask("mmlu")),
        ("mmlu:0", HarnessTask("mmlu", 0)),
        ("mmlu:acc", HarnessTask("mmlu", None, "acc")),
        ("arc_challenge:25:acc_norm", HarnessTask("arc_challenge", 25, "acc_norm")),
        ("C:/own/task.yaml:05", HarnessTask("C:/own/task.yaml", 5)),
        ("mmlu:-1", HarnessTask("mmlu:-1")),  # which the harness does not know
    ],
)
def test_a_task_is_read_with_its_shots_and_metric(text, task):
    assert HarnessTask.parse(text) == task


def test_the_published_set_has_its_shots_and_is_asked_once():
    tasks = harness_tasks("official", ("boolq", "mmlu:5:acc", "mmlu", "boolq"))
    assert {each.task: (each.shots, each.metric) for each in tasks[:4]} == SHORT
    assert tasks[4:] == (HarnessTask("boolq"), HarnessTask("mmlu"))  # mmlu as it comes is another question
    assert harness_tasks(None, ()) == ()
    for wrong in ("offical", "", 5, ["official"]):
        with pytest.raises(ValueError, match=r"short is .*; expected official, or none"):
            harness_tasks(wrong, ())
    for wrong in ("", 5, None):
        with pytest.raises(ValueError, match=r"harness has .*; expected TASK, TASK:SHOTS or TASK:SHOTS:METRIC"):
            harness_tasks(None, (wrong,))


def test_numbers_are_named_by_what_was_asked(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("include: base.yaml\ntask: my_task  # a comment\nmetric_list: []\n")
    given = {"short": "official", "harness": ["mmlu", f"{file}:3"]}
    asked = [f"{task}:{shots}:{metric}" for task, (shots, metric) in SHORT.items()]
    assert harness_names(given) == (*asked, "mmlu", "my_task:3")
    assert harness_names({}) == ()
    file.write_text("dataset_path: json\n")
    with pytest.raises(ValueError, match=r"own\.yaml has no line task: NAME; expected the file of a task"):
        harness_names(given)
    file.unlink()
    with pytest.raises(ValueError, match=r"harness: .*own\.yaml cannot be read"):
        harness_names(given)


def test_an_evolution_can_bound_a_task_of_the_set():
    from longpo_ops.evolve.settings import Bound, Evolution, Round

    def evolution(**evaluate) -> Evolution:
        each = Round("one", 4096, ("a",), evaluate=evaluate)
        bound = Bound("harness:arc_challenge:25:acc_norm", 0.02)
        return Evolution("m", "o", (each,), {"lengths": [8], "short": "official"}, (bound,))

    assert evolution().retention[0].measure == "harness:arc_challenge:25:acc_norm"
    with pytest.raises(ValueError, match=r"is not evaluated for round 'one'; .* there is arc_challenge:5"):
        evolution(short=None, harness=["arc_challenge:5"])
