"""`InferConfig` and its parts: defaults, YAML, overrides, and every message of a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o_dist.config.infer import InferConfig
from d2o_dist.config.sampling import SamplingConfig
from d2o_dist.fields.io import dump_yaml, read_yaml
from d2o_dist.fields.overrides import apply_overrides, parse_override
from d2o_dist.policy.config import D2OConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def load(text: str, tmp_path: Path, *overrides: str) -> InferConfig:
    path = tmp_path / "infer.yaml"
    path.write_text(text, encoding="utf-8")
    return InferConfig.load(path, [parse_override(override) for override in overrides])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("infer*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_parse(path):
    config = InferConfig.load(path, [("prompt", "hello")])
    assert config.model and config.d2o.keep_ratio == 0.2


def test_there_are_shipped_configs():
    assert {path.name for path in CONFIGS.glob("infer*.yaml")} >= {"infer_smollm2.yaml", "infer_llama3_8b.yaml"}


def test_defaults():
    config = InferConfig.from_dict({"model": "m"})
    assert config.d2o == D2OConfig() and config.sampling == SamplingConfig()
    assert (config.max_batch_size, config.max_batch_tokens, config.truncation) == (8, 65536, "error")
    assert config.sampling.is_greedy and config.sampling.max_new_tokens == 128


def test_yaml_and_overrides(tmp_path):
    text = "model: m\nd2o: {preset: lean, keep_ratio: 0.5}\nsampling: {stop: END, seed: 3}\nstream: true\n"
    overrides = ("d2o.keep_ratio=0.1", "sampling.max_new_tokens=64", "prefill_chunk=512", "stream=auto")
    config = load(text, tmp_path, *overrides)
    assert config.d2o == D2OConfig.preset("lean", keep_ratio=0.1)
    assert config.sampling == SamplingConfig(max_new_tokens=64, stop=("END",), seed=3)
    assert (config.prefill_chunk, config.stream) == (512, "auto")


def test_to_dict_is_undone_by_from_dict():
    values = {"model": "m", "d2o": {"preset": "paper", "keep_tokens": 64}, "sampling": {"stop": ["a", "b"]}}
    values |= {"parallel": {"tp": 2, "merge_scope": "local", "sp": 4}, "trace": "t"}
    config = InferConfig.from_dict(values)
    assert InferConfig.from_dict(config.to_dict()) == config


def test_an_override_of_the_size_replaces_the_other_way_to_say_it(tmp_path):
    assert load("model: m\nd2o: {keep_ratio: 0.5}", tmp_path, "d2o.keep_tokens=99").d2o == D2OConfig(keep_tokens=99)
    assert load("model: m\nd2o: {keep_tokens: 99}", tmp_path, "d2o.keep_ratio=0.5").d2o == D2OConfig(keep_ratio=0.5)
    assert load("model: m\nd2o: {keep_ratio: 0.5}", tmp_path, "d2o.preset=full").d2o == D2OConfig.preset("full")


def test_sections_that_are_null_are_the_defaults(tmp_path):
    config = load("model: m\nd2o:\nsampling:\n", tmp_path, "d2o.keep_ratio=0.4")
    assert config.d2o == D2OConfig(keep_ratio=0.4) and config.sampling == SamplingConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_batch_sise=2", 'no field "max_batch_sise". Did you mean "max_batch_size"'),
        ("sampling.top_pp=1", 'SamplingConfig has no field "top_pp". Did you mean "top_p"'),
        ("d2o.keep_ration=0.1", 'D2OConfig has no field "keep_ration". Did you mean "keep_ratio"'),
        ("d2o.keep_ratio=1.5", r"keep_ratio \(1.5\) must be in \(0, 1\]"),
        ("d2o.merge.targets.most_while_decoding=0", r"most_while_decoding \(0\) must be at least 1, or null"),
        ("d2o.merge.targets.most_while_decoding=2.5", r"most_while_decoding \(2.5\) must be an integer"),
        ("d2o.merge.targets.most_while_decoding=true", r"most_while_decoding \(True\) must be an integer"),
        ("d2o=5", "must be a mapping of fields, not int"),
        ("parallel=5", "ParallelConfig must be given as a mapping of fields, not int"),
        ("parallel.pp=2", 'ParallelConfig has no field "pp"'),
        ("parallel.tp=0", r"tp \(0\) must be at least 1"),
        ("trace=5", r"trace \(5\) must be a non-empty string or null"),
        ("sampling=5", "SamplingConfig must be given as a mapping of fields, not int"),
        ("sampling.temperature=-1", r"temperature \(-1\) must be at least 0"),
        ("sampling.temperature=hot", r"temperature \('hot'\) must be a finite number"),
        ("sampling.top_p=0", r"top_p \(0\) must be in \(0, 1\]"),
        ("sampling.top_k=-1", r"top_k \(-1\) must be at least 0"),
        ("sampling.repetition_penalty=0", r"repetition_penalty \(0\) must be above 0"),
        ("sampling.max_new_tokens=0", r"max_new_tokens \(0\) must be at least 1"),
        ("sampling.max_new_tokens=1.5", r"max_new_tokens \(1.5\) must be an integer"),
        ("sampling.seed=-1", r"seed \(-1\) must be in \[0, \d+\]"),
        ("sampling.stop=5", r"stop \(5\) must be a string or a list of strings"),
        ("sampling.stop=['']", r"stop \(''\) must be a non-empty string"),
        ("sampling.ignore_eos=1", r"ignore_eos \(1\) must be true or false"),
        ("model=", r"model \(None\) must be a non-empty string"),
        ("output=3", r"output \(3\) must be a non-empty string or null"),
        ("dtype=bf16", r"dtype \('bf16'\) must be one of auto, bfloat16.*Did you mean"),
        ("device=gpu", r"device \('gpu'\) must be one of auto, cpu, cuda, cuda:N"),
        ("chat_template=sometimes", r"chat_template \('sometimes'\) must be one of auto, never, always"),
        ("decode_graph=on", r"decode_graph \(True\) must be one of auto, always, never"),
        ("decode_graph=ever", r"decode_graph \('ever'\) must be one of auto, always, never"),
        ("truncation=right", r"truncation \('right'\) must be one of error, middle, left"),
        ("stream=maybe", r"stream \('maybe'\) must be one of auto, true, false"),
        ("max_batch_size=0", r"max_batch_size \(0\) must be at least 1"),
        ("max_batch_tokens=0", r"max_batch_tokens \(0\) must be at least 1"),
        ("prefill_chunk=1", r"prefill_chunk \(1\) must be at least 2"),
        ("max_prompt_tokens=0", r"max_prompt_tokens \(0\) must be at least 1"),
        ("trust_remote_code=please", r"trust_remote_code \('please'\) must be true or false"),
        ("prompts=p.jsonl", r"prompts \(p.jsonl\) and prompt are two sources of prompts: give exactly one"),
        ("chat_template=never", 'system_prompt needs a chat template, but chat_template is "never"'),
        ("model.name=x", 'override "model.name": model is \'m\', not a mapping'),
    ],
)
def test_refusals(tmp_path, override, message):
    extra = "system_prompt: be kind\n" if override == "chat_template=never" else ""
    with pytest.raises(ValueError, match=message):
        load(f"model: m\nprompt: hello\n{extra}", tmp_path, override)


@pytest.mark.parametrize("text", ["novalue", "=1", "a..b=1", ".a=1"])
def test_an_override_needs_a_key_and_a_value(text):
    with pytest.raises(ValueError, match="must have the form key=value"):
        parse_override(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-2E5", -2e5), (".5e1", 5.0), ("1.e2", 100.0), ("1e", "1e"), ("e3", "e3"), ("1e-3s", "1e-3s")],
)
def test_numbers_with_an_exponent(text, value):
    """1e-3 is a number in YAML 1.2 and in Python; PyYAML by itself takes it for text."""
    key, found = parse_override(f"sampling.temperature={text}")
    assert key == "sampling.temperature" and found == value and type(found) is type(value)
    assert read_yaml(dump_yaml({"text": text, "value": value}), "") == {"text": text, "value": value}


def test_an_override_that_is_not_yaml():
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_override("stop=[a")


def test_overrides_leave_their_base_alone():
    base, given = {"a": {"b": 1}}, {"f": {"g": 4}}
    wanted = {"a": {"b": 2}, "c": {"d": 3}, "e": {"f": {"g": 5}}}
    assert apply_overrides(base, [("a.b", 2), ("c.d", 3), ("e", given), ("e.f.g", 5)]) == wanted
    assert (base, given) == ({"a": {"b": 1}}, {"f": {"g": 4}})


def test_the_model_must_be_named():
    with pytest.raises(ValueError, match="model is missing"):
        InferConfig.load(None, [("prompt", "x")])


TWICE = ["model: m\nd2o: {keep_ratio: 0.1, keep_ratio: 0.3}\n", "model: m\nd2o: {}\nd2o: {}\n"]


@pytest.mark.parametrize("text", TWICE)
def test_a_key_that_is_given_twice_is_refused(tmp_path, text):
    # YAML would take the last one without a word.
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"c.yaml is not valid YAML: (keep_ratio|d2o) is given twice(.|\n)*line [12]"):
        InferConfig.load(path)
    path.write_text("model: m\nd2o: &one {keep_ratio: 0.1}\nsampling: {seed: 1}\n")
    assert InferConfig.load(path).d2o.keep_ratio == 0.1
