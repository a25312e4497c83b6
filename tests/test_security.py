"""What docs/security.md says: nothing that is read is run, and nothing is written where it was not told."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from d2o_dist.cli import infer
from d2o_dist.config.infer import InferConfig
from d2o_dist.engine.messages import render
from d2o_dist.models.loading import load_model
from d2o_dist.train.engine import STATE_FILE, TorchEngine
from tests.engine.tiny import make_folder, make_tokenizer
from tests.house import REPO, imported, sources

SMALL = ("sampling.max_new_tokens=2", "device=cpu")
PICKLES = ("pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")


class Program:
    """As a pickle, it makes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pickled(model, tmp_path) -> Path:
    """The same model with its weights in a `.bin` file."""
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(model / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def test_no_file_reads_a_pickle_but_as_weights_only():
    loads = 0
    for path, tree in sources(REPO):
        odd = [name for _, name in imported(path, tree) if name.split(".")[0] in PICKLES]
        assert not odd, f"{path} imports {odd[0]}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                told = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert told.get("weights_only") == "True", f"{path}:{node.lineno}"
                loads += 1
    assert loads >= 2


def test_pickled_weights_are_read_only_where_they_are_trusted(pickled):
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, .* set trust_pickled_weights=true"):
        load_model(InferConfig(model=str(pickled), device="cpu"))
    load_model(InferConfig(model=str(pickled), device="cpu", trust_pickled_weights=True))


def test_a_program_among_pickled_weights_is_not_run_even_there(pickled, tmp_path):
    torch.save({"model.norm.weight": Program(tmp_path / "ran")}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="the weights of .* cannot be loaded"):
        load_model(InferConfig(model=str(pickled), device="cpu", trust_pickled_weights=True))
    assert not (tmp_path / "ran").exists()


def test_a_program_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"weights": Program(tmp_path / "ran"), "optimizer": {}}, tmp_path / STATE_FILE)
    with pytest.raises(pickle.UnpicklingError):
        TorchEngine.load(None, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_models_own_code_is_not_run_unless_told(model, tmp_path, capsys):
    folder = tmp_path / "coded"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "coded", "auto_map": {"AutoConfig": "coded.CodedConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "coded.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass CodedConfig: pass\n")
    assert infer.main(["--model", str(folder), "--prompt", "one", *SMALL]) == 2
    said = capsys.readouterr()
    assert "infer.py: error: the configuration of" in said.err and "trust_remote_code" in said.err and not said.out
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_reaches_nothing_but_the_messages(tmp_path):
    tokenizer = make_tokenizer()
    for reach in ("().__class__.__base__.__subclasses__()", "messages.append.__self__.clear()", "messages.clear()"):
        tokenizer.chat_template = "{{ " + reach + " }}"
        with pytest.raises(ValueError, match="the chat template failed: .*(unsafe|not safely callable|undefined)"):
            render(tokenizer, [{"role": "user", "content": "hi"}], None)


@pytest.mark.skipif(not Path("/proc/net/tcp6").exists(), reason="asks Linux which ports are open")
def test_ranks_meet_at_a_port_that_is_open_on_all_interfaces():
    """Not as it should be, but as the page says: whoever reaches the machine reaches the store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    places = [line[1].split(":") for line in lines if line[3] == "0A"]  # that is, listening
    assert {int(address, 16) for address, port in places if int(port, 16) == store.port} == {0}


def test_a_run_writes_its_output_and_nothing_else(model, tmp_path):
    """In a home, a folder of temporary files and a place to stand that are all empty."""
    places = {name: tmp_path / name for name in ("home", "tmp", "here", "out")}
    for place in places.values():
        place.mkdir()
    (tmp_path / "p.jsonl").write_text('{"prompt": "one two"}\n')
    around = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "TORCH"))}
    around |= {"HOME": str(places["home"]), "TMPDIR": str(places["tmp"]), "PYTHONPATH": str(REPO)}
    output = places["out"] / "answers.jsonl"
    ran = subprocess.run(
        [sys.executable, str(REPO / "launch" / "infer.py"), "--model", str(model), "--output", str(output),
         "--prompts", str(tmp_path / "p.jsonl"), *SMALL],
        cwd=places["here"], env=around, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(output.read_text())["error"] is None
    assert [path for place in places.values() for path in place.rglob("*") if not path.is_dir()] == [
        output, output.with_name("answers.jsonl.job")
    ]
