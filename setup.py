"""Packaging. Names and ranges here; exact versions for tests and the demo in requirements/."""

from pathlib import Path

from setuptools import find_packages, setup

readme = Path(__file__).parent / "README.md"

demo = ["accelerate>=1.0", "gguf>=0.10", "matplotlib>=3.7"]
evaluate = ["jieba>=0.42", "lm-eval>=0.4.13,<0.5", "matplotlib>=3.7"]
train = ["datasets>=2.19", "deepspeed>=0.17", "peft>=0.15"]
dev = [
    "hypothesis>=6.100", "matplotlib>=3.7", "psutil>=5.9", "pytest>=8", "pytest-xdist>=3.5", "rouge>=1.0.1",
    "rouge-score>=0.1.2", "ruff>=0.11",
]  # fmt: skip

setup(
    name="d2o_dist",
    version="0.1.0",
    description="Compressed KV caches (D2O) for long-context inference, evaluation and training across ranks",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["d2o_dist", "d2o_dist.*"]),
    package_data={"d2o_dist.plan": ["*.yaml"]},
    entry_points={"console_scripts": ["d2o-dist = d2o_dist.cli.main:main"]},
    install_requires=["torch>=2.6", "transformers>=5.17,<6", "pyyaml>=6", "tqdm>=4.60", "numpy>=1.26"],
    extras_require={
        "demo": demo,
        "eval": evaluate,
        "train": train,
        "deepspeed": ["deepspeed>=0.17"],
        "megatron": ["megatron-core>=0.16"],
        "gpu": ["flash-attn>=2.6", "triton>=3.2"],
        "dev": dev,
    },
)
