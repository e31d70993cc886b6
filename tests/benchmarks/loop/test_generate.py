"""benchmarks/loop/generate.py with two documents and an engine that answers at once."""

import json

from benchmarks.loop.generate import main


def test_a_generation_and_a_listing_are_measured(capsys):
    main(["--documents", "2", "--tokens", "8192", "--latency", "0", "--listed", "3"])
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["generation"]["pairs"] == 2 and results["generation"]["wall_s"] > 0
    assert results["generation"]["requests"] == 2 * 4 * 3  # of every chunk the questions and both answers
    assert results["listing"]["documents"] == 3 and results["listing"]["chunks"] >= 3
