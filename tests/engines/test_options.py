"""The engines' arguments for the options of model.yaml, also on machines unlike this one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cogpress import config
from cogpress.engines import base as engine
from cogpress.engines import gpus, grammar, transformers, vllm
from cogpress.errors import CogpressError
from cogpress.weights import base, manifest

ROOT = Path(__file__).resolve().parents[2]

AMPERE, TURING = (8, 0), (7, 5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 24}))
    return tmp_path


def options(folder: Path, gpus: int = 0, capability: Any = None, adapters: int = 0, **serve: Any) -> dict[str, Any]:
    return vllm.options(folder, config.Serve(**serve), 64, adapters, gpus, capability)


def test_on_a_cpu(folder: Path) -> None:
    found = options(folder)
    assert found["enforce_eager"] is True, "compiled mode may answer wrongly on a CPU"
    assert (found["tensor_parallel_size"], found["pipeline_parallel_size"]) == (1, 1)
    assert (found["max_num_seqs"], found["max_model_len"], found["enable_prefix_caching"]) == (64, -1, True)
    assert found["trust_remote_code"] is False
    assert found["load_format"] == "safetensors"
    assert found["disable_log_stats"] is True
    assert not {"gpu_memory_utilization", "enable_lora", "speculative_config", "quantization"} & found.keys()


def test_every_thread_of_a_child_gets_lower_priority() -> None:
    program = "import threading, sys; [threading.Thread(target=sys.stdin.read).start() for _ in range(3)]; print('on')"
    with subprocess.Popen(
        [sys.executable, "-uc", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "on\n"
        before = os.getpriority(os.PRIO_PROCESS, 0)
        vllm.lower_priority()
        vllm.lower_priority()
        threads = [thread.id for thread in psutil.Process(child.pid).threads()]
        assert len(threads) == 4
        assert {os.getpriority(os.PRIO_PROCESS, one) for one in threads} == {max(before, grammar.NICENESS)}
        assert os.getpriority(os.PRIO_PROCESS, 0) == before
        child.stdin.close()


def test_threads_are_pinned_to_one_core() -> None:
    program = (
        "import os, threading, time, psutil; from cogpress.engines import vllm; wait = threading.Event()\n"
        "start = lambda: threading.Thread(target=wait.wait).start()\n"
        "start(); vllm.pin_threads(); start()\n"
        "cores = [os.sched_getaffinity(thread.id) for thread in psutil.Process().threads()]; wait.set()\n"
        "print(len(cores), {len(one) for one in cores}, max(cores[0]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["3", "{1}", str(max(os.sched_getaffinity(0)))]


@pytest.mark.slow
def test_openmp_is_bound_to_cores_while_an_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_PLACES", raising=False)
    cores = sorted(os.sched_getaffinity(0))
    program = "import torch, os; print(torch.get_num_threads(), sorted(os.sched_getaffinity(0)))"
    with vllm.computing_on(cores[:1]):
        started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert started.stdout.strip() == f"1 {cores[:1]}"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OMP_PLACES" not in os.environ


def test_on_gpus(folder: Path) -> None:
    found = options(folder, 1, AMPERE, gpu_memory_share=0.5, cpu_offload_gb=4, kv_offload_gb=2)
    assert found["enforce_eager"] is False
    assert (found["dtype"], found["gpu_memory_utilization"]) == ("auto", 0.5)
    assert (found["cpu_offload_gb"], found["kv_offloading_size"]) == (4, 2)
    assert options(folder, 1, AMPERE, mode="eager")["enforce_eager"] is True


@pytest.mark.parametrize(
    ("asked", "capability", "got"),
    [("auto", TURING, "float16"), ("auto", AMPERE, "auto"), ("bfloat16", TURING, "bfloat16")],
)
def test_the_dtype_follows_the_gpu(folder: Path, asked: str, capability: Any, got: str) -> None:
    assert options(folder, 1, capability, dtype=asked)["dtype"] == got


def test_the_dtype_follows_what_the_cpu_computes_faster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fastest, got in ((torch.float32, "float32"), (torch.bfloat16, "auto")):
        monkeypatch.setattr(base, "compute_dtype", lambda found=fastest: found)
        assert options(folder)["dtype"] == got
    monkeypatch.setattr(base, "compute_dtype", lambda: torch.float32)
    assert options(folder, dtype="bfloat16")["dtype"] == "bfloat16"
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 24, "quantization_config": {}}))
    assert options(folder)["dtype"] == "auto", "kernels for quantized weights require their dtype"


QWEN_7B = {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
LLAMA_8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
FEW_KV_HEADS = {"num_attention_heads": 24, "num_key_value_heads": 3}
AWQ_14B = {
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 13824,
    "quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": 128}}}},
}
MIXTURE = {"text_config": {"num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768}}


@pytest.mark.parametrize(
    ("model", "gpus", "serve", "got"),
    [
        ({}, 1, {}, (1, 1, 1)),
        ({}, 2, {}, (2, 1, 1)),
        ({}, 5, {}, (4, 1, 1)),
        ({}, 8, {}, (8, 1, 1)),
        ({}, 8, {"pipeline_parallel": 2}, (4, 2, 1)),
        ({}, 8, {"tensor_parallel": 2}, (2, 1, 1)),
        ({}, 8, {"tensor_parallel": 2, "pipeline_parallel": 4}, (2, 4, 1)),
        ({}, 8, {"tensor_parallel": 2, "data_parallel": 4}, (2, 1, 4)),
        ({}, 16, {}, (12, 1, 1)),
        (QWEN_7B, 8, {}, (4, 1, 2)),
        (QWEN_7B, 8, {"data_parallel": 1}, (4, 1, 1)),
        (QWEN_7B, 8, {"data_parallel": 8}, (1, 1, 8)),
        (LLAMA_8B, 8, {}, (8, 1, 1)),
        (FEW_KV_HEADS, 8, {}, (6, 1, 1)),
        (FEW_KV_HEADS, 4, {}, (3, 1, 1)),
        (AWQ_14B, 8, {}, (4, 1, 2)),
        (MIXTURE, 16, {}, (16, 1, 1)),
    ],
)
def test_gpus_are_divided_as_the_model_allows(
    folder: Path, model: dict[str, Any], gpus: int, serve: dict[str, Any], got: tuple[int, int, int]
) -> None:
    if model:
        (folder / "config.json").write_text(json.dumps(model))
    found = options(folder, gpus, AMPERE, **serve)
    divided = (found["tensor_parallel_size"], found["pipeline_parallel_size"], found.get("data_parallel_size", 1))
    assert divided == got


@pytest.mark.parametrize(("gigabytes", "got"), [(80, (4, 1, 2)), (4, (4, 2, 1)), (2, (4, 2, 1))])
def test_weights_that_need_more_gpus_get_stages_instead_of_copies(
    folder: Path, gigabytes: int, got: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    monkeypatch.setattr(manifest, "weights_bytes", lambda folder: 15 * 10**9)
    assert gpus.parallel(folder, config.Serve(), 8, gigabytes * 10**9) == got


@pytest.mark.parametrize(
    ("shares", "free", "engines", "got"),
    [
        ("auto", 80, "", 0.9),
        ("auto", 40, "", 0.48),
        ("auto", 80, "2", 0.45),
        ("auto", 20, "2", 0.23),
        (0.7, 9, "", 0.7),
    ],
)
def test_an_engine_takes_what_is_free_of_a_gpu(
    shares: Any, free: float, engines: str, got: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpus.ENGINES, engines)
    assert gpus.memory_share(config.Serve(gpu_memory_share=shares), free * 1e9, 80e9) == pytest.approx(got)


def test_a_gpu_that_is_full_is_said() -> None:
    with pytest.raises(CogpressError, match=r"3\.0 of 80\.0 GB are free"):
        gpus.memory_share(config.Serve(), 3e9, 80e9)


@pytest.mark.parametrize(
    ("gpus", "serve", "said"),
    [
        (0, {"tensor_parallel": 2}, "tensor_parallel needs GPUs, and this machine has none"),
        (0, {"data_parallel": 2}, "data_parallel needs GPUs, and this machine has none"),
        (2, {"tensor_parallel": 4}, "tensor_parallel needs 4 GPUs; this machine has 2"),
        (4, {"tensor_parallel": 2, "data_parallel": 4}, "tensor_parallel x data_parallel needs 8 GPUs; this machine"),
        (8, {"tensor_parallel": 5}, "does not divide the 24 attention heads"),
        (0, {"mode": "compiled"}, "gives wrong answers on a CPU"),
        (0, {"adapters": 513}, "has rank 513; vLLM serves at most 512"),
    ],
)
def test_impossible_options_are_refused(folder: Path, gpus: int, serve: dict[str, Any], said: str) -> None:
    with pytest.raises(CogpressError, match=said):
        options(folder, gpus, AMPERE if gpus else None, **serve)


def test_other_options_reach_vllm(folder: Path) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
    found = options(
        folder,
        max_context=4096,
        kv_cache_dtype="fp8",
        chunked_prefill=False,
        max_batched_tokens=512,
        prefix_caching=False,
        speculative=speculative,
        metrics_port=9000,
    )
    assert found["speculative_config"] == speculative
    assert (found["max_model_len"], found["kv_cache_dtype"]) == (4096, "fp8")
    assert (found["enable_chunked_prefill"], found["max_num_batched_tokens"]) == (False, 512)
    assert (found["enable_prefix_caching"], found["disable_log_stats"]) == (False, False)


def test_compiled_code_is_the_projects_own(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM runs what it finds there: no folder but the project's `weights/` may bring it."""
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setattr(vllm, "ROOT", tmp_path)
    own, foreign = tmp_path / "weights", tmp_path / "runs" / "a" / "weights"
    for folder in (own, foreign):
        shutil.copytree(tiny_base, folder)
        (folder / "compiled" / "torch_compile_cache").mkdir(parents=True)
    assert vllm.compile_cache(own, options(own)) == {}, "nothing is compiled on a CPU"
    compiled = options(own, 1, AMPERE)
    assert vllm.compile_cache(own, compiled) == {"VLLM_CACHE_ROOT": str(own / "compiled")}
    kept = Path(vllm.compile_cache(foreign, compiled)["VLLM_CACHE_ROOT"])
    assert kept.is_relative_to(tmp_path / ".cache")
    assert list(kept.iterdir()) == []
    config = (foreign / "model.safetensors").read_bytes()
    (foreign / "model.safetensors").write_bytes(config[:-1] + bytes([config[-1] ^ 1]))
    manifest.write(foreign, "weights", {})
    assert vllm.compile_cache(foreign, compiled)["VLLM_CACHE_ROOT"] != str(kept), "other weights, other code"
    (foreign / manifest.NAME).unlink()
    assert vllm.compile_cache(foreign, compiled) == {}, "vLLM's own folder, outside the weights"
    monkeypatch.setenv("VLLM_CACHE_ROOT", "elsewhere")
    assert vllm.compile_cache(own, compiled) == {}


@pytest.mark.slow
def test_compiled_code_is_found_by_the_path_of_the_weights(tiny_base: Path, tmp_path: Path) -> None:
    """So code compiled outside the image is not found inside it, as docs/serving.md says."""
    from vllm import EngineArgs

    (tmp_path / "weights").symlink_to(tiny_base)
    keys = {
        EngineArgs(model=str(folder), enforce_eager=True).create_engine_config().compute_hash()
        for folder in (tiny_base, tmp_path / "weights", tmp_path / "weights")
    }
    assert len(keys) == 2


@pytest.mark.slow
def test_ranks_are_those_that_vllm_accepts() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == vllm.RANKS


def test_adapters_set_vllms_lora_options(folder: Path) -> None:
    found = options(folder, adapters=17, adapters_at_once=3, adapters_kept=2)
    wanted = {"enable_lora": True, "max_lora_rank": 32, "max_loras": 3, "max_cpu_loras": 3}
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.slow
def test_vllm_has_every_option(folder: Path) -> None:
    """Names change between versions, and vLLM would complain only at its start."""
    from vllm import AsyncEngineArgs

    speculative = {"method": "ngram", "num_speculative_tokens": 5}
    everything = options(
        folder,
        2,
        AMPERE,
        adapters=8,
        chunked_prefill=True,
        max_batched_tokens=512,
        cpu_offload_gb=1,
        kv_offload_gb=1,
        speculative=speculative,
    )
    assert everything.keys() <= AsyncEngineArgs.__dataclass_fields__.keys()


@pytest.mark.parametrize(("name", "value"), [("speculative", {"method": "ngram"}), ("tensor_parallel", 2)])
def test_transformers_refuses_options_that_it_does_not_support(name: str, value: Any) -> None:
    with pytest.raises(CogpressError, match=rf"does not support serve\.{name}"):
        transformers.refuse(config.Serve(engine="transformers", **{name: value}))


def test_engines_are_found_by_name() -> None:
    assert {"transformers", "vllm"} <= set(engine.names())
    assert engine.find("vllm") is vllm
    with pytest.raises(CogpressError, match=r"serve\.engine is 'tgi'. Set it to one of .*transformers.*vllm"):
        engine.find("tgi")


def test_nothing_is_compiled_on_a_cpu_which_may_have_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert vllm.environment(config.Serve(), cuda=False)["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in vllm.environment(config.Serve(), cuda=True)


def test_each_drafted_token_is_sampled_as_its_request_asks() -> None:
    """vLLM's own version for CPUs returns what was in memory."""
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    for values in (torch.tensor([0.5, 9.0, 0.0]), torch.tensor([5, 9, 0], dtype=torch.int32)):
        first = values[0].item()
        assert vllm.expanded(values, ends, 5).tolist() == [first, first, 0, 0, 0]
        assert vllm.expanded(values, ends, 5, 0, 1).tolist() == [first, first, 1, 1, 1]
        assert vllm.expanded(values, ends, 5).dtype == values.dtype


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a version of its own")
def test_vllm_uses_it_on_a_cpu() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    sent = pickle.dumps(resolve_obj_by_qualname(vllm.EXECUTOR))
    child = "import pickle, sys; print(pickle.load(sys.stdin.buffer).__name__)\n"
    child += "import vllm.v1.sample.rejection_sampler as sampler; print(sampler.expand_batch_to_tokens.__module__)"
    done = subprocess.run([sys.executable, "-c", child], input=sent, capture_output=True, cwd=ROOT, check=True)
    assert done.stdout.decode().split() == ["CPUExecutor", "cogpress.engines.vllm"], "also in the engine's own process"
