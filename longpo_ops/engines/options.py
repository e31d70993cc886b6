"""The options of the command line that say which engine answers: the same for every command that asks a model.

Tests: tests/generate/test_commands.py.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Option(help="The model: a name or a folder. Its tokenizer is used here.")]
EngineName = Annotated[str | None, typer.Option(help="transformers, vllm or server; server where endpoints are given.")]
Endpoints = Annotated[list[str] | None, typer.Option(help="URL of an OpenAI-compatible server, repeatable.")]
ServedModel = Annotated[str | None, typer.Option(help="The model's name at the server; default the only one.")]
KeyVariable = Annotated[str, typer.Option(help="Environment variable that holds the API key.")]
JudgeModel = Annotated[str | None, typer.Option(help="The judge's name there; default the only one.")]
JudgeKeyVariable = Annotated[str, typer.Option(help="Environment variable that holds the judge's API key.")]
JudgeOptions = Annotated[
    list[str] | None, typer.Option(help="name=value, repeatable: of requests to the judge, as --engine-option.")
]
Concurrency = Annotated[int, typer.Option(help="Requests under way at once, per endpoint or vLLM rank.")]
Timeout = Annotated[float, typer.Option(help="Seconds until a request counts as failed.")]
Patience = Annotated[float, typer.Option(help="Seconds without any answer until the run stops.")]
Rope = Annotated[str | None, typer.Option(help='RoPE entries to replace, as JSON: {"rope_theta": 1e7}.')]
TemplateKwargs = Annotated[str | None, typer.Option(help="Variables of the chat template, as JSON.")]
Dtype = Annotated[str, typer.Option(help="Of the weights, local engines.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        help="name=value (JSON), repeatable: vLLM engine arguments; or request fields: temperature=null leaves one out, "
        "max_tokens=NAME renames one, top_k=40 adds one."
    ),
]


def engine_fields(given: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments with those of the engine as the fields of EngineSettings.

    Raises typer.BadParameter for what is no JSON.
    """
    rest = dict(given)
    endpoints = tuple(rest.pop("endpoint") or ())
    options = rest.pop("engine_option") or ()
    return rest | {
        "engine": rest["engine"] or ("server" if endpoints else "transformers"),
        "endpoints": endpoints,
        "key_variable": rest.pop("api_key_variable"),
        "rope": from_json("--rope", rest["rope"]),
        "template_kwargs": from_json("--template-kwargs", rest["template_kwargs"]),
        "engine_options": assignments("--engine-option", options),
    }


def from_json(name: str, text: str | None) -> dict | None:
    """An option's names and values. Raises typer.BadParameter for what is no JSON object."""
    try:
        value = None if text is None else json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{name} {text}: no valid JSON: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise typer.BadParameter(f"{name} {text}: expected names and values, such as '{{\"rope_theta\": 1e7}}'")
    return value


def assignments(flag: str, given: list[str] | None) -> dict[str, Any] | None:
    """Names and values of a repeatable option; a value that is no JSON is text. Raises typer.BadParameter."""
    found = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{flag} {text}: expected name=value")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found or None
