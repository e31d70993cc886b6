"""Ranks of an engine on several GPUs: given, passed on, and refused where they make no sense."""

import pytest
import torch

from longpo_ops.engines.settings import EngineSettings


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def vllm(**options) -> EngineSettings:
    return EngineSettings(model="m", engine="vllm", engine_options=options, concurrency=8)


def test_ranks_reach_vllm_and_each_has_its_share_of_requests():
    options = {"tensor_parallel_size": 2, "data_parallel_size": 4, "gpu_memory_utilization": 0.8}
    engine = vllm(**options).make_engine(4096)
    assert options.items() <= engine.arguments.items() and engine.arguments["max_model_len"] == 4096
    assert (engine.ranks, engine.concurrency) == (4, 32)


def test_fields_that_change_answers_are_told_from_others():
    options = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": 3, "top_k": 4}
    given = EngineSettings(model="m", engine="server", endpoints=("http://h/v1",), engine_options=options)
    assert given.own_fields == {"temperature": None, "seed": 3} and vllm(seed=3).own_fields == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "engine option tensor_parallel_size=0: expected a whole number of ranks"),
        ({"data_parallel_size": "4"}, "engine option data_parallel_size='4': expected a whole number"),
        ({"data_parallel_size": True}, "engine option data_parallel_size=True: expected a whole number"),
        (
            {"data_parallel_size": 2, "data_parallel_rank": 0},
            "option data_parallel_rank: vLLM in this process starts all",
        ),
        ({"nnodes": 2}, "option nnodes: vLLM in this process starts all its ranks on this machine.* endpoints"),
    ],
)
def test_ranks_that_this_process_cannot_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vllm(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timeout": float("nan")}, "timeout=nan: expected a finite number"),
        ({"patience": float("inf")}, "patience=inf: expected a finite number"),
        ({"concurrency": 1.5}, "concurrency=1.5: expected int"),
        ({"concurrency": True}, "concurrency=True: expected int"),
        ({"rope": {"rope_theta": float("nan")}}, "rope={'rope_theta': nan}: expected finite numbers"),
        ({"endpoints": "http://a"}, "endpoints: a str came; expected list or tuple"),
        ({"trust_remote_code": 1}, "trust_remote_code=1: expected bool"),
    ],
)
def test_settings_of_another_kind_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        EngineSettings(model="m", **changes)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    sizes = {"tensor_parallel_size": 2, "data_parallel_size": 4}
    message = "engine options tensor_parallel_size=2, data_parallel_size=4 take 8 GPUs; there are 4 here"
    with pytest.raises(ValueError, match=message):
        vllm(**sizes)
    assert vllm(**sizes, distributed_executor_backend="ray").engine_options  # whose GPUs may be elsewhere
    assert vllm(**sizes | {"data_parallel_size": 2}).engine_options


def test_ranks_are_none_of_a_request_to_a_server_nor_of_transformers():
    endpoints = ("http://127.0.0.1:8000/v1",)
    with pytest.raises(ValueError, match="start it with them: vllm serve m --tensor-parallel-size 2"):
        EngineSettings(
            model="m", engine="server", endpoints=endpoints, engine_options={"top_k": 1, "tensor_parallel_size": 2}
        )
    with pytest.raises(
        ValueError, match=r"options \['tensor_parallel_size'\]; the transformers engine has none, and one"
    ):
        EngineSettings(model="m", engine_options={"tensor_parallel_size": 2})
    assert EngineSettings(model="m", engine="server", endpoints=endpoints, engine_options={"top_k": 1}).engine_options
