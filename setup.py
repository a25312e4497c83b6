"""Packaging. Names and ranges here; exact versions for tests and the demo in requirements/.

Where nvcc is found, the library of CUDA kernels is built into the package (not by an editable installation: there it is
`python -m d2o_dist.kernels.cuda.build`). D2O_BUILD_CUDA=0 leaves it out, D2O_BUILD_CUDA=1 insists on it.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

root = Path(__file__).parent
readme = root / "README.md"
wanted = os.environ.get("D2O_BUILD_CUDA", "")
# By path: the package itself imports what a build has not.
cuda = runpy.run_path(str(root / "d2o_dist" / "kernels" / "cuda" / "build.py"))
builds_cuda = wanted == "1" or (wanted != "0" and cuda["find_nvcc"]() is not None)


class BuildWithCuda(build_py):
    """Also the library of CUDA kernels."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or not builds_cuda:
            return
        library = Path(self.build_lib) / "d2o_dist" / "kernels" / "cuda" / cuda["LIBRARY"].name
        try:
            cuda["build"](library)
        except (FileNotFoundError, RuntimeError) as error:
            if wanted == "1":
                raise
            # Nothing takes the library unless it is asked to, and then it says that it is not there.
            print(f"warning: the library of CUDA kernels is left out: {error}", file=sys.stderr)


class WheelWithCuda(bdist_wheel):
    """For any Python, but one platform: the library is loaded by ctypes."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = self.root_is_pure and not builds_cuda

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])

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
    cmdclass={"build_py": BuildWithCuda, "bdist_wheel": WheelWithCuda},
    packages=find_packages(include=["d2o_dist", "d2o_dist.*"]),
    package_data={"d2o_dist": ["**/*.yaml", "**/*.json", "**/*.cu", "**/*.cuh", "**/*.so"]},
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
