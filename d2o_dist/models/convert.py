"""From a folder of one library of models to a folder of the other, on one process and in its memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.infer import MODEL_KINDS, InferConfig
from d2o_dist.config.megatron import ARGUMENTS, MegatronArguments
from d2o_dist.fields.io import check_choice, dump_yaml
from d2o_dist.models.hf import loading as hf
from d2o_dist.models.loading import megatron_library


def convert(source: str, output: str, to: str, *, trust_pickled_weights: bool = False) -> None:
    """Write the model of `source` into a new folder, with the dtype that it has.

    Args:
        source: folder or hub name of a Hugging Face model, or the folder of a Megatron model.
        to: the library, one of MODEL_KINDS, that reads `output`.

    Raises:
        ValueError: `source` is not there, or is of a kind that is not converted; `output` exists.
    """
    check_choice("to", to, MODEL_KINDS)
    path = Path(output).expanduser()
    if path.exists():
        raise ValueError(f"output {output} exists: name a new folder")
    kind = "transformers" if to == "megatron" else "megatron"
    config = InferConfig(
        model=source, model_kind=kind, tokenizer=source, device="cpu", trust_pickled_weights=trust_pickled_weights
    )
    megatron_library()
    from d2o_dist.models.megatron.ranks import alone

    with alone():
        (_to_megatron if to == "megatron" else _to_transformers)(config, path)


def _to_megatron(config: InferConfig, output: Path) -> None:
    from d2o_dist.models.megatron.checkpoint import write_weights
    from d2o_dist.models.megatron.convert import load_hf, make_gpt
    from d2o_dist.models.megatron.families import arguments_of

    model_config = hf.load_config(config)
    arguments = arguments_of(model_config)
    dtype = model_config.dtype or torch.float32
    adapter = hf.load_model(dataclasses.replace(config, dtype=_name(dtype)), ParallelMesh.local())
    arguments = dataclasses.replace(arguments, eos_token_ids=tuple(sorted(adapter.eos_ids)))
    model = make_gpt(model_config, params_dtype=dtype, perform_initialization=False)
    load_hf(model, adapter.model.state_dict())
    _make_folder(output)
    write_weights(model, output)
    (output / ARGUMENTS).write_text(dump_yaml(arguments.to_dict()), encoding="utf-8")


def _to_transformers(config: InferConfig, output: Path) -> None:
    from d2o_dist.models.megatron import loading
    from d2o_dist.models.megatron.convert import to_hf

    model_config = loading.config_of_model(config)
    arguments = MegatronArguments.load(Path(config.model).expanduser())
    adapter = loading.load_model(dataclasses.replace(config, dtype=_name(model_config.dtype)), ParallelMesh.local())
    weights = to_hf(adapter.model, ParallelMesh.local(), arguments.vocab_size)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model_config)
    _make_folder(output)
    empty.save_pretrained(output, state_dict=weights)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"output {path} cannot be made: {error.strerror}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
