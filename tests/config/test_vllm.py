"""Settings of rollouts by vLLM: what contradicts them, and what has no effect. None of these needs vLLM."""

import pytest

from sdft_ds import SDFTConfig

SERVER = {"use_vllm": True, "vllm_mode": "server"}


def config(**settings):
    return SDFTConfig(**{"output_dir": "unused", "report_to": "none", "use_cpu": True, "bf16": False, **settings})


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"rollout_backend": "continuous"}, "rollout_backend='continuous'.* leave it at 'generate'"),
        ({"cache_implementation": "static"}, "cache_implementation='static'.* leave it at None"),
        ({"rollout_batch_tokens": 100}, "rollout_batch_tokens=100"),
        ({"ds3_gather_for_generation": False}, "ds3_gather_for_generation=False"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "'no_repeat_ngram_size' is not known to vLLM"),
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2 must divide the 1 ranks"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode=True frees GPU memory"),
        ({"vllm_gpu_memory_utilization": 0.0}, r"vllm_gpu_memory_utilization must be in \(0, 1\]"),
        ({"vllm_mode": "remote"}, "vllm_mode must be one of colocate, server"),
        ({"rollout_lag": 1}, "rollout_lag=1 needs a server"),
        ({**SERVER, "rollout_lag": 2}, r"rollout_lag must be in \[0, 1\]"),
        ({**SERVER, "rollout_lag": 1, "temperature": 0.7, "top_p": 0.9}, "rollout_lag=1 needs the sampler's"),
        ({**SERVER, "vllm_server_base_url": "host:8000"}, "vllm_server_base_url: 'host:8000' is no address"),
        ({**SERVER, "vllm_server_base_url": ","}, "vllm_server_base_url is empty"),
        ({**SERVER, "vllm_server_timeout": 1800}, "vllm_server_timeout=1800 must be below ddp_timeout=1800"),
        (
            {**SERVER, "rollout_lag": 1, "temperature": 0.7, "generation_kwargs": {"min_new_tokens": 2}},
            "rollout_lag=1 needs the sampler's",
        ),
        ({**SERVER, "vllm_weight_sync": "ftp"}, "vllm_weight_sync must be one of auto, nccl, path, adapter"),
    ],
    ids=str,
)
def test_contradictions_are_refused_by_name(settings, match):
    with pytest.raises(ValueError, match=match):
        config(**{"use_vllm": True, **settings})


def test_sleep_mode_and_expandable_segments_are_refused_together(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    made = config(**SERVER)
    made.vllm_mode, made.vllm_enable_sleep_mode, made.use_cpu = "colocate", True, False
    from sdft_ds.config.vllm import refuse_vllm_contradictions

    with pytest.raises(ValueError, match="PYTORCH_ALLOC_CONF=expandable_segments:True: unset one"):
        refuse_vllm_contradictions(made)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"vllm_gpu_memory_utilization": 0.5}, "vllm_gpu_memory_utilization=0.5 has no effect without use_vllm."),
        ({**SERVER, "vllm_max_model_length": 9}, "vllm_max_model_length=9 has no effect without vllm_mode=colocate"),
        ({"use_vllm": True, "vllm_weight_sync": "path"}, "'path' has no effect without vllm_mode=server"),
    ],
    ids=str,
)
def test_settings_without_effect_are_warned_about(settings, match):
    with pytest.warns(UserWarning, match=match):
        config(**settings)


def test_addresses_of_servers():
    assert config(**SERVER).vllm_server_urls == ["http://127.0.0.1:8000"]
    assert config(**SERVER, vllm_server_host="n1", vllm_server_port=9).vllm_server_urls == ["http://n1:9"]
    several = config(**SERVER, vllm_server_base_url="http://n1:8000/, http://n2:8000").vllm_server_urls
    assert several == ["http://n1:8000", "http://n2:8000"]


def test_a_trainer_without_vllm_says_how_to_install_it():
    import importlib.util

    from tests.helpers.trainers import make_trainer

    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(ValueError, match="needs vLLM, which is not installed: see launch/vllm_environment.sh"):
        make_trainer(use_vllm=True)
