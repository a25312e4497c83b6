"""Loading: first configuration and tokenizer, which cost nothing; the weights when all else is known to be right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from d2o_dist.comm.agreement import agreed
from d2o_dist.comm.mesh import ParallelMesh
from d2o_dist.config.infer import InferConfig
from d2o_dist.fields.checks import is_integer
from d2o_dist.fields.io import read_json
from d2o_dist.fields.show import shown, told_by
from d2o_dist.models.adapter_files import base_of
from d2o_dist.models.device import pick_device
from d2o_dist.models.hf.adapter import merge_adapter
from d2o_dist.models.hf.checkpoint import check_keys, without_report
from d2o_dist.models.hf.guards import ATTENTION_NAME
from d2o_dist.models.hf.model import HFModel
from d2o_dist.models.hf.quantised import check_package
from d2o_dist.models.hf.shape import shape_of
from d2o_dist.models.hf.shard import mark_replicas, shard_model
from d2o_dist.models.hf.supported import check_supported
from d2o_dist.models.shape import ModelShape

# Of a model; what has more was made to cost memory.
MAX_LAYERS = 10_000


def load_config(config: InferConfig) -> Any:
    """The model's configuration, as transformers has it.

    Raises:
        ValueError: the folder is missing or has no usable `config.json`, or the hub does not have the model.
    """
    name = base_of(config.model) or config.model
    _check_layers(Path(name).expanduser() / "config.json")
    return _load("configuration", AutoConfig, name, **_hub(config))


def _check_layers(path: Path) -> None:
    """Refuse more layers than any model has: transformers makes lists of them."""
    try:
        fields = read_json(path.read_bytes())
    except (OSError, ValueError):
        return  # there is none, or the library says what is wrong with it
    for part in (fields, *fields.values()) if isinstance(fields, dict) else ():
        count = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if is_integer(count) and count > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers ({shown(count)}) in {path} must be at most {MAX_LAYERS}")


def load_tokenizer(config: InferConfig) -> Any:
    """The tokenizer.

    Raises:
        ValueError: there is none.
    """
    own = config.tokenizer is None or config.tokenizer == config.model
    hub = _hub(config) if own else {"trust_remote_code": config.trust_remote_code}
    name = config.tokenizer or config.model
    # peft leaves the tokenizer with the base, a trainer of adapters saves it beside the adapter.
    if (base := base_of(name)) and not (Path(name).expanduser() / "tokenizer_config.json").exists():
        name = base
    return _load("tokenizer", AutoTokenizer, name, **hub)


def describe(config: InferConfig) -> ModelShape:
    """The shape of the model on the mesh of `config.parallel`, from its configuration.

    Raises:
        ValueError: there is none; a model that cannot be compressed, or be divided among the tensor ranks; quantised
            weights whose package is missing.
    """
    model_config = load_config(config)
    check_supported(model_config)
    check_package(model_config, config.model)
    mark_replicas(model_config, config.parallel)
    return shape_of(model_config)


def load_model(config: InferConfig, mesh: ParallelMesh) -> HFModel:
    """The model with its weights, attending through `d2o`; see `models.loading.load_model`."""
    # Sharding is collective: either all ranks have the weights, or none goes on.
    with agreed(mesh):
        device = pick_device(config.device)
        model = _load_whole(config, device)
    return HFModel(shard_model(model, mesh, config.parallel, device).eval().requires_grad_(False))


def _load_whole(config: InferConfig, device: torch.device) -> Any:
    """The whole model on the CPU, in the dtype for `device`."""
    _check_format(config)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if dtype == "auto" and device.type == "cpu" and load_config(config).dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    base = base_of(config.model)
    with without_report():
        # Shapes that differ are told like all other keys that do not fit.
        model, found = _load(
            "weights", AutoModelForCausalLM, base or config.model, dtype=dtype, attn_implementation=ATTENTION_NAME,
            output_loading_info=True, ignore_mismatched_sizes=True,
            use_safetensors=None if config.trust_pickled_weights else True, **_hub(config),
        )  # fmt: skip
    check_keys(base or config.model, found)
    return model if base is None else merge_adapter(model, config.model)


def _check_format(config: InferConfig) -> None:
    folder = Path(config.model).expanduser()
    pickled = next(folder.glob("pytorch_model*.bin"), None)
    if pickled and not config.trust_pickled_weights and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{pickled} is a pickle, and {folder} has no safetensors: convert it, or set trust_pickled_weights=true"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """A block without progress bars and warnings of transformers."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _hub(config: InferConfig) -> dict[str, Any]:
    return {"trust_remote_code": config.trust_remote_code, "revision": config.revision or "main"}


def _load(what: str, auto: Any, name: str, **kwargs: Any) -> Any:
    path = Path(name).expanduser()
    # A hub name is `name` or `owner/name`; anything else can only be a folder.
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not path.is_dir() and (is_path or path.exists()):
        raise ValueError(f"model folder {name} {'is not a folder' if path.exists() else 'does not exist'}")
    try:
        return auto.from_pretrained(str(path) if path.is_dir() else name, **kwargs)
    except torch.OutOfMemoryError:
        raise
    # transformers and safetensors raise whatever they meet; their first line says what.
    except Exception as error:
        hint = "; it is run only with trust_remote_code=true" if "trust_remote_code" in str(error) else ""
        raise ValueError(f"the {what} of {name} cannot be loaded: {told_by(error)}{hint}") from error
