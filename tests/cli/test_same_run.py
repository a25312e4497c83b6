"""Ranks of several machines: what is not the same there ends them all with one line, before weights are loaded."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2o_dist.cli import evaluate, infer, train
from d2o_dist.models import loading
from d2o_dist.train import model as train_model
from launch.demo import __main__ as demo
from tests.cli.test_many_ranks import speak
from tests.engine.tiny import make_folder
from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank
INFER = ["--model", "model", "--prompts", "p.jsonl", "device=cpu", "sampling.max_new_tokens=5"]
EVALUATE = ["--model", "model", "--output", "out", "device=cpu", "keep_ratios=[0.5]", "methods=[h2o]",
            "tasks=[{kind: fidelity, lengths: [64], num_scored: 8, samples: 2, text: text.txt}]"]  # fmt: skip
TRAIN = ["--model", "model", "--output", "out", "device=cpu", "data.train=text.txt", "steps=1"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """What lies on every machine, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("machine")
    make_folder(folder / "model")
    (folder / "p.jsonl").write_text('{"prompt": "one two three"}\n')
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return folder


def new_weights(folder):
    """Only one tensor, and no other size."""
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 2.0)
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})


def new_config(folder):
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 1}))


def new_ending(folder):
    path = folder / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, 5]}))


def new_tokenizer(folder):
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": True}))


def no_model(folder):
    shutil.rmtree(folder / "model")


def nothing(folder):
    pass


def on_machine(rank, world, folders, program, argvs):
    """Run a program where this rank's machine has its files."""

    def load_model(*args, **kwargs):
        raise AssertionError("loaded")

    real = {module: module.load_model for module in (loading, demo, train_model)}
    here = os.getcwd()
    os.chdir(folders[rank])
    demo.prepare_model, demo.essays = lambda: "model", lambda: ""
    for module in real:
        module.load_model = load_model
    try:
        return speak({"infer": infer, "evaluate": evaluate, "train": train, "demo": demo}[program].main, argvs[rank])
    finally:
        os.chdir(here)
        for module, load in real.items():
            module.load_model = load


def run_apart(machine, tmp_path, change, program, argv, other=()):
    folders = []
    for rank in range(2):
        folders.append(tmp_path / str(rank))
        shutil.copytree(machine, folders[rank])
    change(folders[1])
    before = [sorted(folder.rglob("*")) for folder in folders]
    said = run_ranks(2, on_machine, folders, program, [argv, [*argv, *other]], fresh=True)
    assert [sorted(folder.rglob("*")) for folder in folders] == before  # nothing is written
    return said


@pytest.mark.parametrize(
    ("program", "argv", "change", "other", "message"),
    [
        ("infer", [*INFER, "--sp=2"], new_weights, [], "model.safetensors of model"),
        ("infer", [*INFER, "--sp=2"], new_config, [], "config.json of model"),
        ("infer", [*INFER, "--output=o.jsonl"], new_ending, [], "generation_config.json of model"),
        ("infer", [*INFER, "--sp=2"], new_tokenizer, [], "tokenizer_config.json of model"),
        ("infer", [*INFER, "--sp=2"], nothing, ["sampling.seed=3"], "the setting sampling.seed (3, not 0)"),
        # Ranks that would cut the world in different ways.
        ("infer", INFER, nothing, ["--tp=2"], "the setting parallel.tp (2, not 1)"),
        ("evaluate", EVALUATE, new_weights, [], "model.safetensors of model"),
        ("evaluate", EVALUATE, nothing, ["seed=1"], "the setting seed (1, not 0)"),
        ("train", TRAIN, new_weights, [], "model.safetensors of model"),
        ("demo", [], new_weights, [], "model.safetensors of model"),
    ],
)
def test_what_differs_is_named_once(machine, tmp_path, program, argv, change, other, message):
    first, second = run_apart(machine, tmp_path, change, program, argv, other)
    name = "demo" if program == "demo" else f"{program}.py"
    said = f"{name}: error: rank 1 differs from rank 0 in {message}: make them the same on all machines\n"
    assert first == (2, "", said)
    assert second == (2, "", "")


def test_a_model_that_one_machine_lacks(machine, tmp_path):
    first, second = run_apart(machine, tmp_path, no_model, "infer", [*INFER, "--model=./model", "--sp=2"])
    assert first == (2, "", "infer.py: error: rank 1: model folder ./model does not exist\n")
    assert second == (2, "", "")
